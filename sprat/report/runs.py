"""The runs of a pipeline as the report sees them: main stages in the order of the pipeline, controls beside them."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sprat.errors import CheckpointError, TrustError
from sprat.eval.score import StageScore
from sprat.files.json import read_json
from sprat.report import lineage
from sprat.trust import run_record

STAGE_TITLES = {
    "data": "Data",
    "pretrain": "Pre-train",
    "sft": "SFT on worked examples",
    "rl": "RL (GRPO)",
    "distill": "Distil",
    "quantize": "INT4",
}
OWN_ROAD = "road.toml"  # in the folder of a road of the user's own
_CONTROLS = {"student-scratch": "distill"} | dict.fromkeys(("sft-labels", "rft", "pretrain-more"), "rl")
_MODEL_KEYS = {"rl": "teacher", "distill": "student", "quantize": "int4"}
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class StageRun:
    """One finished run: ``name`` is its folder in the pipeline, ``kind`` its stage there."""

    name: str
    kind: str
    title: str
    control_of: str
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    scores: list[StageScore] = field(default_factory=list)

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

    def by_task(self, mode: str = "greedy") -> dict[str, StageScore]:
        """The scores asked in ``mode``; where a stage has none of it, those of its first mode."""
        modes = [score.mode for score in self.scores]
        chosen_mode = mode if mode in modes or not modes else modes[0]
        return {score.task: score for score in self.scores if score.mode == chosen_mode}

    def mean_accuracy(self) -> float | None:
        """Mean greedy accuracy over the trained tasks, or None without scores."""
        accuracies = [score.accuracy for score in self.by_task().values() if score.trained]
        return sum(accuracies) / len(accuracies) if accuracies else None


@dataclass(frozen=True)
class PipelineRuns:
    """All finished runs, and those of ``main``: each made from the one before it, what is shown as the pipeline.

    ``is_own``: of a road of the user's own, whose stages have their own names, no controls, and are compared by what
    they say themselves.
    """

    stages: list[StageRun]
    main: list[StageRun]
    is_own: bool = False

    @property
    def scored(self) -> list[StageRun]:
        """Main stages that were scored."""
        return [stage for stage in self.main if stage.scores]

    def controls(self, stage: StageRun) -> list[StageRun]:
        """The controls of ``stage`` that had its start."""
        return [other for other in self.stages if _is_control_of(other, stage) and lineage.is_comparable(other, stage)]

    def with_controls(self, *kinds: str) -> list[StageRun]:
        """Main stages of these ``kinds``, then their controls."""
        stages = [stage for stage in self.main if stage.kind in kinds]
        return stages + [control for stage in stages for control in self.controls(stage)]

    def model_fact(self, stage: StageRun, fact: str) -> float | None:
        """A fact (``size_bytes``, ``tokens_per_second``) of a stage's model, measured there or side by side later.

        Side by side is ``facts["models"]`` of a main stage: the same facts for ``teacher``, ``student`` and ``int4``.
        """
        model_tables = [other.facts["models"] for other in self.main if other.facts.get("models")]
        name = _MODEL_KEYS.get(stage.kind, "")
        if model_tables and name in model_tables[-1] and stage in self.main:
            return float(model_tables[-1][name][fact]) if model_tables[-1][name].get(fact) else None
        return float(stage.facts[fact]) if stage.facts.get(fact) else None

    def seed_runs(self, kind: str) -> list[StageRun]:
        """The main stage of a ``kind``, and those that differ from it in nothing but their seed."""
        candidates = [stage for stage in self.stages if stage.kind == kind and not stage.control_of]
        main = next((stage for stage in self.main if stage.kind == kind), None)
        if main is None:
            return []
        return [stage for stage in candidates if stage == main or lineage.differ_only_in_seed(stage, main)]

    @property
    def compared_stages(self) -> list[StageRun]:
        """All stages that are set against another: main ones, their other seeds, their controls."""
        names = set[str]()
        for stage in self.main:
            names |= {other.name for other in (stage, *self.seed_runs(stage.kind), *self.controls(stage))}
        return [stage for stage in self.stages if stage.name in names]

    @property
    def excluded(self) -> list[StageRun]:
        """Stages that would stand in a place of the pipeline, but do not belong to what stands there."""

        def in_pipeline(stage: StageRun) -> bool:
            if stage.control_of:
                return any(_is_control_of(stage, other) for other in self.main)
            return stage.kind in STAGE_TITLES

        compared = self.compared_stages
        return [] if self.is_own else [stage for stage in self.stages if stage not in compared and in_pipeline(stage)]

    def tasks(self) -> dict[str, bool]:
        """Each task that any compared stage was scored on, and whether it was trained, trained ones first."""
        trained_by_task = {score.task: score.trained for stage in self.compared_stages for score in stage.scores}
        return dict(sorted(trained_by_task.items(), key=lambda item: not item[1]))


def read_runs(folder: Path) -> PipelineRuns:
    """The finished runs under ``folder``.

    Raises:
        CheckpointError: there is none.
        TrustError: a ``run.json`` cannot be read.
    """
    run_folders = run_record.find_runs(folder) if folder.is_dir() else []
    if not run_folders:
        todo = f"run `sprat quickstart --out {folder}` first, or give the folder of a road"
        raise CheckpointError("no finished run to report on", where=str(folder), todo=todo)
    if (folder / OWN_ROAD).is_file():
        stages = [_read_stage(path, folder, is_own=True) for path in run_folders]
        return PipelineRuns(stages, lineage.main_stages(stages, _stage_index), is_own=True)
    stages = sorted((_read_stage(path, folder) for path in run_folders), key=_sort_key)
    main = lineage.main_stages(stages, _stage_index)
    names, kinds = {stage.name for stage in main}, {stage.kind for stage in main}
    for number, stage in enumerate(stages):
        if stage.name in names:  # a control of an earlier walk may be part of this one
            stages[number] = replace(stage, control_of="")
        elif stage.kind == "sft" and "rl" in kinds:  # and the other way round
            stages[number] = replace(stage, control_of=stage.control_of or "rl")
    stages.sort(key=_sort_key)
    return PipelineRuns(stages, [stage for stage in stages if stage.name in names])


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of one run, finished or not."""
    return any((folder / name).is_file() for name in ("run.json", "open.json"))


def read_run(folder: Path) -> StageRun:
    """The run in ``folder``; of one that is not finished what is known so far, without times and cost at its end.

    Raises:
        TrustError: its files cannot be read.
    """
    if (folder / "run.json").is_file():
        return _read_stage(folder, folder)
    record, facts = (read_json(folder / name) for name in ("open.json", "facts.json"))
    try:
        recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrustError(f"recipe.toml cannot be read: {error}", where=str(folder), todo="go on with the run") from None
    spent = {key: value for key, value in (read_json(folder / "spent.json") or {}).items() if key != "step"}
    metrics = printable(run_record.read_metrics(folder))
    last = metrics[-1] if metrics else {}
    spent |= {"tokens": last.get("tokens") or 0, "flops": 1e15 * float(last.get("petaflops") or 0)}
    record = printable({**(record or {}), **spent, "recipe": recipe, "facts": facts or {}})
    return StageRun(folder.name, str(record.get("stage")), folder.name, "", record, metrics)


def _stage_index(stage: StageRun) -> int:
    """The place of a stage on the pipeline, -1 for one that has none."""
    return list(STAGE_TITLES).index(stage.kind) if stage.kind in STAGE_TITLES else -1


def _is_control_of(control: StageRun, stage: StageRun) -> bool:
    """Whether ``control`` says that it is one of ``stage``."""
    return bool(control.control_of) and control.control_of in (stage.kind, stage.name)


def _sort_key(stage: StageRun) -> tuple[int, int, str, str]:
    """Stages in the order of the pipeline, others last in the order of their finish, controls after stages."""
    kind = stage.control_of.partition("-")[0] or stage.kind
    order = list(STAGE_TITLES)
    index = order.index(kind) if kind in order else len(order)
    finished = "" if kind in order else str(stage.record.get("finished"))
    return index, bool(stage.control_of), finished, stage.name


def _read_stage(path: Path, folder: Path, *, is_own: bool = False) -> StageRun:
    """The run in ``path`` as a stage."""
    record = read_json(path / "run.json")
    if record is None:
        raise TrustError("run.json cannot be read", where=str(path), todo="see verify; then run that stage again")
    record = printable(record)
    name = path.name if path == folder else path.relative_to(folder).as_posix()
    facts = record.get("facts") or {}
    if is_own:
        stage = str(record.get("stage", name))
        return StageRun(name, stage, name, "", record, printable(run_record.read_metrics(path)))
    kind = next((f for f in STAGE_TITLES if name == f or name.startswith(f"{f}-")), str(record.get("stage", name)))
    title = str(facts.get("title") or STAGE_TITLES.get(name, name))
    control_of = str(facts.get("control_of") or _CONTROLS.get(name, ""))
    scores = [StageScore.from_dict(row) for row in facts.get("scores") or []]
    return StageRun(name, kind, title, control_of, record, printable(run_record.read_metrics(path)), scores)


def printable(value: Any) -> Any:
    """``value`` without the characters that no page or font can show (controls, halves of a surrogate pair)."""
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    return value
