"""Rows of the user's own files: what is read of each kind, and what is said, with line and column, of what is not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.data import json_stream
from sprat.data.folder import ExclusionTally
from sprat.data.record import BadRecord, Record
from sprat.data.records import read_records
from sprat.errors import DataError, SpratError

A, B = {"text": "a"}, {"text": "b"}
ONE, TWO = json.dumps(A).encode(), json.dumps(B).encode()


def rows(path: Path, **options: Any) -> list[tuple[int, dict[str, Any]] | tuple[str, str]]:
    """Line and values of each record; of a bad one its place, as compilers say it, and why."""
    return [
        (each.where.line, each.values)
        if isinstance(each, Record)
        else (each.where.short, f"{each.reason}: {each.detail}")
        for each in read_records(path, **options)
    ]


# Name, content, rows: of a bad one its place and the beginning of what is said of it.
STEPPED_OVER: list[tuple[str, bytes, list[Any]]] = [
    ("a.jsonl", ONE + b"\n" + TWO, [(1, A), (2, B)]),
    ("a.ndjson", ONE + b"\n", [(1, A)]),
    ("a.jsonl", b"\xef\xbb\xbf" + ONE + b"\r\n" + TWO + b"\r\n", [(1, A), (2, B)]),
    ("a.jsonl", b"\n  \n" + ONE + b"\n\n", [(3, A)]),
    ("a.jsonl", b"", []),
    ("a.jsonl", '{"text": "\u2028 \u0085"}\n'.encode() + ONE, [(1, {"text": "\u2028 \u0085"}), (2, A)]),
    ("a.jsonl", ONE + b"\n{oops\n" + TWO, [(1, A), ("a.jsonl:2:2", "not JSON: Expecting property"), (3, B)]),
    ("a.jsonl", b'{"text": "a\n' + ONE, [("a.jsonl:1:12", "not JSON: Invalid control"), (2, A)]),
    ("a.jsonl", ONE + b",\n", [("a.jsonl:1:14", "not JSON: Extra data")]),
    ("a.jsonl", b"{'text': 'a'}", [("a.jsonl:1:2", "not JSON: ")]),
    ("a.jsonl", b'{"text": "a\tb"}', [("a.jsonl:1:12", "not JSON: Invalid control character")]),
    ("a.jsonl", b'{"text": "a\x00"}', [("a.jsonl:1:12", "not JSON: Invalid control character")]),
    ("a.jsonl", "{“text”: 1}".encode(), [("a.jsonl:1:2", "not JSON: ")]),
    ("a.jsonl", b'{"text": "caf\xe9"}\n' + ONE, [("a.jsonl:1:14", "not UTF-8: byte 0xe9"), (2, A)]),
    ("a.jsonl", '{"text": "é'.encode() + b'\xff"}', [("a.jsonl:1:13", "not UTF-8: byte 0xff")]),
    (
        "a.jsonl",
        b'[1]\n"x"\n3\nnull\ntrue\n' + ONE,
        [
            ("a.jsonl:1", "not an object: a list"),
            ("a.jsonl:2", "not an object: a string"),
            ("a.jsonl:3", "not an object: a number"),
            ("a.jsonl:4", "not an object: null"),
            ("a.jsonl:5", "not an object: true or false"),
            (6, A),
        ],
    ),
    ("a.jsonl", b"[" * 200_000 + b"\n" + ONE, [("a.jsonl:1", "not JSON: nested too deep"), (2, A)]),
    ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}\n" + ONE, [("a.jsonl:1", "not JSON: Exceeds the limit"), (2, A)]),
    ("a.jsonl", b'{"text": "a", "text": "b"}', [(1, B)]),
    ("a.json", b'[\n {"text": "a"},\n\n {"text":\n  "b"}\n]\n', [(2, A), (4, B)]),
    ("a.json", b"[]", []),
    ("a.json", b" \n", []),
    (
        "a.json",
        b'[{"text": "a"}, 1,\n[2]]',
        [(1, A), ("a.json:1:17", "not an obj"), ("a.json:2:1", "not an obj")],
    ),
    (
        "a.json",
        b'{"version": 1, "data": [{"text": "a"}, {"text": "b"}, 7]}',
        [(1, A), (2, B), ("a.json:3", "not an o")],
    ),
    ("a.json", ONE + b"\n" + TWO + b"\n" + ONE, [(1, A), (2, B), (3, A)]),
    ("a.json", b'{"messages": [{"role": "user"}]}', [(1, {"messages": [{"role": "user"}]})]),
    ("a.json", b"3", [("a.json:1:1", "not an object: a number")]),
    ("a.json", b"\xef\xbb\xbf[" + ONE + b"]", [(1, A)]),
    ("a.csv", b"text,n\r\na,1\r\n\r\nb,\r\n", [(2, {"text": "a", "n": "1"}), (4, {"text": "b", "n": ""})]),
    ("a.csv", b'\xef\xbb\xbf"text"\n"a"\n', [(2, A)]),
    ("a.csv", b'text\n"two\nlines"\nb\n', [(2, {"text": "two\nlines"}), (4, B)]),
    ("a.csv", b'text\n"say ""a"", b"\n', [(2, {"text": 'say "a", b'})]),
    ("a.csv", b'text,n\n"a"x,1\nb,2\n', [("a.csv:2:4", "not CSV: "), (3, {"text": "b", "n": "2"})]),
    ("a.csv", b'text\n"a\nb"x\nb\n', [("a.csv:3:3", "not CSV: "), (4, B)]),
    (
        "a.csv",
        b"text,n\na,1,2\nb\n",
        [("a.csv:2", "fields that do not fit the header: 3 where"), ("a.csv:3", "fields that do not fit")],
    ),
    ("a.csv", b'text\n"x\ncaf\xe9"\nb\n', [("a.csv:3:4", "not UTF-8: byte 0xe9"), (4, B)]),
    ("a.csv", b"text\n" + b"x" * 200_000 + b"\n", [(2, {"text": "x" * 200_000})]),
    ("a.csv", b"text\n", []),
    ("a.tsv", b"text\tn\na, b\t1\n", [(2, {"text": "a, b", "n": "1"})]),
]


@pytest.mark.parametrize(("name", "content", "expected"), STEPPED_OVER)
def test_a_row_that_cannot_be_read_is_named_and_the_others_are_read(
    tmp_path: Path, name: str, content: bytes, expected: list[Any]
) -> None:
    (tmp_path / name).write_bytes(content)
    found = rows(tmp_path / name)
    assert len(found) == len(expected)
    for (place, said), (expected_place, beginning) in zip(found, expected, strict=True):
        assert place == expected_place
        assert said == beginning if isinstance(said, dict) else said.startswith(beginning)


REFUSED: list[tuple[str, bytes, str]] = [
    ("a.json", b'[{"text": "a"},\n {oops}]', r"not JSON: Expecting property name.*a\.json, line 2, column 3"),
    ("a.json", b'[{"text": "a"}\n {"text": "b"}]', r"',' or '\]' expected \(a\.json, line 2, column 2\)"),
    ("a.json", b'[{"text": "a"},\n', r"not JSON: .*a\.json, line 2, column 1"),
    ("a.json", b'[{"text": "a"}] []', r"more behind the end of the list \(a\.json, line 1, column 17\)"),
    ("a.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]', r"not UTF-8: byte 0xe9 \(a\.json, line 2, column 14\)"),
    ("a.json", b'{"train": [{"a": 1}], "test": [{"a": 1}]}', r"lists of rows under 'train', 'test' \(a\.json"),
    ("a.json", b"[" * 200_000, "not JSON: nested too deep .*line 1, column 2"),
    ("a.jsonl", b"\xff\xfe" + '{"text": 1}'.encode("utf-16-le"), r"UTF-16, not UTF-8 \(a\.jsonl\)"),
    ("a.csv", b'text\na\n"b\nc\n', r"a quote that is never closed \(a\.csv, line 3\)"),
    ("a.csv", b"text,text\na,b\n", r"two columns called 'text' \(a\.csv, line 1\)"),
    ("a.csv", b"text,\na,b\n", r"column 2 has no name \(a\.csv, line 1\)"),
    ("a.csv", b"caf\xe9\na\n", r"not UTF-8.*a\.csv, line 1, column 4"),
    ("a.jsonl.gz", ONE, r"not a gzip file.*a\.jsonl\.gz"),
    ("a.jsonl.gz", gzip.compress(ONE * 9)[:-9], "not a gzip file, or torn.*copy the file again"),
    ("a.txt", ONE, "no data file by its name .*give .jsonl"),
    ("a.parquet", b"PAR1 not really", "not a Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "said"), REFUSED)
def test_a_file_that_cannot_be_read_on_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    if ".parquet" in name:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpratError, match=said) as caught:
        rows(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for path, said in ((tmp_path / "a.jsonl", "a pipe or a device"), (tmp_path / "none.jsonl", "no such folder")):
        with pytest.raises(DataError, match=said):
            rows(path)


def test_a_folder_is_read_in_the_order_of_its_names_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_bytes(TWO)
    (tmp_path / "b.CSV").write_bytes(b"text\na\n")
    (tmp_path / "a.json").write_bytes(b"[" + ONE + b"]")
    (tmp_path / "README.md").write_text("# Read me")
    (tmp_path / ".hidden.jsonl").write_bytes(ONE)
    tally = ExclusionTally()
    found = [each.where.short for each in read_records(tmp_path, tally)]
    assert found == ["a.json:1:2", "b.CSV:2", "sub/a.jsonl:1"]
    assert [(each.count, each.names) for each in tally.excluded()] == [(1, (".hidden.jsonl",)), (1, ("README.md",))]
    for name in ("a.json", "b.CSV", "sub/a.jsonl"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="no data files in the folder: .*README.md"):
        rows(tmp_path)


def compressed(content: bytes, suffix: str) -> bytes:
    """By the published programs' own formats: gzip of the standard library, Zstandard of pyarrow."""
    if suffix == ".gz":
        return gzip.compress(content)
    arrow = pytest.importorskip("pyarrow")
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    result: bytes = sink.getvalue().to_pybytes()
    return result


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_compressed_file_is_read_as_what_it_holds(tmp_path: Path, name: str, suffix: str) -> None:
    wanted = [{"text": "é" * 30, "n": str(number)} for number in range(3000)]
    if name == "a.parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        sink = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist(wanted), sink)
        content = sink.getvalue()
    elif name == "a.csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["text", "n"])
        writer.writeheader()
        writer.writerows(wanted)
        content = text.getvalue().encode()
    else:
        content = (
            json.dumps(wanted).encode() if name == "a.json" else b"\n".join(json.dumps(w).encode() for w in wanted)
        )
    path = tmp_path / (name + suffix)
    half = len(content) // 2
    whole = compressed(content[:half], suffix.lower()) + compressed(content[half:], suffix.lower())  # as `cat` joins
    path.write_bytes(whole)
    found = rows(path)
    assert [values for _, values in found] == wanted
    assert found[-1][0] == {"a.jsonl": 3000, "a.json": 1, "a.csv": 3001, "a.parquet": 3000}[name]
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"torn.*{path.name}"):
        rows(path)


def test_parquet_gives_its_values_and_row_numbers(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    wanted = [{"messages": [{"role": "user", "content": str(number)}], "n": None} for number in range(600)]
    parquet.write_table(arrow.Table.from_pylist(wanted), tmp_path / "a.parquet", row_group_size=100)
    found = list(read_records(tmp_path / "a.parquet"))
    assert [each.values for each in found if isinstance(each, Record)] == wanted
    assert str(found[-1].where) == "a.parquet, row 600"


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_record_over_the_limit_is_refused_by_its_line(tmp_path: Path, line_end: bytes) -> None:
    size = len(ONE)
    long = json.dumps({"text": "x" * 50}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + ONE + line_end + long + line_end + TWO)
    found = rows(tmp_path / "a.jsonl", max_record_bytes=size)
    assert found == [(1, A), ("a.jsonl:2", f"a record that is too long: more than {size} bytes"), (3, B)]
    endless = b'{"text": "' + b"x" * 3_000_000 + b'"}'
    for content in (endless, ONE + b"\r" * 40):
        (tmp_path / "a.jsonl").write_bytes(content + line_end + TWO)
        assert [place for place, _ in rows(tmp_path / "a.jsonl", max_record_bytes=size)] == ["a.jsonl:1", 2]
    for name, content in (
        ("a.json", b"[" + ONE + b",\n" + json.dumps({"text": "x" * 200_000}).encode() + b"]"),
        ("a.csv", b'text\na\n"' + b"x\n" * 100_000 + b'"\n'),
    ):
        (tmp_path / name).write_bytes(content)
        line = 2 if name == "a.json" else 3
        with pytest.raises(DataError, match=rf"more than 1,000 bytes.*{name}, line {line}"):
            rows(tmp_path / name, max_record_bytes=1000)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_long_line_needs_no_many_times_its_size(tmp_path: Path, name: str) -> None:
    size = 8_000_000
    line = json.dumps({"text": "x" * size})
    (tmp_path / name).write_text(f"[{line},\n{line}]" if name == "a.json" else f"{line}\n{line}\n")
    tracemalloc.start()
    try:
        lengths = [len(each.values["text"]) for each in read_records(tmp_path / name) if isinstance(each, Record)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lengths == [size, size]
    assert peak < (3.5 if name == "a.jsonl" else 6) * size


JSON_ITEMS = st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.none(), max_size=3)


@given(
    st.lists(JSON_ITEMS | st.integers() | st.floats(), max_size=5),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
    st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_a_json_list_is_read_as_python_reads_it(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: Any, ascii_only: bool, chunk_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:  # wherever a value is cut
        patch.setattr(json_stream, "_CHUNK_BYTES", chunk_bytes)
        found = [each.values if isinstance(each, Record) else each.detail for each in read_records(path)]
    assert found == [value if isinstance(value, dict) else "a number" for value in values]


@given(st.binary(max_size=60), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".json.gz", ".parquet", ".csv.zst"]))
@settings(max_examples=150, deadline=None)
def test_whatever_bytes_a_file_holds_it_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"a{suffix}"
    path.write_bytes(content)
    try:
        assert all(isinstance(each, Record | BadRecord) for each in read_records(path))
    except SpratError as error:
        assert "\n" not in str(error)
