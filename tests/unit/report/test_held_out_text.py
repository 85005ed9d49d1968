"""A model on held-out text stands beside the best baseline, whichever that is, and beside gzip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sprat.config import TrainConfig
from sprat.eval.score import HeldOutScores
from sprat.report import held_out_text, write_report
from sprat.report.runs import PipelineRuns, read_runs
from sprat.trust import open_run
from sprat.trust.run_record import Input


def pretrained(folder: Path, bits: dict[str, Any], data: dict[str, Any] | None = None) -> PipelineRuns:
    """A pipeline of a data stage and a pre-trained model that was measured on text."""
    ledger, inputs = folder / "ledger.jsonl", dict[str, Input]()
    for name, facts in (("data", {"baselines": data or {}}), ("pretrain", {"title": "Model", "bits_per_byte": bits})):
        run = open_run(folder / name, stage=name, recipe=TrainConfig(), inputs=inputs, seed=0, ledger=ledger)
        (run.artifact / "made").write_bytes(name.encode())
        inputs = {"data": folder / "data"}
        run.add_facts(**facts)
        run.finish()
    return read_runs(folder)


def rows(pipeline: PipelineRuns) -> list[list[str]]:
    """The cells of the table's body, as HTML."""
    body = held_out_text.table(pipeline).split("<tbody>")[1]
    return [re.findall(r"<td[^>]*>.*?</td>", row) for row in body.split("<tr>")[1:]]


def test_the_table_names_the_best_baseline_and_says_who_wins(pipeline: Path) -> None:
    docstring, prose = rows(read_runs(pipeline))
    assert prose[:3] == ["<td>prose</td>", '<td class="bad">2.210</td>', '<td class="bad">2.330</td>']  # and the twin
    assert prose[3:5] == ["<td><b>1.870</b><small>PPM</small></td>", "<td>3.050</td>"]
    assert "xz -9 2.36, byte 3-gram 2.62, byte 6-gram 2.14" in prose[5]
    assert docstring[1:3] == ['<td class="good">2.400</td>', '<td class="bad">2.520</td>']
    assert docstring[3:5] == ["<td><b>2.490</b><small>byte 6-gram</small></td>", "<td>2.710</td>"]
    assert "xz -9 2.55, byte 3-gram 2.95" in docstring[5]


def test_a_plot_holds_the_models_the_best_baseline_and_gzip_and_no_more(pipeline: Path) -> None:
    docstring, prose = held_out_text.plots(read_runs(pipeline))
    assert all(word in prose for word in ("PPM", "gzip -9", "1.87", "2.21", "3.05"))
    assert not any(word in prose for word in ("xz -9", "-gram", "2.36"))
    assert "byte 6-gram" in docstring and "gzip -9" in docstring and "xz -9" not in docstring


@pytest.mark.parametrize("beside", ["model", "data"])
def test_a_road_made_before_shows_what_was_measured_then(tmp_path: Path, beside: str) -> None:
    old = {"gzip": 2.92, "trigram": 2.86, "bytes": 74_227}
    row = {"model": 2.08} | (old if beside == "model" else {})
    pipeline = pretrained(tmp_path, {"prose": row}, {"prose": old})
    ((_, model, best, gzip, others),) = rows(pipeline)
    assert model == '<td class="good">2.080</td>'
    assert best == "<td><b>2.860</b><small>byte 3-gram</small></td>" and gzip == "<td>2.920</td>" and "–" in others
    assert "byte 3-gram" in write_report(tmp_path).read_text(encoding="utf-8")


def test_gzip_stands_once_where_it_is_the_best(tmp_path: Path) -> None:
    pipeline = pretrained(tmp_path, {"code": {"model": 2.4, "gzip": 2.27, "trigram": 3.04}})
    assert held_out_text.plots(pipeline)[0].count("gzip -9") == 1
    ((_, model, best, _, others),) = rows(pipeline)
    assert model == '<td class="bad">2.400</td>' and "2.270" in best and "byte 3-gram 3.04" in others


def test_a_model_without_baselines_is_shown_alone_and_nothing_without_a_model(tmp_path: Path) -> None:
    alone = pretrained(tmp_path / "alone", {"prose": {"model": 2.5}})
    assert rows(alone)[0][1:4] == ["<td>2.500</td>", "<td>–</td>", "<td>–</td>"]
    assert len(held_out_text.plots(alone)) == 1
    nothing = pretrained(tmp_path / "nothing", {"prose": {}})
    assert held_out_text.plots(nothing) == []
    assert held_out_text.table(pretrained(tmp_path / "none", {})) == ""


def test_a_baseline_of_a_foreign_road_is_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>@bad|"
    pretrained(tmp_path, {"prose": {"model": 2.5, name: 2.0, "gzip": 2.9, f"{name}2": 2.4}})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;&#64;bad|2 2.40" in page


def test_what_a_stage_writes_is_what_the_report_reads() -> None:
    held = HeldOutScores(500, {"gzip": 3.0, "ppm": 1.9}, 2.1)
    assert held.to_dict() == {"gzip": 3.0, "ppm": 1.9, "bytes": 500, "model": 2.1}
    assert HeldOutScores.from_dict(held.to_dict()) == held
    assert (held.best_baseline, HeldOutScores(0, {}).best_baseline) == ("ppm", "")
