"""The smallest modules, and the walk that puts another format (INT4, FP8, LoRA) in the place of their matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprat.errors import ConfigError
from sprat.kernels import mixed_precision, ops


class LinearBase(nn.Module):
    """What holds matrices that another format may hold in its place: linears, the embedding, stacked experts.

    ``compute_dtype`` is that of a linear's products (see ``set_compute_dtype``); None: as its matrix is.
    """

    compute_dtype: torch.dtype | None = None
    weight_names: ClassVar[tuple[str, ...]] = ("weight",)


class Linear(LinearBase):
    """``y = x W^T + b`` with ``weight`` [out, in] and an optional ``bias`` [out].

    A replacement (INT4, FP8, LoRA) offers the same ``forward``, ``dense_weight``, ``in_features`` and
    ``out_features``; nothing else of it is read. torch runs such a model, and it is saved once each replacement is a
    ``Linear`` again whose weight is its ``dense_weight()``. Weights are left unset here: ``Transformer`` fills them.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out], same dtype."""
        return mixed_precision.linear(x, product_weight(self), self.bias)

    def dense_weight(self) -> Tensor:
        """The matrix [out, in] in a dense dtype; absorbed attention multiplies by parts of it."""
        return self.weight

    def extra_repr(self) -> str:
        """Shape, for ``print(model)``."""
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


def product_weight(module: Linear) -> Tensor:
    """The matrix [out, in] of ``module`` as its products see it, with a gradient to its weight."""
    weight, dtype = module.dense_weight(), getattr(module, "compute_dtype", None)
    return weight if dtype is None else weight.to(dtype)


class Embedding(LinearBase):
    """Rows of ``weight`` [vocabulary, hidden], looked up by token."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` [...] long -> [..., hidden]."""
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """``rms_norm`` with a learned gain ``weight`` [dim], set to one."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., dim] -> same shape and dtype."""
        return ops.rms_norm(x, self.weight, self.eps)


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Make the products of the linears of ``model``, its head's included, in ``dtype``: mixed precision.

    ``torch.bfloat16`` is for training on processors that multiply it (AVX512-BF16, AMX), at twice float32's rate or
    more; on others it is slower. Weights, activations between products, norms, attention, adapters and the loss stay
    as they are; stacked experts do, too. None undoes it.
    """
    for _, module in linears(model):
        module.compute_dtype = dtype


def linears(model: nn.Module) -> Iterator[tuple[str, LinearBase]]:
    """Every module of ``model`` that holds matrices, with its name, in whatever format it is."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LinearBase))


def matrix_names(model: nn.Module) -> list[str]:
    """The matrices of a dense ``model`` by their names in the state dict, a tied head's included."""
    return [f"{name}.{leaf}" for name, linear in linears(model) for leaf in linear.weight_names]


def replace_linears(model: nn.Module, make: Callable[[str, LinearBase], nn.Module | None]) -> None:
    """Put what ``make(name, linear)`` gives in the place of each of ``linears(model)``; None leaves it as it is.

    They come in the order of ``model.named_modules()``; what is put in is not walked through itself.

    Raises:
        ConfigError: ``model`` is itself what shall be replaced.
    """
    for name, linear in list(linears(model)):
        replacement = make(name, linear)
        if replacement is not None and not name:
            raise ConfigError("a linear cannot replace itself", where="model", todo="give the module that holds it")
        if replacement is not None:
            model.set_submodule(name, replacement)
