"""What is not learned from is counted and named, whatever lies in the user's folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from sprat.data import corpus, ingest
from sprat.data.folder import ExclusionTally
from sprat.errors import DataError
from sprat.pipeline.data import data
from sprat.pipeline.pipeline import Pipeline
from sprat.pipeline.recipe import load_recipe
from sprat.trust.verify import verify


def left(path: Path, budget: int, folder: Path) -> dict[str, tuple[int, int, tuple[str, ...]]]:
    """By reason: how many, how many bytes, names."""
    made = corpus.text_corpus(path, folder, budget_bytes=budget)
    return {one.why: (one.count, one.bytes, one.names) for one in made.excluded}


def reasons(path: Path) -> dict[str, tuple[int, tuple[str, ...]]]:
    tally = ExclusionTally()
    list(ingest.read_texts(path, tally))
    return {one.why.partition(" than")[0]: (one.count, one.names) for one in tally.excluded()}


def test_documents_beyond_the_budget_are_counted_to_the_byte(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(124):
        (folder / f"{number}.txt").write_text(f"{number} " + "x" * 30_000)
    told = left(folder, 100_000, tmp_path / "corpus")
    kept = corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=100_000).read()
    whole = sum(path.stat().st_size for path in folder.iterdir())
    assert sum(count for why, (count, _, _) in told.items() if not why.startswith("parts")) == 124 - len(kept) > 100
    assert sum(size for _, size, _ in told.values()) == whole - sum(len(one.text) for one in kept)
    assert all("data.text_bytes=100000" in why for why in told)


def test_the_rest_of_one_long_document_is_counted_too(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A line of the book.\n" * 50_000)
    told = left(tmp_path / "book.txt", 100_000, tmp_path / "corpus")
    ((why, (count, size, names)),) = told.items()
    assert why.startswith("parts of documents beyond") and (count, names) == (1, ("book.txt",))
    assert size == 1_000_000 - len(
        corpus.text_corpus(tmp_path / "book.txt", tmp_path / "c", budget_bytes=100_000).read()[0].text
    )


def test_copies_are_counted_and_all_is_learned_where_nothing_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"File {number} says something of its own.\n" * 30)
    assert left(folder, 100_000, tmp_path / "corpus") == {}
    shutil.copy(folder / "1.txt", folder / "9.txt")
    assert left(folder, 100_000, tmp_path / "corpus") == {
        "documents that others say too": (1, (folder / "9.txt").stat().st_size, ("9.txt",))
    }


def test_every_kind_of_file_that_is_not_read_is_counted_and_named(tmp_path: Path) -> None:
    folder, away = tmp_path / "mine", tmp_path / "away"
    (folder / ".git").mkdir(parents=True)
    away.mkdir()
    (away / "linked.txt").write_text("by a link")
    (folder / "a.txt").write_text("plain")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "binary.md").write_bytes(b"a\0b")
    (folder / "rows.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    (folder / "blank.txt").write_text(" \n")
    for name in ("page.html", "table.csv", "tree.json", "photo.png", "README"):
        (folder / name).write_text("<p>markup</p>")
    (folder / "link.txt").symlink_to(away / "linked.txt")
    (folder / "broken.txt").symlink_to(away / "none.txt")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "folder").symlink_to(away)
    os.mkfifo(folder / "pipe.txt")
    assert [one.text for one in ingest.read_texts(folder)] == ["plain", "by a link"]
    assert reasons(folder) == {
        "hidden files and folders": (1, (".git",)),
        "links that lead to no file": (3, ("broken.txt", "folder", "loop.txt")),
        "files of other kinds": (5, ("README", "page.html", "photo.png")),
        "pipes and devices": (1, ("pipe.txt",)),
        "blank documents": (1, ("blank.txt",)),
        "files of binary data, not UTF-8 text": (3, ("binary.md", "latin.txt", "rows.jsonl")),
    }


@pytest.mark.timeout(20)
def test_a_single_file_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    for name, content, said in (
        ("page.html", b"<p>", "no text file by its name .*learned as it is"),
        ("tree.json", b"{}", "a row without a text .*tree.json, row 1"),
        ("page.txt.gz", b"", "no text file by its name"),
        ("torn.jsonl.gz", b"no gzip", "torn.jsonl.gz"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("deep.jsonl", b"[" * 200_000, "line 1"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said):
            list(ingest.read_texts(tmp_path / name))
    os.mkfifo(tmp_path / "pipe.txt")
    for odd in (tmp_path / "pipe.txt", Path("/dev/zero")):
        with pytest.raises(DataError, match="a pipe or a device"):
            list(ingest.read_texts(odd))


def test_a_folder_with_nothing_to_read_says_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("x")
    with pytest.raises(DataError, match="no text files .*1 files of other kinds .*page.html"):
        list(ingest.read_texts(tmp_path))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="the text is empty.*not UTF-8 text .latin.txt"):
        list(ingest.read_texts(tmp_path))


def test_the_data_stage_notes_it_and_says_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / os.fsdecode(b"mine\xe9")  # a name that is no UTF-8, as old disks have them
    text.mkdir()
    (text / os.fsdecode(b"caf\xe9.html")).write_text("<p>")
    (text / "two\nlines.html").write_text("<p>")
    for number in range(40):
        (text / f"{number}.txt").write_text(f"File {number} says: {'word ' * number}and no more than that.\n" * 20)
    (text / "table.csv").write_text("a,b")
    (text / "link.txt").symlink_to(text / "3.txt")
    small = ("data.text_bytes=20000", "data.demonstrations=40", "data.test_problems=10", "data.vocab_size=700")
    pipeline = Pipeline(tmp_path / "road", load_recipe("tiny", small))
    data(pipeline, text)
    (source,) = json.loads((pipeline.run_folder("data") / "run.json").read_text())["facts"]["sources"]
    told = {one["why"]: one["count"] for one in source["left_out"]}
    assert told.pop("files of other kinds than .txt, .md, .rst, .py, .jsonl, .parquet") == 3
    assert told.pop("documents that others say too") == 1
    assert source["documents"] + told.pop("documents beyond data.text_bytes=20000") == 40
    said = capfd.readouterr().err
    assert "not learned from: 3 files of other kinds than" in said and ", table.csv, " in said
    assert all(finding.ok for finding in verify(pipeline.folder))
    (pipeline.folder / "corpus" / "documents.jsonl").open("a").write("{}")
    assert [finding.subject for finding in verify(pipeline.folder) if not finding.ok] == ["corpus"]
