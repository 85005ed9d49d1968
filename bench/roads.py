"""Whole roads, each with a seed of its own and on several instruction sets: mean, range, and which bars hold where.

Data order, weights, RL and the student are all re-seeded. ``avx2`` makes torch, MKL and Sprat's kernels round as on a
processor without AVX-512. A bar of learning holds where it holds on five roads of six; a gain stands with the lower end
of its 95 % interval over the seeds (Student's t), since one road's p-value says nothing of another seed.

    python -m bench.roads OUT [--seeds 0 1 2] [--isa avx512 avx2] [--recipe quickstart] [--set a.b=c] [--twins]
                              [--quick] [--json]

Roads that are finished under OUT are read, not walked again. ``--twins`` adds two dense twins of the teacher to each,
at equal CPU seconds and at equal parameters, for which a quickstart has no time. ``--quick`` walks one road.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ISAS = {
    "avx512": {},
    "avx2": {"SPRAT_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
_TWIN = (
    "{{equal='{equal}',{more},size='micro',changes={{num_hidden_layers=2,first_k_dense_replace=2,n_routed_experts=0,"
    "n_shared_experts=0,num_experts_per_tok=0,moe_intermediate_size=0,intermediate_size={width}}}}}"
)
TWINS = "dense=[" + ",".join((
    _TWIN.format(equal="FLOPs", more="steps=1600", width=288),
    _TWIN.format(equal="CPU seconds", more="steps=2100", width=288),  # dense products are faster at equal FLOPs
    _TWIN.format(equal="parameters", more="steps=1600", width=864),  # those of all experts
)) + "]"  # fmt: skip
ROWS = {  # of the table: a run of a road, how it was asked, and what it is called
    ("pretrain", "greedy"): "pre-trained, sparse",
    ("pretrain", "thinking"): "*the same, made to think*",
    ("rl-seed0", "greedy"): "**after RL**",
    ("sft", "greedy"): "*control:* SFT on worked examples",
    ("rft", "greedy"): "*control:* rejection sampling, then SFT",
    ("pretrain-more", "greedy"): "*control:* more pre-training",
    ("pretrain-dense", "thinking"): "*control of the experts:* dense, equal FLOPs, made to think",
    ("pretrain-dense-seconds", "thinking"): "*control of the experts:* dense, equal CPU seconds",
    ("pretrain-dense-parameters", "thinking"): "*control of the experts:* dense, equal parameters",
    ("distill", "greedy"): "student, distilled",
    ("student-scratch", "greedy"): "*control:* the same without a teacher",
    ("quantize", "greedy"): "student in INT4",
}
T95 = (math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)  # by degrees of freedom, two-sided
SHARE = 5 / 6  # of roads on which a bar must hold
Scores = dict[str, float]


@dataclass(frozen=True)
class Road:
    """One finished road, read from its run folders."""

    name: str
    runs: dict[str, dict[str, Any]]
    minutes: float | None

    def scores(self, run: str, way: str = "greedy") -> Scores:
        """Share of right answers by trained task; empty where the run was not asked so."""
        rows = self.runs[run]["facts"]["scores"] if run in self.runs else []
        return {r["task"]: r["correct"] / r["count"] for r in rows if r["label"] == way and r.get("trained", True)}

    def mean(self, run: str, way: str = "greedy") -> float:
        """Mean over the trained tasks."""
        return statistics.mean(self.scores(run, way).values())

    def fact(self, run: str, name: str) -> Any:
        """A fact that a run noted."""
        return self.runs[run]["facts"].get(name)


def walk(folder: Path, seed: int, isa: str, recipe: str, overrides: Sequence[str], twins: bool = False) -> Road:
    """Walk a road where it is not finished, then its further twins where they are wanted, and read it."""
    told = folder / "minutes"
    command = [sys.executable, "-m", "sprat", "quickstart", "--out", str(folder), "--seed", str(seed), "--no-serve"]
    command += ["--recipe", recipe, *(word for each in overrides for word in ("--set", each))]

    def go(*more: str) -> None:
        subprocess.run([*command, *more], env=os.environ | ISAS[isa], check=True, stdout=subprocess.DEVNULL)

    if not (folder / "report.html").is_file():
        began = time.monotonic()
        go()
        told.write_text(f"{(time.monotonic() - began) / 60:.2f}")
    if twins and not (folder / "pretrain-dense-parameters" / "run.json").is_file():
        go("--set", TWINS)
    return read(folder, f"{seed}-{isa}", float(told.read_text()) if told.is_file() else None)


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
    """Figure and verdict of each bar on one road; accuracies are shares."""
    base, thinking, rl = road.scores("pretrain"), road.scores("pretrain", "thinking"), road.scores("rl-seed0")
    gains = sorted((round(rl[task] - base[task], 9) for task in rl), reverse=True)
    kept = min(rl[task] / max(thinking[task], 1e-9) for task in rl)
    taught = road.mean("distill") - road.mean("student-scratch")
    loss = road.fact("quantize", "relative_loss") or {"": math.nan}  # a student that is never right has nothing to lose
    text = road.fact("pretrain", "bits_per_byte")
    over = {d: row["model"] - min(v for k, v in row.items() if k not in ("model", "bytes")) for d, row in text.items()}
    found = {
        "RL over the base: fourth best gain of the tasks >= 0.20": (gains[:4][-1], gains[:4][-1] >= 0.20),
        "RL: worst task's share of the base made to think >= 0.97": (kept, kept >= 0.97),
        "student over its twin without a teacher, mean > 0": (taught, taught > 0),
        "INT4: mean relative loss <= 0.02": (statistics.mean(loss.values()), statistics.mean(loss.values()) <= 0.02),
        "INT4: worst task's relative loss <= 0.05": (max(loss.values()), max(loss.values()) <= 0.05),
        **{f"bits per byte over the best baseline, {d} < 0": (gap, gap < 0) for d, gap in over.items() if d != "code"},
    }
    if told := road.fact("quantize", "drafts"):
        ratio = told["with_drafts"] / told["without"]
        found["MTP: share of first drafts accepted >= 0.70"] = (told["accepted"], told["accepted"] >= 0.70)
        found["MTP: tokens/s with drafts over without >= 1.15"] = (ratio, ratio >= 1.15)
    if road.minutes is not None:
        found["minutes of the quickstart <= 15"] = (road.minutes, road.minutes <= 15)
    return found


def _shown(values: Sequence[float], form: str, ranges: bool) -> str:
    """Mean (least to most)."""
    middle, least, most = (format(value, form) for value in (statistics.mean(values), min(values), max(values)))
    return f"{middle} ({least} to {most})" if ranges and len(values) > 1 else middle


def table(roads: Sequence[Road], ranges: bool) -> str:
    """Accuracy in per cent on each task and CPU seconds of training, means over roads, as Markdown.

    Args:
        ranges: least and most of every cell; else of the mean of tasks alone.
    """
    tasks = list(roads[0].scores("pretrain"))
    lines = ["| | " + " | ".join([*tasks, "mean", "CPU s"]) + " |", "|---" * (len(tasks) + 3) + "|"]
    for (run, way), label in ROWS.items():
        rows = [road.scores(run, way) for road in roads]
        if not all(rows):  # a run that some of the roads have not
            continue
        cells = [_shown([100 * row[task] for row in rows], ".1f", ranges) for task in tasks]
        cells.append(_shown([100 * statistics.mean(row.values()) for row in rows], ".1f", True))
        spent = [float(road.fact(run, "training_cpu_seconds") or math.nan) for road in roads]
        asked_again = way == "thinking" and run == "pretrain" or math.isnan(spent[0])
        cells.append("" if asked_again else _shown(spent, ".0f", ranges))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gains(roads: Sequence[Road]) -> dict[str, dict[str, float]]:
    """Mean gain and its lower 95 % end over seeds, for each task and each pair of runs that a sentence rests on."""
    pairs = {
        "RL over base": ("rl-seed0", "pretrain"), "RL over SFT": ("rl-seed0", "sft"),
        "RL over RFT": ("rl-seed0", "rft"), "RL over more pre-training": ("rl-seed0", "pretrain-more"),
        "student over twin": ("distill", "student-scratch"), "sparse over dense": ("pretrain", "pretrain-dense"),
        "sparse over dense, CPU seconds": ("pretrain", "pretrain-dense-seconds"),
        "sparse over dense, parameters": ("pretrain", "pretrain-dense-parameters"),
    }  # fmt: skip
    found = {}
    for name, (after, before) in pairs.items():
        if not all(after in road.runs and before in road.runs for road in roads):
            continue
        way = "thinking" if name.startswith("sparse") else "greedy"
        each = [(road.scores(after, way), road.scores(before, way)) for road in roads]
        changes = {task: [new[task] - old[task] for new, old in each] for task in each[0][0]}
        changes["mean"] = [statistics.mean(values) for values in zip(*changes.values(), strict=True)]
        for task, values in changes.items():
            found[f"{name}: {task}"] = {"mean": statistics.mean(values), "lower": lower(by_seed(roads, values))}
    return found


def main() -> int:
    """Walk, print, and say which bars hold; 1 where one does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--isa", nargs="+", choices=list(ISAS), default=list(ISAS))
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--twins", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    kinds = [(seed, isa) for seed in asked.seeds for isa in asked.isa][: 1 if asked.quick else None]
    way = (asked.recipe, asked.overrides, asked.twins)
    roads = [walk(asked.out / f"seed{seed}-{isa}", seed, isa, *way) for seed, isa in kinds]
    each = [bars(road) for road in roads]
    held = {name: [one[name] for one in each if name in one] for name in each[0]}
    good = {name: sum(fine for _, fine in found) >= SHARE * len(found) for name, found in held.items()}
    if asked.json:
        facts = {"roads": [road.name for road in roads], "bars": held, "good": good, "gains": gains(roads)}
        print(json.dumps(facts))
    else:
        print(table(roads, ranges=False), table(roads, ranges=True), sep="\n\n", end="\n\n")
        for name, gain in gains(roads).items():
            print(f"{name:44} {100 * gain['mean']:+6.1f} points, lower 95 % {100 * gain['lower']:+6.1f}")
        for name, found in held.items():
            figure = _shown([value for value, _ in found], ".3g", True)
            verdict = "met" if good[name] else "MISSED"
            print(f"{name:60} {figure:28} {sum(fine for _, fine in found)} of {len(found)}: {verdict}")
    return 0 if all(good.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
