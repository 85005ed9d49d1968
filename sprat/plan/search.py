"""The best layouts of a model on a fleet, under memory, a deadline and a budget; what nearly fitted, why the rest fell.

Every product of degrees that divides is listed (tensor inside a domain of links, experts, pipeline, context for long
sequences) with every schedule, micro-batch, recomputation and ZeRO level. That makes thousands, hence three sieves:

1. arithmetic: a micro-batch is priced for the model as a whole, and the schedule's bubble by its closed formula;
2. memory of the fullest rank (``memory.py``), the most promising layouts first;
3. the simulation (``step.py``) for those that fit.

The estimate leaves out what only makes a step longer, so a layout whose estimate is beyond the best one's step cannot
win. When ``seconds`` are used up, the result says how many were left. A mixed fleet has its chips in pipeline ranks of
one kind each, and layers in proportion to their speed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from sprat.config.parallel import ParallelPlan, Schedule
from sprat.errors import ConfigError
from sprat.plan.balance import balance_layers
from sprat.plan.hardware import Chip
from sprat.plan.layer_time import Rank
from sprat.plan.memory import rank_memory
from sprat.plan.precision import recipe_of
from sprat.plan.shapes import ModelShape
from sprat.plan.simulate import StageTime
from sprat.plan.stage_time import StageMaker
from sprat.plan.step import StepEstimate, StepOptions, check_options, step_time

GIB = 2**30
SCHEDULES: tuple[tuple[Schedule, int], ...] = (
    ("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zero_bubble", 1), ("zbv", 2), ("dualpipe_v", 2),
)  # fmt: skip
RECOMPUTE = ("none", ("layernorm", "mla_up_proj", "moe_act"), "full")
LONG = 16384  # tokens of a sequence from which on context parallelism is tried
MARGIN = 0.05  # proposals are complete so far behind the best: the simulation adds 1 to 8 % to the estimate, never less
NEAR = 1.25  # of a chip's memory: what needs no more than that nearly fitted
LOOKS = 50  # at least so many, even where the estimate is far beyond the deadline
DAY = 86400.0


@dataclass(frozen=True)
class Goal:
    """What is to be trained, on what, and within what.

    Attributes:
        fleet: chips and how many of each.
        base: batch, sequence, precision and dtypes of every layout; its degrees do not count.
        tokens: of the run.
        deadline_days, budget, price: days, money, and money a chip-hour; infinite or 0: no bound.
        options: of the step.
    """

    shape: ModelShape
    fleet: tuple[tuple[Chip, int], ...]
    base: ParallelPlan
    tokens: float
    deadline_days: float = math.inf
    budget: float = math.inf
    price: float = 0.0
    options: StepOptions = StepOptions()

    @property
    def gpus(self) -> int:
        """Chips in all."""
        return sum(count for _, count in self.fleet)


@dataclass(frozen=True)
class Candidate:
    """One layout; ``seconds`` of a step are the simulation's, or the estimate's where it fell before that."""

    plan: ParallelPlan
    seconds: float
    memory_gib: float
    days: float
    cost: float
    reason: str = ""  # why it fell; "": it fits
    short: float = 0.0  # what it needs over what there is, of memory, days and money: the worst of them
    step: StepEstimate | None = None


@dataclass(frozen=True)
class Found:
    """The result: ``proposals`` best first, ``near`` misses best first, and how many fell for which reason."""

    proposals: tuple[Candidate, ...]
    near: tuple[Candidate, ...]
    reasons: dict[str, int]
    listed: int
    left: int  # that time did not suffice for

    def within(self, share: float) -> tuple[Candidate, ...]:
        """Proposals at most ``share`` slower than the best."""
        return tuple(one for one in self.proposals if one.seconds <= (1 + share) * self.proposals[0].seconds)


def search(goal: Goal, *, seconds: float = 25.0) -> Found:
    """The best layouts for ``goal``.

    Args:
        seconds: of searching.

    Raises:
        ConfigError: a number is absurd, or no layout divides. If none fits, ``near`` has those that are least short.
    """
    _check(goal)
    until = time.monotonic() + seconds
    reasons: Counter[str] = Counter()
    listed = sorted(_estimates(goal, reasons), key=lambda one: one[0])
    if not listed:
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        what = f"no layout of {goal.shape.name} divides {goal.gpus} chips and {goal.base.global_batch} sequences: {why}"
        few = math.gcd(goal.base.global_batch, 2 ** int(math.log2(goal.gpus)))
        raise ConfigError(what, where="search", todo=f"use {few} of one kind, or a batch that {goal.gpus} divides")
    fits: list[Candidate] = []
    fell: list[Candidate] = []
    looked = 0
    for estimate, plan in listed:
        best = min((one.seconds for one in fits), default=math.inf)
        late = goal.tokens / plan.step_tokens * estimate / DAY > NEAR * goal.deadline_days and looked >= LOOKS
        if time.monotonic() > until or late or estimate > (1 + MARGIN) * best:
            break
        looked += 1
        candidate = _judge(goal, plan, estimate)
        if not candidate.reason:
            fits.append(candidate)
            continue
        reasons[candidate.reason.partition(":")[0]] += 1
        if candidate.short:
            fell.append(candidate)
    near = sorted((one for one in fell if one.short <= NEAR), key=lambda one: one.seconds)
    if not fits:  # then what is least short, however much that is
        near = sorted(fell, key=lambda one: one.short)
    order = sorted(fits, key=lambda one: one.seconds)
    if slower := len(listed) - looked if time.monotonic() <= until else 0:
        reasons["slower by the estimate" if order else "deadline, by the estimate"] += slower
    return Found(tuple(order), tuple(near[:20]), dict(reasons), len(listed), len(listed) - looked - slower)


def _check(goal: Goal) -> None:
    check_options(goal.options)
    for name, most in (("tokens", 1e20), ("deadline_days", math.inf), ("budget", math.inf)):
        if not 0 < (value := getattr(goal, name)) <= most:
            raise ConfigError(f"{name} is {value}", where="search", todo="give a number above 0; tokens: 1e20 at most")
    if not (math.isfinite(goal.price) and goal.price >= 0):
        raise ConfigError(f"price is {goal.price}", where="search", todo="give money a chip-hour, 0 or more")
    if not goal.fleet or min(count for _, count in goal.fleet) < 1:
        raise ConfigError("the fleet has no chips", where="search", todo="give each kind at least one")


def _powers(most: int) -> list[int]:
    return [2**power for power in range(int(math.log2(max(1, most))) + 1)]


def _ranks_of_chips(goal: Goal, pipeline: int) -> list[Chip] | None:
    """The chip of each pipeline rank; None where a kind does not fill whole ranks."""
    if len(goal.fleet) == 1:
        return [goal.fleet[0][0]]
    each = goal.gpus // pipeline
    if goal.gpus % pipeline or any(count % each for _, count in goal.fleet):
        return None
    return [chip for chip, count in goal.fleet for _ in range(count // each)]


def _degrees(goal: Goal) -> Iterator[dict[str, int]]:
    """Products of degrees that make the fleet."""
    shape, gpus = goal.shape, goal.gpus
    experts = max((block.mixture.experts for block in shape.blocks if block.mixture), default=1)
    heads = [block.core.heads for block in shape.blocks if block.core is not None]
    domain = min(chip.domain for chip, _ in goal.fleet)
    contexts = _powers(16) if goal.base.sequence_length >= LONG else [1]
    pipelines = [each for each in _powers(len(shape.layers)) if gpus % each == 0]
    if len(goal.fleet) > 1:  # ranks of one kind: the kinds' common divisors too
        pipelines = [each for each in range(1, len(shape.layers) + 1) if gpus % each == 0]
    for tensor, pipeline, context in itertools.product(_powers(min(domain, 8)), pipelines, contexts):
        if gpus % (tensor * pipeline * context) or any(count % tensor for count in heads):
            continue
        for expert in _powers(experts):
            if experts % expert == 0 and (gpus // pipeline) % expert == 0:
                degrees = {"tensor": tensor, "pipeline": pipeline, "context": context, "expert": expert}
                yield degrees | {"data_shard": gpus // (tensor * pipeline * context)}


def _estimates(goal: Goal, reasons: Counter[str]) -> Iterator[tuple[float, ParallelPlan]]:
    """Each layout that divides, with the estimated seconds of its step."""
    base = goal.base.model_dump() | {"data_replicate": 1, "expert_tensor": 1, "stage_layers": ()}
    asked = goal.base.recompute
    recompute = RECOMPUTE if asked in RECOMPUTE else (*RECOMPUTE, asked)
    known: dict[tuple[object, ...], StageTime] = {}
    for degrees in _degrees(goal):
        chips = _ranks_of_chips(goal, degrees["pipeline"])
        if chips is None:
            reasons["a kind of chip does not fill whole pipeline ranks"] += 1
            continue
        for micro, again, zero in itertools.product((1, 2, 4, 8), recompute, (1, 3)):
            if zero == 3 and degrees["pipeline"] > 1:  # gathered anew for each micro-batch: never the better one
                continue
            shard = degrees["data_shard"] if zero == 3 else 0
            key = (degrees["tensor"], degrees["context"], degrees["expert"], shard, micro, again)
            for schedule, chunks in SCHEDULES if degrees["pipeline"] > 1 else SCHEDULES[:1]:
                facts = base | degrees | {"schedule": schedule, "virtual_stages": chunks, "micro_batch": micro}
                try:
                    plan = ParallelPlan.model_validate(facts | {"recompute": again, "zero": zero})
                except ValidationError as error:
                    reasons[_short(str(error.errors()[0]["msg"]))] += 1
                    continue
                if plan.stages > len(goal.shape.layers):
                    reasons["more stages than layers"] += 1
                    continue
                if key not in known:
                    known[key] = _whole(goal, plan, chips)
                yield _arithmetic(plan, known[key]), plan


def _short(message: str) -> str:
    """The kind of a refusal, without its numbers."""
    for words in ("global_batch", "micro-batches", "sequence_length", "expert"):
        if words in message:
            return f"{words} does not divide"
    return "does not divide"


def _whole(goal: Goal, plan: ParallelPlan, chips: Sequence[Chip]) -> StageTime:
    """A micro-batch through all layers, mean over the fleet's chips."""
    times = []
    for chip in {each.name: each for each in chips}.values():
        rank = Rank(chip, plan, recipe_of(goal.options.recipe or plan.precision), goal.options.trains_weights)
        maker = StageMaker(goal.shape, rank, mtp=goal.options.mtp)
        times.append((maker.stage(0, len(maker.layers), is_first=True, is_last=True).time(), chips.count(chip)))
    share = sum(count / (time.forward + time.backward) for time, count in times) / len(chips)
    one = times[0][0]
    scale = 1 / share / (one.forward + one.backward)
    return StageTime(scale * one.forward, scale * one.backward, scale * one.weight, scale * one.overlapped)


def _arithmetic(plan: ParallelPlan, whole: StageTime) -> float:
    """Seconds of a step by closed formulas: see deepseek-ai/DualPipe's README and arXiv 2104.04473, section 2.2."""
    ranks, chunks, number = plan.pipeline, plan.virtual_stages, plan.micro_batches
    f, b, w = (each / (ranks * chunks) for each in (whole.forward, whole.backward, whole.weight))
    pair = 2 * whole.overlapped / (ranks * chunks)
    work = number * chunks * (f + b)
    hops = ranks - 1
    if plan.schedule in ("zero_bubble", "zbv"):
        return work + hops * max(0.0, f + b - 2 * w)
    if plan.schedule == "dualpipe_v":
        apart = min(number * chunks, 3 * hops)  # chunks that warm up and cool down with no partner
        return (number * chunks - apart) * pair + apart * (f + b) + hops * max(0.0, pair + b - 3 * w)
    return work + hops * (f + b)


def _judge(goal: Goal, plan: ParallelPlan, estimate: float) -> Candidate:
    """``plan`` under memory, deadline and budget."""
    chips = _ranks_of_chips(goal, plan.pipeline) or []

    def candidate(seconds: float, gib: float, reason: str, short: float, step: StepEstimate | None) -> Candidate:
        days = goal.tokens / plan.step_tokens * seconds / DAY
        cost = days * 24 * goal.gpus * goal.price
        over = {"deadline": days / goal.deadline_days, "budget": cost / goal.budget}
        worst = max(over, key=lambda name: over[name])
        if over[worst] > 1:
            value, limit = (days, goal.deadline_days) if worst == "deadline" else (cost, goal.budget)
            reason += f"{'; ' if reason else ''}{worst}: {value:,.1f} of {limit:,.1f}"
        return Candidate(plan, seconds, gib, days, cost, reason, max(short, over[worst]) if reason else 0.0, step)

    try:
        if len(chips) > 1:
            plan = plan.replace(stage_layers=_uneven(goal, plan, chips))
        fullest = 0.0
        for rank in range(plan.pipeline):
            own = chips[rank if len(chips) > 1 else 0]
            gib = rank_memory(goal.shape, plan, rank, imbalance=goal.options.imbalance).bytes / GIB
            fullest = max(fullest, gib)
            if gib > own.memory_gib:
                what = f"memory: rank {rank} of the pipeline needs {gib:.1f} GiB of {own.memory_gib:g} on {own.name}"
                return candidate(estimate, gib, what, gib / own.memory_gib, None)
        step = step_time(goal.shape, plan, chips if len(chips) > 1 else chips[0], goal.options)
    except ConfigError as error:
        return candidate(estimate, 0.0, f"model and layout: {error}", 0.0, None)
    return candidate(step.seconds, fullest, "", 0.0, step)


def _uneven(goal: Goal, plan: ParallelPlan, chips: Sequence[Chip]) -> tuple[int, ...]:
    """Decoder layers of each stage on a mixed fleet; MTP modules are the last stage's, whoever had room for them."""
    recipe = recipe_of(goal.options.recipe or plan.precision)
    makers = [StageMaker(goal.shape, Rank(chip, plan, recipe), mtp=goal.options.mtp) for chip in chips]
    counts, modules = list(balance_layers(makers)), len(makers[0].layers) - len(goal.shape.layers)
    for stage in reversed(range(plan.stages)):
        taken = min(modules, counts[stage])
        counts[stage] -= taken
        modules -= taken
    return tuple(counts)
