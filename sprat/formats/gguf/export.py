"""Our model as a GGUF file that llama.cpp loads: ``names`` and ``weights`` read backwards.

What a tensor becomes is decided as llama.cpp's converter decides it: vectors, norms, biases and routers stay float32;
matrices become what was asked for, or float16 where their rows are no whole blocks. Embedding and head of a Q4_0 file
are Q8_0, as those of our INT4 models are INT8. For ``llama`` the rows of each query and key head are re-ordered (pairs
of channels side by side); DeepSeek's ``kv_b_proj`` is cut into its two halves, the keys' transposed.

Codes that we have are not rounded again where the type can hold them: INT4 in groups of 32 (or 64, or 128) is Q4_0 or
Q8_0 bit for bit, INT8 in such groups or with a scale per row is Q8_0. What cannot be held (codes with minimums, INT8 in
a Q4_0 file, the transposed half) is computed in float32 and rounded anew, and a warning names it. That half of an INT4
model becomes Q8_0, lest it be rounded to four bits twice.
"""

# N rows, I weights of a row, H heads, n qk_nope_head_dim, v v_head_dim, R kv_lora_rank

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError
from sprat.formats.gguf import blocks, metadata, vocabulary
from sprat.formats.gguf.blocks import GROUP, Array
from sprat.formats.gguf.header import Value, Values
from sprat.formats.gguf.names import file_name
from sprat.formats.gguf.writer import TensorData, write_file
from sprat.model import Transformer
from sprat.model.rope import inverse_frequencies
from sprat.quant import QuantizedTensor, dequantize_tensor, quantized_weights
from sprat.quant.int4 import unpack_int4
from sprat.tokens import Tokenizer

Kind = Literal["f32", "f16", "q8_0", "q4_0"]
FILE_TYPES: dict[str, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}  # general.file_type
QUANTIZATION_VERSION = 2
CHUNK = 4 << 20  # weights that are encoded at a time
_LARGEST = {"F32": 3.4028235e38, "F16": 65504.0, "Q8_0": 65504.0 * 127, "Q4_0": 65504.0 * 8}
_QUANTIZED = ("q8_0", "q4_0")
_BITS = {"Q8_0": 8, "Q4_0": 4}
_VOCABULARY = ("token_embd.weight", "output.weight")

Rows = Callable[[Tensor], Tensor]  # [rows of ours, columns] -> [rows of the file, columns]


@dataclass(frozen=True)
class Part:
    """A tensor of the file and what it is made from: ``rows`` of ours, transposed within heads or not."""

    name: str
    shape: tuple[int, ...]
    rows: Rows
    transposed: bool = False


def save(model: Transformer, tokenizer: Tokenizer, path: str | Path, *, kind: Kind, pre: str | None = None) -> None:
    """Write ``model`` and ``tokenizer`` as one GGUF file (format version 3) that llama.cpp loads.

    Beside the model, memory holds one of its tensors at a time. Modules of multi-token prediction are left out, with a
    warning, as llama.cpp's converter leaves them out.

    Args:
        kind: of the matrices; f32 keeps every bit of a float32 model.
        pre: llama.cpp's name of the cut before byte-level BPE; None finds the one that cuts as ``tokenizer`` does.

    Raises:
        CheckpointError: no such kind, or ``path`` is a folder; llama.cpp computes no such model, or cuts no text as
            this tokenizer does; the model holds what its config does not say (an adapter), or a weight is not finite or
            too large for ``kind``.
        MachineError: the disk is full or closed to us; what was there is untouched.
    """
    if kind not in FILE_TYPES:
        raise CheckpointError(f"no kind {kind!r}", where="kind", todo=f"use one of {', '.join(FILE_TYPES)}")
    if Path(path).is_dir():
        raise CheckpointError("a folder stands there", where=str(path), todo="give the name of a file")
    config = model.config
    keys: dict[str, Value | Values] = {
        "general.architecture": metadata.architecture(config),
        "general.type": "model",
        "general.name": Path(path).stem,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
        **metadata.config_keys(config),
    }
    tensors = _tensors(model, kind, str(path))
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    eos = {token_id for token_id in ends if token_id is not None}
    keys |= vocabulary.tokenizer_keys(tokenizer, config.vocab_size, eos_token_ids=eos, pre=pre)
    if len(model.mtp):
        warnings.warn(f"{path}: modules of multi-token prediction are left out", stacklevel=2)
    write_file(path, keys, tensors)


def _tensors(model: Transformer, kind: Kind, where: str) -> list[TensorData]:
    """All tensors of the file, none of them encoded yet; warns of what loses more than ``kind`` says."""
    config = model.config
    tensors: list[TensorData] = []
    again: list[str] = []
    uneven: list[str] = []
    for name, source in _sources(model, where).items():
        for part in parts(name, tuple(_shape(source)), config):
            of_type = tensor_type(part, kind, source)
            chunks: Callable[[], Iterator[Array]] = functools.partial(_encode_weights, part, of_type, source)
            if isinstance(source, QuantizedTensor) and not part.transposed and _holds(of_type, source):
                chunks = functools.partial(_encode_codes, part, of_type, source)
            elif isinstance(source, QuantizedTensor) and source.bits < 16 and of_type in _BITS:
                again.append(part.name)
            if of_type == "F16" and kind in _QUANTIZED:
                uneven.append(part.name)
            tensors.append(TensorData(part.name, of_type, part.shape, chunks))
    for names, what in ((again, "rounded a second time"), (uneven, f"F16, as their rows are no blocks of {GROUP}")):
        if names:
            warnings.warn(f"{where}: {what}: {len(names)} tensors ({', '.join(names[:3])} …)", stacklevel=3)
    return tensors + _rope_divisors(config)


def _sources(model: Transformer, where: str) -> dict[str, Tensor | QuantizedTensor]:
    """The weights of ``model`` that a file holds, by their names in the state dict of a dense model.

    Raises:
        CheckpointError: one is not as the config says, or there are others.
    """
    packed = quantized_weights(model)
    codes = {id(tensor) for each in packed.values() for tensor in each.buffers()}
    own: dict[str, Tensor | QuantizedTensor] = {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in codes
    }
    own |= {name: each.to_tensor() for name, each in packed.items()}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(model.config, seed=None).state_dict().items()}
    tied = {"head.weight"} if model.config.tie_word_embeddings else set()
    differing = {name for name, _ in {name: _shape(each) for name, each in own.items()}.items() ^ shapes.items()}
    if differing := differing - tied:
        todo = "merge first: put a Linear in each adapter's place whose weight is its dense_weight()"
        raise CheckpointError(f"{min(differing)} is not as the model's config says", where=where, todo=todo)
    return {name: own[name] for name in shapes if name not in tied and not name.startswith("mtp.")}


def parts(name: str, shape: tuple[int, ...], config: ModelConfig) -> list[Part]:
    """The tensors of the file that our tensor ``name`` of ``shape`` becomes.

    >>> from sprat.config.sizes import size
    >>> [(part.name, part.shape) for part in parts("layers.1.self_attn.kv_b_proj.weight", (96, 32), size("pico"))]
    [('blk.1.attn_k_b.weight', (2, 32, 16)), ('blk.1.attn_v_b.weight', (2, 32, 32))]
    """
    there = file_name(name, config)
    if ".attn_kv_b." in there:
        heads, rank = config.num_attention_heads, config.kv_lora_rank
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        keys, values = there.replace("attn_kv_b", "attn_k_b"), there.replace("attn_kv_b", "attn_v_b")
        return [
            Part(keys, (heads, rank, nope), functools.partial(_key_rows, heads, nope), transposed=True),
            Part(values, (heads, value, rank), functools.partial(_value_rows, heads, nope)),
        ]
    if metadata.architecture(config) == "llama" and re.search(r"\.attn_[qk]\.", there):
        return [Part(there, shape, functools.partial(_pair_rows, config.attention_head_dim))]
    return [Part(there, shape, lambda rows: rows)]


def _pair_rows(width: int, rows: Tensor) -> Tensor:
    """Rows of heads of ``width``, each with its partner of the other half beside it."""
    paired: Tensor = rows.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
    return paired


def _key_rows(heads: int, nope: int, rows_NR: Tensor) -> Tensor:
    """[H (n + v), R] -> [H R, n]: what makes keys of a latent, transposed head by head."""
    keys: Tensor = rows_NR.unflatten(0, (heads, -1))[:, :nope].transpose(1, 2).flatten(0, 1)
    return keys


def _value_rows(heads: int, nope: int, rows: Tensor) -> Tensor:
    """[H (n + v), R] -> [H v, R]: what makes values of a latent."""
    values: Tensor = rows.unflatten(0, (heads, -1))[:, nope:].flatten(0, 1)
    return values


def tensor_type(part: Part, kind: Kind, source: Tensor | QuantizedTensor) -> str:
    """The ggml type of ``part`` in a file of ``kind``."""
    if len(part.shape) == 1 or not part.name.endswith(".weight") or ".ffn_gate_inp." in part.name:
        return "F32"
    if kind in ("f32", "f16"):
        return kind.upper()
    if part.shape[-1] % GROUP:
        return "F16"
    twice = part.transposed and isinstance(source, QuantizedTensor)
    return "Q8_0" if part.name in _VOCABULARY or twice else kind.upper()


def _shape(source: Tensor | QuantizedTensor) -> torch.Size:
    """The shape of the weight that ``source`` is or stands for."""
    return source.shape if isinstance(source, Tensor) else torch.Size((*source.codes.shape[:-1], source.width))


def _holds(of_type: str, source: QuantizedTensor) -> bool:
    """Whether ``of_type`` can hold the codes of ``source`` as they are."""
    if of_type not in _BITS or source.bits > _BITS[of_type] or source.minimums is not None:
        return False
    return source.width % GROUP == 0 and (source.group % GROUP == 0 or source.group >= source.width)


def _encode_codes(part: Part, of_type: str, source: QuantizedTensor) -> Iterator[Array]:
    """The bytes of a tensor whose codes are kept: reordered by whole rows, each scale once for every 32 weights."""
    codes = source.codes.detach().cpu().flatten(0, -2)
    scales = source.scales.detach().cpu().flatten(0, -2).repeat_interleave(max(1, source.group // GROUP), -1)
    scales = scales[:, : source.width // GROUP]
    if not bool(torch.isfinite(scales).all()):
        raise _not_finite(part)
    step = max(1, CHUNK // source.width)
    for codes_N, scales_NG in zip(part.rows(codes).split(step), part.rows(scales).split(step), strict=True):
        codes_NI = unpack_int4(codes_N, source.width) if source.bits == 4 else codes_N
        yield blocks.pack(of_type, codes_NI.numpy(), scales_NG.numpy())


def _encode_weights(part: Part, of_type: str, source: Tensor | QuantizedTensor) -> Iterator[Array]:
    """The bytes of a tensor of plain numbers."""
    dense = dequantize_tensor(source) if isinstance(source, QuantizedTensor) else source.detach().cpu()
    rows = part.rows(dense.flatten(0, -2) if dense.dim() > 1 else dense.unsqueeze(-1))
    rows = rows.reshape(-1, part.shape[-1])
    for chunk_NI in rows.split(max(1, CHUNK // rows.shape[1])):
        weights_NI = chunk_NI.float()
        if not float(weights_NI.abs().max()) <= _LARGEST[of_type]:  # so is what is no number
            raise _not_finite(part)
        yield blocks.quantize(of_type, weights_NI.numpy())


def _not_finite(part: Part) -> CheckpointError:
    what = "a weight is not finite, or too large for the type asked for"
    return CheckpointError(what, where=part.name, todo="use a checkpoint that did not diverge, or kind f32")


def _rope_divisors(config: ModelConfig) -> list[TensorData]:
    """Llama 3's stretching: what each rotary frequency is divided by."""
    if (config.rope_scaling or {}).get("rope_type") != "llama3":
        return []
    plain, _ = inverse_frequencies(config.replace(rope_scaling=None))
    divisors = plain / inverse_frequencies(config)[0]
    return [
        TensorData(
            "rope_freqs.weight", "F32", tuple(divisors.shape), lambda: [blocks.quantize("F32", divisors.numpy())]
        )
    ]
