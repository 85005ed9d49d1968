"""Our GPTQ, asked for llm-compressor's settings, gives its codes and scales to the last bit."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from bench import gptq_parity
from bench.gptq_parity import Verdict, inputs, measure
from bench.oracles import ROOT, python_of


@pytest.mark.slow
def test_codes_and_scales_are_llm_compressors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where ``python -m bench.oracles`` has installed llm-compressor; ``make test`` does not."""
    python = python_of("llmcompressor")
    code = "import torch, compressed_tensors.quantization"
    if not python.is_file() or subprocess.run([python, "-c", code], capture_output=True, cwd=ROOT).returncode:
        pytest.skip("llm-compressor is not installed (python -m bench.oracles)")

    def few(quick: bool) -> Iterator[tuple[str, Any, Any]]:
        yield next(inputs(quick))

    monkeypatch.setattr(gptq_parity, "inputs", few)
    found = list(measure(python, quick=True))
    assert (
        len([row for row in found if row.word == "met"]) == 6 and [row for row in found if row.word == "MISSED"] == []
    )


def test_a_single_other_code_is_missed() -> None:
    assert [Verdict("w", "codes", figure, bar).word for figure, bar in ((0, 0), (1, 0), (1, None))] == [
        "met",
        "MISSED",
        "shown",
    ]
