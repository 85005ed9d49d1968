"""The road by hand is the road: one verb for each station, the same digests as the quickstart."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Sprat = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stations_by_hand_make_what_the_quickstart_makes(sprat: Sprat, tiny_pipeline: Path, tmp_path: Path) -> None:
    for verb, name in (("data", "data"), ("train", "pretrain"), ("sft", "sft")):
        done = sprat(verb, "--out", str(tmp_path / "road"), "--recipe", "tiny", "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        written = json.loads((tiny_pipeline / name / "run.json").read_text(encoding="utf-8"))
        assert told["artefact_digest"] == written["artefact_digest"], name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_finished_road_is_told_at_once_and_served_by_name(sprat: Sprat, tiny_pipeline: Path) -> None:
    done = sprat("quickstart", "--out", str(tiny_pipeline), "--recipe", "tiny", "--no-serve", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert Path(told["report"]).is_file() and {"data", "pretrain", "sft", "distill", "quantize"} <= set(told["runs"])
    answered = sprat("run", told["model"], "What is 2 + 3?", "--json")
    assert answered.returncode == 0 and json.loads(answered.stdout)["outputs"][0]["usage"]["completion_tokens"] > 0
    assert sprat("verify", str(tiny_pipeline)).returncode == 0


def test_a_station_before_its_turn_names_what_is_missing(sprat: Sprat, tmp_path: Path) -> None:
    done = sprat("sft", "--out", str(tmp_path / "road"), "--recipe", "tiny")
    assert done.returncode == 3, done.stderr
    assert f"run `sprat data --out {tmp_path}/road` first" in done.stderr.splitlines()[-1]
