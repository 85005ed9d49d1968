"""What finished roads say: accuracies, gains with an interval over seeds, CPU seconds, and which bars hold.

A run that some of the roads have not is in no table or gain of them together, and is named by ``incomplete``; a bar
that a road says nothing of is not held on that road.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = {  # of the table: a run of a road, and what it is called
    "pretrain": "pre-trained, sparse",
    "rl-seed0": "**after RL**",
    "sft": "*control:* SFT on worked examples",
    "rft": "*control:* rejection sampling, then SFT",
    "pretrain-more": "*control:* more pre-training",
    "pretrain-dense": "*control of the experts:* dense, equal FLOPs",
    "pretrain-dense-seconds": "*control of the experts:* dense, equal CPU seconds",
    "pretrain-dense-parameters": "*control of the experts:* dense, equal parameters",
    "distill": "student, distilled",
    "student-scratch": "*control:* the same without a teacher",
    "student-examples": "*control:* without a teacher, with as many worked examples as the teacher answered",
    "quantize": "student in INT4",
}
G, T = "greedy", "thinking"
PAIRS = {  # of runs that a sentence rests on, each with how it was asked: after, before
    "RL over base": ("rl-seed0", G, "pretrain", G),
    "RL over base made to think": ("rl-seed0", G, "pretrain", T),
    "RL sampled over base sampled": ("rl-seed0", "sampled", "pretrain", "sampled"),  # at temperature 1
    "RL over SFT": ("rl-seed0", G, "sft", G),
    "RL over RFT": ("rl-seed0", G, "rft", G),
    "RL over RFT made to think": ("rl-seed0", G, "rft", T),
    "RL over more pre-training": ("rl-seed0", G, "pretrain-more", G),
    "RL over more pre-training made to think": ("rl-seed0", G, "pretrain-more", T),
    "student over twin": ("distill", G, "student-scratch", G),
    "student over twin with as many examples": ("distill", G, "student-examples", G),
    "sparse over dense, FLOPs": ("pretrain", G, "pretrain-dense", G),
    "sparse over dense, FLOPs, made to think": ("pretrain", T, "pretrain-dense", T),
    "sparse over dense, CPU seconds": ("pretrain", G, "pretrain-dense-seconds", G),
    "sparse over dense, CPU seconds, made to think": ("pretrain", T, "pretrain-dense-seconds", T),
    "sparse over dense, parameters": ("pretrain", G, "pretrain-dense-parameters", G),
    "sparse over dense, parameters, made to think": ("pretrain", T, "pretrain-dense-parameters", T),
}
SAME_SECONDS = {  # a control, and what it is to have had as many CPU seconds as
    "sft": "rl-seed0", "rft": "rl-seed0", "pretrain-more": "rl-seed0", "student-scratch": "distill",
    "pretrain-dense-seconds": "pretrain",
}  # fmt: skip
LEAST_SECONDS = 0.85  # share of them, below which a control had less
RL = "RL over the base: fourth best gain of the tasks >= 0.20"
KEPT = "RL: worst task's share of the base made to think >= 0.97"
STUDENT = "student over its twin without a teacher, mean > 0"
LOSS, WORST_LOSS = "INT4: mean relative loss <= 0.02", "INT4: worst task's relative loss <= 0.05"
ALWAYS = (RL, KEPT, STUDENT, LOSS, WORST_LOSS)  # bars of every road, whatever its runs say
T95 = (math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)  # by degrees of freedom, two-sided
SHARE = 5 / 6  # of roads on which a bar must hold
Scores = dict[str, float]


@dataclass(frozen=True)
class Road:
    """One finished road, read from its run folders."""

    name: str
    runs: dict[str, dict[str, Any]]
    minutes: float | None

    def scores(self, run: str, way: str = G) -> Scores:
        """Share of right answers by trained task; empty where the run was not asked so."""
        rows = self.fact(run, "scores") or []
        return {r["task"]: r["correct"] / r["count"] for r in rows if r["label"] == way and r.get("trained", True)}

    def mean(self, run: str, way: str = G) -> float | None:
        """Mean over the trained tasks; None where the run was not asked so."""
        scores = self.scores(run, way)
        return statistics.mean(scores.values()) if scores else None

    def fact(self, run: str, name: str) -> Any:
        """A fact that a run noted; None where there is none."""
        return self.runs[run]["facts"].get(name) if run in self.runs else None


@dataclass(frozen=True)
class Bar:
    """What a bar came to on each road, None where it is missing, and on all of them."""

    found: list[tuple[float, bool] | None]
    met: bool
    note: str = ""  # what else was asked of it


def read(folder: Path, name: str, minutes: float | None = None) -> Road:
    """The finished runs of a road."""
    runs = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/run.json")}
    return Road(name, runs, minutes)


def lower(values: Sequence[float]) -> float:
    """The lower end of the 95 % interval of the mean (Student's t); minus infinity for a single value."""
    if len(values) < 2:
        return -math.inf
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - T95[min(len(values) - 1, len(T95) - 1)] * spread


def by_seed(roads: Sequence[Road], values: Sequence[float]) -> list[float]:
    """A value for each seed: roads of one seed on two instruction sets share data and first weights, and are no two."""
    seeds = [road.name.partition("-")[0] for road in roads]
    return [
        statistics.mean(value for value, one in zip(values, seeds, strict=True) if one == seed)
        for seed in dict.fromkeys(seeds)
    ]


def bars(road: Road) -> dict[str, tuple[float, bool]]:
    """Figure and verdict of each bar that one road has something to say of; accuracies are shares."""
    found: dict[str, tuple[float, bool]] = {}
    base, thinking, rl = road.scores("pretrain"), road.scores("pretrain", T), road.scores("rl-seed0")
    if base and rl:
        fourth = sorted((round(rl[task] - base[task], 9) for task in rl), reverse=True)[:4][-1]
        found[RL] = (fourth, fourth >= 0.20)
    if thinking and rl:
        kept = min(rl[task] / max(thinking[task], 1e-9) for task in rl)
        found[KEPT] = (kept, kept >= 0.97)
    student, twin = road.mean("distill"), road.mean("student-scratch")
    if student is not None and twin is not None:
        found[STUDENT] = (student - twin, student > twin)
    if loss := road.fact("quantize", "relative_loss"):  # none where the student is never right
        found[LOSS] = (statistics.mean(loss.values()), statistics.mean(loss.values()) <= 0.02)
        found[WORST_LOSS] = (max(loss.values()), max(loss.values()) <= 0.05)
    text = road.fact("pretrain", "bits_per_byte") or {}
    for domain, row in text.items():
        if domain != "code":
            gap = row["model"] - min(v for k, v in row.items() if k not in ("model", "bytes"))
            found[f"bits per byte over the best baseline, {domain} < 0"] = (gap, gap < 0)
    if told := road.fact("quantize", "drafts"):
        ratio = told["with_drafts"] / told["without"]
        found["MTP: share of first drafts accepted >= 0.70"] = (told["accepted"], told["accepted"] >= 0.70)
        found["MTP: tokens/s with drafts over without >= 1.15"] = (ratio, ratio >= 1.15)
    if road.minutes is not None:
        found["minutes of the quickstart <= 15"] = (road.minutes, road.minutes <= 15)
    return found


def judge(roads: Sequence[Road]) -> dict[str, Bar]:
    """Each bar that any of the roads has, and those that all must have."""
    each, gained = [bars(road) for road in roads], gains(roads)
    found = {}
    for name in dict.fromkeys((*ALWAYS, *(name for one in each for name in one))):
        figures = [one.get(name) for one in each]
        enough = sum(figure is not None and figure[1] for figure in figures) >= SHARE * len(roads)
        sure, note = _sure(name, len(by_seed(roads, [0.0] * len(roads))), gained)
        found[name] = Bar(figures, enough and sure, note)
    return found


def _sure(name: str, seeds: int, gained: dict[str, dict[str, float]]) -> tuple[bool, str]:
    """Whether a claim of learning stands with the lower end of its interval, and a word on it; others need none."""
    if name not in (RL, STUDENT):
        return True, ""
    if seeds < 2:
        return True, "one seed: no interval"
    if name == STUDENT:
        least = gained.get("student over twin: mean", {}).get("lower", -math.inf)
        return least > 0, f"lower 95 % end over seeds {100 * least:+.1f} points, > 0 is needed"
    over = {task: gain for task, gain in of_pair(gained, "RL over base").items() if task != "mean"}
    sure = sum(round(gain["mean"], 9) >= 0.20 and gain["lower"] > 0 for gain in over.values())
    needed = min(4, max(1, len(over)))
    return sure >= needed, f"mean >= 0.20 and lower 95 % end over seeds > 0 on {sure} tasks, {needed} are needed"


def shown(values: Sequence[float], form: str, ranges: bool) -> str:
    """Mean (least to most)."""
    middle, least, most = (format(value, form) for value in (statistics.mean(values), min(values), max(values)))
    return f"{middle} ({least} to {most})" if ranges and len(values) > 1 else middle


def _cell(values: Sequence[float | None], form: str, ranges: bool, scale: float = 1) -> str:
    """The same; empty where one of the roads has no value, or none that counts."""
    there = [scale * value for value in values if value is not None]
    return shown(there, form, ranges) if len(there) == len(values) else ""


def table(roads: Sequence[Road], ranges: bool) -> str:
    """Accuracy in per cent of each run on each task and CPU seconds of training, means over roads, as Markdown.

    Args:
        ranges: least and most of every cell, and FLOPs; else of the means of tasks alone.
    """
    tasks = list(roads[0].scores("pretrain"))
    heads = [*tasks, "mean", "made to think", "CPU s", *(["FLOPs"] if ranges else [])]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for run, label in ROWS.items():
        rows = [road.scores(run) for road in roads]
        if not all(rows):  # see ``incomplete``
            continue
        cells = [_cell([row[task] for row in rows], ".1f", ranges, 100) for task in tasks]
        cells += [_cell([road.mean(run, way) for road in roads], ".1f", True, 100) for way in (G, T)]
        cells.append(_cell([road.fact(run, "training_cpu_seconds") for road in roads], ".0f", ranges))
        if ranges:
            cells.append(_cell([road.runs[run].get("flops") or None for road in roads], ".3g", True))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def incomplete(roads: Sequence[Road]) -> dict[str, int]:
    """Runs that some of the roads have and some have not, with how many have them: they are in no table or gain."""
    count = {run: sum(bool(road.scores(run)) for road in roads) for run in ROWS}
    return {run: there for run, there in count.items() if 0 < there < len(roads)}


def gains(roads: Sequence[Road]) -> dict[str, dict[str, float]]:
    """Mean gain and its lower 95 % end over seeds, as ``pair: task``, for each task and their mean."""
    found = {}
    for name, (after, how, before, how_before) in PAIRS.items():
        each = [(road.scores(after, how), road.scores(before, how_before)) for road in roads]
        if not all(new and old for new, old in each):
            continue
        changes = {task: [new[task] - old[task] for new, old in each] for task in each[0][0]}
        changes["mean"] = [statistics.mean(values) for values in zip(*changes.values(), strict=True)]
        for task, values in changes.items():
            found[f"{name}: {task}"] = {"mean": statistics.mean(values), "lower": lower(by_seed(roads, values))}
    return found


def of_pair(gained: dict[str, dict[str, float]], pair: str) -> dict[str, dict[str, float]]:
    """The gains of one pair, by task."""
    return {name.partition(": ")[2]: gain for name, gain in gained.items() if name.partition(": ")[0] == pair}


def gain_lines(gained: dict[str, dict[str, float]]) -> str:
    """Gains in points, one a line."""
    return "\n".join(
        f"{name:64} {100 * gain['mean']:+6.1f} points, lower 95 % {100 * gain['lower']:+6.1f}"
        for name, gain in gained.items()
    )


def seconds(roads: Sequence[Road]) -> dict[str, list[float | None]]:
    """CPU seconds of training of each control over those of what it is to equal, on each road that has both."""
    found: dict[str, list[float | None]] = {}
    for run, other in SAME_SECONDS.items():
        spent = [tuple(road.fact(one, "training_cpu_seconds") for one in (run, other)) for road in roads]
        if any(run in road.runs for road in roads):
            found[f"{run} over {other}"] = [mine / its if mine and its else None for mine, its in spent]
    return found


def seconds_lines(found: dict[str, list[float | None]]) -> str:
    """One a line, flagged where the control had less or it is not known."""
    lines = []
    for name, ratios in found.items():
        there = [ratio for ratio in ratios if ratio is not None]
        flag = "" if len(there) == len(ratios) else f"  MISSING on {len(ratios) - len(there)} of {len(ratios)} roads"
        if there and statistics.mean(there) < LEAST_SECONDS:
            flag += "  the control had LESS"
        lines.append(f"CPU seconds, {name:38} {shown(there, '.2f', True) if there else ''}{flag}")
    return "\n".join(lines)
