"""Thinking before and after RL, and what the last model says, on the same held-out questions."""

from __future__ import annotations

from typing import Any

from sprat.report.runs import PipelineRuns, StageRun
from sprat.report.tables import escape

_PAIRS_PER_TASK, _MAX_PAIRS = 2, 8


def before_after_rl(runs: PipelineRuns) -> str:
    """The first questions of each task that RL and the stage before it were asked, side by side."""
    scored = runs.scored
    rl_index = next((number for number, stage in enumerate(scored) if stage.kind == "rl"), 0)
    if not rl_index:
        return ""
    before, after = scored[rl_index - 1], scored[rl_index]
    pairs = [pair for task in runs.tasks() for pair in _pairs(before, after, task)][:_MAX_PAIRS]
    if not pairs:
        return ""
    return "".join(_pair(before.title, after.title, *pair) for pair in pairs)


def _pairs(before: StageRun, after: StageRun, task: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Samples of the same question."""
    score_before, score_after = before.by_task().get(task), after.by_task().get(task)
    if score_before is None or score_after is None:
        return []
    samples_before = {sample["question"]: sample for sample in score_before.samples}
    pairs = [(task, samples_before[s["question"]], s) for s in score_after.samples if s["question"] in samples_before]
    return pairs[:_PAIRS_PER_TASK]


def _pair(before: str, after: str, task: str, sample_before: dict[str, Any], sample_after: dict[str, Any]) -> str:
    """One question with two answers."""
    question = f'<p class="ask"><span class="tag">{escape(task)}</span> {escape(sample_after["question"])}'
    question += f" <small>expected {escape(sample_after.get('answer', ''))}</small></p>"
    answers = _answer(before, sample_before) + _answer(after, sample_after)
    return f'<div class="sample">{question}<div class="two">{answers}</div></div>\n'


def _answer(title: str, sample: dict[str, Any]) -> str:
    """One answer with its thinking."""
    correct = bool(sample.get("correct"))
    mark = '<span class="good">right</span>' if correct else '<span class="bad">wrong</span>'
    reasoning = str(sample.get("reasoning") or "").strip()
    details = f"<details open><summary>thinking</summary><pre>{escape(reasoning)}</pre></details>" if reasoning else ""
    content = str(sample.get("content") or "").strip() or "(nothing)"
    empty = "" if reasoning else '<p class="none">(no thinking)</p>'
    return f'<div><h4>{escape(title)}: {mark}</h4>{details}{empty}<p class="said">{escape(content)}</p></div>'
