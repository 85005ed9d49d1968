"""The runs of a road as the report sees them: main stages in the order of the road, controls beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sprat.errors import CheckpointError, TrustError
from sprat.report import kin
from sprat.trust import record

FAMILIES = {
    "data": "Data",
    "pretrain": "Pre-train",
    "sft": "SFT on worked examples",
    "rl": "RL (GRPO)",
    "distill": "Distil",
    "quantize": "INT4",
}
_CONTROLS = {"student-scratch": "distill"} | dict.fromkeys(("sft-labels", "rft", "pretrain-more"), "rl")
_MEASURED_AS = {"rl": "teacher", "distill": "student", "quantize": "int4"}
_Z95 = 1.959964
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Score:
    """Accuracy of a stage on one task asked in one way (``label``), with its 95 % interval."""

    task: str
    label: str
    count: int
    correct: int
    low: float
    high: float
    mean_tokens: float | None
    by_length: dict[int, tuple[int, int]]
    unseen: frozenset[int]  # lengths that were never trained
    trained: bool
    samples: list[dict[str, Any]]

    @property
    def accuracy(self) -> float:
        """Share of right answers; a judge's partial credit is not in it."""
        return self.correct / max(self.count, 1)


@dataclass(frozen=True)
class Stage:
    """One finished run: ``name`` is its folder on the road, ``family`` its station."""

    name: str
    family: str
    title: str
    control_of: str
    record: dict[str, Any]
    rows: list[dict[str, Any]]
    scores: list[Score] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage noted."""
        facts: dict[str, Any] = self.record.get("facts") or {}
        return facts

    @property
    def inputs(self) -> dict[str, Any]:
        """What it was made from: by name the digest of each, and its path."""
        inputs: dict[str, Any] = self.record.get("inputs") or {}
        return inputs

    @property
    def recipe(self) -> dict[str, Any]:
        """Its settings."""
        recipe: dict[str, Any] = self.record.get("recipe") or {}
        return recipe

    @property
    def digest(self) -> Any:
        """The digest of what it made."""
        return self.record.get("artefact_digest")

    def by_task(self, label: str = "greedy") -> dict[str, Score]:
        """The scores asked in the way ``label``; where a stage has none of it, those of its first way."""
        labels = [score.label for score in self.scores]
        chosen = label if label in labels or not labels else labels[0]
        return {score.task: score for score in self.scores if score.label == chosen}

    def quality(self) -> float | None:
        """Mean greedy accuracy over the trained tasks, or None without scores."""
        means = [score.accuracy for score in self.by_task().values() if score.trained]
        return sum(means) / len(means) if means else None


@dataclass(frozen=True)
class Road:
    """All finished runs, and those of ``main``: each made from the one before it, what is shown as the road."""

    stages: list[Stage]
    main: list[Stage]

    @property
    def scored(self) -> list[Stage]:
        """Main stages that were scored."""
        return [stage for stage in self.main if stage.scores]

    def controls(self, stage: Stage) -> list[Stage]:
        """The controls of ``stage`` that had its start."""
        return [other for other in self.stages if _stands_beside(other, stage) and kin.alike(other, stage)]

    def measured(self, stage: Stage, fact: str) -> float | None:
        """A fact (``size_bytes``, ``tokens_per_second``) of a stage's model, measured there or side by side later.

        Side by side is ``facts["models"]`` of a main stage: the same facts for ``teacher``, ``student`` and ``int4``.
        """
        together = [other.facts["models"] for other in self.main if other.facts.get("models")]
        name = _MEASURED_AS.get(stage.family, "")
        if together and name in together[-1] and stage in self.main:
            return float(together[-1][name][fact]) if together[-1][name].get(fact) else None
        return float(stage.facts[fact]) if stage.facts.get(fact) else None

    def seeds(self, family: str) -> list[Stage]:
        """The main stage of a family, and those that differ from it in nothing but their seed."""
        own = [stage for stage in self.stages if stage.family == family and not stage.control_of]
        first = [stage for stage in self.main if stage.family == family][:1]
        return [stage for stage in own if first and (stage in first or kin.same_but_for_seed(stage, first[0]))]

    @property
    def compared(self) -> list[Stage]:
        """All stages that are set against another: main ones, their other seeds, their controls."""
        shown = [other for stage in self.main for other in (stage, *self.seeds(stage.family), *self.controls(stage))]
        names = {stage.name for stage in shown}
        return [stage for stage in self.stages if stage.name in names]

    @property
    def left_out(self) -> list[Stage]:
        """Stages that would stand in a place of the road, but do not belong to what stands there."""
        kept = self.compared
        beside = [stage for stage in self.stages if any(_stands_beside(stage, other) for other in self.main)]
        return [
            stage
            for stage in self.stages
            if stage not in kept and (stage in beside if stage.control_of else stage.family in FAMILIES)
        ]

    def tasks(self) -> dict[str, bool]:
        """Each task that any compared stage was scored on, and whether it was trained, trained ones first."""
        found = {score.task: score.trained for stage in self.compared for score in stage.scores}
        return dict(sorted(found.items(), key=lambda item: not item[1]))


def read(folder: Path) -> Road:
    """The finished runs under ``folder``.

    Raises:
        CheckpointError: there is none.
        TrustError: a ``run.json`` cannot be read.
    """
    found = record.find(folder) if folder.is_dir() else []
    if not found:
        todo = f"run `sprat quickstart --out {folder}` first, or give the folder of a road"
        raise CheckpointError("no finished run to report on", where=str(folder), todo=todo)
    stages = sorted((_stage(path, folder) for path in found), key=_place)
    road = kin.chain(stages, _station)
    names, families = {stage.name for stage in road}, {stage.family for stage in road}
    for number, stage in enumerate(stages):
        if stage.name in names:  # a control of an earlier walk may be part of this one
            stages[number] = replace(stage, control_of="")
        elif stage.family == "sft" and "rl" in families:  # and the other way round
            stages[number] = replace(stage, control_of=stage.control_of or "rl")
    stages.sort(key=_place)
    return Road(stages, [stage for stage in stages if stage.name in names])


def _station(stage: Stage) -> int:
    """The place of a stage on the road, -1 for one that has none."""
    return list(FAMILIES).index(stage.family) if stage.family in FAMILIES else -1


def _stands_beside(control: Stage, stage: Stage) -> bool:
    """Whether ``control`` says that it is one of ``stage``."""
    return bool(control.control_of) and control.control_of in (stage.family, stage.name)


def _place(stage: Stage) -> tuple[int, int, str, str]:
    """Stations in the order of the road, strangers last in the order of their finish, controls after stages."""
    station = stage.control_of.partition("-")[0] or stage.family
    order = list(FAMILIES)
    number = order.index(station) if station in order else len(order)
    finished = "" if station in order else str(stage.record.get("finished"))
    return number, bool(stage.control_of), finished, stage.name


def _stage(path: Path, road: Path) -> Stage:
    """The run in ``path`` as a stage."""
    written = record.read_json(path / "run.json")
    if written is None:
        raise TrustError("run.json cannot be read", where=str(path), todo="see verify; then run that stage again")
    written = _printable(written)
    name = path.name if path == road else path.relative_to(road).as_posix()
    facts = written.get("facts") or {}
    family = next((f for f in FAMILIES if name == f or name.startswith(f"{f}-")), str(written.get("stage", name)))
    title = str(facts.get("title") or FAMILIES.get(name, name))
    control_of = str(facts.get("control_of") or _CONTROLS.get(name, ""))
    scores = [_score(row) for row in facts.get("scores") or []]
    return Stage(name, family, title, control_of, written, record.metrics(path), scores)


def _printable(value: Any) -> Any:
    """``value`` without the characters that no page or font can show (controls, halves of a surrogate pair)."""
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, str):
        return _UNSHOWN.sub("\ufffd", value)
    return value


def _score(row: dict[str, Any]) -> Score:
    """A row of ``facts["scores"]``; what is missing follows from the counts."""
    count, correct = int(row["count"]), int(row["correct"])
    low, high = wilson(correct, count)
    by_length = {int(length): (int(c), int(n)) for length, (c, n) in (row.get("by_length") or {}).items()}
    trained = bool(row.get("trained", True))
    tokens = row.get("mean_tokens")
    return Score(
        task=str(row["task"]),
        label=str(row.get("label", "greedy")),
        count=count,
        correct=correct,
        low=float(row.get("low", low)),
        high=float(row.get("high", high)),
        mean_tokens=None if tokens is None else float(tokens),
        by_length=dict(sorted(by_length.items())),
        unseen=frozenset(() if trained else by_length),
        trained=trained,
        samples=list(row.get("samples") or []),
    )


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927).

    >>> [round(bound, 3) for bound in wilson(95, 100)]
    [0.888, 0.978]
    """
    if not count:
        return 0.0, 1.0
    share, z2 = correct / count, _Z95**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def p_value(before: Sequence[Score], after: Sequence[Score]) -> float:
    """Two-sided p of equal shares of all problems of these scores, by the pooled two-proportion z test."""
    right = [sum(score.correct for score in scores) for scores in (before, after)]
    count = [max(1, sum(score.count for score in scores)) for scores in (before, after)]
    share = sum(right) / sum(count)
    spread = math.sqrt(share * (1 - share) * (1 / count[0] + 1 / count[1]))
    gap = abs(right[1] / count[1] - right[0] / count[0])
    return math.erfc(gap / spread / math.sqrt(2)) if spread else 1.0
