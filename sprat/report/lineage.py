"""Which runs of a folder belong together, told by the digests of what each was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sprat.report.runs import StageRun

_EVAL_INPUTS = ("data", "eval")  # what two runs must have read alike, so that their scores can be compared


def main_stages(stages: Sequence[StageRun], stage_index: Callable[[StageRun], int]) -> list[StageRun]:
    """The run furthest on the pipeline, and those that it was made from, in their order, all judged alike.

    A run is the furthest only where none that it was made from, however far back, has been replaced by another since or
    was judged otherwise, unless there is no such run. One of no known station goes along where it was made from these.

    Args:
        stages: in the order of the pipeline; the first of several at one station is taken.
        stage_index: the place of a stage on the pipeline, -1 for one that has none.
    """
    candidates = [stage for stage in stages if not stage.control_of] or list(stages)
    in_pipeline = [stage for stage in candidates if stage_index(stage) >= 0]
    current = [stage for stage in in_pipeline if _is_current(stage, stages)]
    last = max(current or in_pipeline or candidates, key=stage_index)
    selected = [stage for stage in _ancestry(last, stages) if _same_inputs(stage, last, _EVAL_INPUTS)]
    names = {stage.name for stage in selected}
    for stage in candidates:
        parents = {run.name for run in _parents(stage, stages)}
        if stage_index(stage) < 0 and parents & names and _same_inputs(stage, last, _EVAL_INPUTS):
            names.add(stage.name)
    return [stage for stage in stages if stage.name in names]


def is_comparable(control: StageRun, stage: StageRun) -> bool:
    """Whether a control had the start, data and judging of ``stage``, and the student's shape if there is one.

    A checkpoint to go on from is each run's own.
    """
    shapes = [run.recipe["student"] for run in (control, stage) if "student" in run.recipe]
    shared = (set(control.inputs) & set(stage.inputs)) - {"init_from"}
    return _same_inputs(control, stage, sorted(shared)) and all(shape == shapes[0] for shape in shapes)


def differ_only_in_seed(run: StageRun, other: StageRun) -> bool:
    """Whether two runs differ in nothing but their seed, and in how much the first of several seeds is asked."""
    recipes = [{name: value for name, value in stage.recipe.items() if name != "seed"} for stage in (run, other)]
    inputs = [{name: value for name, value in _digests(stage).items() if name != "asked"} for stage in (run, other)]
    return recipes[0] == recipes[1] and inputs[0] == inputs[1]


def _same_inputs(run: StageRun, other: StageRun, names: Sequence[str]) -> bool:
    """Whether both read the same under each of ``names`` that both have."""
    first, second = _digests(run), _digests(other)
    return all(first[name] == second[name] for name in names if name in first and name in second)


def _digests(stage: StageRun) -> dict[str, Any]:
    return {name: item.get("digest") for name, item in stage.inputs.items()}


def _parents(stage: StageRun, stages: Sequence[StageRun]) -> list[StageRun]:
    """The runs that ``stage`` was made from, as far as they are here; of two with one artefact that at its path."""
    parents = []
    for item in stage.inputs.values():
        matches = [run for run in stages if run is not stage and run.digest and run.digest == item.get("digest")]
        parents += sorted(matches, key=lambda run: bool(run.name != item.get("path")))[:1]
    return parents


def _ancestry(stage: StageRun, stages: Sequence[StageRun]) -> list[StageRun]:
    """``stage`` and all that it was made from."""
    ancestry, pending = {stage.name: stage}, [stage]
    while pending:
        parents = [run for run in _parents(pending.pop(), stages) if run.name not in ancestry]
        ancestry |= {run.name: run for run in parents}
        pending += parents
    return list(ancestry.values())


def _is_current(stage: StageRun, stages: Sequence[StageRun]) -> bool:
    """Whether all that ``stage`` was made from, as far as it is here, still stands and was judged as it was."""
    runs = _ancestry(stage, stages)
    return all(not _was_replaced(run, stages) and _same_inputs(run, stage, _EVAL_INPUTS) for run in runs)


def _was_replaced(stage: StageRun, stages: Sequence[StageRun]) -> bool:
    """Whether in the place of a run that ``stage`` was made from another one stands now."""
    names, digests = [run.name for run in stages], [run.digest for run in stages]
    return any(item.get("path") in names and item.get("digest") not in digests for item in stage.inputs.values())
