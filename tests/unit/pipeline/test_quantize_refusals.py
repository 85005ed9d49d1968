"""`sprat quantize MODEL` writes no model into a run, and does not round otherwise than it was told."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.cli.quantize import quantize
from sprat.config.base import override
from sprat.config.quant import QuantizeConfig, load_quantize_config
from sprat.errors import CheckpointError, ConfigError
from sprat.post.quantize import quantize_model


@pytest.mark.parametrize("inside", [".", "artefact", "new/deep"])
def test_a_finished_run_is_not_written_into(tmp_path: Path, inside: str) -> None:
    run = tmp_path / "distill"
    (run / "artefact").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="finished run"):
        quantize_model(tmp_path / "model", run / inside, QuantizeConfig(), None)


@pytest.mark.parametrize(
    ("settings", "rounding"),
    [
        (["clip=mse"], "gptq"),  # it once was "nearest", without a word
        (["clip=minmax", "group=128", "precision=float32"], "gptq"),  # docs/quant.md; it once was refused
        (["awq=false"], "gptq"),
        (["awq=true"], "nearest"),
        (["rounding=nearest", "clip=mse"], "nearest"),
    ],
)
def test_text_means_gptq_unless_something_else_is_asked_for(settings: list[str], rounding: str) -> None:
    """As ``--help`` and docs/recipes.md say it; how scales are chosen is no rounding."""
    assert load_quantize_config(has_text=True, overrides=settings).rounding == rounding
    table: dict[str, object] = override({}, settings)
    assert load_quantize_config(has_text=True, table=table).rounding == rounding


@pytest.mark.parametrize(("rounding", "text"), [("gptq", None), ("nearest", Path("text"))])
def test_a_rounding_that_does_not_fit_is_refused(tmp_path: Path, rounding: str, text: Path | None) -> None:
    with pytest.raises(ConfigError, match="calibrate"):
        quantize(tmp_path / "model", tmp_path / "out", calibrate=text, overrides=[f"rounding={rounding}"])
