"""Tensors of a Hugging Face folder into our state dict: all checked first, then read one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from pathlib import Path

import torch
from torch import Tensor, nn

from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError
from sprat.formats import fp8
from sprat.formats.memory import check_available_memory, explain_out_of_memory
from sprat.formats.safetensors import Shards, TensorInfo
from sprat.model.rope import inverse_frequencies

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # on disk
_COPY = re.compile(r"model\.layers\.(\d+)\.(embed_tokens|shared_head\.head)\.weight")
_FREQUENCIES = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ADVICE = "check that config.json and the weights belong together"


def redundant_tensors(config: ModelConfig, shards: Shards) -> dict[str, Callable[[], bool]]:
    """Tensors that a model of ``config`` knows and does not need -> whether they differ from what they repeat."""
    redundant: dict[str, Callable[[], bool]] = {}
    inverse, _ = inverse_frequencies(config)
    head = EMBEDDING if config.tie_word_embeddings else HEAD

    def copied(name: str, source: str) -> Callable[[], bool]:
        return lambda: not shards.equal(name, source)

    def frequency(name: str) -> Callable[[], bool]:
        close = {"rtol": 1e-2, "atol": 0.0}  # some were saved in bfloat16
        return lambda: (
            shards.entries[name].shape != inverse.shape
            or not torch.allclose(shards.read(name).float(), inverse, **close)  # type: ignore[arg-type]
        )

    for name in shards.entries:
        copy = _COPY.fullmatch(name)
        if copy and int(copy[1]) >= config.num_hidden_layers:
            source = EMBEDDING if copy[2] == "embed_tokens" else head
            redundant[name] = copied(name, source if source in shards.entries else HEAD)
        elif _FREQUENCIES.fullmatch(name):
            redundant[name] = frequency(name)
    if config.tie_word_embeddings and HEAD in shards.entries:
        redundant[HEAD] = lambda: False  # compared when it was decided to tie them
    return redundant


class StateDictReader:
    """What a model wants and what its files hold.

    Args:
        model: on the meta device; only its shapes are read.
        expected: our name -> its names on disk; of a stacked tensor one for each row, else one in all.
        fp8_block: rows and columns that share a factor in FP8 matrices; None where there are none.
    """

    def __init__(
        self, model: nn.Module, expected: dict[str, list[str]], shards: Shards, fp8_block: tuple[int, int] | None
    ) -> None:
        self.expected, self.shards, self.fp8_block = expected, shards, fp8_block
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name in expected}

    def check(self, ignored: Set[str], where: Path) -> None:
        """Compare names, shapes and dtypes; ``ignored`` may stand in the files and is not read.

        Raises:
            CheckpointError: a tensor is missing, has no place in the model, or has another shape or dtype.
        """
        entries = self.shards.entries
        known = {disk for names in self.expected.values() for disk in names} | ignored
        known |= {name + fp8.SCALE_SUFFIX for name in known if name in entries and entries[name].dtype == fp8.DTYPE}
        missing = sorted(disk for names in self.expected.values() for disk in names if disk not in entries)
        unknown = sorted(entries.keys() - known)
        if missing or unknown:
            name, what = (missing[0], "missing") if missing else (unknown[0], "not part of this model")
            more = len(missing or unknown) - 1
            fault = f"tensor {name!r} is {what}" + (f", as are {more} more" if more else "")
            raise CheckpointError(fault, where=str(where), todo=_ADVICE)
        for name, names in self.expected.items():
            want = self.shapes[name][1:] if self._stacked(name) else self.shapes[name]
            for disk in names:
                self._check_entry(disk, entries[disk], want)

    def read(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Our state dict in ``dtype`` on ``device``; the router's correction stays float32.

        Raises:
            CheckpointError: a file ends early, or there is no memory for the model.
        """
        entries = self.shards.entries
        if device.type == "cpu":
            elements = sum(torch.Size(shape).numel() for shape in self.shapes.values())
            check_available_memory(elements * dtype.itemsize, next(iter(entries.values())).file.parent)
        state: dict[str, Tensor] = {}
        for name, names in self.expected.items():
            target = torch.float32 if name.endswith("e_score_correction_bias") else dtype
            with explain_out_of_memory(name, entries[names[0]].file):
                out = torch.empty(self.shapes[name], dtype=target, device=device)
            for part, disk in zip(out.unbind(0) if self._stacked(name) else [out], names, strict=True):
                if entries[disk].dtype == fp8.DTYPE:
                    part.copy_(self._dequantize_fp8(disk))
                else:
                    self.shards.read_into(disk, part)
            state[name] = out
        return state

    def _stacked(self, name: str) -> bool:
        """Whether each of the names on disk is one row of our tensor."""
        return len(self.expected[name]) == self.shapes[name][0] and len(self.shapes[name]) == 3

    def _check_entry(self, disk: str, entry: TensorInfo, want: tuple[int, ...]) -> None:
        """Raise CheckpointError where a tensor on disk cannot become what we want."""
        if entry.shape != want:
            fault = f"tensor {disk!r} has shape {entry.shape}, expected {want}"
            raise CheckpointError(fault, where=str(entry.file), todo=_ADVICE)
        if entry.dtype in _FLOATS:
            return
        if entry.dtype != fp8.DTYPE or self.fp8_block is None or len(want) != 2:
            fault = f"tensor {disk!r} is {str(entry.dtype).removeprefix('torch.')}, which config.json does not announce"
            raise CheckpointError(fault, where=str(entry.file), todo=_ADVICE)
        factors = tuple(-(-size // block) for size, block in zip(want, self.fp8_block, strict=True))
        scale = disk + fp8.SCALE_SUFFIX
        if scale not in self.shards.entries or self.shards.entries[scale].shape != factors:
            fault = f"tensor {scale!r} is missing or has not the shape {factors}"
            raise CheckpointError(fault, where=str(entry.file), todo="fetch the checkpoint again")

    def _dequantize_fp8(self, disk: str) -> Tensor:
        """The float32 matrix that the FP8 numbers of ``disk`` and their factors stand for."""
        assert self.fp8_block is not None
        return fp8.dequantize_fp8(self.shards.read(disk), self.shards.read(disk + fp8.SCALE_SUFFIX), self.fp8_block)
