"""The default corpus: real text on any machine, its terms recorded, and the reason when a part is missing."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.data import corpus, debian, ingest, pythonlib, rdata
from sprat.errors import DataError

BUDGET = 60_000


def word(*values: int) -> bytes:
    return struct.pack(f">{len(values)}i", *values)


def strings(lines: list[str]) -> bytes:
    items = [word(9 | 1 << 15, len(line.encode())) + line.encode() for line in lines]
    return word(16, len(items)) + b"".join(items)


HEADER = b"X\n" + word(3, 0x40201, 0x30500, 5) + b"UTF-8"


def named_list(values: dict[str, bytes]) -> bytes:
    """A list with names, as R writes it: the values, then a pairlist with the attribute."""
    symbol = word(1, 9, 5) + b"names"
    body = word(19 | 0x200, len(values)) + b"".join(values.values())
    return body + word(2 | 0x400) + symbol + strings(list(values)) + word(254)


def write_database(folder: Path, texts: dict[str, list[str]]) -> Path:
    """An R lazy-load database of character vectors, written as R writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    index, content = {}, b""
    for name, lines in texts.items():
        raw = HEADER + strings(lines)
        packed = struct.pack(">I", len(raw)) + zlib.compress(raw)
        index[name] = word(13, 2, len(content), len(packed))
        content += packed
    (folder / "Rdata.rdb").write_bytes(content)
    # the second list's tag is a reference to the symbol that the first one defined
    outer = word(19 | 0x200, 1) + named_list(index) + word(2 | 0x400, 255 | 1 << 8) + strings(["variables"]) + word(254)
    (folder / "Rdata.rdx").write_bytes(gzip.compress(HEADER + outer))
    return folder / "Rdata.rdb"


@given(st.dictionaries(st.text("abc", min_size=1), st.lists(st.text(max_size=9), min_size=1, max_size=5), min_size=1))
@settings(max_examples=40, deadline=None)
def test_texts_in_r_packages_are_read_without_r(tmp_path_factory: pytest.TempPathFactory, texts: dict) -> None:
    database = write_database(tmp_path_factory.mktemp("r"), texts)
    assert rdata.texts(database) == texts


def test_a_damaged_r_package_is_one_sentence(tmp_path: Path) -> None:
    database = write_database(tmp_path, {"a": ["x" * 50]})
    whole = database.read_bytes()
    for cut in (0, 3, 10, len(whole) - 1):
        database.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            rdata.texts(database)
    (tmp_path / "Rdata.rdx").write_bytes(b"nothing")
    with pytest.raises(DataError):
        rdata.texts(database)


def test_docstrings_and_code_are_parted_and_both_keep_their_source(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "no.py").write_text('"""Tests are left out of the corpus."""')
    (tmp_path / "broken.py").write_text("def (")
    text = '"""What this module is for."""\n\ndef f(a, *b, c=1):\n    """Say what f does with a."""\n    return a\n'
    (tmp_path / "pkg" / "mod.py").write_text(text)
    found = list(pythonlib.documents(tmp_path))
    said, code = found
    assert said.text == "pkg.mod\n\nWhat this module is for.\n\nf(a, *b, c)\n\nSay what f does with a.\n"
    assert "Say what" not in code.text
    assert ast.parse(code.text).body[-1].name == "f"  # type: ignore[attr-defined]
    assert said.source == code.source == "python/pkg/mod.py"
    assert said.licence == "PSF-2.0"


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


def test_the_same_machine_gives_the_same_corpus(offline: corpus.Corpus, tmp_path: Path) -> None:
    again = corpus.default_corpus(tmp_path, budget_bytes=BUDGET, offline=True)
    assert again.digest == offline.digest == hashlib.sha256(again.documents.read_bytes()).hexdigest()


def test_the_corpus_is_read_by_the_door_for_the_users_text(offline: corpus.Corpus) -> None:
    found = list(ingest.read_texts(offline.documents))
    assert [(one.text, one.source, one.domain) for one in found] == [
        (one.text, one.source, one.domain) for one in offline.read()
    ]


def fake_tools(folder: Path, monkeypatch: pytest.MonkeyPatch, apt: str, dpkg: str = "") -> None:
    """Put an apt-get and a dpkg-deb of our own on the path, in place of all others but the shell."""
    folder.mkdir()
    for name, script in (("apt-get", apt), ("dpkg-deb", dpkg)):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    for name in ("sleep", "cp", "mkdir"):
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))


CHAPTER = ["CHAPTER 1", ""] + ["It was a dark and stormy night;", "the rain fell in torrents."] * 5 + ["", "Next day."]


def test_novels_from_a_package_are_used_and_one_is_held_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = {"emma": CHAPTER, "persuasion": [line.replace("dark", "light") for line in CHAPTER]}
    write_database(tmp_path / "made" / "janeaustenr" / "data", books)
    apt, dpkg = 'echo fake > "$3_1.deb"', f'mkdir -p "$3"; cp -r {tmp_path}/made "$3"'
    fake_tools(tmp_path / "bin", monkeypatch, apt, dpkg)
    found = corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET)
    assert found.faults == []
    package = found.sources[0]
    assert package["digest"] == hashlib.sha256(b"fake\n").hexdigest() != package["pinned"]
    parts = found.split()
    prose = {side: [one.text for one in texts if one.domain == "prose"] for side, texts in vars(parts).items()}
    assert len(prose["train"]) == len(prose["held_out"]) == 1
    assert prose["train"][0].startswith("CHAPTER 1\n\nIt was a dark and stormy night; the rain")
    assert prose["train"][0].endswith("torrents.\n\nNext day.\n")
    assert "light" in prose["held_out"][0]
    # what was fetched once is kept, whatever becomes of the net
    monkeypatch.setenv("PATH", "")
    assert corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET).digest == found.digest


def test_what_was_made_offline_is_made_anew_for_who_goes_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_database(tmp_path / "made" / "janeaustenr" / "data", {"emma": CHAPTER, "persuasion": CHAPTER[:4]})
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
    assert fetched.faults == [] and "janeaustenr/emma" in {one.source for one in fetched.split().train}
    # and back: nothing is fetched, what is there stays
    monkeypatch.setenv("PATH", "")
    assert corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET, offline=True).digest == fetched.digest


@pytest.mark.parametrize(
    ("apt", "said"),
    [
        ("echo 'E: Unable to locate package x' >&2; exit 100", "Unable to locate package x"),
        ("sleep 60", "took more than 0.5 s"),
        ("exit 0", "left no package"),
        ("echo x > a.deb", "no texts"),
        (None, "no apt-get"),
    ],
)
def test_a_package_that_cannot_be_had_is_told_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apt: str | None, said: str
) -> None:
    monkeypatch.setattr(debian, "TIMEOUT_SECONDS", 0.5)
    if apt is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fake_tools(tmp_path / "bin", monkeypatch, apt, 'mkdir -p "$3"')
    (found,) = debian.fetch_packages()
    assert said in found.fault
    assert found.documents == ()


def test_the_users_own_text_becomes_a_corpus_once(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"File {number} says something of its own.\n" * 4)
    made = corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=BUDGET)
    assert len(made.read()) == 30
    assert made.sources[0]["name"] == "mine"
    stamp = made.documents.stat().st_mtime_ns
    assert corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=BUDGET).digest == made.digest
    assert made.documents.stat().st_mtime_ns == stamp
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
    shutil.copytree(offline.documents.parent, tmp_path / "c")
    file = tmp_path / "c" / "documents.jsonl"
    file.write_text(file.read_text()[:-40])
    again = corpus.default_corpus(tmp_path / "c", budget_bytes=BUDGET, offline=True)
    assert again.digest == offline.digest
    facts = json.loads((tmp_path / "c" / "sources.json").read_text())
    assert facts["digest"] == offline.digest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("apt-get") is None, reason="needs apt-get")
def test_debians_package_holds_six_novels() -> None:
    (found,) = debian.fetch_packages()
    if found.fault:
        pytest.skip(found.fault)
    titles = {one.source for one in found.documents}
    assert len(titles) == 6
    assert sum(one.size for one in found.documents) > 3_900_000
