"""How one training run is spread over its ranks: the type that the planner prices and the trainer carries out.

The names and the meaning of the degrees are torchtitan's (``data_parallel_replicate_degree`` and its siblings):

- The world is ``data_replicate * data_shard * context * tensor * pipeline`` ranks.
- Experts need no ranks of their own: ``expert * expert_tensor`` ranks are taken out of
  ``data_shard * context * tensor`` of a stage, and the experts that a rank holds are repeated on the rest of them.
- ``zero`` says what the ranks that hold the same parameters share out among them (Rajbhandari et al. 2020, arXiv
  1910.02054): 0 nothing, 1 the optimizer's state, 2 the gradients too, 3 the parameters too (FSDP).
- Stages of the pipeline are numbered in the order of the layers, ``pipeline * virtual_stages`` of them. A loop puts
  stage ``s`` on rank ``s % pipeline``; the V of ``zbv`` and ``dualpipe_v`` goes there and back.

What does not fit is refused with the product that does not divide and the nearest one that does.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sprat.config.base import Config
from sprat.errors import ConfigError

Schedule = Literal["1f1b", "interleaved", "zero_bubble", "zbv", "dualpipe_v"]
Precision = Literal["fp32", "bf16", "fp8"]
StateDtype = Literal["fp32", "bf16", "fp16", "fp8", "none"]
# The modules that can be computed a second time on the way back, by Megatron's names (``--recompute-modules``).
RecomputeModule = Literal["core_attn", "layernorm", "mla_up_proj", "moe_act", "mlp", "moe", "shared_experts"]
Recompute = Literal["none", "selective", "full"] | tuple[RecomputeModule, ...]

V_SCHEDULES = ("zbv", "dualpipe_v")
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "none": 0}
MOST_MICRO_BATCHES = 2**14  # of a pipeline in one step
Degree = Annotated[int, Field(ge=1, le=2**20)]
LayerCount = Annotated[int, Field(ge=0)]


def nearest_multiples(number: int, step: int) -> tuple[int, ...]:
    """The multiples of ``step`` around ``number``, the nearer one first; 0 is none.

    >>> nearest_multiples(61, 16), nearest_multiples(3, 16)
    ((64, 48), (16,))
    """
    below = number // step * step
    around = [each for each in (below, below + step) if each > 0]
    return tuple(sorted(around, key=lambda each: abs(each - number)))


def nearest_divisor(number: int, of: int) -> int:
    """The divisor of ``of`` that is nearest to ``number``; the smaller of two.

    >>> nearest_divisor(48, 128), nearest_divisor(5, 8)
    (32, 4)
    """
    low = [each for each in range(1, math.isqrt(of) + 1) if of % each == 0]
    return min((*low, *(of // each for each in low)), key=lambda each: (abs(each - number), each))


def _or(numbers: tuple[int, ...]) -> str:
    return " or ".join(str(each) for each in numbers)


class ParallelPlan(Config):
    """Degrees, batch, schedule and dtypes of a run. Batches are in sequences, ``sequence_length`` in tokens."""

    data_replicate: Degree = 1  # groups of ranks that each hold the whole model (DDP, HSDP)
    data_shard: Degree = 1  # ranks with different data among which ZeRO shares and experts spread
    tensor: Degree = 1  # with sequence parallelism: what lies between the products is cut by it too
    pipeline: Degree = 1
    expert: Degree = 1
    expert_tensor: Degree = 1  # ranks that cut each expert
    context: Degree = 1
    schedule: Schedule = "1f1b"
    virtual_stages: Degree = 1  # stages that a rank of the pipeline holds
    stage_layers: tuple[LayerCount, ...] = ()  # decoder layers of each stage, in their order; empty: even
    micro_batch: int = Field(1, ge=1, le=2**20)  # sequences of a rank that go through at once
    global_batch: int = Field(1, ge=1, le=2**40)  # sequences of a step
    sequence_length: int = Field(4096, ge=1, le=2**31)
    recompute: Recompute = "none"  # selective: core_attn
    precision: Precision = "bf16"  # of the products; fp8 as DeepSeek-V3 has it: linears only, the head in bf16
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    master_dtype: StateDtype = "fp32"  # none: the parameters themselves are stepped, as with fp32 they always are
    moment_dtype: StateDtype = "fp32"
    gradient_dtype: StateDtype = "fp32"  # of what gradients are added up in
    zero: int = Field(1, ge=0, le=3)

    @property
    def data_ranks(self) -> int:
        """Ranks with data of their own: context, tensor and pipeline ranks share theirs."""
        return self.data_replicate * self.data_shard

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline rank's place."""
        return self.data_ranks * self.context * self.tensor

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.stage_ranks * self.pipeline

    @property
    def shard_ranks(self) -> int:
        """Ranks among which ZeRO shares a parameter that is no expert's."""
        return self.data_shard * self.context

    @property
    def expert_shard_ranks(self) -> int:
        """Ranks among which ZeRO shares an expert's parameters: those that hold the same experts."""
        return self.data_shard * self.context * self.tensor // (self.expert * self.expert_tensor)

    @property
    def stages(self) -> int:
        """Stages of the pipeline, all ranks' together."""
        return self.pipeline * self.virtual_stages

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step that go through each pipeline."""
        return self.global_batch // (self.data_ranks * self.micro_batch)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one micro-batch on one rank: context parallelism cuts the sequence."""
        return self.micro_batch * self.sequence_length // self.context

    @property
    def step_tokens(self) -> int:
        """Tokens of one step, the whole world's."""
        return self.global_batch * self.sequence_length

    @property
    def recompute_modules(self) -> tuple[str, ...]:
        """Modules that are computed a second time; ``("full",)``: whole layers."""
        if isinstance(self.recompute, tuple):
            return self.recompute
        return {"none": (), "selective": ("core_attn",), "full": ("full",)}[self.recompute]

    def rank_of_stage(self, stage: int) -> int:
        """The pipeline rank that holds ``stage`` (both 0-based)."""
        turn, place = divmod(stage, self.pipeline)
        return self.pipeline - 1 - place if self.schedule in V_SCHEDULES and turn % 2 else place

    def stages_of_rank(self, rank: int) -> tuple[int, ...]:
        """The stages that pipeline rank ``rank`` holds, in their order."""
        return tuple(stage for stage in range(self.stages) if self.rank_of_stage(stage) == rank)

    def split_layers(self, layers: int) -> tuple[int, ...]:
        """Decoder layers of each stage of a model of ``layers``: ``stage_layers``, or even.

        Even as torchtitan has it: embedding and head count as a layer each, and the first stages take the rest.

        >>> ParallelPlan(pipeline=4, global_batch=4).split_layers(10)
        (2, 3, 3, 2)

        Raises:
            ConfigError: ``stage_layers`` has another sum, or there are more stages than the model can fill.
        """
        if self.stage_layers:
            if sum(self.stage_layers) != layers:
                what = f"stage_layers add up to {sum(self.stage_layers)}, and the model has {layers} layers"
                off = layers - sum(self.stage_layers[:-1])
                todo = f"give the last stage {off}" if off >= 0 else f"take {sum(self.stage_layers) - layers} away"
                raise ConfigError(what, where="stage_layers", todo=todo)
            return self.stage_layers
        if self.stages == 1:
            return (layers,)
        if self.stages > layers + 2:
            what = f"pipeline {self.pipeline} * virtual_stages {self.virtual_stages} = {self.stages} stages"
            most = nearest_multiples(layers + 2, self.pipeline)
            fits = max((each for each in most if each <= layers + 2), default=0)
            say = f", say {fits}: virtual_stages {fits // self.pipeline}" if fits else ""
            todo = f"use at most {layers + 2}{say}"
            raise ConfigError(f"{what} for {layers} layers, an embedding and a head", where="pipeline", todo=todo)
        each, rest = divmod(layers + 2, self.stages)
        counts = [each + (stage < rest) for stage in range(self.stages)]
        counts[0] -= 1
        counts[-1] -= 1
        return tuple(counts)

    def check_world(self, gpus: int) -> None:
        """Refuse a fleet that the plan does not fill exactly.

        Raises:
            ConfigError: ``gpus`` is not ``world_size``; it names the ``data_replicate`` that comes nearest.
        """
        if gpus == self.world_size:
            return
        rest = self.world_size // self.data_replicate
        product = "data_shard * context * tensor * pipeline"
        what = f"data_replicate {self.data_replicate} * {product} {rest} = {self.world_size} ranks, not {gpus}"
        fits = nearest_multiples(gpus, rest)
        todo = f"use {_or(fits)} ranks: data_replicate {_or(tuple(each // rest for each in fits))}"
        raise ConfigError(what, where="world size", todo=todo)

    def check_model(self, *, tensor_cuts: int = 0, **sizes: int) -> None:
        """Refuse a model that the degrees do not cut evenly.

        Args:
            tensor_cuts: what all that ``tensor`` cuts have in common, where ``sizes`` are not all of the model's.
            sizes: ``layers``, ``heads``, ``kv_heads``, ``experts``, ``ffn``, ``expert_ffn``; 0 or absent: it has none.

        Raises:
            ConfigError: a degree does not divide what it cuts; it names the nearest one that does.
        """
        if layers := sizes.get("layers", 0):
            self.split_layers(layers)
        ranks, of_tensor = self.data_shard * self.context * self.tensor, ("heads", "ffn", "kv_heads")
        common = math.gcd(self.sequence_length // self.context, tensor_cuts, *(sizes.get(n, 0) for n in of_tensor))
        cuts = [("tensor", self.tensor, name, common) for name in of_tensor]  # what the nearest one has to divide too
        cuts.append(("expert", self.expert, "experts", ranks // self.expert_tensor))
        cuts.append(("expert_tensor", self.expert_tensor, "expert_ffn", ranks // self.expert))
        for key, degree, name, too in cuts:
            size, repeats = sizes.get(name, 0), name == "kv_heads"
            if size % degree and not (repeats and degree % size == 0):
                verb = "neither divides nor repeats" if repeats else "does not divide"
                todo = f"use {key} {nearest_divisor(degree, math.gcd(size, too))}"
                raise ConfigError(f"{key} {degree} {verb} {size} {name}", where=key, todo=todo)
        if self.expert > 1 and not sizes.get("experts", 0):
            raise ConfigError(f"expert {self.expert} for a model without experts", where="expert", todo="use expert 1")

    @model_validator(mode="after")
    def _degrees_hold_together(self) -> Self:
        """Refuse products that do not divide."""
        ranks, wanted = self.data_shard * self.context * self.tensor, self.expert * self.expert_tensor
        if ranks % wanted:
            cut = nearest_divisor(self.expert_tensor, ranks)
            fit = f"expert {nearest_divisor(self.expert, ranks // cut)}"
            fit += f" * expert_tensor {cut}" if cut != self.expert_tensor else ""
            product = f"data_shard {self.data_shard} * context {self.context} * tensor {self.tensor} = {ranks}"
            name = f"expert {self.expert}"
            name += f" * expert_tensor {self.expert_tensor} = {wanted}" if self.expert_tensor > 1 else ""
            more = _or(nearest_multiples(ranks, wanted))
            raise ValueError(f"{name} does not divide {product}; nearest: {fit}, or {more} ranks")
        pieces = 2 * self.context if self.context > 1 else 1  # each rank takes one from the front and one from the end
        length = self.sequence_length
        if length % pieces:
            what = f"2 * context {self.context} = {pieces} does not divide sequence_length {length}"
            raise ValueError(f"{what}; nearest: {_or(nearest_multiples(length, pieces))}")
        if (length // self.context) % self.tensor:
            near = _or(nearest_multiples(length, pieces * self.tensor))
            what = f"context {self.context} * tensor {self.tensor} = {self.context * self.tensor}"
            raise ValueError(f"{what} does not divide sequence_length {length}; nearest: {near}")
        return self

    @model_validator(mode="after")
    def _batch_holds_together(self) -> Self:
        """Refuse a batch that the ranks cannot share evenly."""
        each = self.data_ranks * self.micro_batch
        if self.global_batch % each:
            product = f"data_replicate {self.data_replicate} * data_shard {self.data_shard}"
            what = f"{product} * micro_batch {self.micro_batch} = {each} does not divide global_batch"
            raise ValueError(f"{what} {self.global_batch}; nearest: {_or(nearest_multiples(self.global_batch, each))}")
        if self.micro_batches > MOST_MICRO_BATCHES:
            raise ValueError(f"{self.micro_batches} micro-batches; nearest: global_batch {MOST_MICRO_BATCHES * each}")
        return self

    @model_validator(mode="after")
    def _pipeline_holds_together(self) -> Self:
        """Refuse stages that the schedule cannot run."""
        if self.stage_layers and len(self.stage_layers) != self.stages:
            product = f"pipeline {self.pipeline} * virtual_stages {self.virtual_stages} = {self.stages}"
            raise ValueError(f"stage_layers names {len(self.stage_layers)} stages, and {product}; give each its layers")
        if self.pipeline == 1:
            if self.virtual_stages > 1:
                raise ValueError(f"virtual_stages {self.virtual_stages} without a pipeline; nearest: 1")
            return self
        if self.schedule == "1f1b" and self.virtual_stages > 1:
            raise ValueError(f"1f1b has virtual_stages 1, not {self.virtual_stages}; nearest: schedule interleaved")
        if self.schedule == "interleaved" and self.virtual_stages < 2:
            raise ValueError("interleaved has virtual_stages 2 or more; nearest: 2, or schedule 1f1b")
        if self.schedule in V_SCHEDULES and self.virtual_stages != 2:
            raise ValueError(f"{self.schedule} has virtual_stages 2, not {self.virtual_stages}; nearest: 2")
        if self.schedule == "dualpipe_v" and self.micro_batches < 2 * self.pipeline:
            least = 2 * self.pipeline * self.data_ranks * self.micro_batch
            what = f"dualpipe_v needs 2 * pipeline {self.pipeline} = {2 * self.pipeline} micro-batches"
            raise ValueError(f"{what}, not {self.micro_batches}; nearest: global_batch {least}")
        rounds = max(1, self.micro_batches // self.pipeline)
        if self.schedule in ("interleaved", "zero_bubble") and self.micro_batches % rounds:
            near = nearest_multiples(self.micro_batches, self.pipeline)
            batches = tuple(count * self.data_ranks * self.micro_batch for count in near)
            what = f"{self.schedule} needs a multiple of pipeline {self.pipeline} micro-batches"
            raise ValueError(f"{what}, not {self.micro_batches}; nearest: global_batch {_or(batches)}")
        return self


def v3_plan(**changes: Any) -> ParallelPlan:
    """The published layout of DeepSeek-V3 (arXiv 2412.19437, section 3) on 2,048 GPUs, with ``changes``.

    Pipeline 16 in the V form of DualPipe, experts over 64 ranks, ZeRO-1; norms, MLA's up-projections and SwiGLU are
    computed twice, moments are bf16 (sections 3.2 and 3.3). The batch is that of its ramp's end.
    """
    table = {
        "data_shard": 128, "pipeline": 16, "expert": 64, "schedule": "dualpipe_v", "virtual_stages": 2,
        "global_batch": 15360, "sequence_length": 4096, "recompute": ("layernorm", "mla_up_proj", "moe_act"),
        "precision": "fp8", "moment_dtype": "bf16",
    }  # fmt: skip
    return ParallelPlan.model_validate(table | changes)
