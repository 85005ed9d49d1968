"""The default corpus: real text on any machine, its terms recorded, and the reason when a part is missing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from sprat.data import corpus, ingest
from sprat.data.document import Document
from sprat.data.sources import python_library
from sprat.data.sources.source import SourceRequest, SourceText
from sprat.data.text_split import is_held_out_source
from sprat.errors import DataError
from sprat.trust.stage_facts import TextSource
from tests.unit.data.packages import PAGE, fake_tools, write_pages

BUDGET = 60_000


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    return corpus.default_corpus(tmp_path_factory.mktemp("corpus"), budget_bytes=BUDGET, offline=True)


def test_without_packages_the_python_library_serves_and_says_so(offline: corpus.Corpus) -> None:
    parts = offline.split()
    for side in (parts.train, parts.held_out):
        assert {one.domain for one in side} == {"prose", "docstring", "code"}
    size = sum(one.size for one in parts.train)
    assert 0.8 * BUDGET < size <= BUDGET
    assert offline.faults == ["offline: no package was fetched"]
    library = offline.sources[-1]
    assert library["licence"] == "PSF-2.0"
    assert library["bytes"] == sum(one.size for one in offline.read())
    assert len(library["digest"]) == 64


def test_a_source_of_another_kind_is_one_more_entry(
    offline: corpus.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked first, and the library gives no topics where there is prose, and the same modules as ever."""
    poems = [Document(f"poem {n}", f"Poem {n} rhymes.\n" * 300, f"poem {n}", "CC0-1.0", "prose") for n in range(64)]
    asked: list[SourceRequest] = []

    def read(request: SourceRequest) -> SourceText:
        asked.append(request)
        return SourceText(poems, lambda sample: TextSource("poems", "CC0-1.0", len(sample)))

    monkeypatch.setattr(corpus, "SOURCES", (read, python_library.read))
    made = corpus.default_corpus(tmp_path, budget_bytes=BUDGET, offline=True)
    assert [(one.offline, set(one.train_bytes)) for one in asked] == [(True, {"prose", "docstring", "code"})]
    prose = [one.source for one in made.read() if one.domain == "prose"]
    assert prose and all(source.startswith("poem") for source in prose)
    assert [source["name"] for source in made.sources] == ["poems", offline.sources[-1]["name"]]
    assert made.sources[0]["documents"] == len(prose)
    modules = [[one for one in each.read() if one.domain != "prose"] for each in (made, offline)]
    assert modules[0] == modules[1]


def test_the_same_machine_gives_the_same_corpus(offline: corpus.Corpus, tmp_path: Path) -> None:
    again = corpus.default_corpus(tmp_path, budget_bytes=BUDGET, offline=True)
    assert again.digest == offline.digest == hashlib.sha256(again.documents_path.read_bytes()).hexdigest()


def test_the_corpus_is_read_by_the_door_for_the_users_text(offline: corpus.Corpus) -> None:
    found = list(ingest.read_texts(offline.documents_path))
    assert [(one.text, one.source, one.domain) for one in found] == [
        (one.text, one.source, one.domain) for one in offline.read()
    ]


NAMES = [f"perl{number}" for number in range(64)]
KEPT = [name for name in NAMES if is_held_out_source(f"perl/{name}")][0]
LEARNED = [name for name in NAMES if not is_held_out_source(f"perl/{name}")][0]


def test_pages_from_a_package_are_used_and_one_in_sixteen_is_held_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"perl5180delta": PAGE.replace("torrents", "changes"), "perltoc": PAGE.replace("torrents", "contents")}
    write_pages(tmp_path / "made", {LEARNED: PAGE, KEPT: PAGE.replace("dark", "light"), **changes})
    apt, dpkg = 'echo fake > "$3_1.deb"', f'mkdir -p "$3"; cp -r {tmp_path}/made "$3"'
    fake_tools(tmp_path / "bin", monkeypatch, apt, dpkg)
    found = corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET)
    assert found.faults == []
    package = found.sources[0]
    assert package["digest"] == hashlib.sha256(b"fake\n").hexdigest() != package["pinned"]
    assert package["licence"] == "Artistic or GPL-1+"
    parts = found.split()
    prose = {side: [one.text for one in texts if one.domain == "prose"] for side, texts in vars(parts).items()}
    assert len(prose["train"]) == len(prose["held_out"]) == 1
    assert prose["train"][0].startswith("DESCRIPTION\n\nIt was a dark and stormy->night; the rain fell in torrents, as")
    assert prose["train"][0].endswith("\n\nWords behind it.\n")
    assert "light" in prose["held_out"][0]
    # what was fetched once is kept, whatever becomes of the net
    monkeypatch.setenv("PATH", "")
    assert corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET).digest == found.digest


def test_what_was_made_offline_is_made_anew_for_who_goes_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pages(tmp_path / "made", {LEARNED: PAGE, KEPT: PAGE.replace("dark", "light")})
    fake_tools(tmp_path / "bin", monkeypatch, "exit 100", f'mkdir -p "$3"; cp -r {tmp_path}/made "$3"')
    alone = corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET, offline=True)
    tried = corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET)
    assert tried.digest == alone.digest
    assert tried.faults and not any("offline" in fault for fault in tried.faults)
    (tmp_path / "bin" / "apt-get").write_text('#!/bin/sh\necho fake > "$3_1.deb"\n')
    assert corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET).digest == alone.digest, (
        "tried once, then kept"
    )
    shutil.rmtree(tmp_path / "corpus")
    corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET, offline=True)
    fetched = corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET)
    assert fetched.faults == [] and f"perl/{LEARNED}" in {one.source for one in fetched.split().train}
    # and back: nothing is fetched, what is there stays
    monkeypatch.setenv("PATH", "")
    assert corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET, offline=True).digest == fetched.digest


def test_the_users_own_text_becomes_a_corpus_once(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"File {number} says something of its own.\n" * 4)
    made = corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=BUDGET)
    assert len(made.read()) == 30
    assert made.sources[0]["name"] == "mine"
    stamp = made.documents_path.stat().st_mtime_ns
    assert corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=BUDGET).digest == made.digest
    assert made.documents_path.stat().st_mtime_ns == stamp
    (folder / "31.txt").write_text("A new file with news.")
    assert corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=BUDGET).digest != made.digest
    small = corpus.text_corpus(folder, tmp_path / "small", budget_bytes=1000)
    assert sum(one.size for one in small.split().train) <= 1000


@pytest.mark.parametrize("name", [f"{number}.txt" for number in range(12)])
def test_of_two_files_the_large_one_is_learned_from_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("".join(f"Line {number} of the long book.\n" for number in range(9000)))
    (folder / "notes.txt").write_text("A few notes.\n" * 100)
    whole = sum(path.stat().st_size for path in folder.iterdir())
    for budget in (BUDGET, whole):
        made = corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=budget)
        again = corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=budget)  # as kept
        for parts in (made.split(), again.split()):
            assert {one.source for one in parts.train} == {name}
            assert {one.source for one in parts.held_out} == {"notes.txt"}
            assert sum(one.size for one in parts.train) > 0.9 * min(budget, whole)


def test_what_was_held_out_of_the_whole_text_is_held_out_of_its_sample(tmp_path: Path) -> None:
    """A budget makes the large sources small: by the sample's own sizes others would be held out."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"{number} says so.\n" * (60 if number % 2 else 12_000))
    held = {
        budget: {one.source for one in corpus.text_corpus(folder, tmp_path / "c", budget_bytes=budget).split().held_out}
        for budget in (1000, 50_000, 10_000_000)
    }
    assert held[1000] == held[50_000] == held[10_000_000]


def test_a_file_whose_name_is_no_utf_8_stays_on_its_side(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"na\xefve.txt"):
        (folder / os.fsdecode(name)).write_text(f"{name!r} says something of its own.\n" * 40)
    for _ in range(2):
        parts = corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=BUDGET).split()
        assert len(parts.train) == len(parts.held_out) == 1


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="5 bytes"):
        corpus.text_corpus(tmp_path, tmp_path / "corpus", budget_bytes=BUDGET)
    assert not (tmp_path / "corpus").exists()


def test_a_corpus_that_was_tampered_with_is_made_anew(offline: corpus.Corpus, tmp_path: Path) -> None:
    shutil.copytree(offline.documents_path.parent, tmp_path / "c")
    file = tmp_path / "c" / "documents.jsonl"
    file.write_text(file.read_text()[:-40])
    again = corpus.default_corpus(tmp_path / "c", budget_bytes=BUDGET, offline=True)
    assert again.digest == offline.digest
    facts = json.loads((tmp_path / "c" / "sources.json").read_text())
    assert facts["digest"] == offline.digest
