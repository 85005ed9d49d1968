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


def run(road: Path, name: str, *, steps: int = 3, **inputs: Path) -> None:
    """A tiny finished run with a score."""
    made = open_run(
        road / name, stage=name, recipe=TrainConfig(steps=steps), inputs=inputs, seed=1, ledger=road / "ledger.jsonl"
    )
    if made.done:
        return
    for file in ("model.bin", "more.bin"):
        (made.artifact / file).write_bytes(f"{road.name} {name} {steps} {file}".encode())
    made.log(1, loss=2.5)
    made.add_facts(title=name, scores=[{"task": "sums", "mean": 0.5}])
    made.finish(flops=1e6, tokens=100)


def make(road: Path) -> Path:
    """A pipeline as the quickstart leaves it, in miniature: one stage was made again with another recipe."""
    road.mkdir()
    ledger = Ledger(road / "ledger.jsonl")
    ledger.root_hash()
    files = {"recipe.toml": "seed = 0\n", "corpus/documents.jsonl": "{}\n", "corpus/sources.json": "{}\n"}
    for name, content in files.items():
        (road / name).parent.mkdir(exist_ok=True)
        (road / name).write_text(content)
    ledger.add_file(road / "recipe.toml")
    ledger.add_file(road / "corpus")
    run(road, "data")
    run(road, "sft", steps=2, data=road / "data")
    run(road, "sft", data=road / "data")
    run(road, "rl-seed0", model=road / "sft")
    run(road, "rl-seed1", model=road / "sft")
    (road / "report.html").write_text("<p>50 %</p>")
    ledger.add_file(road / "report.html")
    return road


@pytest.fixture(scope="module")
def roads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines side by side: ``pipeline`` and ``other``."""
    folder = tmp_path_factory.mktemp("roads")
    make(folder / "road")
    make(folder / "other")
    return folder


@pytest.fixture
def road(roads: Path, tmp_path: Path) -> Path:
    """A pipeline of this test's own, with another beside it that is only read."""
    shutil.copytree(roads / "road", tmp_path / "roads" / "road")
    (tmp_path / "roads" / "other").symlink_to(roads / "other")
    return tmp_path / "roads" / "road"


def faults(road: Path, head: str = "") -> list[str]:
    return [str(finding) for finding in verify(road, expect_head=head) if not finding.ok]


def told(road: Path) -> str:
    return "\n".join(map(str, verify(road)))


def test_the_road_is_sound_and_names_what_was_set_aside(road: Path) -> None:
    head = entries(road)[-1]["hash"]
    assert faults(road) == faults(road, head) == faults(road, head[:16]) == faults(road, head.upper()) == []
    assert f"10 entries, head {head}, chain whole, no run missing; set aside: sft.old-1" in told(road)
    assert all(faults(road / name) == [] for name in ("data", "sft", "rl-seed0", "rl-seed1"))
    with pytest.raises(TrustError, match="not the head of a ledger"):
        verify(road, expect_head="abc")


def test_there_are_at_least_forty_kinds() -> None:
    assert len(SEEN) + len(TOLD) + len(WITNESS) >= 40


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", SEEN)
def test_it_is_seen(road: Path, name: str) -> None:
    SEEN[name](road)
    assert faults(road), f"unseen: {name}"


@pytest.mark.parametrize("name", TOLD)
def test_it_is_told(road: Path, name: str) -> None:
    head = entries(road)[-1]["hash"]
    attack, said = TOLD[name]
    before = told(road)
    attack(road)
    assert said.partition(": ")[2] in told(road) and said.partition(": ")[2] not in before
    if entries(road)[-1]["hash"] != head:
        assert "since it was kept" in faults(road, head)[0]


@pytest.mark.parametrize("name", WITNESS)
def test_a_witness_sees_it_and_security_md_says_that_nobody_else_can(road: Path, name: str) -> None:
    head = entries(road)[-1]["hash"]
    attack, said = WITNESS[name]
    attack(road)
    assert faults(road) == [], "it is seen without a witness: say so"
    assert any("since it was kept" in fault for fault in faults(road, head))
    assert said in " ".join(SECURITY.split())


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_count_is_named(road: Path, name: str) -> None:
    attack, said = SAME[name]
    attack(road)
    assert faults(road) == []
    assert said in " ".join(SECURITY.split())


def test_a_doctored_run_is_seen_alone_as_on_its_road(road: Path) -> None:
    for name in ("doctored scores", "another ledger that the run names", "a second entry that blesses doctored scores"):
        SEEN[name](road)
        assert faults(road / "rl-seed1"), name
        shutil.rmtree(road)
        shutil.copytree(road.parent / "other", road)
    shutil.move(road / "rl-seed1", road.parent.parent / "alone")
    assert "copy the whole road" in faults(road.parent.parent / "alone")[0]


def test_a_road_from_before_the_root_is_read_and_says_what_it_does_not_prove(road: Path) -> None:
    aged(road)
    assert faults(road) == faults(road / "sft") == []
    assert "it binds runs, not recipe, corpus and report; make the road anew" in told(road)
    assert "not proved: corpus/documents.jsonl, corpus/sources.json, recipe.toml, report.html, sft.old-1" in told(road)
    run(road, "sft", data=road / "data")  # finds itself done
    run(road, "rl-seed2", model=road / "sft")
    assert not (road / "sft.old-2").exists()
    assert faults(road) == []
    doctor(road)
    assert faults(road)


def test_nothing_is_built_upon_a_run_of_another_ledger(road: Path) -> None:
    SEEN["a run of another road and its entry"](road)
    run(road, "rl-seed1", model=road / "sft")
    assert (road / "rl-seed1.old-1").is_dir()
    assert faults(road) == []
