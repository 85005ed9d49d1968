"""Folders that Sprat exports, in transformers with compressed-tensors and in vLLM on this machine's cores.

Held to bars: weights that transformers reads otherwise than we do, and the largest difference of its logits from those
of our dense folder of the same model (bar: none, both where it multiplies packed weights out as it loads and where it
does so as it runs); matrices that compressed-tensors packed and we read otherwise (bar: none); mean |log-prob gap| of
vLLM in float32 (bar: 1e-2). vLLM's INT4 kernel for CPUs computes in bfloat16: that gap is shown.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.exports import Verdict, Worker, random_model, real_text

WINDOW, WINDOWS = 128, 2
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
WIDTHS: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "initializer_range": 0.1,
}  # fmt: skip
DENSE: dict[str, Any] = {**WIDTHS, "dense": True, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **WIDTHS, "q_lora_rank": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "num_attention_heads": 4, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "num_hidden_layers": 3,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "llama": {**DENSE, "architecture": "llama"},
    "qwen2": {**DENSE, "architecture": "qwen2", "attention_bias": True},
    "qwen3": {**DENSE, "architecture": "qwen3"},
}  # fmt: skip


def make(name: str, folder: Path, bits: int | None = None) -> Path:
    """A small random model, as ``sprat.save`` writes it: dense, or of INT4 or INT8."""
    import sprat
    from sprat.config import QuantConfig
    from sprat.quant import quantize_model

    source = folder / f"{name}-{bits}"
    if not source.exists():
        model, tokenizer = random_model("micro", **SHAPES[name])
        group = 64 if bits == 8 else 32
        small = quantize_model(model, QuantConfig.model_validate({"bits": bits, "group": group})) if bits else model
        sprat.save(small, tokenizer, source)
    return source


def measure_compressed(python: Path, folder: Path, names: Iterable[str] = SHAPES) -> Iterator[Verdict]:
    """What transformers and compressed-tensors make of our folders, and we of theirs."""
    from sprat.formats.export import Form, export_model

    worker = Worker([python, "-m", "bench.export_workers", "transformers"], folder / "compressed.log")
    for name in names:
        for kind in ("int4", "int8", "fp8"):
            source = make(name, folder, {"int4": 4, "int8": 8}.get(kind))
            dense, packed = folder / f"{name}-{kind}-dense", folder / f"{name}-{kind}-packed"
            export_model(source, packed, Form("fp8" if kind == "fp8" else "pack-quantized"))
            export_model(packed, dense, Form())
            if kind == "fp8" and name == "deepseek_v3":
                continue  # 576 rows are ragged, which transformers 5.23 refuses; the tests have a NumPy reference
            for multiplied_out in (True, False) if kind != "fp8" else (False,):
                paths = {"dense": str(dense), "packed": str(packed), "multiplied_out": multiplied_out}
                told = worker.ask("compare", tokens=list(range(64)), **paths)
                way = "loading" if multiplied_out or kind == "fp8" else "running"
                yield Verdict(name, kind, f"weights differ, of {told['weights']}, {way}", told["differ"], 0)
                yield Verdict(name, kind, f"max |logit difference|, {way}", told["logits"], 0)
    for bits in (4, 8):
        for symmetric in (True, False):
            differ, count = read_theirs(worker, folder, bits, symmetric)
            kind = f"int{bits}" + ("" if symmetric else " zeros")
            yield Verdict("theirs", kind, f"matrices that we read otherwise, of {count}", differ, 0)
    worker.close()


def read_theirs(worker: Worker, folder: Path, bits: int, symmetric: bool) -> tuple[int, int]:
    """(matrices that we read otherwise, of how many) of a folder that compressed-tensors packed."""
    import torch
    from safetensors.torch import load_file

    import sprat
    from sprat.formats.export import Form, export_model
    from sprat.formats.hf import disk_tensors

    theirs = folder / f"theirs-{bits}-{symmetric}"
    export_model(make("llama", folder), theirs, Form())
    worker.ask("pack", folder=str(theirs), bits=bits, group=64, symmetric=symmetric, seed=bits)
    model, _ = sprat.load(theirs, dequantize=True)
    ours, want = disk_tensors(model.config, model.state_dict()), load_file(theirs.with_suffix(".want"))
    return sum(not torch.equal(ours[name], value) for name, value in want.items()), len(want)


def measure_vllm(python: Path, folder: Path, quick: bool) -> Iterator[Verdict]:
    """vLLM's log-probs of real text against ours."""
    from sprat.formats.export import Form, export_model

    todo: list[tuple[str, str, Path | str, Form, str]] = [
        ("deepseek_v3", "f32", make("deepseek_v3", folder), Form(), "float32"),
        ("llama", "int4", make("llama", folder, 4), Form("pack-quantized"), "bfloat16"),
    ]
    if not quick:
        todo.insert(0, ("SmolLM2-135M", "f32", "smol", Form(), "float32"))
    for name, kind, source, form, dtype in todo:
        out = folder / f"vllm-{name}-{kind}"
        export_model(source, out, form)
        worker = Worker([python, "-m", "bench.export_workers", "vllm"], folder / "vllm.log")
        figure = vllm_gap(worker, out, dtype)
        worker.close()
        words = f"mean |log-prob gap|, {WINDOWS * (WINDOW - 1)} tokens, vLLM {dtype}"
        yield Verdict(name, kind, words, figure, 1e-2 if dtype == "float32" else None)
        shutil.rmtree(out)


def vllm_gap(worker: Worker, path: Path, dtype: str) -> float:
    """Mean |difference| of the log-probs of real text."""
    import torch

    import sprat

    model, tokenizer = sprat.load(path, dequantize=True)
    ids = [token for text in real_text() for token in tokenizer.encode(text)]
    windows = [ids[at : at + WINDOW] for at in range(0, WINDOW * WINDOWS, WINDOW)]
    gaps: list[float] = []
    for window, theirs in zip(
        windows, worker.ask("log_probs", path=str(path), dtype=dtype, windows=windows), strict=True
    ):
        with torch.no_grad():
            log_probs = model(torch.tensor([window]))[0, :-1].double().log_softmax(-1)
        ours = log_probs.gather(1, torch.tensor(window[1:])[:, None])[:, 0].tolist()
        gaps += [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return math.fsum(gaps) / len(gaps)
