"""A GGUF file as our model: plan what goes where, let the reading process fill it, put the tensors in place.

All names and shapes are compared before a byte is read. The tensors of the model are views of one block of memory
that both processes share, so a load holds the result once, and nothing of the file but the megabytes in work.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError, ConfigError
from sprat.formats.gguf import names
from sprat.formats.gguf.blocks import GROUP, PACKED, WITH_MINIMUMS
from sprat.formats.gguf.decode import Job
from sprat.formats.gguf.header import Header, TensorInfo
from sprat.formats.gguf.names import Source
from sprat.formats.memory import check_available_memory
from sprat.model import Embedding, Experts, Transformer
from sprat.model.layers import matrix_names
from sprat.model.transformer import meta_model
from sprat.quant.int4 import QuantizedTensor
from sprat.quant.layers import replace_with_quantized

MEMORY = 1 << 30  # address space of the reading process, whatever the file's size
_SECONDS, _BYTES_A_SECOND = 60, 4 << 20  # its CPU time: so much, and more for large files
_ALIGN = 64
_SMALL = 1 << 20  # bytes of a norm or a router at most
_ADVICE = "fetch or convert the file again"


class LoadPlan:
    """Where every tensor of ``model`` (on the meta device) comes from and lies; ``size`` bytes in all.

    Raises:
        CheckpointError: a tensor is missing, has no place in the model, or has another shape.
    """

    def __init__(self, model: Transformer, header: Header, dtype: torch.dtype) -> None:
        self.header, self.config = header, model.config
        self.dtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
        self.size = 0
        self.jobs: list[Job] = []
        self.parts: dict[str, dict[str, int]] = {}  # our name -> part -> offset
        self.kinds: dict[str, str] = {}
        tied = model.config.tie_word_embeddings
        self.shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if not (tied and n == "head.weight")}
        matrices = set(matrix_names(model))
        sources_of = {name: names.sources(name, shape, header, self.config) for name, shape in self.shapes.items()}
        sources_of |= {name: [] for name, sources in sources_of.items() if _is_zero(sources, header)}
        self._check(sources_of)
        for name, sources in sources_of.items():
            self._add(name, sources, name in matrices)

    def _check(self, sources_of: dict[str, list[Source]]) -> None:
        """Compare names and shapes with those of the file."""
        tensors = self.header.tensors
        known = {source.name for sources in sources_of.values() for source in sources}
        missing = sorted(known - tensors.keys())
        unknown = sorted(name for name in tensors.keys() - known if not names.IGNORED.fullmatch(name))
        if missing or unknown:
            name, what = (missing[0], "missing") if missing else (unknown[0], "not part of this model")
            raise CheckpointError(f"tensor {name!r} is {what}", where=str(self.header.path), todo=_ADVICE)
        for source in (source for sources in sources_of.values() for source in sources):
            if tensors[source.name].shape != source.shape:
                fault = f"tensor {source.name!r} has shape {tensors[source.name].shape}, expected {source.shape}"
                raise CheckpointError(fault, where=str(self.header.path), todo=_ADVICE)
        idle = [name for name in tensors.keys() - known if name != "rope_freqs.weight" and not self._is_copy(name)]
        if idle:
            what = f"tensors that are not used, and are not copies: {', '.join(sorted(idle)[:5])}"
            warnings.warn(f"{self.header.path}: {what}", stacklevel=5)

    def _is_copy(self, name: str) -> bool:
        """Whether a prediction module's own embedding or head is the model's, byte for byte."""
        tensors, leaf = self.header.tensors, name.split(".")[-2]
        head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
        like = {"embed_tokens": "token_embd.weight", "shared_head_head": head}.get(leaf)
        if like is None or (tensors[name].kind, tensors[name].shape) != (tensors[like].kind, tensors[like].shape):
            return False
        with open(self.header.path, "rb", buffering=0) as one, open(self.header.path, "rb", buffering=0) as two:
            one.seek(tensors[name].offset), two.seek(tensors[like].offset)
            left = tensors[name].nbytes
            while left:
                count = min(left, 1 << 24)
                if one.read(count) != two.read(count):
                    return False
                left -= count
        return True

    def _add(self, name: str, sources: list[Source], quantizable: bool) -> None:
        """Make room for our tensor ``name`` and plan the jobs that fill it."""
        elements = prod(self.shapes[name])
        kind = self.header.tensors[sources[0].name].kind.name if sources else ""
        codes = quantizable and len(sources) == 1 and kind in PACKED
        plain = "float32" if name.endswith("e_score_correction_bias") else self.dtype
        dense = "" if codes else plain
        if codes:
            sizes = {"codes": elements * PACKED[kind] // 8, "scales": elements // GROUP * 2}
            sizes |= {"minimums": sizes["scales"]} if kind in WITH_MINIMUMS else {}
        else:
            sizes = {"dense": elements * (2 if dense == "bfloat16" else 4)}
        self.kinds[name] = kind if codes else dense
        self.parts[name] = {part: self._reserve(count) for part, count in sizes.items()}
        for source in sources:
            self.jobs.append(_decode_job(source, self.header.tensors[source.name], dense, self.parts[name]))

    def _reserve(self, count: int) -> int:
        """The offset of ``count`` more bytes."""
        offset = -(-self.size // _ALIGN) * _ALIGN
        self.size = offset + count
        return offset


def _is_zero(sources: list[Source], header: Header) -> bool:
    """Whether a tensor is a bias of attention that the file does not hold; memory that nobody fills is zero."""
    name = sources[0].name
    return name not in header.tensors and re.fullmatch(r".*attn_(q|k|v|output)\.bias", name) is not None


def empty_model(header: Header, config: ModelConfig) -> Transformer:
    """The model of ``config`` without weights.

    Raises:
        CheckpointError: the config announces more than the file can hold, or positions that cannot be computed.
    """
    try:
        return meta_model(config, [entry.shape for entry in header.tensors.values()], header.path)
    except ConfigError as error:
        raise CheckpointError(error.what, where=f"{header.path}: {error.where}", todo=_ADVICE) from None


def load(header: Header, config: ModelConfig, dtype: torch.dtype, *, materialize: bool = True) -> Transformer:
    """The model of ``config`` with the weights of the file, quantized where they are.

    Args:
        dtype: of matrices that are not quantized, where no matrix is; a quantized model's are float32.
        materialize: see ``quant.quantize_model``.

    Raises:
        CheckpointError: a tensor is missing, unknown, of the wrong shape or not finite, or there is no memory.
    """
    model = empty_model(header, config)
    if any(entry.kind.name in PACKED for entry in header.tensors.values()):
        dtype = torch.float32
    plan = LoadPlan(model, header, dtype)
    check_available_memory(plan.size, header.path)
    memory = _decode_in_subprocess(plan)

    def view(name: str, part: str, kind: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        flat = torch.frombuffer(memory, dtype=kind, count=prod(shape), offset=plan.parts[name][part])
        return flat.view(shape)

    def quantized_tensor(name: str) -> QuantizedTensor | None:
        kind, shape = plan.kinds[name], plan.shapes[name]
        if kind not in PACKED:
            mixed = ".experts." in name and any(plan.kinds[sister] in PACKED for sister in _expert_weights(name))
            if not mixed:
                return None
            none = torch.empty(0, dtype=torch.float16)
            return QuantizedTensor(view(name, "dense", torch.float32, shape), none, 32, shape[-1], shape[-1])
        *outer, width = shape
        grouped = (*outer, width // GROUP)
        four = PACKED[kind] == 4
        codes = view(name, "codes", torch.uint8 if four else torch.int8, (*outer, width // 2 if four else width))
        scales = view(name, "scales", torch.float16, grouped)
        minimums = view(name, "minimums", torch.float16, grouped) if kind in WITH_MINIMUMS else None
        return QuantizedTensor(codes, scales, PACKED[kind], GROUP, width, minimums)

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    plain = {name: kind for name, kind in plan.kinds.items() if kind in dtypes}
    state = {name: view(name, "dense", dtypes[kind], plan.shapes[name]) for name, kind in plain.items()}
    if len(plain) < len(plan.kinds):  # an engine takes the codes over, and then nothing shall hold their memory
        state = {name: part.clone() if part.nbytes < _SMALL else part for name, part in state.items()}
    model.load_state_dict(state, strict=False, assign=True)
    replace_with_quantized(model, quantized_tensor, materialize=materialize)
    if config.tie_word_embeddings and isinstance(model.embed_tokens, Embedding):
        model.head.weight = model.embed_tokens.weight
    return model


def _expert_weights(name: str) -> list[str]:
    """The three weights of the experts that ``name`` belongs to."""
    stem = name.rpartition(".")[0]
    return [f"{stem}.{leaf}" for leaf in Experts.weight_names]


def _decode_job(source: Source, entry: TensorInfo, dense: str, out: dict[str, int]) -> Job:
    """What the reading process has to do for one tensor of the file."""
    rows, width, stride = prod(entry.shape[:-1]), entry.shape[-1], 0
    if len(entry.shape) == 1 and source.reorder:
        rows, width = width, 1
    if source.every:
        row = (entry.shape[1] if source.reorder else width) * 4
        out, stride = {"dense": out["dense"] + source.first * row}, source.every * row
    kind = entry.kind
    return Job(
        source.name, kind.name, kind.block_weights, kind.block_bytes, entry.offset, rows, width, source.unit,
        source.reorder, dense, out, stride,
    )  # fmt: skip


def _decode_in_subprocess(plan: LoadPlan) -> mmap.mmap:
    """Memory that the reading process has filled.

    Raises:
        CheckpointError: it found a tensor unsound, or ended before it was done.
    """
    path = plan.header.path
    root = str(Path(__file__).resolve().parents[2])
    python_path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(python_path), "OPENBLAS_NUM_THREADS": "1"}
    seconds = _SECONDS + sum(entry.nbytes for entry in plan.header.tensors.values()) // _BYTES_A_SECOND
    with _memory_file() as target, open(path, "rb", buffering=0) as source:
        try:
            os.ftruncate(target.fileno(), max(1, plan.size))
            memory = mmap.mmap(target.fileno(), max(1, plan.size))
        except OSError as error:
            what = f"no room for the weights: {error.strerror}"
            raise CheckpointError(what, where=str(path), todo="free memory") from None
        ends = (source.fileno(), target.fileno())
        try:
            done = subprocess.run(
                [sys.executable, "-m", "sprat.formats.gguf.decode", *map(str, ends), str(MEMORY), str(seconds)],
                input=json.dumps([asdict(job) for job in plan.jobs]),
                capture_output=True, text=True, pass_fds=ends, env=environment, timeout=10 * seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise CheckpointError("reading it took too long", where=str(path), todo="use a faster disk") from None
    if done.returncode:
        raise _decode_error(done, path)
    return memory


def _memory_file() -> IO[bytes]:
    """An empty file that lives in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("sprat-weights"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _decode_error(done: subprocess.CompletedProcess[str], path: Path) -> CheckpointError:
    """What the reading process said, or how it ended."""
    try:
        answer = json.loads(done.stdout)
        return CheckpointError(f"tensor {answer['tensor']!r}: {answer['why']}", where=str(path), todo=_ADVICE)
    except (ValueError, KeyError, TypeError):
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"code {done.returncode}"
        last = (done.stderr.strip().splitlines() or [""])[-1][:200]
        return CheckpointError(f"reading it ended with {how} {last}".rstrip(), where=str(path), todo=_ADVICE)
