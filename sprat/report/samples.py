"""Thinking before and after RL, and what the last model says, on the same held-out questions."""

from __future__ import annotations

from typing import Any

from sprat.report.runs import Road, Stage
from sprat.report.tables import text

_PER_TASK, _MOST = 2, 8


def before_after(road: Road) -> str:
    """The first questions of each task that RL and the stage before it were asked, side by side."""
    scored = road.scored
    place = next((number for number, stage in enumerate(scored) if stage.family == "rl"), 0)
    if not place:
        return ""
    before, after = scored[place - 1], scored[place]
    pairs = [pair for task in road.tasks() for pair in _pairs(before, after, task)][:_MOST]
    if not pairs:
        return ""
    return "".join(_pair(before.title, after.title, *pair) for pair in pairs)


def _pairs(before: Stage, after: Stage, task: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Samples of the same question."""
    old, new = before.by_task().get(task), after.by_task().get(task)
    if old is None or new is None:
        return []
    asked = {sample["question"]: sample for sample in old.samples}
    found = [(task, asked[s["question"]], s) for s in new.samples if s["question"] in asked]
    return found[:_PER_TASK]


def _pair(before: str, after: str, task: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    """One question with two answers."""
    asked = f'<p class="ask"><span class="tag">{text(task)}</span> {text(new["question"])}'
    asked += f" <small>expected {text(new.get('answer', ''))}</small></p>"
    return f'<div class="sample">{asked}<div class="two">{_answer(before, old)}{_answer(after, new)}</div></div>\n'


def _answer(title: str, sample: dict[str, Any]) -> str:
    """One answer with its thinking."""
    right = bool(sample.get("correct"))
    mark = '<span class="good">right</span>' if right else '<span class="bad">wrong</span>'
    thought = str(sample.get("reasoning") or "").strip()
    shown = f"<details open><summary>thinking</summary><pre>{text(thought)}</pre></details>" if thought else ""
    said = str(sample.get("content") or "").strip() or "(nothing)"
    empty = "" if thought else '<p class="none">(no thinking)</p>'
    return f'<div><h4>{text(title)}: {mark}</h4>{shown}{empty}<p class="said">{text(said)}</p></div>'
