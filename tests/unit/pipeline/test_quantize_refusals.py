"""`sprat quantize MODEL` writes no model into a run, and does not round otherwise than it was told."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.cli.quantize import quantize
from sprat.config.quant import QuantizeConfig
from sprat.errors import CheckpointError, ConfigError
from sprat.post.quantize import quantize_model


@pytest.mark.parametrize("inside", [".", "artefact", "new/deep"])
def test_a_finished_run_is_not_written_into(tmp_path: Path, inside: str) -> None:
    run = tmp_path / "distill"
    (run / "artefact").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="finished run"):
        quantize_model(tmp_path / "model", run / inside, QuantizeConfig(), None)


@pytest.mark.parametrize(("rounding", "text"), [("gptq", None), ("nearest", Path("text"))])
def test_a_rounding_that_does_not_fit_is_refused(tmp_path: Path, rounding: str, text: Path | None) -> None:
    with pytest.raises(ConfigError, match="calibrate"):
        quantize(tmp_path / "model", tmp_path / "out", calibrate=text, overrides=[f"rounding={rounding}"])
