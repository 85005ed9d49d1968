# size: adapters of linears and of stacked experts, put in, taken out and merged, are one noun
"""LoRA: adapters beside frozen matrices (Hu et al., arXiv 2106.09685), with rsLoRA and DoRA by option.

The trick. What fine-tuning changes in a matrix W [out, in] has low rank, so it is learned as a product of two thin
ones: ``W + s B A`` with ``A`` [r, in] and ``B`` [out, r]. ``B`` starts at zero, so a fresh adapter changes no bit of
the output. W gets no gradient and no optimizer state: a step saves one of the three products of each linear, the
gradients of embedding and head, and the memory of the moments. ``s`` is ``alpha / r``, or ``alpha / sqrt(r)`` in rsLoRA
(Kalajdzievski, arXiv 2312.03732), with which high ranks learn as fast as low ones.

DoRA (Liu et al., arXiv 2402.09353, section 4) learns direction and length apart: the sum is normalized row by row and
multiplied by a learned magnitude, ``m * (W + s B A) / |W + s B A|``. The norm counts as a constant for the gradient
(section 4.3). ``m`` starts as the norm of W's rows, so that the factor is exactly one.

``LoRALinear`` stands where a ``Linear`` stood, ``LoRAExperts`` where a layer's stacked experts stood (each expert has
an A and a B of its own; grouped products serve all), and ``LoRAMLP`` is an ``MLP`` that keeps the merged product of
gate and up and its kernel. Names, initial values and scales are PEFT's. Routers, head and embedding are left alone.

Left out: dropout (its masks would have to be drawn alike however a batch is cut over threads), biases, quantized bases.
"""

# N rows, E experts, M rows of all experts, I inputs, O outputs, R rank, F width of a gate, D hidden

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprat.config.model import LoRAConfig
from sprat.errors import CheckpointError, ConfigError
from sprat.kernels import ops
from sprat.kernels.mixed_precision import adapted_linear
from sprat.model.layers import Embedding, Linear, LinearBase, linears, product_weight, replace_linears
from sprat.model.moe import MLP, Experts
from sprat.model.transformer import Transformer

Product = Callable[[Tensor, Tensor], Tensor]  # rows and a matrix (or a stack) -> rows
ALL_LINEAR = "all-linear"
# Projections of routed experts, by their names in published checkpoints, and their stacks.
EXPERT_PROJECTIONS = {"gate_proj": "w_gate_EFD", "up_proj": "w_up_EFD", "down_proj": "w_down_EDF"}


class LowRank(nn.Module):
    """The adapter of a matrix [O, I], or of a stack [E, O, I] with the same shapes behind an E.

    ``lora_A`` [R, I] is uniform in +-1/sqrt(I) (Kaiming's with a = sqrt 5), ``lora_B`` [O, R] zero, and DoRA's
    ``lora_magnitude_vector`` [O] the norm of the rows. They are float32 even beside a narrower matrix.
    """

    lora_magnitude_vector: nn.Parameter | None

    def __init__(self, weight: Tensor, config: LoRAConfig, generator: torch.Generator) -> None:
        super().__init__()
        *stack, outputs, inputs = weight.shape
        self.config, dtype = config, torch.promote_types(weight.dtype, torch.float32)
        self.scaling = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
        start = torch.empty(*stack, config.rank, inputs).uniform_(-1, 1, generator=generator) / math.sqrt(inputs)
        self.lora_A = nn.Parameter(start.to(weight.device, dtype))
        self.lora_B = nn.Parameter(self.lora_A.new_zeros(*stack, outputs, config.rank))
        norms = torch.linalg.vector_norm(weight.detach().to(dtype), dim=-1)
        self.lora_magnitude_vector = nn.Parameter(norms) if config.dora else None

    def forward(self, x: Tensor, product: Product = F.linear) -> Tensor:
        """What is added to the product of ``x`` [..., I] and the matrix: ``s x A^T B^T`` [..., O], of its dtype."""
        return product(product(x, self.lora_A.to(x.dtype)) * self.scaling, self.lora_B.to(x.dtype))

    def row_scale(self, weight: Tensor) -> Tensor | None:
        """DoRA's factor of each output [O]; None without DoRA."""
        if self.lora_magnitude_vector is None:
            return None
        with torch.no_grad():
            norms = torch.linalg.vector_norm(self._sum(weight), dim=-1)
            norms.clamp_(min=torch.finfo(norms.dtype).tiny)  # a row of zeros stays one
        scale: Tensor = self.lora_magnitude_vector / norms
        return scale

    def merge(self, weight: Tensor) -> Tensor:
        """The matrix that ``weight`` and the adapter are together, in the dtype of ``weight``."""
        total, scale = self._sum(weight), self.row_scale(weight)
        return (total if scale is None else total * scale.unsqueeze(-1)).to(weight.dtype)

    def _sum(self, weight: Tensor) -> Tensor:
        return weight + (self.lora_B * self.scaling) @ self.lora_A


def _adapted_product(x: Tensor, bases: Sequence[Linear], own: Sequence[LowRank], dtype: torch.dtype) -> Tensor:
    """Products with ``bases`` and their adapters side by side, in ``dtype``; biases and DoRA are the caller's."""
    downs, ups = [each.lora_A for each in own], [each.lora_B for each in own]
    return adapted_linear(x, [base.weight for base in bases], downs, ups, own[0].scaling, dtype)


class LoRALinear(LinearBase):
    """``y = x W'^T + b`` with ``W' = W + s B A``, or DoRA's; stands where the ``Linear`` ``base`` stood."""

    weight_names = ()  # its matrix is the base's, which is found by itself

    def __init__(self, base: Linear, adapter: LowRank) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out], same dtype."""
        if (dtype := self.base.compute_dtype) is not None:
            y = _adapted_product(x, [self.base], [self.adapter], dtype)
            y = y if self.base.bias is None else y + self.base.bias
        else:
            y = self.base(x).add_(self.adapter(x))
        scale = self.adapter.row_scale(self.base.weight)
        if scale is not None:
            y = y * scale.to(y.dtype)
            if self.base.bias is not None:  # which has no part in the factor
                y = y + self.base.bias * (1 - scale).to(y.dtype)
        out: Tensor = y
        return out

    def dense_weight(self) -> Tensor:
        """The matrix W' [out, in], in the dtype of the base."""
        return self.adapter.merge(self.base.weight)

    def merge(self) -> Linear:
        """The base, with W' in the place of W."""
        self.base.weight = nn.Parameter(self.dense_weight().detach())
        return self.base


class LoRAMLP(MLP):
    """An ``MLP`` whose gate or up is adapted, with both products and their kernel in one; see ``ops.swiglu``."""

    def __init__(self, mlp: MLP) -> None:
        nn.Module.__init__(self)  # the linears of MLP are what we are given
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., D] -> [..., D]."""
        pair: list[Linear | LoRALinear] = [self.gate_proj, self.up_proj]
        adapters = [linear.adapter if isinstance(linear, LoRALinear) else None for linear in pair]
        bases = [linear.base if isinstance(linear, LoRALinear) else linear for linear in pair]
        if (dtype := bases[0].compute_dtype) is not None and all(own and not own.config.dora for own in adapters):
            both = _adapted_product(x, bases, [own for own in adapters if own], dtype)
            merged: Tensor = self.down_proj(ops.silu_and_mul(both))
            return merged
        gate_FD, up_FD = (product_weight(base) for base in bases)
        adapt = functools.partial(_adapt_gate_up, adapters, [base.dense_weight() for base in bases])
        hidden = ops.swiglu(x, gate_FD, up_FD, adapt)
        out: Tensor = self.down_proj(hidden)
        return out


class LoRAExperts(Experts):
    """Stacked experts of which some projections are adapted, each expert's by itself; stands where ``base`` stood."""

    weight_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: Experts, adapters: Mapping[str, LowRank]) -> None:
        nn.Module.__init__(self)  # the stacks of Experts are the base's
        self.base = base
        self.gate_proj, self.up_proj, self.down_proj = (adapters.get(name) for name in EXPERT_PROJECTIONS)

    def forward(self, x_MD: Tensor, rows_E: Tensor) -> Tensor:
        """See ``Experts``."""
        base, ends_E = self.base, rows_E.cumsum(0).to(torch.int32)
        product = functools.partial(ops.grouped_mm, ends_E=ends_E)
        gate_up, weights = (self.gate_proj, self.up_proj), (base.w_gate_EFD, base.w_up_EFD)
        adapt = functools.partial(_adapt_gate_up, gate_up, weights, product=product, rows_E=rows_E)
        is_adapted = any(each is not None for each in gate_up)
        hidden_MF = ops.grouped_swiglu(x_MD, *weights, ends_E, adapt if is_adapted else None)
        y_MD = product(hidden_MF, base.w_down_EDF)
        if self.down_proj is not None:
            y_MD = y_MD.add_(self.down_proj(hidden_MF, product))
            if (scale_ED := self.down_proj.row_scale(base.w_down_EDF)) is not None:
                y_MD = y_MD * scale_ED.repeat_interleave(rows_E, 0).to(y_MD.dtype)
        return y_MD

    def merge(self) -> Experts:
        """The base, with what its stacks and the adapters are together in their place."""
        for name, leaf in EXPERT_PROJECTIONS.items():
            if (adapter := getattr(self, name)) is not None:
                setattr(self.base, leaf, nn.Parameter(adapter.merge(getattr(self.base, leaf)).detach()))
        return self.base


def _adapt_gate_up(
    adapters: Sequence[LowRank | None],
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    product: Product = F.linear,
    rows_E: Tensor | None = None,
) -> Tensor:
    """``y`` [..., 2F] (overwritten), the products of gate and up side by side, with their adapters."""
    pairs, width = list(zip(adapters, weights, strict=True)), y.shape[-1] // 2
    parts = [y.new_zeros(*y.shape[:-1], width) if own is None else own(x, product) for own, _ in pairs]
    y = y.add_(torch.cat(parts, -1))
    scales = [None if own is None else own.row_scale(weight) for own, weight in pairs]
    if all(scale is None for scale in scales):
        return y
    ones = torch.ones(weights[0].shape[:-1], dtype=y.dtype, device=y.device)
    scale = torch.cat([ones if each is None else each.to(y.dtype) for each in scales], -1)
    return y * (scale if rows_E is None else scale.repeat_interleave(rows_E, 0))


def target_names(model: nn.Module) -> list[str]:
    """What can be adapted, or is, by name: every linear but the head, and of a layer's experts each projection.

    Those of experts are called as one expert's are in published checkpoints: ``layers.1.mlp.experts.gate_proj``.
    """
    plain = ((name, linear) for name, linear in linears(model) if name.rpartition(".")[2] != "base")
    return [target for name, linear in plain for target in _targets_of(name, linear)]


def _targets_of(name: str, linear: LinearBase) -> list[str]:
    if type(linear) in (Experts, LoRAExperts):
        return [f"{name}.{projection}" for projection in EXPERT_PROJECTIONS]
    return [name] if type(linear) in (Linear, LoRALinear) and name != "head" else []


def add_lora(model: Transformer, config: LoRAConfig, seed: int = 0) -> None:
    """Put adapters beside the matrices of ``model`` that ``config.targets`` names, in place; all else is frozen.

    A target is the end of a name in ``target_names``, in whole parts (``q_proj``, ``shared_experts.up_proj``).

    Args:
        seed: each A draws from a generator of its own, seeded by (seed, name): the same seed gives the same bits.

    Raises:
        ConfigError: a target does not exist; the model is quantized, or has adapters already. Nothing is changed.
    """
    check_plain(model)
    names = target_names(model)
    chosen = set(names)
    if config.targets != (ALL_LINEAR,):
        for target in config.targets:
            if not any(_ends_with(name, target) for name in names):
                choices = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
                raise ConfigError(f"the model has no linear {target!r}", where="targets", todo=f"there are {choices}")
        chosen = {name for name in names if any(_ends_with(name, target) for target in config.targets)}

    def adapter(target: str, weight: Tensor) -> LowRank:
        digest = hashlib.sha256(f"{seed}:{target}.lora_A".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return LowRank(weight, config, generator)

    def make(name: str, linear: LinearBase) -> LinearBase | None:
        if not (own := [target for target in _targets_of(name, linear) if target in chosen]):
            return None
        if isinstance(linear, Linear):
            return LoRALinear(linear, adapter(name, linear.weight))
        assert isinstance(linear, Experts)
        stacks = {target.rpartition(".")[2]: target for target in own}
        return LoRAExperts(
            linear, {key: adapter(target, getattr(linear, EXPERT_PROJECTIONS[key])) for key, target in stacks.items()}
        )

    model.requires_grad_(False)
    replace_linears(model, make)
    for name, mlp in list(model.named_modules()):
        if type(mlp) is MLP and (isinstance(mlp.gate_proj, LoRALinear) or isinstance(mlp.up_proj, LoRALinear)):
            model.set_submodule(name, LoRAMLP(mlp))


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def check_plain(model: nn.Module) -> None:
    """Refuse a model to which no adapters can be added.

    Raises:
        ConfigError: it has some already, or a matrix is quantized.
    """
    for name, linear in linears(model):
        if isinstance(linear, LoRALinear | LoRAExperts):
            todo = "merge them first (merge_lora), or load the model again"
            raise ConfigError("the model has adapters already", where=name, todo=todo)
        if type(linear) not in (Linear, Experts, Embedding):
            what = f"an adapter stands beside dense matrices, and this one is a {type(linear).__name__}"
            raise ConfigError(what, where=name, todo="load a dense model: sprat.load(path, dequantize=True)")


def adapters(model: nn.Module) -> dict[str, LowRank]:
    """The adapters of ``model`` by what they adapt (see ``target_names``); none for a plain model."""
    return dict(_adapters(model))


def _adapters(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    for name, linear in linears(model):
        if isinstance(linear, LoRALinear):
            yield name, linear.adapter
        elif isinstance(linear, LoRAExperts):
            yield from ((f"{name}.{key}", own) for key in EXPERT_PROJECTIONS if (own := getattr(linear, key)))


def merge_lora(model: Transformer) -> None:
    """Put plain modules back, in place, whose matrices are what base and adapter were together; all can be trained.

    A model without adapters stays as it is.

    Raises:
        ConfigError: the base was quantized under its adapters. Nothing is changed.
    """
    if not adapters(model):
        return
    for name, linear in linears(model):
        if name.rpartition(".")[2] == "base" and type(linear) not in (Linear, Experts):
            what, todo = f"the base of an adapter is a {type(linear).__name__}", "merge first, then quantize"
            raise ConfigError(what, where=name, todo=todo)
    replace_linears(
        model, lambda name, linear: linear.merge() if isinstance(linear, LoRALinear | LoRAExperts) else None
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRAMLP):
            mlp = MLP.__new__(MLP)
            nn.Module.__init__(mlp)
            mlp.gate_proj, mlp.up_proj, mlp.down_proj = module.gate_proj, module.up_proj, module.down_proj
            model.set_submodule(name, mlp)
    model.requires_grad_(True)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors, live: ``<target>.lora_A``, ``.lora_B`` and, with DoRA, ``.lora_magnitude_vector``.

    Those of experts are stacks [E, ...].
    """
    return {f"{name}.{leaf}": p.detach() for name, own in _adapters(model) for leaf, p in own.named_parameters()}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take over what ``lora_state_dict`` gave for a model with the same adapters.

    Raises:
        CheckpointError: names or shapes differ, or a number is not finite. Nothing is changed.
    """
    own, todo = lora_state_dict(model), "add adapters with the config that they were made with"
    shapes, given = ({name: tuple(x.shape) for name, x in each.items()} for each in (own, state))
    if differing := sorted({name for name, _ in shapes.items() ^ given.items()}):
        name = differing[0]
        what = f"{name!r} is {given.get(name, 'missing')}, and the model's adapters have it {shapes.get(name, 'not')}"
        raise CheckpointError(what, where="lora_state_dict", todo=todo)
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            todo = "use an adapter whose training did not diverge"
            raise CheckpointError(f"tensor {name!r} is not finite", where="lora_state_dict", todo=todo)
    for name, value in state.items():
        own[name].copy_(value)
