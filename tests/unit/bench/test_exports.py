"""llama.cpp, transformers and compressed-tensors themselves read what we export, where they are made."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.export_folders import measure_compressed
from bench.exports import SUMS, Case, Verdict, measure, random_model
from bench.oracles import ROOT, python_of

MLA: dict[str, Any] = {"initializer_range": 0.1, "q_lora_rank": 32, "n_group": 4, "topk_group": 2}
DENSE: dict[str, Any] = {"initializer_range": 0.1, "dense": True, "num_key_value_heads": 1, "head_dim": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek_v3": MLA,
    "llama": {**DENSE, "architecture": "llama", "attention_bias": True},
    "qwen3": {**DENSE, "architecture": "qwen3"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_ids_chat_and_logits_are_ours_and_bytes_are_its_own(name: str, tmp_path: Path) -> None:
    """Only where ``python -m bench.oracles`` has compiled llama.cpp; ``make test`` does not."""
    python = python_of("llama")
    code = "import llama_cpp, jinja2"
    if not python.is_file() or subprocess.run([python, "-c", code], capture_output=True, cwd=ROOT).returncode:
        pytest.skip("llama.cpp is not built (python -m bench.oracles)")
    case = Case(name, functools.partial(random_model, "pico", **SHAPES[name]), ("q8_0",), "superbpe", SUMS[:30])
    found = list(measure(case, python, tmp_path, quick=True))
    assert len(found) == 7 and [row for row in found if row.word == "MISSED"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_transformers_reads_packed_and_eight_bit_weights_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Only where ``python -m bench.oracles compressed`` has installed them; ``make test`` does not."""
    python = python_of("compressed")
    if not python.is_file():
        pytest.skip("compressed-tensors is not there (python -m bench.oracles compressed)")
    found = list(measure_compressed(python, tmp_path, [name]))
    assert len(found) == (12 if name == "deepseek_v3" else 14)
    assert [row for row in found if row.word != "met"] == []


def test_a_figure_above_its_bar_is_missed() -> None:
    words = [Verdict("m", "f32", "gap", figure, bar).word for figure, bar in ((0.1, 0.2), (0.3, 0.2), (0.3, None))]
    assert words == ["met", "MISSED", "shown"]
