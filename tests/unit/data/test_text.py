"""Reading, dedup and split: the user's own text in, clear sentences when it cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.data import dedup, ingest
from sprat.data.document import Document
from sprat.data.text_split import held_out_sources, is_held_out_source, split_documents
from sprat.errors import DataError, MachineError, SpratError


def doc(name: str, text: str = "text", source: str | None = None) -> Document:
    return Document(name, text, source or name, "MIT", "prose")


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbfsecond\r\nline")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "c.py").write_text("x = 1")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\x00")
    (tmp_path / ".git" / "secret.txt").write_text("hidden")
    found = list(ingest.read_texts(tmp_path))
    assert [(one.id, one.text, one.domain) for one in found] == [
        ("a.txt", "first", "prose"),
        ("b.md", "second\nline", "prose"),
        ("sub/c.py", "x = 1", "code"),
    ]
    assert [one.text for one in ingest.read_texts(tmp_path / "a.txt")] == ["first"]


ROWS = [{"text": "one", "id": 7, "source": "book", "license": "CC0-1.0"}, {"text": "two", "domain": "code"}]


def test_jsonl_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    parquet.write_table(arrow.Table.from_pylist(ROWS, schema=_schema(arrow)), tmp_path / "t.parquet")
    lines, rows = (list(ingest.read_texts(tmp_path / name)) for name in ("t.jsonl", "t.parquet"))
    assert [(one.text, one.licence, one.domain) for one in lines] == [
        ("one", "CC0-1.0", "prose"),
        ("two", "unspecified", "code"),
    ]
    assert lines[0].source == "book"
    assert lines[0].id == "t.jsonl:1:7"
    assert [(one.text, one.licence, one.domain) for one in rows] == [(o.text, o.licence, o.domain) for o in lines]


def test_rows_of_every_form_that_people_have_are_read(tmp_path: Path) -> None:
    """Compressed ones in a folder, too; a table or a tree of others only where it is named by itself."""
    lines = b'{"text": "one fish"}\n{"text": "two fish"}\n'
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "b.jsonl").write_bytes(lines.replace(b"fish", b"whales"))
    (folder / "c.csv").write_text("text,n\nthree fish,1\n")
    (folder / "d.json").write_text('[{"text": "four fish"}]')
    said = ["one fish", "two fish", "one whales", "two whales"]
    assert [document.text for document in ingest.read_texts(folder)] == said
    for name, text in (("a.jsonl.gz", "one fish"), ("c.csv", "three fish"), ("d.json", "four fish")):
        assert next(iter(ingest.read_texts(folder / name))).text == text


def _schema(arrow: object) -> object:
    names = ("text", "source", "license", "domain")
    return arrow.schema([("id", arrow.int64()), *((name, arrow.string()) for name in names)])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\x00\x01\x02", "binary data"),
        ("a.txt", b"caf\xe9", "binary data"),
        ("a.txt", b"  \n\n", "the text is empty"),
        ("a.bin", b"hello", "no text files"),
        ("a.jsonl", b'{"text": "x"}\n{oops', "line 2"),
        ("a.jsonl", b'{"txt": "x"}', "row 1"),
        ("a.jsonl", b"[1]", "line 1"),
        ("a.parquet", b"PAR1 not really", "not a Parquet file"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpratError, match=said) as caught:
        list(ingest.read_texts(tmp_path))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, (DataError, MachineError))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        list(ingest.read_texts(tmp_path / "nowhere"))


LONG = "A paragraph that is long enough to be recognised when somebody pastes it a second time into a page. " * 2


def test_copies_of_documents_and_of_long_paragraphs_are_left_out() -> None:
    found = list(
        dedup.exact_dedup(
            [
                doc("1", f"Title\n\n{LONG}\n\nend"),
                doc("2", f"TITLE\n\n{LONG.upper()}\n\n  END"),
                doc("3", f"Other\n\n{LONG}\n\nlast\n"),
                doc("4", LONG),
                doc("5", "short"),
                doc("6", "other\n\nshort"),
            ]
        )
    )
    assert [one.id for one in found] == ["1", "3", "5", "6"]
    assert found[1].text == "Other\n\nlast\n"
    assert found[0].text == f"Title\n\n{LONG}\n\nend"


@given(st.lists(st.text(alphabet="ab \n", max_size=300), max_size=8))
@settings(max_examples=100, deadline=None)
def test_dedup_of_clean_text_changes_nothing(texts: list[str]) -> None:
    once = list(dedup.exact_dedup(doc(str(number), text) for number, text in enumerate(texts)))
    assert list(dedup.exact_dedup(once)) == once


def test_held_out_and_training_share_no_source() -> None:
    documents = [doc(f"{number}", source=f"file{number % 200}") for number in range(1000)]
    found = split_documents(documents)
    assert {one.source for one in found.train}.isdisjoint(one.source for one in found.held_out)
    assert len(found.train) + len(found.held_out) == len(documents)
    assert 20 < len(found.held_out) < 130


def test_a_little_text_is_split_too() -> None:
    none = [name for name in map(str, range(50)) if not is_held_out_source(name)][:2]
    two = [doc(name) for name in none]
    assert len(split_documents(two, held_out_sources(two).__contains__).held_out) == 1
    rows = [doc(str(number), source=none[0]) for number in range(40)]
    many = split_documents(rows, held_out_sources(rows).__contains__)
    assert [one.id for one in many.held_out] == ["38", "39"]
    whole = doc("one", "\n\n".join(f"paragraph {number}" for number in range(100)))
    alone = split_documents([whole], held_out_sources([whole]).__contains__)
    assert alone.train[0].text + alone.held_out[0].text == whole.text
    assert alone.held_out[0].text.startswith("paragraph")


def test_of_one_source_a_last_document_that_is_most_of_it_is_not_held_out_whole() -> None:
    rows = [doc(str(number), "a short row. ", source="rows") for number in range(20)]
    parts = split_documents(
        [*rows, doc("20", "a long row. " * 2000, source="rows")], held_out_sources(rows).__contains__
    )
    assert len(parts.train) == 21
    assert sum(one.size for one in parts.held_out) < 2000 < 20_000 < sum(one.size for one in parts.train)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5000)), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_never_more_than_half_of_the_users_bytes_is_held_out_and_never_a_part_of_a_source(
    rows: list[tuple[int, int]],
) -> None:
    documents = [doc(str(n), "x" * size, source=f"{source}.txt") for n, (source, size) in enumerate(rows)]
    held = held_out_sources(documents)
    size = sum(size for source, size in rows if f"{source}.txt" in held)
    assert size * 2 <= sum(size for _, size in rows)
    assert bool(held) == (len({source for source, _ in rows}) > 1), "a side of each, where there are two sources"
