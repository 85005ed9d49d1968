"""Every way to doctor a pipeline we could think of is seen, told, or named in SECURITY.md as a witness's business."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sprat.config import TrainConfig
from sprat.errors import TrustError
from sprat.trust import Ledger, open_run
from sprat.trust.verify import verify

from .attacks import SAME, SEEN, TOLD, WITNESS, aged, doctor, entries

SECURITY = (Path(__file__).parents[3] / "SECURITY.md").read_text(encoding="utf-8")


def run(pipeline: Path, name: str, *, steps: int = 3, **inputs: Path) -> None:
    """A tiny finished run with a score."""
    made = open_run(
        pipeline / name,
        stage=name,
        recipe=TrainConfig(steps=steps),
        inputs=inputs,
        seed=1,
        ledger=pipeline / "ledger.jsonl",
    )
    if made.done:
        return
    for file in ("model.bin", "more.bin"):
        (made.artifact / file).write_bytes(f"{pipeline.name} {name} {steps} {file}".encode())
    made.log(1, loss=2.5)
    made.add_facts(title=name, scores=[{"task": "sums", "mean": 0.5}])
    made.finish(flops=1e6, tokens=100)


def make(pipeline: Path) -> Path:
    """A pipeline as the quickstart leaves it, in miniature: one stage was made again with another recipe."""
    pipeline.mkdir()
    ledger = Ledger(pipeline / "ledger.jsonl")
    ledger.root_hash()
    files = {"recipe.toml": "seed = 0\n", "corpus/documents.jsonl": "{}\n", "corpus/sources.json": "{}\n"}
    for name, content in files.items():
        (pipeline / name).parent.mkdir(exist_ok=True)
        (pipeline / name).write_text(content)
    ledger.add_file(pipeline / "recipe.toml")
    ledger.add_file(pipeline / "corpus")
    run(pipeline, "data")
    run(pipeline, "sft", steps=2, data=pipeline / "data")
    run(pipeline, "sft", data=pipeline / "data")
    run(pipeline, "rl-seed0", model=pipeline / "sft")
    run(pipeline, "rl-seed1", model=pipeline / "sft")
    (pipeline / "report.html").write_text("<p>50 %</p>")
    ledger.add_file(pipeline / "report.html")
    return pipeline


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines side by side: ``pipeline`` and ``other``."""
    folder = tmp_path_factory.mktemp("roads")
    make(folder / "road")
    make(folder / "other")
    return folder


@pytest.fixture
def pipeline(pipelines: Path, tmp_path: Path) -> Path:
    """A pipeline of this test's own, with another beside it that is only read."""
    shutil.copytree(pipelines / "road", tmp_path / "roads" / "road")
    (tmp_path / "roads" / "other").symlink_to(pipelines / "other")
    return tmp_path / "roads" / "road"


def faults(pipeline: Path, head: str = "") -> list[str]:
    return [str(finding) for finding in verify(pipeline, expect_head=head) if not finding.ok]


def told(pipeline: Path) -> str:
    return "\n".join(map(str, verify(pipeline)))


def test_the_road_is_sound_and_names_what_was_set_aside(pipeline: Path) -> None:
    head = entries(pipeline)[-1]["hash"]
    assert (
        faults(pipeline)
        == faults(pipeline, head)
        == faults(pipeline, head[:16])
        == faults(pipeline, head.upper())
        == []
    )
    assert f"10 entries, head {head}, chain whole, no run missing; set aside: sft.old-1" in told(pipeline)
    assert all(faults(pipeline / name) == [] for name in ("data", "sft", "rl-seed0", "rl-seed1"))
    with pytest.raises(TrustError, match="not the head of a ledger"):
        verify(pipeline, expect_head="abc")


def test_there_are_at_least_forty_kinds() -> None:
    assert len(SEEN) + len(TOLD) + len(WITNESS) >= 40


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", SEEN)
def test_it_is_seen(pipeline: Path, name: str) -> None:
    SEEN[name](pipeline)
    assert faults(pipeline), f"unseen: {name}"


@pytest.mark.parametrize("name", TOLD)
def test_it_is_told(pipeline: Path, name: str) -> None:
    head = entries(pipeline)[-1]["hash"]
    attack, said = TOLD[name]
    before = told(pipeline)
    attack(pipeline)
    assert said.partition(": ")[2] in told(pipeline) and said.partition(": ")[2] not in before
    if entries(pipeline)[-1]["hash"] != head:
        assert "since it was kept" in faults(pipeline, head)[0]


@pytest.mark.parametrize("name", WITNESS)
def test_a_witness_sees_it_and_security_md_says_that_nobody_else_can(pipeline: Path, name: str) -> None:
    head = entries(pipeline)[-1]["hash"]
    attack, said = WITNESS[name]
    attack(pipeline)
    assert faults(pipeline) == [], "it is seen without a witness: say so"
    assert any("since it was kept" in fault for fault in faults(pipeline, head))
    assert said in " ".join(SECURITY.split())


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_count_is_named(pipeline: Path, name: str) -> None:
    attack, said = SAME[name]
    attack(pipeline)
    assert faults(pipeline) == []
    assert said in " ".join(SECURITY.split())


def test_a_doctored_run_is_seen_alone_as_on_its_road(pipeline: Path) -> None:
    for name in ("doctored scores", "another ledger that the run names", "a second entry that blesses doctored scores"):
        SEEN[name](pipeline)
        assert faults(pipeline / "rl-seed1"), name
        shutil.rmtree(pipeline)
        shutil.copytree(pipeline.parent / "other", pipeline)
    shutil.move(pipeline / "rl-seed1", pipeline.parent.parent / "alone")
    assert "copy the whole road" in faults(pipeline.parent.parent / "alone")[0]


def test_a_road_from_before_the_root_is_read_and_says_what_it_does_not_prove(pipeline: Path) -> None:
    aged(pipeline)
    assert faults(pipeline) == faults(pipeline / "sft") == []
    assert "it binds runs, not recipe, corpus and report; make the road anew" in told(pipeline)
    assert "not proved: corpus/documents.jsonl, corpus/sources.json, recipe.toml, report.html, sft.old-1" in told(
        pipeline
    )
    run(pipeline, "sft", data=pipeline / "data")  # finds itself done
    run(pipeline, "rl-seed2", model=pipeline / "sft")
    assert not (pipeline / "sft.old-2").exists()
    assert faults(pipeline) == []
    doctor(pipeline)
    assert faults(pipeline)


def test_nothing_is_built_upon_a_run_of_another_ledger(pipeline: Path) -> None:
    SEEN["a run of another road and its entry"](pipeline)
    run(pipeline, "rl-seed1", model=pipeline / "sft")
    assert (pipeline / "rl-seed1.old-1").is_dir()
    assert faults(pipeline) == []
