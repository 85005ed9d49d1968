"""Tables of a pipeline are torch's own, action for action, and their bubbles are those that were published."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from sprat.errors import ConfigError
from sprat.plan.schedule import Action, ScheduleName, make_table, stages_of_rank
from sprat.plan.simulate import StageTime, simulate

SHAPES = [(pp, n) for pp in (1, 2, 3, 4, 5, 8, 16) for n in (1, 2, 3, 4, 5, 8, 9, 15, 16, 24, 32, 40)]


def torch_table(name: str, pipeline: int, micro_batches: int, chunks: int) -> list[list[str]]:
    """The same table of torch.distributed.pipelining, idle slots and its own bookkeeping left out."""
    from torch.distributed.pipelining import schedules
    from torch.distributed.pipelining.stage import _PipelineStageBase

    def no_call(*_: Any) -> None:
        raise AssertionError("a stage that only has a number computes nothing")

    abstract = dict.fromkeys(_PipelineStageBase.__abstractmethods__, no_call)
    bare = type("Stage", (_PipelineStageBase,), abstract | {"__init__": lambda self, **facts: vars(self).update(facts)})

    kind = getattr(schedules, name)
    facts = {"num_stages": pipeline * chunks, "group_size": pipeline, "group_rank": 0, "submod": None, "group": None}
    stages = [bare(stage_index=index * pipeline, **facts) for index in range(chunks)]
    if name == "Schedule1F1B":
        order = kind(stages[0], n_microbatches=micro_batches)._get_pipeline_order()
    else:
        order = kind(stages, n_microbatches=micro_batches).pipeline_order
    computed = ("F", "I", "W", "B", "OVERLAP_F_B")
    actions = [[a for a in order[rank] if a is not None and a.computation_type.value in computed] for rank in order]
    if name == "Schedule1F1B":  # its printed table numbers the last rank's forwards from 1; what runs begins with 0
        last = [a for a in actions[-1] if a.computation_type.value == "F"]
        numbers = {id(a): a._replace(microbatch_index=number) for number, a in enumerate(last)}
        actions[-1] = [numbers.get(id(a), a) for a in actions[-1]]
    return [[written(action) for action in rank] for rank in actions]


def written(action: Any) -> str:
    """An action of torch as ours are written."""
    if action.sub_actions:
        return "+".join(written(part) for part in action.sub_actions)
    return f"{action.stage_index}{action.computation_type.value}{action.microbatch_index}"


def shape_is_torchs(name: str, pipeline: int, micro_batches: int) -> bool:
    """Whether torch's own class takes this shape (and, of 1F1B, computes nothing beyond the last micro-batch)."""
    if name in ("ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble"):
        return micro_batches % max(1, micro_batches // pipeline) == 0
    if name == "ScheduleDualPipeV":
        return micro_batches >= 2 * pipeline
    return name != "Schedule1F1B" or micro_batches >= pipeline


@pytest.mark.parametrize(
    ("ours", "theirs", "chunks"),
    [
        ("1f1b", "Schedule1F1B", 1),
        *[("interleaved", "ScheduleInterleaved1F1B", chunks) for chunks in (1, 2, 3, 4)],
        *[("zero_bubble", "ScheduleInterleavedZeroBubble", chunks) for chunks in (1, 2, 3)],
        ("zbv", "ScheduleZBVZeroBubble", 2),
        ("dualpipe_v", "ScheduleDualPipeV", 2),
    ],
)
def test_tables_are_torchs_action_for_action(ours: ScheduleName, theirs: str, chunks: int) -> None:
    shapes = [shape for shape in SHAPES if shape_is_torchs(theirs, *shape)]
    assert len(shapes) >= 20
    for pipeline, micro_batches in shapes:
        own = [[str(a) for a in rank] for rank in make_table(ours, pipeline, micro_batches, chunks)]
        assert own == torch_table(theirs, pipeline, micro_batches, chunks), (pipeline, micro_batches)


def times_of(forward: float, backward: float, weight: float, pair: float, stages: int) -> list[StageTime]:
    return [StageTime(forward, backward, weight, pair / 2) for _ in range(stages)]


@pytest.mark.parametrize(("pp", "n"), [(2, 4), (4, 8), (4, 32), (8, 24), (16, 64)])
@pytest.mark.parametrize(("f", "b", "w", "fb"), [(1.0, 2.0, 1.0, 3.0), (1.0, 2.0, 0.75, 2.5), (1.0, 2.5, 1.0, 3.25)])
def test_bubbles_are_the_published_formulas(pp: int, n: int, f: float, b: float, w: float, fb: float) -> None:
    # deepseek-ai/DualPipe, README: F, B, W = forward, full backward, weights' backward; FB = overlapped pair
    bubble = simulate(make_table("1f1b", pp, n), times_of(f, b, w, fb, pp)).bubble
    assert bubble == pytest.approx((pp - 1) * (f + b), rel=1e-9)
    bubble = simulate(make_table("zero_bubble", pp, n), times_of(f, b, w, fb, pp)).bubble
    assert bubble == pytest.approx((pp - 1) * (f + b - 2 * w), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("pp", "n"), [(2, 4), (4, 8), (4, 32), (8, 24), (16, 64), (32, 64)])
def test_the_bubble_of_dualpipe_is_its_published_formula(pp: int, n: int) -> None:
    half = pp // 2  # DualPipe on pp ranks is two of these, mirrored

    def idle(f: float, b: float, w: float, fb: float) -> float:
        timeline = simulate(make_table("dualpipe_v", half, n, 2), times_of(f, b, w, fb, pp))
        return timeline.span - min(timeline.busy)

    for fb in (3.0, 2.75, 2.5):  # the table is tight where F, I and W take equally long: the formula to the letter
        assert idle(1.0, 2.0, 1.0, fb) == pytest.approx((half - 1) * (fb + 2 - 3), rel=1e-9, abs=1e-9)
    if pp >= 16:  # elsewhere the formula is what many ranks come near to
        for f, b, w, fb in ((1.0, 2.0, 0.75, 3.0), (1.0, 2.5, 1.0, 3.5), (1.0, 2.4, 1.2, 3.4)):
            assert idle(f, b, w, fb) == pytest.approx((half - 1) * (fb + b - 3 * w), rel=0.07)


def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank() -> None:
    # arXiv 2104.04473, section 2.2: (p - 1) (F + B) / v
    for pp, n, chunks in itertools.product((2, 4, 8), (16, 32), (1, 2, 4)):
        times = times_of(1 / chunks, 2 / chunks, 1 / chunks, 0, pp * chunks)
        bubble = simulate(make_table("interleaved", pp, n, chunks), times).bubble
        assert bubble == pytest.approx((pp - 1) * 3 / chunks, rel=1e-9)


def test_zbv_has_no_bubble_inside_where_all_parts_take_equally_long() -> None:
    # arXiv 2401.10241, section 6: only the way to the last rank and back is left
    timeline = simulate(make_table("zbv", 4, 16, 2), times_of(1.0, 2.0, 1.0, 0, 8))
    for begins, ends in zip(timeline.begin, timeline.end, strict=True):
        assert all(begin == pytest.approx(end) for begin, end in zip(begins[1:], ends[:-1], strict=True))


def test_every_micro_batch_passes_every_stage_once_each_way() -> None:
    for name, chunks in (("interleaved", 2), ("zero_bubble", 2), ("zbv", 2), ("dualpipe_v", 2)):
        table = make_table(name, 4, 8, chunks)  # type: ignore[arg-type]
        seen: dict[str, list[tuple[int, int]]] = {"F": [], "I": [], "W": []}
        for rank, actions in enumerate(table):
            assert {a.stage for a in actions} == set(stages_of_rank(name, 4, chunks, rank))  # type: ignore[arg-type]
            for a in actions:
                if a.kind in ("F", "FB"):
                    seen["F"].append((a.stage, a.micro_batch))
                back = (a.backward_stage, a.backward_micro_batch) if a.kind == "FB" else (a.stage, a.micro_batch)
                for kind in ("I", "W"):
                    if a.kind in ("B", "FB", kind):
                        seen[kind].append(back)
        every = sorted(itertools.product(range(8), range(8)))
        assert all(sorted(passes) == every for passes in seen.values())


def test_a_slow_rank_and_a_long_way_are_waited_for() -> None:
    # two ranks, one micro-batch: F, way, F, B, way, B
    timeline = simulate(make_table("1f1b", 2, 1), [StageTime(1, 2), StageTime(10, 20)], send=0.5)
    assert timeline.span == pytest.approx(1 + 0.5 + 10 + 20 + 0.5 + 2)
    # many micro-batches: the slow rank is always busy once it has begun
    timeline = simulate(make_table("1f1b", 2, 8), [StageTime(1, 2), StageTime(10, 20)])
    assert timeline.span == pytest.approx(1 + 8 * 30 + 2)


@pytest.mark.parametrize(
    ("name", "pp", "n", "chunks", "says"),
    [
        ("gpipe", 4, 8, 1, "unknown schedule"),
        ("1f1b", 0, 8, 1, "at least 1"),
        ("1f1b", 4, 8, 2, "interleaved"),
        ("zbv", 4, 8, 3, "two"),
        ("dualpipe_v", 4, 7, 2, "at least 8"),
        ("interleaved", 4, 9, 2, "8 or 10"),
    ],
)
def test_tables_that_do_not_exist_are_refused(name: Any, pp: int, n: int, chunks: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_table(name, pp, n, chunks)


def test_a_table_that_waits_for_ever_is_refused() -> None:
    table = ((Action("B", 0, 0), Action("F", 0, 0)),)
    with pytest.raises(ConfigError, match="for ever before 0B0"):
        simulate(table, [StageTime(1, 2)])
