"""A domain is a label that rows of foreign data choose: it never decides where a file is written."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from sprat.data import ingest
from sprat.data.document import Document, safe_name
from sprat.files import atomic
from sprat.pipeline.data import _pack_held_out
from sprat.pipeline.pipeline import DataArtifact
from sprat.tokens import Tokenizer

COUNT = int(os.environ.get("SPRAT_FUZZ_DOMAINS", "400"))  # 5,000 and more: set it
HOSTILE = [
    "../../out",
    "/tmp/out",
    "..",
    ".",
    "",
    " ",
    "a/b",
    "a\\b",
    "C:\\out",
    "~",
    "~root/x",
    "\x00",
    "a\x00b",
    "\n",
    "x" * 5000,
    "é" * 300,
    "con",
    "prose/",
    "PROSE",
    "Prose",
    "_0cfd1c96cbc0c0e0",
    "\ud800",
    "\u202egpj",
    "a\r\nb",
    "-rf",
    "$HOME",
    "%2e%2e/x",
    "file:///out",
    "prose\u200b",
    "．．／out",
    "heldout/bytes.json",
    "bytes.json",
    ".lock",
    "<script>",
    7,
    1.5,
    True,
    ["../x"],
    {"a": "../x"},
    None,
]
PIECES = [
    "..",
    "/",
    "\\",
    ".",
    "a",
    "Z",
    "\x00",
    "\n",
    "~",
    " ",
    "é",
    "\u202e",
    "\ud800",
    "x" * 300,
    "$",
    ":",
    "-",
    "_",
    "0",
]


def domains(count: int) -> list[Any]:
    chance = random.Random(7)
    made = ["".join(chance.choices(PIECES, k=chance.randint(1, 8))) for _ in range(count - len(HOSTILE))]
    return [*HOSTILE, *made]


def rows_of(found: list[Any]) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "domain": domain} for number, domain in enumerate(found)]


def read_all(folder: Path) -> list[Document]:
    """The same hostile rows as JSONL and, where a string column can hold them, as Parquet."""
    rows = rows_of(domains(COUNT))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = list(ingest.read_texts(folder / "rows.jsonl"))
    assert len(documents) == COUNT
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    words = [row for row in rows if isinstance(row["domain"], str) and "\ud800" not in row["domain"]]
    parquet.write_table(arrow.Table.from_pylist(words), folder / "rows.parquet")
    return documents + list(ingest.read_texts(folder / "rows.parquet"))


def test_no_domain_writes_outside_of_its_folder_and_no_two_share_one(tmp_path: Path) -> None:
    inside = tmp_path / "one" / "two" / "heldout"
    (tmp_path / "data").mkdir()
    inside.mkdir(parents=True)
    named = {document.domain for document in read_all(tmp_path / "data")}
    for domain in named:
        assert 0 < len(domain) <= 60 and domain.isprintable()
        atomic.write_text(inside / safe_name(domain) / "packed", domain, durable=False)
    assert {path.read_text() for path in inside.glob("*/packed")} == named
    assert len({path.name.lower() for path in inside.iterdir()}) == len(named), "case-blind disks too"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "one"]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "one").rglob("*"))[:2] == [
        "one/two",
        "one/two/heldout",
    ]
    assert all(len(path.relative_to(inside).parts) <= 2 for path in inside.rglob("*"))


def test_the_default_domains_keep_their_folders() -> None:
    assert [safe_name(name) for name in ("prose", "docstring", "code")] == ["prose", "docstring", "code"]


def test_the_data_stage_holds_out_hostile_domains_each_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(HOSTILE)))
    found = list(ingest.read_texts(tmp_path / "rows.jsonl"))
    tokenizer = Tokenizer.train(["text 0 1 2 3 4 5 6 7 8 9 " * 20], 460)
    folder = tmp_path / "road" / "artefact"
    scores = _pack_held_out(tokenizer, found[:4], found, 32, folder / "heldout")
    artefact = DataArtifact(folder)
    sizes = artefact.held_out_domains()
    assert set(sizes) == set(scores) == {one.domain for one in found}
    for domain in sizes:
        rows = artefact.held_out(domain)
        mine = [one for one in found if one.domain == domain]
        assert int((rows.segments > 0).sum()) == sum(2 + len(tokenizer.encode(one.text)) for one in mine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["road", "rows.jsonl"]
    assert [path.name for path in (tmp_path / "road").iterdir()] == ["artefact"]


if sys.platform == "linux":

    def test_a_label_fits_a_safe_name_of_any_disk() -> None:
        for domain in domains(300):
            name = safe_name(str(domain))
            assert len(name.encode()) <= 64 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
