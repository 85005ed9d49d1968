"""Which runs of a folder belong together, told by the digests of what each was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sprat.report.runs import Stage

_JUDGED = ("data", "eval")  # what two runs must have read alike, so that their scores can be compared


def chain(stages: Sequence[Stage], station: Callable[[Stage], int]) -> list[Stage]:
    """The run furthest on the road, and those that it was made from, in their order, all judged alike.

    A run is the furthest only where none that it was made from, however far back, has been replaced by another since or
    was judged otherwise, unless there is no such run. One of no known station goes along where it was made from these.

    Args:
        stages: in the order of the road; the first of several at one station is taken.
        station: the place of a stage on the road, -1 for one that has none.
    """
    own = [stage for stage in stages if not stage.control_of] or list(stages)
    known = [stage for stage in own if station(stage) >= 0]
    end = max([stage for stage in known if _whole(stage, stages)] or known or own, key=station)
    kept = [stage for stage in _line(end, stages) if _agree(stage, end, _JUDGED)]
    names = {stage.name for stage in kept}
    for stage in own:
        parents = {one.name for one in _parents(stage, stages)}
        if station(stage) < 0 and parents & names and _agree(stage, end, _JUDGED):
            names.add(stage.name)
    return [stage for stage in stages if stage.name in names]


def alike(control: Stage, stage: Stage) -> bool:
    """Whether a control had the start, data and judging of ``stage``, and the student's shape if there is one.

    A checkpoint to go on from is each run's own.
    """
    shapes = [one.recipe["student"] for one in (control, stage) if "student" in one.recipe]
    shared = (set(control.inputs) & set(stage.inputs)) - {"init_from"}
    return _agree(control, stage, sorted(shared)) and all(shape == shapes[0] for shape in shapes)


def same_but_for_seed(one: Stage, other: Stage) -> bool:
    """Whether two runs differ in nothing but their seed, and in how much the first of several seeds is asked."""
    recipes = [{name: value for name, value in stage.recipe.items() if name != "seed"} for stage in (one, other)]
    read = [{name: value for name, value in _digests(stage).items() if name != "asked"} for stage in (one, other)]
    return recipes[0] == recipes[1] and read[0] == read[1]


def _agree(one: Stage, other: Stage, names: Sequence[str]) -> bool:
    """Whether both read the same under each of ``names`` that both have."""
    mine, others = _digests(one), _digests(other)
    return all(mine[name] == others[name] for name in names if name in mine and name in others)


def _digests(stage: Stage) -> dict[str, Any]:
    return {name: item.get("digest") for name, item in stage.inputs.items()}


def _parents(stage: Stage, stages: Sequence[Stage]) -> list[Stage]:
    """The runs that ``stage`` was made from, as far as they are here; of two with one artefact that at its path."""
    found = []
    for item in stage.inputs.values():
        same = [one for one in stages if one is not stage and one.digest and one.digest == item.get("digest")]
        found += sorted(same, key=lambda one: bool(one.name != item.get("path")))[:1]
    return found


def _line(stage: Stage, stages: Sequence[Stage]) -> list[Stage]:
    """``stage`` and all that it was made from."""
    found, waiting = {stage.name: stage}, [stage]
    while waiting:
        new = [one for one in _parents(waiting.pop(), stages) if one.name not in found]
        found |= {one.name: one for one in new}
        waiting += new
    return list(found.values())


def _whole(stage: Stage, stages: Sequence[Stage]) -> bool:
    """Whether all that ``stage`` was made from, as far as it is here, still stands and was judged as it was."""
    return all(not _replaced(one, stages) and _agree(one, stage, _JUDGED) for one in _line(stage, stages))


def _replaced(stage: Stage, stages: Sequence[Stage]) -> bool:
    """Whether in the place of a run that ``stage`` was made from another one stands now."""
    names, here = [one.name for one in stages], [one.digest for one in stages]
    return any(item.get("path") in names and item.get("digest") not in here for item in stage.inputs.values())
