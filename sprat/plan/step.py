"""How long one training step takes, where the time goes, and how much of it a failing fleet keeps.

The schedule's table is simulated with the times of its stages (``simulate.py``, ``stage_time.py``); to that come what
is once a step: gradients and parameters among data ranks as far as no micro-batch hides them, the optimizer, and what
the data loader makes the chips wait. Everything is an estimate from a catalogue; ``calibration.py`` says how far such
estimates were off and puts the interval around them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sprat.config.parallel import DTYPE_BYTES, ParallelPlan
from sprat.errors import ConfigError
from sprat.plan.balance import make_stages
from sprat.plan.counts import training_flops
from sprat.plan.hardware import Chip
from sprat.plan.layer_time import Rank
from sprat.plan.precision import recipe_of
from sprat.plan.schedule import make_table
from sprat.plan.shapes import ModelShape
from sprat.plan.simulate import Timeline, simulate
from sprat.plan.stage_time import EXPOSED, Stage
from sprat.plan.state import check_fit

EXPOSED_GRADIENTS = 0.1  # of the messages among data ranks, even where a micro-batch is long enough to hide them


@dataclass(frozen=True)
class StepOptions:
    """What a plan does not say.

    Attributes:
        recipe: how products are computed (``precision.RECIPES``); "": the plan's precision.
        mtp: whether the modules of multi-token prediction are trained along.
        trains_weights: False where adapters alone learn, so that no gradient of a weight is computed.
        imbalance: load of the fullest expert rank over the mean; 1 where tokens are dropped or forced even.
        deduplicates: whether a token goes once to a domain however many of its experts are there (DeepEP).
        data_stall: seconds a step for which the loader makes the chips wait.
        factor: how much longer the fitted chip and precision takes than its catalogue says (``calibration.py``).
    """

    recipe: str = ""
    mtp: bool = True
    trains_weights: bool = True
    imbalance: float = 1.0
    deduplicates: bool = True
    data_stall: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class Line:
    """One number of an estimate, for ``--explain``."""

    name: str
    value: float
    unit: str
    formula: str
    source: str


@dataclass(frozen=True)
class StepEstimate:
    """One step. Seconds, unless a name says otherwise; ``busy`` is the fullest rank's."""

    plan: ParallelPlan
    chips: tuple[Chip, ...]
    stages: tuple[Stage, ...]
    timeline: Timeline
    pipeline: float
    gradients: float
    optimizer: float
    data_stall: float
    factor: float
    flops_causal: float  # a token; of the main model, as papers count it
    flops_full: float
    flops_trained: float  # causal, with the MTP modules

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.factor * (self.pipeline + self.gradients + self.optimizer) + self.data_stall

    @property
    def bubble(self) -> float:
        """Seconds that ranks wait in the pipeline, mean over ranks."""
        return self.factor * self.timeline.bubble

    @property
    def tokens_per_second(self) -> float:
        """Of one chip."""
        return self.plan.step_tokens / self.seconds / self.plan.world_size

    def flops_per_second(self, *, causal: bool) -> float:
        """Model FLOP/s of one chip; neither recomputation nor MTP modules are counted."""
        return self.tokens_per_second * (self.flops_causal if causal else self.flops_full)

    def mfu(self, *, causal: bool) -> float:
        """Share of the bf16 peak, as papers print it whatever the precision (arXiv 2505.09343, table 4)."""
        peaks = [each.peak.get("bf16", max(each.peak.values())) * 1e12 for each in self.chips]
        return self.flops_per_second(causal=causal) * len(peaks) / sum(peaks)

    def terms(self) -> dict[str, float]:
        """Seconds of each kind of work on the mean rank, in one step, and the waiting: they add up to ``seconds``.

        Messages count as far as nothing hides them within a micro-batch; ``overlap`` is what pairs of micro-batches
        save beside that (negative), or what starting kernels and sending between stages adds.
        """
        sums: dict[str, float] = {}
        for stage in self.stages:
            for term in stage.terms:
                seconds = EXPOSED.get(term.name, 1.0) * (term.forward + term.inputs + term.weights)
                sums[term.name] = sums.get(term.name, 0.0) + seconds * self.plan.micro_batches / self.plan.pipeline
        overlap = self.pipeline - self.timeline.bubble - sum(sums.values())
        sums = {name: self.factor * value for name, value in sums.items()}
        once = {
            "overlap": overlap,
            "bubble": self.timeline.bubble,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
        }
        return sums | {name: self.factor * value for name, value in once.items()} | {"data stall": self.data_stall}

    def _source(self, name: str) -> str:
        """Where the rate of the term ``name`` comes from."""
        kind = _RATES.get(name, "links" if name.endswith("messages") or name == "gradients" else "")
        if not kind:
            return "sprat/plan/simulate.py" if name != "data stall" else "given"
        return "; ".join(dict.fromkeys(each.efficiency.source[kind] for each in self.chips))

    def explain(self) -> list[Line]:
        """Every number with its formula and source."""
        catalogue = "; ".join(dict.fromkeys(each.source for each in self.chips))
        lines = [Line(name, value, "s", _FORMULAS[name], self._source(name)) for name, value in self.terms().items()]
        lines += [
            Line("step", self.seconds, "s", "factor x (pipeline + gradients + optimizer) + data stall", "simulation"),
            Line(
                "pipeline", self.factor * self.pipeline, "s", "end of the last action of the table", "plan/simulate.py"
            ),
            Line("factor", self.factor, "", "exp(mean log error) of the chip and precision", "plan/calibration.py"),
            Line("tokens a second", self.tokens_per_second, "1/s/chip", "tokens of a step / seconds / chips", ""),
            Line("MFU, causal", self.mfu(causal=True), "", "tokens/s x causal FLOPs / bf16 peak", catalogue),
            Line("MFU, not causal", self.mfu(causal=False), "", "tokens/s x full FLOPs / bf16 peak", catalogue),
        ]
        return lines


_RATES = {
    **dict.fromkeys(("products", "experts", "head", "scan"), "products"),
    **dict.fromkeys(("elementwise", "quantize", "optimizer"), "memory"),
    "attention": "attention",
}
_FORMULAS = {
    "products": "2 M N K / (peak x share(M, N, K)), or bytes / bandwidth; backward: two of the same",
    "experts": "grouped products of local experts x rows; rows = tokens x ranks x top-k / experts",
    "head": "tokens x hidden x vocabulary in bf16, and 18 bytes a logit",
    "attention": "2 heads (qk + v) keys tokens / (bf16 peak x share(keys)); backward 2.5 times",
    "scan": "FLOPs of chunks / (bf16 peak / 4)",
    "elementwise": "bytes / bandwidth + kernels x start; backward twice",
    "quantize": "cast bytes x inputs / bandwidth",
    "tensor messages": "bytes (t - 1) / t / rate, twice a block and way; half of it hidden",
    "expert messages": "top-k x width x bytes to other ranks / rate, there and back",
    "context messages": "keys and values around the ring; seven tenths hidden",
    "parameter messages": "parameters gathered twice, gradients scattered, less what layers hide",
    "overlap": "what pairs of micro-batches hide (negative), or kernel starts and sends add",
    "bubble": "span of the simulated table less the busy time, mean over ranks",
    "gradients": "max(10 %, bytes (d - 1) / d / rate less one micro-batch)",
    "optimizer": "bytes of states, gradients and parameters / bandwidth",
    "data stall": "given",
}


def step_time(
    shape: ModelShape, plan: ParallelPlan, chips: Chip | Sequence[Chip], options: StepOptions = StepOptions()
) -> StepEstimate:
    """One step of ``shape`` under ``plan``.

    Args:
        chips: one for all ranks, or one for each pipeline rank (a fleet of several kinds).

    Raises:
        ConfigError: plan and model, or plan and chips, do not fit; the chip does not compute in the precision.
    """
    each = (chips,) if isinstance(chips, Chip) else tuple(chips)
    if len(each) not in (1, plan.pipeline):
        what, todo = f"{len(each)} chips for {plan.pipeline} pipeline ranks", "name one chip, or one for each rank"
        raise ConfigError(what, where="fleet", todo=todo)
    check_options(options)
    check_fit(shape, plan)
    recipe = recipe_of(options.recipe or plan.precision)
    gradient_bytes = float(DTYPE_BYTES[plan.gradient_dtype])
    ranks = [
        Rank(chip, plan, recipe, options.trains_weights, options.imbalance, options.deduplicates, gradient_bytes)
        for chip in each
    ]
    stages = make_stages(shape, ranks, mtp=options.mtp)
    send = _send_seconds(shape, plan, each)
    table = make_table(plan.schedule, plan.pipeline, plan.micro_batches, plan.virtual_stages)
    times = [stage.time() for stage in stages]
    if plan.schedule == "1f1b":  # Megatron hides sending and receiving with several stages a rank only
        times = [replace(t, forward=t.forward + send, backward=t.backward + send) for t in times]
        send = 0.0
    timeline = simulate(table, times, send)
    once = [_once(plan, rank, stages, place) for place, rank in _places(plan, ranks)]
    share = 1.0 if options.trains_weights else 2 / 3
    counts = [(True, False), (False, False), (True, options.mtp)]
    flops = [share * training_flops(shape, plan.sequence_length, causal=causal, mtp=mtp) for causal, mtp in counts]
    return StepEstimate(
        plan, each, tuple(stages), timeline, timeline.span, max(g for g, _ in once), max(o for _, o in once),
        options.data_stall, options.factor, *flops,
    )  # fmt: skip


def check_options(options: StepOptions) -> None:
    """Refuse numbers that no step has.

    Raises:
        ConfigError: see ``step_time``.
    """
    if not (math.isfinite(options.data_stall) and options.data_stall >= 0):
        raise ConfigError(f"data_stall is {options.data_stall}", where="step", todo="give seconds, 0 or more")
    if not (math.isfinite(options.factor) and options.factor > 0):
        raise ConfigError(f"factor is {options.factor}", where="step", todo="give a number above 0")
    if not 1 <= options.imbalance < 1e6:
        raise ConfigError(f"imbalance is {options.imbalance}", where="step", todo="give 1 or more, below a million")


def _places(plan: ParallelPlan, ranks: Sequence[Rank]) -> list[tuple[int, Rank]]:
    return [(place, ranks[place if len(ranks) > 1 else 0]) for place in range(plan.pipeline)]


def _send_seconds(shape: ModelShape, plan: ParallelPlan, chips: Sequence[Chip]) -> float:
    """Seconds of a micro-batch's activations from one stage to the next, over the slowest chip's links."""
    if plan.pipeline == 1:
        return 0.0
    size = 2.0 * plan.micro_batch_tokens / plan.tensor * shape.hidden
    rate = min(chip.rate(2, plan.stage_ranks) for chip in chips)
    return size / rate + 1e-5


def _once(plan: ParallelPlan, rank: Rank, stages: Sequence[Stage], place: int) -> tuple[float, float]:
    """Seconds of gradients and of the optimizer on pipeline rank ``place``, once a step."""
    own = [stages[stage] for stage in plan.stages_of_rank(place)]
    chip = rank.chip
    if not rank.trains_weights:
        return 0.0, 0.0
    dense, experts = sum(s.dense_parameters for s in own), sum(s.expert_parameters for s in own)
    messages = 0.0
    if plan.zero < 3:
        width = rank.gradient_bytes + (1.0 if rank.recipe.peak in ("fp8", "fp4") else 2.0)
        messages += chip.ring_seconds(width * dense, plan.shard_ranks, plan.tensor)
        messages += chip.ring_seconds(width * experts, plan.expert_shard_ranks, plan.expert * plan.expert_tensor)
    if plan.data_replicate > 1:
        share = plan.shard_ranks if plan.zero else 1
        size = 2 * rank.gradient_bytes * (dense + experts) / share
        messages += chip.ring_seconds(size, plan.data_replicate, plan.stage_ranks // plan.data_replicate)
    window = sum(s.time().forward + s.time().backward for s in own)
    gradients = max(EXPOSED_GRADIENTS * messages, messages - window)
    moments = {"adamw": 2, "muon": 1, "sgd": 0}[plan.optimizer]
    states = 2 * (moments * DTYPE_BYTES[plan.moment_dtype] + DTYPE_BYTES[plan.master_dtype])  # read and written
    moved = states + rank.gradient_bytes + 2.0
    shares = (plan.shard_ranks, plan.expert_shard_ranks) if plan.zero else (1, 1)
    held = dense / shares[0] + experts / shares[1]
    return gradients, chip.memory_seconds(moved * held + rank.gradient_bytes * (dense + experts) * (plan.zero < 2))
