"""``sprat export`` and ``sprat merge``: take a model away, in files that other programs load unchanged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from sprat.cli.verb import ModelFolder, Result
from sprat.errors import ConfigError

_GGUF_HELP = "Write a GGUF file, for llama.cpp and what is built on it."
Gguf = Annotated[Path | None, typer.Option("--gguf", metavar="FILE", help=_GGUF_HELP)]
_HF_HELP = "Write a Hugging Face folder (safetensors), for transformers, vLLM and SGLang."
HuggingFace = Annotated[Path | None, typer.Option("--hf", metavar="DIR", help=_HF_HELP)]
_KIND_HELP = "How a GGUF file holds its matrices."
Kind = Annotated[Literal["f32", "f16", "q8_0", "q4_0"], typer.Option("--kind", help=_KIND_HELP)]
_PRE_HELP = "llama.cpp's name of how text is cut, where none cuts as this tokenizer does: superbpe is nearest."
Pre = Annotated[str | None, typer.Option("--pre", metavar="NAME", help=_PRE_HELP)]
_FORMAT_HELP = "How a folder holds its matrices: in float32, INT4/INT8 (compressed-tensors), or DeepSeek's FP8 blocks."
FolderFormat = Annotated[Literal["dense", "pack-quantized", "fp8"], typer.Option("--format", help=_FORMAT_HELP)]
_ADAPTER_HELP = "A folder in PEFT's layout: adapter_config.json, adapter_model.safetensors."
_DEQUANTIZE_HELP = "Merge into what a quantised model stands for, in float32."
Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help=_ADAPTER_HELP)]


def export(
    model: ModelFolder,
    gguf: Gguf = None,
    hf: HuggingFace = None,
    kind: Kind = "q8_0",
    format: FolderFormat = "dense",
    pre: Pre = None,
) -> Result:
    """Write MODEL as a GGUF file or a Hugging Face folder, with a manifest that sprat verify-export reads.

    Example: sprat export runs/mine --gguf mine.gguf
    """
    if (gguf is None) == (hf is None):
        what = "no form to write" if gguf is None else "two forms to write"
        raise ConfigError(what, where="export", todo="give one of --gguf FILE and --hf DIR")
    if gguf is not None and format != "dense":
        raise ConfigError("a GGUF file has a --kind", where="--format", todo="leave --format out, or give --hf DIR")
    if hf is not None and pre is not None:
        raise ConfigError("a folder holds its whole tokenizer", where="--pre", todo="leave --pre out")
    from sprat.formats.export import Form, export_model

    if gguf is not None:
        export_model(model, gguf, Form("gguf", kind, pre))
        size = gguf.stat().st_size
        return Result({"model": str(model), "gguf": str(gguf), "kind": kind, "bytes": size}, _describe_size(gguf))
    assert hf is not None
    export_model(model, hf, Form(format))
    return Result({"model": str(model), "hf": str(hf), "format": format}, _describe_size(hf))


def merge(
    base: ModelFolder,
    adapter: Adapter,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    dequantize: Annotated[bool, typer.Option("--dequantize", help=_DEQUANTIZE_HELP)] = False,
) -> Result:
    """Put a LoRA adapter into the weights of its base, as a Hugging Face folder.

    Example: sprat merge smol runs/mine/artefact/adapter --out merged
    """
    from sprat.formats.export import new_folder, refuse_existing_folder
    from sprat.formats.load import load_dense, save
    from sprat.formats.peft import load_peft
    from sprat.model.lora import merge_lora

    refuse_existing_folder(out)
    model, tokenizer = load_dense(base, dequantize=dequantize)
    load_peft(model, adapter)
    merge_lora(model)
    with new_folder(Path(os.path.abspath(out))) as folder:
        save(model, tokenizer, folder)
    return Result({"base": str(base), "adapter": str(adapter), "model": str(out)}, _describe_size(out))


def _describe_size(path: Path) -> str:
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    return f"{path}: {size / 1e6:,.1f} MB"
