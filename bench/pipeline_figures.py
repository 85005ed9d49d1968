"""What finished pipelines say: accuracies, gains with an interval over seeds, CPU seconds, and which bars hold.

A run that some of the pipelines have not is in no table or gain of them together, and is named by ``incomplete``; a bar
that a pipeline says nothing of is not held on that pipeline.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN_LABELS = {  # of the table: a run of a pipeline, and what it is called
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
COMPARISONS = {  # of runs that a sentence rests on, each with how it was asked: after, before
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
EQUAL_CPU_CONTROLS = {  # a control, and what it is to have had as many CPU seconds as
    "sft": "rl-seed0", "rft": "rl-seed0", "pretrain-more": "rl-seed0", "student-scratch": "distill",
    "pretrain-dense-seconds": "pretrain",
}  # fmt: skip
MIN_CPU_SHARE = 0.85  # share of them, below which a control had less
RL = "RL over the base: fourth best gain of the tasks >= 0.20"
KEPT = "RL: worst task's share of the base made to think >= 0.97"
STUDENT = "student over its twin without a teacher, mean > 0"
LOSS, WORST_LOSS = "INT4: mean relative loss <= 0.02", "INT4: worst task's relative loss <= 0.05"
ALWAYS = (RL, KEPT, STUDENT, LOSS, WORST_LOSS)  # bars of every pipeline, whatever its runs say
T95 = (math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)  # by degrees of freedom, two-sided
REQUIRED_SHARE = 5 / 6  # of pipelines on which a bar must hold
Scores = dict[str, float]


@dataclass(frozen=True)
class PipelineResult:
    """One finished pipeline, read from its run folders."""

    name: str
    runs: dict[str, dict[str, Any]]
    minutes: float | None

    def scores(self, run: str, mode: str = G) -> Scores:
        """Share of right answers by trained task; empty where the run was not asked so."""
        rows = self.fact(run, "scores") or []
        return {r["task"]: r["correct"] / r["count"] for r in rows if r["label"] == mode and r.get("trained", True)}

    def mean(self, run: str, mode: str = G) -> float | None:
        """Mean over the trained tasks; None where the run was not asked so."""
        scores = self.scores(run, mode)
        return statistics.mean(scores.values()) if scores else None

    def fact(self, run: str, name: str) -> Any:
        """A fact that a run noted; None where there is none."""
        return self.runs[run]["facts"].get(name) if run in self.runs else None


@dataclass(frozen=True)
class Criterion:
    """What a bar came to on each pipeline, None where it is missing, and on all of them."""

    values: list[tuple[float, bool] | None]
    passed: bool
    note: str = ""  # what else was asked of it


def read_result(folder: Path, name: str, minutes: float | None = None) -> PipelineResult:
    """The finished runs of a pipeline."""
    runs = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/run.json")}
    return PipelineResult(name, runs, minutes)


def lower_bound(values: Sequence[float]) -> float:
    """The lower end of the 95 % interval of the mean (Student's t); minus infinity for a single value."""
    if len(values) < 2:
        return -math.inf
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - T95[min(len(values) - 1, len(T95) - 1)] * spread


def mean_by_seed(results: Sequence[PipelineResult], values: Sequence[float]) -> list[float]:
    """A value for each seed: pipelines of one seed on two instruction sets share data and first weights: one value."""
    seeds = [result.name.partition("-")[0] for result in results]
    return [
        statistics.mean(value for value, seed_of_value in zip(values, seeds, strict=True) if seed_of_value == seed)
        for seed in dict.fromkeys(seeds)
    ]


def check_criteria(result: PipelineResult) -> dict[str, tuple[float, bool]]:
    """Figure and verdict of each bar that one pipeline has something to say of; accuracies are shares."""
    outcomes: dict[str, tuple[float, bool]] = {}
    base, thinking, rl = result.scores("pretrain"), result.scores("pretrain", T), result.scores("rl-seed0")
    if base and rl:
        fourth = sorted((round(rl[task] - base[task], 9) for task in rl), reverse=True)[:4][-1]
        outcomes[RL] = (fourth, fourth >= 0.20)
    if thinking and rl:
        kept_share = min(rl[task] / max(thinking[task], 1e-9) for task in rl)
        outcomes[KEPT] = (kept_share, kept_share >= 0.97)
    student, without_teacher = result.mean("distill"), result.mean("student-scratch")
    if student is not None and without_teacher is not None:
        outcomes[STUDENT] = (student - without_teacher, student > without_teacher)
    if loss := result.fact("quantize", "relative_loss"):  # none where the student is never right
        outcomes[LOSS] = (statistics.mean(loss.values()), statistics.mean(loss.values()) <= 0.02)
        outcomes[WORST_LOSS] = (max(loss.values()), max(loss.values()) <= 0.05)
    text = result.fact("pretrain", "bits_per_byte") or {}
    for domain, row in text.items():
        if domain != "code":
            gap = row["model"] - min(v for k, v in row.items() if k not in ("model", "bytes"))
            outcomes[f"bits per byte over the best baseline, {domain} < 0"] = (gap, gap < 0)
    if drafts := result.fact("quantize", "drafts"):
        ratio = drafts["with_drafts"] / drafts["without"]
        outcomes["MTP: share of first drafts accepted >= 0.70"] = (drafts["accepted"], drafts["accepted"] >= 0.70)
        outcomes["MTP: tokens/s with drafts over without >= 1.15"] = (ratio, ratio >= 1.15)
    if result.minutes is not None:
        outcomes["minutes of the quickstart <= 15"] = (result.minutes, result.minutes <= 15)
    return outcomes


def judge_criteria(results: Sequence[PipelineResult]) -> dict[str, Criterion]:
    """Each bar that any of the pipelines has, and those that all must have."""
    outcomes_by_result, gains_by_name = [check_criteria(result) for result in results], gains(results)
    criteria = {}
    for name in dict.fromkeys((*ALWAYS, *(name for outcomes in outcomes_by_result for name in outcomes))):
        figures = [outcomes.get(name) for outcomes in outcomes_by_result]
        enough = sum(figure is not None and figure[1] for figure in figures) >= REQUIRED_SHARE * len(results)
        interval_ok, note = _check_interval(name, len(mean_by_seed(results, [0.0] * len(results))), gains_by_name)
        criteria[name] = Criterion(figures, enough and interval_ok, note)
    return criteria


def _check_interval(name: str, seeds: int, gains_by_name: dict[str, dict[str, float]]) -> tuple[bool, str]:
    """Whether a claim of learning stands with the lower end of its interval, and a word on it; others need none."""
    if name not in (RL, STUDENT):
        return True, ""
    if seeds < 2:
        return True, "one seed: no interval"
    if name == STUDENT:
        lower_end = gains_by_name.get("student over twin: mean", {}).get("lower", -math.inf)
        return lower_end > 0, f"lower 95 % end over seeds {100 * lower_end:+.1f} points, > 0 is needed"
    over = {task: gain for task, gain in gains_of_pair(gains_by_name, "RL over base").items() if task != "mean"}
    num_sure = sum(round(gain["mean"], 9) >= 0.20 and gain["lower"] > 0 for gain in over.values())
    needed = min(4, max(1, len(over)))
    return (
        num_sure >= needed,
        f"mean >= 0.20 and lower 95 % end over seeds > 0 on {num_sure} tasks, {needed} are needed",
    )


def format_range(values: Sequence[float], form: str, ranges: bool) -> str:
    """Mean (least to most)."""
    middle, minimum, maximum = (format(value, form) for value in (statistics.mean(values), min(values), max(values)))
    return f"{middle} ({minimum} to {maximum})" if ranges and len(values) > 1 else middle


def _cell(values: Sequence[float | None], form: str, ranges: bool, scale: float = 1) -> str:
    """The same; empty where one of the pipelines has no value, or none that counts."""
    present = [scale * value for value in values if value is not None]
    return format_range(present, form, ranges) if len(present) == len(values) else ""


def table(results: Sequence[PipelineResult], ranges: bool) -> str:
    """Accuracy in per cent of each run on each task and CPU seconds of training, means over pipelines, as Markdown.

    Args:
        ranges: least and most of every cell, and FLOPs; else of the means of tasks alone.
    """
    tasks = list(results[0].scores("pretrain"))
    heads = [*tasks, "mean", "made to think", "CPU s", *(["FLOPs"] if ranges else [])]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for run, label in RUN_LABELS.items():
        rows = [result.scores(run) for result in results]
        if not all(rows):  # see ``incomplete``
            continue
        cells = [_cell([row[task] for row in rows], ".1f", ranges, 100) for task in tasks]
        cells += [_cell([result.mean(run, mode) for result in results], ".1f", True, 100) for mode in (G, T)]
        cells.append(_cell([result.fact(run, "training_cpu_seconds") for result in results], ".0f", ranges))
        if ranges:
            cells.append(_cell([result.runs[run].get("flops") or None for result in results], ".3g", True))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def incomplete(results: Sequence[PipelineResult]) -> dict[str, int]:
    """Runs that some of the pipelines have and some have not, with how many have them: they are in no table or gain."""
    count = {run: sum(bool(result.scores(run)) for result in results) for run in RUN_LABELS}
    return {run: present for run, present in count.items() if 0 < present < len(results)}


def gains(results: Sequence[PipelineResult]) -> dict[str, dict[str, float]]:
    """Mean gain and its lower 95 % end over seeds, as ``pair: task``, for each task and their mean."""
    gains_by_name = {}
    for name, (after, how, before, how_before) in COMPARISONS.items():
        score_pairs = [(result.scores(after, how), result.scores(before, how_before)) for result in results]
        if not all(new and old for new, old in score_pairs):
            continue
        changes = {task: [new[task] - old[task] for new, old in score_pairs] for task in score_pairs[0][0]}
        changes["mean"] = [statistics.mean(values) for values in zip(*changes.values(), strict=True)]
        for task, values in changes.items():
            gains_by_name[f"{name}: {task}"] = {
                "mean": statistics.mean(values),
                "lower": lower_bound(mean_by_seed(results, values)),
            }
    return gains_by_name


def gains_of_pair(gains_by_name: dict[str, dict[str, float]], pair: str) -> dict[str, dict[str, float]]:
    """The gains of one pair, by task."""
    return {name.partition(": ")[2]: gain for name, gain in gains_by_name.items() if name.partition(": ")[0] == pair}


def format_gains(gains_by_name: dict[str, dict[str, float]]) -> str:
    """Gains in points, one a line."""
    return "\n".join(
        f"{name:64} {100 * gain['mean']:+6.1f} points, lower 95 % {100 * gain['lower']:+6.1f}"
        for name, gain in gains_by_name.items()
    )


def cpu_second_ratios(results: Sequence[PipelineResult]) -> dict[str, list[float | None]]:
    """CPU seconds of training of each control over those of what it is to equal, on each pipeline that has both."""
    ratios: dict[str, list[float | None]] = {}
    for run, other in EQUAL_CPU_CONTROLS.items():
        spent = [tuple(result.fact(one, "training_cpu_seconds") for one in (run, other)) for result in results]
        if any(run in result.runs for result in results):
            ratios[f"{run} over {other}"] = [
                control_seconds / reference_seconds if control_seconds and reference_seconds else None
                for control_seconds, reference_seconds in spent
            ]
    return ratios


def format_cpu_second_ratios(ratios_by_name: dict[str, list[float | None]]) -> str:
    """One a line, flagged where the control had less or it is not known."""
    lines = []
    for name, ratios in ratios_by_name.items():
        present = [ratio for ratio in ratios if ratio is not None]
        flag = (
            "" if len(present) == len(ratios) else f"  MISSING on {len(ratios) - len(present)} of {len(ratios)} roads"
        )
        if present and statistics.mean(present) < MIN_CPU_SHARE:
            flag += "  the control had LESS"
        lines.append(f"CPU seconds, {name:38} {format_range(present, '.2f', True) if present else ''}{flag}")
    return "\n".join(lines)
