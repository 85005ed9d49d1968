"""GGUF files in and out: what is read is checked and decoded in a process of its own, what is written llama.cpp loads.

What is heavy is imported when a file is loaded: the process that decodes tensors starts here too, and needs none of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from sprat.formats.gguf.export import Kind
    from sprat.model import Transformer
    from sprat.tokens import Tokenizer


def is_gguf(path: str | Path) -> bool:
    """Whether ``path`` is a file that begins as GGUF files do."""
    from sprat.formats.gguf.header import MAGIC

    try:
        with open(path, "rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def load(
    path: str | Path, *, dtype: torch.dtype | Literal["auto"] | None = None, materialize: bool = True
) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a GGUF file; quantized tensors keep their class (see ``blocks``).

    Args:
        dtype: of the weights of a file that holds no quantized tensor; None is float32, "auto" is bfloat16 where the
            file's embedding is. What is dense beside quantized tensors is float32.
        materialize: see ``quant.quantize_model``.

    Raises:
        CheckpointError: there is no such file, or it is not sound, or not a model that we know, or memory is short.
            The sentence names the key or the tensor. Nothing is half-loaded.
    """
    import torch

    from sprat.formats.gguf import weights
    from sprat.formats.gguf.config import read_config
    from sprat.formats.gguf.header import read_header
    from sprat.formats.gguf.tokenizer import read_tokenizer

    header = read_header(path)
    config = read_config(header)
    if dtype == "auto":
        narrow = header.tensors["token_embd.weight"].kind.name == "BF16"
        dtype = torch.bfloat16 if narrow else torch.float32
    tokenizer = read_tokenizer(header)
    return weights.load(header, config, dtype or torch.float32, materialize=materialize), tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        CheckpointError: see ``load``.
    """
    from sprat.formats.gguf.header import read_header
    from sprat.formats.gguf.tokenizer import read_tokenizer

    return read_tokenizer(read_header(path))


def save(model: Transformer, tokenizer: Tokenizer, path: str | Path, *, kind: Kind, pre: str | None = None) -> None:
    """Write one file that llama.cpp loads; see ``export.save``."""
    from sprat.formats.gguf import export

    export.save(model, tokenizer, path, kind=kind, pre=pre)
