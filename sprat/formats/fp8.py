"""FP8 in blocks, as DeepSeek-V3 is published: a weight in eight bits, a factor for each 128 × 128 of them.

A matrix is E4M3 numbers (``<name>``) and float32 factors (``<name>_scale_inv``, one a block); the weight is their
product, computed in float32 (arXiv 2412.19437, section 3.3.2; ``weight_dequant`` of the published inference code). The
last block of a row or column may be ragged: ``kv_a_proj_with_mqa`` of V3 has 576 rows, four blocks and a half.

A factor is the block's largest |weight| / 448, 448 being the largest E4M3 number. Dividing and multiplying by it does
not always give the same bits back, so of the factor and its two neighbors the one is taken that gives the block
exactly, where one does: what was loaded from FP8 is written as it came.

What stays as it is, as in the published checkpoint: norms, embeddings, the head, the router and its correction, biases,
and ``eh_proj`` of the prediction modules. So do, named in ``modules_to_not_convert``, matrices whose sides are no whole
blocks, and what runtimes fuse with them: vLLM refuses ragged blocks in fused matrices, and transformers (5.23) divides
the rows by the number of blocks, and so gives some rows the factor of others. ``kv_a_proj_with_mqa`` may be ragged.
"""

# N rows, I columns; P, Q blocks along each; b rows of a block, c columns of it

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sprat.errors import CheckpointError, ConfigError

METHOD, SCALE_SUFFIX, DTYPE = "fp8", "_scale_inv", torch.float8_e4m3fn
BLOCK = (128, 128)
CONFIG: dict[str, Any] = {
    "quant_method": METHOD,
    "fmt": "e4m3",
    "weight_block_size": list(BLOCK),
    "activation_scheme": "dynamic",
}
_LARGEST = 448.0
_PLAIN = ("embed_tokens.weight", "head.weight", ".mlp.gate.weight", ".eh_proj.weight")
_RAGGED = ".kv_a_proj_with_mqa.weight"
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
# keys of quantization_config that change no weight: how activations are rounded on the way, and what the dtypes of
# the tensors say anyway
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "quant_method": (METHOD,),
    "weight_block_size": (),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("ue8m0", "float"),
    "modules_to_not_convert": (),
    "ignored_layers": (),
}


def parse_config(table: dict[str, Any], where: str) -> tuple[int, int]:
    """Rows and columns of a block, from a ``quantization_config`` whose method is FP8.

    Raises:
        ConfigError: a key is not understood, or asks for another form; ``where`` is named.
    """
    size = table.get("weight_block_size")
    is_pair = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    wrong = [] if is_pair else ["weight_block_size"]
    for key, value in table.items():
        allowed = _ALLOWED.get(key)
        if value not in (None, False) and (allowed is None or (allowed and value not in allowed)):
            wrong.append(key)
    if wrong or not isinstance(size, list):
        what = f"FP8 of the form {wrong[0]}={table.get(wrong[0])!r} is not known"
        raise ConfigError(what, where=where, todo="use fmt e4m3 with a weight_block_size of two numbers")
    return size[0], size[1]


def dequantize_fp8(codes: Tensor, scales: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """The float32 matrix [N, I] that ``codes`` (E4M3, [N, I]) and ``scales`` ([P, Q]) stand for."""
    factors = scales.float()
    for dim, size in enumerate(block):
        factors = factors.repeat_interleave(size, dim).narrow(dim, 0, codes.shape[dim])
    return codes.float().mul_(factors)


def quantize_fp8(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """(codes E4M3 [N, I], scales float32 [P, Q]) of ``weight`` (float [N, I]); ragged last blocks keep their shape.

    Raises:
        CheckpointError: a number of it is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError("a weight is not finite", where="fp8", todo="use a checkpoint that did not diverge")
    rows, columns = weight.shape
    padded = F.pad(weight.detach().float(), (0, -columns % block[1], 0, -rows % block[0]))
    blocks_PbQc = padded.view(-(-rows // block[0]), block[0], -(-columns // block[1]), block[1])
    plain_PQ = blocks_PbQc.abs().amax((1, 3)) / _LARGEST
    plain_PQ = torch.where(plain_PQ > 0, plain_PQ, torch.ones(()))
    scales_PQ, codes_PbQc = plain_PQ, _divide(blocks_PbQc, plain_PQ)
    exact_PQ = _is_exact(blocks_PbQc, codes_PbQc, plain_PQ)
    for end in (torch.inf, 0.0):
        near_PQ = torch.nextafter(plain_PQ, torch.full_like(plain_PQ, end))
        near_codes = _divide(blocks_PbQc, near_PQ)
        better_PQ = ~exact_PQ & _is_exact(blocks_PbQc, near_codes, near_PQ)
        scales_PQ = torch.where(better_PQ, near_PQ, scales_PQ)
        # E4M3 tensors know no ``where``: their bytes do
        chosen = torch.where(better_PQ[:, None, :, None], near_codes.view(torch.uint8), codes_PbQc.view(torch.uint8))
        codes_PbQc, exact_PQ = chosen.view(DTYPE), exact_PQ | better_PQ
    codes = codes_PbQc.view(torch.uint8).reshape(padded.shape)[:rows, :columns].contiguous().view(DTYPE)
    return codes, scales_PQ


def _divide(blocks_PbQc: Tensor, scales_PQ: Tensor) -> Tensor:
    """The nearest E4M3 numbers of each block by its factor; never beyond the largest, which would be no number."""
    return (blocks_PbQc / scales_PQ[:, None, :, None]).clamp_(-_LARGEST, _LARGEST).to(DTYPE)


def _is_exact(blocks_PbQc: Tensor, codes_PbQc: Tensor, scales_PQ: Tensor) -> Tensor:
    """Whether a block is what its codes stand for, bool [P, Q]."""
    return (codes_PbQc.float() * scales_PQ[:, None, :, None] == blocks_PbQc).all(3).all(1)


def encode_tensors(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(``tensors`` of a Hugging Face folder, its matrices in FP8 with their scales; the ``quantization_config``).

    Warns of ragged blocks, which transformers 5.23 does not read.

    Raises:
        CheckpointError: no matrix has whole blocks; a number is not finite.
    """
    matrices = {name for name, tensor in tensors.items() if tensor.dim() == 2 and not name.endswith(_PLAIN)}
    ragged = {name for name in matrices if any(n % size for n, size in zip(tensors[name].shape, BLOCK, strict=True))}
    latent = {name for name in ragged if name.endswith(_RAGGED) and tensors[name].shape[1] % BLOCK[1] == 0}
    dense = {other for name in ragged - latent for other in fused(name) if other in matrices}
    if not matrices - dense:
        todo = "write it dense, or quantize it and write pack-quantized"
        raise CheckpointError("no matrix of the model has whole blocks of 128 x 128", where=where, todo=todo)
    if written := sorted(latent - dense):
        what = f"{written[0]!r} ends in a ragged block, as in DeepSeek-V3, which transformers 5.23 does not read"
        warnings.warn(f"{where}: {what}", stacklevel=4)
    encoded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in matrices - dense:
            encoded[name], encoded[name + SCALE_SUFFIX] = quantize_fp8(tensor)
        else:
            encoded[name] = tensor
    skipped = sorted(name.removesuffix(".weight") for name in dense)
    return encoded, CONFIG | ({"modules_to_not_convert": [*skipped, "lm_head"]} if skipped else {})


def fused(name: str) -> set[str]:
    """The matrices that runtimes compute as one with ``name``, and must find in one format: itself among them.

    >>> sorted(fused("mlp.up_proj.weight"))
    ['mlp.gate_proj.weight', 'mlp.up_proj.weight']
    """
    stem, _, last = name.removesuffix(".weight").rpartition(".")
    parts: tuple[str, ...] = next((each for each in _FUSED if last in each), (last,))
    return {f"{stem}.{part}.weight" for part in parts}
