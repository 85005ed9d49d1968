"""Rotation (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; SpinQuant, Liu et al. 2024, arXiv 2405.16406).

A few channels of the residual stream hold values far above the rest, and the weights that read or write them have
columns and rows that no common scale fits. In another basis no channel stands out: with an orthogonal ``Q``,
let the stream be ``x Q`` instead of ``x``. Whoever writes into it writes ``W^T Q``, whoever reads it reads through
``Q^T``, both folded into weights, so at run time nothing is added. RMSNorm divides by the stream's length, which
``Q`` leaves as it is, but its gain belongs to a channel: it is multiplied into the linears that follow (and into the
router), and becomes one. The model computes what it did, expert for expert.

``Q`` is a Hadamard matrix with random signs: entries of one size, so that a single loud channel is spread evenly.
There is one for every power of two; a width of ``2^k m`` (576 = 64 * 9) takes the Kronecker product of the Hadamard
matrix of ``2^k`` and a random orthogonal one of ``m``. Blocks of ``2^k`` alone would leave each loud channel within its
block, and since all of it is folded, a dense ``Q`` costs no more.

An embedding that is also the head must be kept twice: the head has the last norm's gain, the embedding has none.

Left as they are: the input of the down projection, since silu does not commute with a rotation (QuaRot turns it
at run time); channels inside heads, and latents of MLA, which gains and rotary positions tie to their basis. MTP
modules cannot be rotated: they norm what the last norm has multiplied by its gain, and no weight lies between.
"""

# D hidden, m odd part of D

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sprat.errors import ConfigError
from sprat.model import MLP, Embedding, Linear, MoE, Transformer
from sprat.model.mla import MLA


def orthogonal_matrix(width: int, seed: int) -> Tensor:
    """A Hadamard matrix with random signs, times a random orthogonal one for the odd part of ``width``; float64 [D, D].

    >>> matrix = orthogonal_matrix(12, seed=0)
    >>> bool(torch.allclose(matrix @ matrix.T, torch.eye(12, dtype=torch.float64)))
    True
    """
    generator = torch.Generator().manual_seed(seed)
    power = width & -width
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    odd = torch.randn(width // power, width // power, dtype=torch.float64, generator=generator)
    odd = torch.linalg.qr(odd).Q.contiguous()
    signs_D = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return signs_D.unsqueeze(1) * torch.kron(hadamard * power**-0.5, odd)


def rotate(model: Transformer, seed: int = 0) -> Transformer:
    """``model`` (dense; changed in place) in a rotated basis of its residual stream: the same function, head untied.

    Raises:
        ConfigError: the model has MTP modules.
    """
    if len(model.mtp):
        todo = "set drop_mtp=true to leave them out (the model answers the same, without drafts)"
        raise ConfigError("MTP modules cannot be rotated", where="rotation", todo=todo)
    matrix_DD = orthogonal_matrix(model.config.hidden_size, seed)
    with torch.no_grad():
        if model.config.tie_word_embeddings:
            model.head.weight = nn.Parameter(model.embed_tokens.weight.clone())
            model.config = model.config.replace(tie_word_embeddings=False)
        _read(model.embed_tokens, matrix_DD)  # a row of the table is a state of the stream
        for block in model.layers:
            _rotate_block(block, matrix_DD)
        _fold_norm(model.norm, [model.head])
        _read(model.head, matrix_DD)
    return model


def _rotate_block(block: Any, matrix_DD: Tensor) -> None:
    """One decoder layer, its norms folded."""
    attention, mlp = block.self_attn, block.mlp
    readers: list[Any]
    if isinstance(attention, MLA):
        readers = [attention.q_a_proj if attention.has_q_lora else attention.q_proj, attention.kv_a_proj_with_mqa]
    else:
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
    _fold_norm(block.input_layernorm, readers)
    for reader in readers:
        _read(reader, matrix_DD)
    _write(attention.o_proj, matrix_DD)
    dense = [mlp.shared_experts] if isinstance(mlp, MoE) else [mlp]
    readers = [leaf for each in dense if isinstance(each, MLP) for leaf in (each.gate_proj, each.up_proj)]
    stacks: list[Tensor] = []
    if isinstance(mlp, MoE):
        readers.append(mlp.gate)
        stacks = [mlp.experts.w_gate_EFD, mlp.experts.w_up_EFD]
        down_EDF = mlp.experts.w_down_EDF
        down_EDF.copy_((matrix_DD.T @ down_EDF.double()).to(down_EDF.dtype))
    for each in dense:
        if isinstance(each, MLP):
            _write(each.down_proj, matrix_DD)
    _fold_norm(block.post_attention_layernorm, readers, stacks)
    for reader in readers:
        _read(reader, matrix_DD)
    for stack_EFD in stacks:
        stack_EFD.copy_((stack_EFD.double() @ matrix_DD).to(stack_EFD.dtype))


def _fold_norm(norm: Any, readers: list[Any], stacks: list[Tensor] | None = None) -> None:
    """Multiply the gain of ``norm`` into the columns of all that reads it; it becomes one."""
    for weight in [*(reader.weight for reader in readers), *(stacks or [])]:
        weight.copy_((weight.double() * norm.weight.double()).to(weight.dtype))
    norm.weight.fill_(1.0)


def _read(module: Linear | Embedding | Any, matrix_DD: Tensor) -> None:
    """Turn the input of ``module`` (of an embedding, what it gives)."""
    module.weight.copy_((module.weight.double() @ matrix_DD).to(module.weight.dtype))


def _write(module: Linear, matrix_DD: Tensor) -> None:
    """Turn what ``module`` adds to the stream."""
    module.weight.copy_((matrix_DD.T @ module.weight.double()).to(module.weight.dtype))
    if module.bias is not None:
        module.bias.copy_((module.bias.double() @ matrix_DD).to(module.bias.dtype))


def without_mtp(model: Transformer) -> Transformer:
    """``model`` (changed in place) without the modules that draft tokens."""
    model.mtp = nn.ModuleList()
    model.config = model.config.replace(num_nextn_predict_layers=0)
    return model
