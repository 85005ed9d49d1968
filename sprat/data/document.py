"""A document: a text, where it came from, and on what terms."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sprat.errors import DataError
from sprat.files import atomic

MAX_LABEL_CHARS = 60  # characters of a label
_PLAIN = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}")


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: unique name within a corpus.
        text: what it says.
        source: the file, book or page it was taken from; documents of one source are never split apart.
        licence: SPDX identifier or "public domain"; "unspecified" where nobody said.
        domain: "prose", "docstring" or "code", or what the user's rows say: see ``printable_label``, never a path.
    """

    id: str
    text: str
    source: str
    licence: str
    domain: str

    @property
    def size(self) -> int:
        """Length in UTF-8 bytes."""
        return len(self.text.encode("utf-8", "replace"))

    def with_text(self, text: str) -> Document:
        """This document with another text."""
        return replace(self, text=text)


def printable_label(text: str) -> str:
    """``text`` as it is shown in tables and figures: its printable characters on one line, 60 at most.

    >>> printable_label("News \\n of\\ttoday"), printable_label("../etc"), printable_label("\\x00 ")
    ('News of today', '../etc', 'unnamed')
    """
    line = " ".join(text.split())
    return "".join(character for character in line if character.isprintable())[:MAX_LABEL_CHARS].strip() or "unnamed"


def safe_name(name: str) -> str:
    """``name`` as one part of a path: itself where it is a plain small word, else an underscore and a hash of it.

    What rows and recipes say is never a path: a domain or a title may hold slashes, dots, or differ by case alone.

    >>> safe_name("docstring"), safe_name("../..")
    ('docstring', '_0cfd1c96cbc0c0e0')
    """
    if _PLAIN.fullmatch(name):
        return name
    return "_" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write documents.jsonl at once, one document a line."""
    lines = [json.dumps(asdict(document), ensure_ascii=False, sort_keys=True) + "\n" for document in documents]
    atomic.write_bytes(path, "".join(lines).encode("utf-8", "replace"))


def read_documents(path: Path) -> Iterator[Document]:
    """Read what ``write_documents`` wrote.

    Raises:
        DataError: the file is missing or torn.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield Document(**json.loads(line))
                except (ValueError, TypeError):
                    todo = "delete the folder and build it again"
                    raise DataError("the corpus is torn", where=f"{path}, line {number}", todo=todo) from None
    except FileNotFoundError:
        raise DataError("no corpus", where=str(path), todo="build it first") from None


def count_and_bytes(documents: Iterable[Document]) -> tuple[int, int]:
    """How many documents, and how many bytes."""
    sizes = [document.size for document in documents]
    return len(sizes), sum(sizes)


def digest_documents(documents: Iterable[Document]) -> str:
    """SHA-256 (hex) over ids and texts."""
    sha256 = hashlib.sha256()
    for document in documents:
        sha256.update(json.dumps([document.id, document.text]).encode())
    return sha256.hexdigest()
