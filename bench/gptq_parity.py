"""GPTQ against llm-compressor's: the same weight, the same Hessian, the same codes and scales, bit for bit?

Their `quantize_weight` runs unmodified in an environment of its own (`bench.oracles`), on the same torch. Ours is asked
for their settings: `clip="minmax"`, `precision="float32"`, damping 0.01, columns as they lie or by energy (their
`static`). We keep scales in float16. So three things are compared:

- scales: ours, and theirs rounded to float16 (bar: all equal);
- codes on those scales (bar: all equal);
- codes on their own scales as a model in float32 or bfloat16 gives them (shown: what the width of a scale changes. With
  scales in bfloat16 they also round every restored weight to bfloat16 while they go on, which we do not);
- and, to see what the order of float operations alone does, codes of our default, float64, on the same scales (shown).

    python -m bench.gptq_parity [--quick] [--json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.oracles import ROOT, make_llmcompressor

GROUP, DAMPING, BLOCK = 128, 0.01, 128
SCALES = ("float16", "float32", "bfloat16")


@dataclass(frozen=True)
class Verdict:
    """One figure: ``bar`` is what it may be at most, None where it is only shown."""

    case: str
    what: str
    figure: float
    bar: float | None

    @property
    def word(self) -> str:
        """What the figure means."""
        return "shown" if self.bar is None else "met" if self.figure <= self.bar else "MISSED"


def worker(source: str, target: str) -> None:
    """Theirs: scales and codes of each weight and Hessian in ``source``."""
    import importlib

    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    [folder] = [Path(path) / "llmcompressor" for path in sys.path if (Path(path) / "llmcompressor").is_dir()]
    for name in ("llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.gptq"):
        module = types.ModuleType(name)  # the packages without what they import: accelerate, datasets, auto-round
        module.__path__ = [str(folder.parent / name.replace(".", "/"))]
        sys.modules[name] = module
    theirs = importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with safe_open(source, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
        for name, (bits, order) in cases.items():
            weight, hessian = file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.hessian")
            actorder = None if order == "none" else order
            args = QuantizationArgs(
                num_bits=bits, symmetric=True, strategy="group", group_size=GROUP, actorder=actorder
            )
            groups = weight.unflatten(-1, (-1, GROUP))
            for kind in SCALES:
                values = groups.bfloat16() if kind == "bfloat16" else groups
                scale, zero = calculate_qparams(values.amin(-1), values.amax(-1), args)
                scale = scale.half().float() if kind == "float16" else scale
                start = weight.bfloat16().float() if kind == "bfloat16" else weight.clone()
                restored, _, failed = theirs.quantize_weight(
                    start[None], hessian[None].clone(), scale[None], zero[None], None, args, BLOCK, DAMPING
                )
                assert not bool(failed.any())
                steps = scale.float().repeat_interleave(GROUP, -1)
                found[f"{name}.{kind}.codes"] = (restored[0].float() / steps).round().to(torch.int8)
                found[f"{name}.{kind}.scales"] = scale.float()
    save_file(found, target)


def inputs(quick: bool) -> Iterator[tuple[str, Any, Any]]:
    """Name, weight [N, I] and ``X^T X`` [I, I] (float32)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for rows, width in ((96, 256), (256, 768)) if quick else ((96, 256), (256, 768), (768, 2048)):
        few = torch.randn(3 * width, width // 4, generator=generator) @ torch.randn(
            width // 4, width, generator=generator
        )
        x = few + 0.3 * torch.randn(few.shape, generator=generator) * torch.linspace(0.1, 3, width)
        weight = torch.randn(rows, width, generator=generator) * 0.02
        yield f"random {rows}x{width}", weight, x.T @ x
    yield from smol_inputs(1 if quick else 4)


def smol_inputs(layers: int) -> Iterator[tuple[str, Any, Any]]:
    """The down projections of SmolLM2 on what Python's help makes of their inputs."""
    import torch

    import sprat
    from bench.exports import real_text

    model, tokenizer = sprat.load("smol", dequantize=True)
    ids = [token for text in real_text() for token in tokenizer.encode(text)][:2048]
    seen: list[tuple[str, Any, Any]] = []

    def hook(name: str) -> Any:
        def note(module: Any, given: tuple[Any, ...]) -> None:
            x = given[0].flatten(0, -2)
            seen.append((name, module.weight.detach().clone(), x.T @ x))

        return note

    blocks: list[Any] = list(model.layers)[:layers]
    model.layers = torch.nn.ModuleList(blocks)
    for number, block in enumerate(blocks):
        block.mlp.down_proj.register_forward_pre_hook(hook(f"SmolLM2 {number} down"))
    with torch.no_grad():
        model.hidden(torch.tensor([ids]))
    yield from seen


def ours(weight: Any, hessian: Any, bits: int, order: str, precision: str) -> tuple[Any, Any]:
    """Codes (int8) and scales (float32) as we find them."""
    from sprat.quant.gptq import GPTQSettings, gptq_quantize
    from sprat.quant.int4 import Scheme, unpack_int4

    settings = GPTQSettings(order, DAMPING, precision == "float32")  # type: ignore[arg-type]
    packed = gptq_quantize(weight[None], hessian[None], Scheme(bits, GROUP, clip="minmax"), settings)
    codes = unpack_int4(packed.codes, packed.width) if bits == 4 else packed.codes
    return codes[0], packed.scales[0].float()


def measure(python: Path, quick: bool) -> Iterator[Verdict]:
    """All figures."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    settings = [(4, "static"), (4, "none"), (8, "static")]
    cases, tensors = {}, {}
    for label, weight, hessian in inputs(quick):
        for bits, order in settings:
            name = f"{label} int{bits} {order}"
            cases[name] = (bits, order)
            tensors[f"{name}.weight"], tensors[f"{name}.hessian"] = weight.clone(), hessian.clone()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
        save_file(tensors, source, metadata={"cases": json.dumps(cases)})
        subprocess.run(
            [str(python), "-m", "bench.gptq_parity", "--worker", str(source), str(target)], check=True, cwd=ROOT
        )
        theirs = load_file(target)
    for name, (bits, order) in cases.items():
        weight, hessian = tensors[f"{name}.weight"], tensors[f"{name}.hessian"]
        codes, scales = ours(weight, hessian, bits, order, "float32")
        other = theirs[f"{name}.float32.scales"].half().float() != scales
        yield Verdict(name, f"scales that differ, of {scales.numel()}", int(other.sum()), 0)
        other = theirs[f"{name}.float16.codes"] != codes
        yield Verdict(name, f"codes that differ, of {codes.numel()}", int(other.sum()), 0)
        for kind in SCALES[1:]:
            other = theirs[f"{name}.{kind}.codes"] != codes
            yield Verdict(name, f"codes differ, their scales {kind}, %", 100 * float(other.float().mean()), None)
        other = ours(weight, hessian, bits, order, "float64")[0] != codes
        yield Verdict(name, "codes differ, ours in float64, %", 100 * float(other.float().mean()), None)


def main() -> int:
    """Measure and print; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most five minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(*asked.worker)
        return 0
    found: list[Verdict] = []
    for row in measure(make_llmcompressor(), asked.quick):
        found.append(row)
        if not asked.json:
            bar = "" if row.bar is None else f"bar {row.bar:g}: "
            print(f"{row.case:30} {row.what:42} {row.figure:8.3g}  {bar}{row.word}", flush=True)
    missed = [row for row in found if row.word == "MISSED"]
    if asked.json:
        table = [{**asdict(row), "verdict": row.word} for row in found]
        print(json.dumps({"date": datetime.date.today().isoformat(), "figures": table, "passed": not missed}))
    else:
        bars = sum(row.bar is not None for row in found)
        print(f"gptq_parity: {'PASS' if not missed else 'MISS'}, {bars - len(missed)} of {bars} bars met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
