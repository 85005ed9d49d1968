"""What the trust package promises: runs, the ledger and the verdict."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sprat.config import MoneyConfig, QuantConfig, TrainConfig
from sprat.errors import TrustError
from sprat.files import digest
from sprat.files.json import read_json
from sprat.trust import Ledger, open_run, run_record
from sprat.trust.run import Run
from sprat.trust.verify import verify

from .runs import faults, finished


def test_the_ledger_goes_on_after_a_torn_last_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("note", {"n": 1})
    with open(ledger.path, "ab") as stream:
        stream.write(b'{"body":{"n":2},"ha')
    assert ledger.find_errors() == ["the last line is torn (its write was cut off)"]
    assert [entry["body"]["n"] for entry in ledger.entries()] == [1]
    ledger.append("note", {"n": 3})
    assert ledger.find_errors() == []
    assert [entry["body"]["n"] for entry in ledger.entries()] == [1, 3]


def test_no_line_of_the_ledger_can_be_altered_dropped_or_moved_unseen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in range(3):
        ledger.append("note", {"n": number, "text": "é\x85"})
    whole = ledger.path.read_bytes()
    assert ledger.find_errors() == []
    for place in range(len(whole)):
        ledger.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert ledger.find_errors(), f"byte {place} flipped unseen"
    first, second, third = whole.splitlines(keepends=True)
    for altered in (first + third, second + first + third, first + second + second + third, second + third):
        ledger.path.write_bytes(altered)
        assert ledger.find_errors()


def test_a_run_says_what_it_read_made_and_cost(pipeline: Path) -> None:
    written = read_json(pipeline / "sft" / "run.json")
    assert written is not None
    assert written["inputs"]["model"]["path"] == "pretrain"
    assert written["inputs"]["model"]["digest"] == digest.of_folder(pipeline / "pretrain" / "artefact")
    assert written["outputs"] == {"deep/model.bin": digest.of_bytes(b"tuned")}
    assert written["artefact_digest"] == digest.of_folder(pipeline / "sft" / "artefact")
    assert written["recipe_digest"] == TrainConfig(steps=3).digest()
    assert (written["tokens"], written["flops"], written["seed"]) == (100, 1e6, 1)
    assert written["facts"] == {"title": "sft"}
    assert str(pipeline) not in (pipeline / "sft" / "run.json").read_text()
    assert sorted(path.name for path in (pipeline / "sft").iterdir()) == [
        "artefact", "metrics.jsonl", "recipe.toml", "run.json",
    ]  # fmt: skip


def test_money_is_whole_nano_yuan_of_the_stated_price() -> None:
    money = MoneyConfig(yuan_per_core_hour=0.36, watts_per_core=5.0)
    assert run_record.price_nano_yuan(10.0, money) == 1_000_000
    assert isinstance(run_record.price_nano_yuan(1.234, money), int)
    assert run_record.energy_joules(10.0, money) == 50.0


def test_the_same_call_finds_the_run_done_and_another_recipe_sets_it_aside(pipeline: Path) -> None:
    assert finished(pipeline, "pretrain").done
    again = open_run(
        pipeline / "pretrain",
        stage="pretrain",
        recipe=TrainConfig(steps=4),
        inputs={},
        seed=1,
        ledger=pipeline / "ledger.jsonl",
    )
    assert not again.done
    assert not any(again.artifact.iterdir())
    assert (pipeline / "pretrain.old-1" / "run.json").is_file()
    (again.artifact / "model.bin").write_bytes(b"other")
    again.finish()
    assert any("now holds something else" in fault for fault in faults(pipeline))
    assert finished(pipeline, "sft", b"tuned", model=pipeline / "pretrain").done
    assert (pipeline / "sft.old-1").is_dir()
    assert faults(pipeline) == []


def test_another_seed_or_a_half_done_run_of_another_recipe_is_never_continued(tmp_path: Path) -> None:
    def opened(steps: int, seed: int) -> Run:
        return open_run(
            tmp_path / "a",
            stage="a",
            recipe=TrainConfig(steps=steps),
            inputs={},
            seed=seed,
            ledger=tmp_path / "ledger.jsonl",
        )

    (opened(1, 0).checkpoints / "step-1").mkdir()
    assert any(opened(1, 0).checkpoints.iterdir())
    assert not any(opened(2, 0).checkpoints.iterdir())
    assert not any(opened(2, 1).checkpoints.iterdir())
    assert (tmp_path / "a.old-2").is_dir()


def test_a_damaged_or_doctored_run_is_made_again_not_blessed(pipeline: Path) -> None:
    (pipeline / "sft" / "artefact" / "deep" / "model.bin").write_bytes(b"TUNED")
    assert finished(pipeline, "sft", b"tuned", model=pipeline / "pretrain").done
    assert (pipeline / "sft.old-1").is_dir()
    path = pipeline / "pretrain" / "run.json"
    path.write_text(path.read_text().replace('"title": "pretrain"', '"title": "doctored"'))
    finished(pipeline, "pretrain")
    assert (pipeline / "pretrain.old-1").is_dir()
    assert faults(pipeline) == []


def test_foreign_files_are_never_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(TrustError, match="something else"):
        finished(tmp_path, "mine")
    with pytest.raises(TrustError, match="not there"):
        finished(tmp_path, "other", model=tmp_path / "nowhere")
    with pytest.raises(TrustError, match="cannot lie in a run"):
        open_run(tmp_path / "a", stage="a", recipe=QuantConfig(), inputs={}, seed=0, ledger=tmp_path / "a" / "l.jsonl")


def test_rewind_drops_the_rows_after_the_checkpoint_and_a_number_may_be_infinite(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a", stage="a", recipe=QuantConfig(), inputs={}, seed=0, ledger=tmp_path / "ledger.jsonl")
    for step in range(4):
        run.log(step, loss=float("inf") if step == 1 else step)
    run.truncate_metrics(2)
    assert [(row["step"], row["loss"]) for row in run_record.read_metrics(run.folder)] == [(0, 0), (1, None), (2, 2)]


def test_a_road_that_was_moved_still_verifies_whole_and_run_by_run(pipeline: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "deep"
    shutil.move(pipeline, moved)
    assert faults(moved) == []
    assert faults(moved / "sft") == []
    assert all(finding.ok for finding in verify(moved)) and len(verify(moved)) == 3
    with pytest.raises(TrustError, match="no run to verify"):
        verify(tmp_path / "elsewhere" / "nothing")


def test_no_byte_of_a_road_can_be_flipped_unseen(pipeline: Path) -> None:
    assert faults(pipeline) == []
    files = [path for path in pipeline.rglob("*") if path.is_file()]
    assert len(files) == 9
    for path in files:
        whole = path.read_bytes()
        step = max(1, len(whole) // 40)
        for place in {*range(0, len(whole), step), len(whole) - 1}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert faults(pipeline), f"{path.relative_to(pipeline)}: byte {place} flipped unseen"
        path.write_bytes(whole)
    assert faults(pipeline) == []


def test_a_file_added_or_taken_away_is_seen(pipeline: Path) -> None:
    for path in [path for path in pipeline.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        path.unlink()
        assert faults(pipeline), f"{path.relative_to(pipeline)} taken away unseen"
        path.write_bytes(whole)
    (pipeline / "sft" / "artefact" / "extra.bin").write_bytes(b"")
    assert faults(pipeline) == ["sft: artefact/extra.bin was added after the run"]
    shutil.rmtree(pipeline / "sft")
    assert any("is not there" in fault for fault in faults(pipeline))


def test_an_altered_input_cannot_be_built_upon(pipeline: Path) -> None:
    (pipeline / "pretrain" / "artefact" / "deep" / "model.bin").write_bytes(b"poison")
    assert any(fault.startswith("sft: input 'model'") for fault in faults(pipeline))
    with pytest.raises(TrustError, match="altered"):
        finished(pipeline, "rl", model=pipeline / "pretrain")
