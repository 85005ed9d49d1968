"""What may lie in a folder, and what becomes of a run whose folder is moved, deleted or cut off in between."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from sprat.config import QuantConfig, TrainConfig
from sprat.errors import TrustError
from sprat.files import digest
from sprat.trust import Ledger, open_run
from sprat.trust.run import Run
from sprat.trust.verify import verify

from .attacks import body_of, canonical, edit, rewrite, sha
from .runs import faults, finished


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs the kernel's count of bytes read")
def test_to_append_to_a_long_ledger_reads_its_end_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    entry = ledger.append("note", {"text": "x" * 9000})
    line = ledger.path.read_bytes()
    ledger.path.write_bytes(line * 200)  # no chain, but a length: append looks at the last line alone

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    again = ledger.append("note", {})
    assert read() - before < 60_000 < 200 * len(line)
    assert again["prev"] == entry["hash"]
    assert len(ledger.path.read_bytes().splitlines()) == 201


def test_a_torn_line_longer_than_what_is_read_at_once_is_cut_off(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for torn in (b"x" * 20_000, b"y"):
        with open(ledger.path, "ab") as stream:
            stream.write(torn)
        ledger.append("note", {"text": "z" * 7000})
        assert ledger.find_errors() == []
    assert [entry["index"] for entry in ledger.entries()] == [0, 1]


@pytest.mark.timeout(20)
def test_a_pipe_or_a_device_is_refused_not_waited_for(tmp_path: Path, pipeline: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(TrustError, match="a pipe or a device"):
            digest.of_file(odd)
        with pytest.raises(TrustError, match="a pipe or a device"):
            finished(pipeline, "rl", text=odd)
    (pipeline / "text").write_text("words")
    finished(pipeline, "rl", text=pipeline / "text")
    (pipeline / "text").unlink()
    os.mkfifo(pipeline / "text")
    assert any("a pipe or a device" in fault for fault in faults(pipeline / "rl"))


def test_a_folder_of_the_users_may_hold_links_and_pipes(tmp_path: Path, pipeline: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (tmp_path / "words.txt").write_text("one")
    (text / "words.txt").symlink_to(tmp_path / "words.txt")
    (text / "nowhere.txt").symlink_to(tmp_path / "none")
    os.mkfifo(text / "pipe")
    assert finished(pipeline, "rl", text=text).done
    (tmp_path / "words.txt").write_text("two")
    assert not (pipeline / "rl.old-1").exists()
    finished(pipeline, "rl", text=text)
    assert (pipeline / "rl.old-1").is_dir(), "what a link leads to is part of the input"


def test_a_run_that_was_deleted_is_made_again_and_that_is_told(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "sft")
    assert any("'sft' is not there" in fault for fault in faults(pipeline))
    run = open_run(
        pipeline / "sft",
        stage="sft",
        recipe=TrainConfig(steps=3),
        inputs={"model": pipeline / "pretrain"},
        seed=1,
        ledger=pipeline / "ledger.jsonl",
    )
    assert any("'sft' was deleted and not made again" in fault for fault in faults(pipeline))
    run.finish()
    assert faults(pipeline) == []
    assert "deleted and made again: sft" in str(verify(pipeline)[-1])


def test_killed_while_a_run_is_set_aside_the_road_is_whole_at_the_next_start(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other() -> Run:
        return open_run(
            pipeline / "sft",
            stage="sft",
            recipe=TrainConfig(steps=9),
            inputs={},
            seed=1,
            ledger=pipeline / "ledger.jsonl",
        )

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr("sprat.trust.run.os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            other()
    assert (pipeline / "sft" / "run.json").is_file()
    other().finish()
    assert faults(pipeline) == []
    assert sorted(path.name for path in pipeline.glob("sft*")) == ["sft", "sft.old-1"]


def test_a_run_that_was_set_aside_with_a_link_in_it_is_not_listed_as_proved(pipeline: Path) -> None:
    (pipeline / "sft" / "artefact" / "link").symlink_to("/etc/hostname")
    open_run(
        pipeline / "sft", stage="sft", recipe=TrainConfig(steps=9), inputs={}, seed=1, ledger=pipeline / "ledger.jsonl"
    ).finish()
    assert faults(pipeline) == []
    _, aside, unproved = str(verify(pipeline)[-1]).partition("not proved: ")
    assert aside and unproved.startswith("sft.old-1 (") and "link" in unproved
    assert "set aside: sft.old-1" not in str(verify(pipeline)[-1])
    (pipeline / "sft.old-1" / "artefact" / "link").unlink()
    assert [fault for fault in faults(pipeline) if "sft.old-1: it was changed" in fault]


def told(pipeline: Path, name: str) -> str:
    """What verify says of the run ``name``."""
    return " ".join(str(finding) for finding in verify(pipeline) if finding.subject == name)


def remake(pipeline: Path, name: str) -> None:
    """Set the run ``name`` aside and make it with another recipe."""
    run = open_run(
        pipeline / name, stage=name, recipe=TrainConfig(steps=9), inputs={}, seed=1, ledger=pipeline / "ledger.jsonl"
    )
    run.finish()


def test_a_checkpoint_that_a_run_starts_from_is_checked_where_it_lies_now(pipeline: Path) -> None:
    finished(pipeline, "rl", init_from=pipeline / "sft" / "artefact" / "deep")
    assert faults(pipeline) == [] and "1 inputs" in told(pipeline, "rl") and "not here" not in told(pipeline, "rl")
    remake(pipeline, "sft")  # the checkpoint goes along
    assert faults(pipeline) == [] and "1 inputs" in told(pipeline, "rl") and "not here" not in told(pipeline, "rl")
    (pipeline / "sft.old-1" / "artefact" / "deep" / "model.bin").write_bytes(b"other")
    assert "rl: input 'init_from' (sft/artefact/deep)" in " ".join(faults(pipeline))


def test_a_checkpoint_of_an_open_run_is_checked_as_long_as_it_is_there(pipeline: Path) -> None:
    pretrain = open_run(
        pipeline / "more",
        stage="more",
        recipe=TrainConfig(steps=3),
        inputs={},
        seed=1,
        ledger=pipeline / "ledger.jsonl",
    )
    (pretrain.checkpoints / "step-1").mkdir()
    (pretrain.checkpoints / "step-1" / "model.bin").write_bytes(b"half")
    finished(pipeline, "rl", init_from=pretrain.checkpoints / "step-1")
    assert faults(pipeline) == [] and "1 inputs" in told(pipeline, "rl") and "not here" not in told(pipeline, "rl")
    pretrain.finish()  # which removes its checkpoints
    assert (
        faults(pipeline) == []
        and "0 inputs" in told(pipeline, "rl")
        and "not here to check: input init_from" in told(pipeline, "rl")
    )


def test_settings_are_recorded_with_their_digest_and_checked(pipeline: Path) -> None:
    settings = QuantConfig(group=64)
    finished(pipeline, "rl", eval=settings, init_from="0" * 64)
    written = json.loads((pipeline / "rl" / "run.json").read_text())["inputs"]["eval"]
    assert written["settings"]["group"] == 64
    assert written["digest"] == sha(canonical(written["settings"]).encode()) == settings.digest()
    assert "1 inputs" in told(pipeline, "rl") and "not here to check: input init_from" in told(pipeline, "rl")
    edit(pipeline / "rl" / "run.json", '"group": 64', '"group": 32')
    rewrite(pipeline, lambda found: [*found[:-1], {**found[-1], "body": body_of(pipeline, "rl")}])
    assert faults(pipeline) == ["rl: input 'eval': not the settings recorded"]
    finished(pipeline, "dpo", eval=settings.digest())
    assert finished(pipeline, "dpo", eval=settings).set_aside is None, (
        "a run from before settings were recorded is found"
    )


def test_a_ledger_that_verify_would_not_find_is_refused(tmp_path: Path) -> None:
    for ledger in (tmp_path / "book.jsonl", tmp_path / "beside" / "ledger.jsonl"):
        with pytest.raises(TrustError, match=r"is the ledger.jsonl of a folder above it.*give .*ledger.jsonl"):
            open_run(tmp_path / "a", stage="a", recipe=QuantConfig(), inputs={}, seed=0, ledger=ledger)
