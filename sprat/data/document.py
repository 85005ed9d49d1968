"""A document: a text, where it came from, and on what terms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sprat.errors import DataError
from sprat.trust import atomic


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: unique name within a corpus.
        text: what it says.
        source: the file, book or page it was taken from; documents of one source are never split apart.
        licence: SPDX identifier or "public domain"; "unspecified" where nobody said.
        domain: "prose", "docstring" or "code".
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


def write(path: Path, documents: Iterable[Document]) -> None:
    """Write documents.jsonl at once, one document a line."""
    lines = [json.dumps(asdict(document), ensure_ascii=False, sort_keys=True) + "\n" for document in documents]
    atomic.write_bytes(path, "".join(lines).encode("utf-8", "replace"))


def read(path: Path) -> Iterator[Document]:
    """Read what ``write`` wrote.

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
