"""``sprat export`` and ``sprat merge``: take a model away, in files that other programs load unchanged."""

from __future__ import annotations

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
_ADAPTER_HELP = "A folder in PEFT's layout: adapter_config.json, adapter_model.safetensors."
Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help=_ADAPTER_HELP)]


def export(model: ModelFolder, gguf: Gguf = None, hf: HuggingFace = None, kind: Kind = "q8_0") -> Result:
    """Write MODEL as a GGUF file or a Hugging Face folder.

    Example: sprat export runs/mine --gguf mine.gguf
    """
    if (gguf is None) == (hf is None):
        what = "no form to write" if gguf is None else "two forms to write"
        raise ConfigError(what, where="export", todo="give one of --gguf FILE and --hf DIR")
    from sprat.formats import gguf as gguf_format
    from sprat.formats.load import load, save

    out = gguf or hf
    assert out is not None
    if out.exists() and (out.is_dir() if gguf else out.is_file() or any(out.iterdir())):
        what = "this is a folder" if gguf else "something is there already"
        raise ConfigError(what, where=str(out), todo="give another path")
    weights, tokenizer = load(model, dequantize=hf is not None)
    if gguf is not None:
        gguf_format.save(weights, tokenizer, gguf, kind=kind)
        return Result(
            {"model": str(model), "gguf": str(gguf), "kind": kind, "bytes": gguf.stat().st_size}, _describe_size(gguf)
        )
    save(weights, tokenizer, out)
    return Result({"model": str(model), "hf": str(out)}, _describe_size(out))


def merge(
    base: ModelFolder,
    adapter: Adapter,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
) -> Result:
    """Put a LoRA adapter into the weights of its base, as a Hugging Face folder.

    Example: sprat merge smol runs/mine/artefact/adapter --out merged
    """
    from sprat.formats import gguf as gguf_format
    from sprat.formats.load import load, locate, save
    from sprat.formats.peft import load_peft
    from sprat.model.lora import merge_lora

    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError("something is there already", where=str(out), todo="give another folder")
    path = locate(base)
    model, tokenizer = load(path, dequantize=gguf_format.is_gguf(path))
    load_peft(model, adapter)
    merge_lora(model)
    save(model, tokenizer, out)
    return Result({"base": str(base), "adapter": str(adapter), "model": str(out)}, _describe_size(out))


def _describe_size(path: Path) -> str:
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    return f"{path}: {size / 1e6:,.1f} MB"
