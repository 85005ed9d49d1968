"""The corpus of a run: documents.jsonl with the text, sources.json with where it came from and on what terms.

Nobody's text is in this repository. The default corpus is put together on the user's machine from what is
there (the Python installation's own library) and what a package brings (Perl's manual), and
where the package cannot be had, the library alone serves and sources.json says why. Once made, a corpus
is kept and never fetched again, so that a run that goes on reads the very same text; only one that was made
offline is made anew for who asks for more.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.data import debian, dedup, document, ingest, pythonlib
from sprat.data.document import Document
from sprat.data.split import Split, own_held_out, source_held_out, split
from sprat.errors import DataError
from sprat.trust import atomic
from sprat.trust.facts import LeftOut, Source

VERSION = 2
TEXT_VERSION = 2  # of a corpus of the user's text: its held-out side depends on sizes
SHARES = {"prose": 0.55, "docstring": 0.25, "code": 0.20}
LIBRARY = ("docstring", "code")  # domains that the Python library fills
HELD_OUT_SHARE = 0.025  # of the budget, for each domain, beside the budget
HELD_OUT_LEAST = 60_000  # bytes
HELD_OUT_DOCUMENT = 8_000  # bytes; longer ones are cut, so that no single file decides the test
LEAST = 1000  # bytes of the user's text
OFFLINE = "offline: no package was fetched"


@dataclass(frozen=True)
class Corpus:
    """Documents on disk.

    Attributes:
        documents: the file documents.jsonl; sources.json lies beside it.
        sources: one entry for each source of text, as ``Source.to_dict`` writes it.
        digest: SHA-256 (hex) of documents.jsonl.
        held_out: of the user's own text, the names of the documents' sources that are held out, chosen before the
            text was cut to the budget; None for the default corpus, where the name of a source decides.
    """

    documents: Path
    sources: list[dict[str, Any]]
    digest: str
    held_out: frozenset[str] | None = None

    def read(self) -> list[Document]:
        """The documents, in the order of the file."""
        return list(document.read(self.documents))

    def split(self) -> Split:
        """The training and the held-out documents."""
        return split(self.read(), source_held_out if self.held_out is None else self.held_out.__contains__)

    @property
    def faults(self) -> list[str]:
        """Why a source is missing, one sentence each; empty when all is there."""
        return [str(source["fault"]) for source in self.sources if source.get("fault")]

    @property
    def left_out(self) -> list[LeftOut]:
        """What the user gave and the corpus does not hold; empty when all is there."""
        return [left for source in self.sources for left in Source.of(source).left_out]


def default(folder: str | Path, *, budget_bytes: int, offline: bool = False) -> Corpus:
    """The default corpus, made once and then read from ``folder``.

    Args:
        folder: where it is kept.
        budget_bytes: about how much text to train on (55 % prose, 25 % docstrings, 20 % code, as far as there
            is so much); 2.5 % of it, at least 60 kB, is held out of each domain beside that.
        offline: fetch nothing. A kept corpus that was made so is made anew where this is False.

    Raises:
        DataError: the machine has no text at all, or the folder is torn.
    """
    folder, request = Path(folder), {"version": VERSION, "kind": "default", "budget_bytes": budget_bytes}
    kept = _kept(folder, request)
    if kept is not None and (offline or OFFLINE not in kept.faults):
        return kept
    fetched = [] if offline else debian.fetch()
    found = [document for one in fetched for document in one.documents]
    sources: list[dict[str, Any]] = [_package_entry(one) for one in fetched]
    if not found:
        found = list(pythonlib.topics())
        if offline:
            sources.append(Source("debian packages", fault=OFFLINE).to_dict())
    found += _library(budget_bytes)
    chosen = _choose(list(dedup.exact(found)), budget_bytes, SHARES, source_held_out)
    if not chosen:
        raise DataError("this machine has no text to learn from", where=str(folder), todo="give your own: --text DIR")
    library = [one for one in chosen if one.source.startswith("python/")]
    version = "{}.{}.{}".format(*sys.version_info[:3])
    entry = Source(f"python {version} library", pythonlib.LICENCE, *_extent(library), digest=_digest(library))
    sources.append(entry.to_dict())
    return _keep(folder, request, chosen, sources)


def from_text(path: str | Path, folder: str | Path, *, budget_bytes: int) -> Corpus:
    """A corpus of the user's own text (see ``ingest.read``), made once and then read from ``folder``.

    What is left out stands in the source's ``left_out``: what ``ingest.read`` leaves out, copies, and what is
    beyond ``budget_bytes`` (documents are taken in the order of the hash of their names until it is full).

    Raises:
        DataError: the text is missing, empty, binary or too little.
    """
    tally = ingest.Tally()
    folder, found = Path(folder), list(ingest.read(path, tally))
    text = _digest(found)
    request = {"version": TEXT_VERSION, "kind": "text", "budget_bytes": budget_bytes, "text": text}
    request["left_out"] = str(tally)
    kept = _kept(folder, request)
    if kept is not None:
        return kept
    size = sum(one.size for one in found)
    if size < LEAST:
        what = f"{size} bytes of text are too little to learn from"
        raise DataError(what, where=str(path), todo=f"give at least {LEAST} bytes")
    unlike = list(dedup.exact(found))
    held = own_held_out(unlike)
    chosen = _choose(unlike, budget_bytes, {}, held.__contains__)
    split(chosen, held.__contains__).both(path)
    _tell(tally, "documents that others say too", found, unlike)
    _tell(tally, f"documents beyond data.text_bytes={budget_bytes}", unlike, chosen)
    licence = ", ".join(sorted({one.licence for one in found}))
    entry = Source(Path(path).name, licence, *_extent(chosen), digest=text, left_out=tally.left_out())
    return _keep(folder, request, chosen, [entry.to_dict()], held)


def _tell(tally: ingest.Tally, why: str, before: Sequence[Document], after: Sequence[Document]) -> None:
    """Count the documents of ``before`` that are not in ``after``, or only in part."""
    here = {one.id: one.size for one in after}
    for one in before:
        size = one.size - here.get(one.id, 0)
        if one.id not in here:
            tally.add(why, one.id, size)
        elif size:
            tally.add(f"parts of {why}", one.id, size)


def _library(budget: int) -> list[Document]:
    """As many docstrings and as much code of the Python library as both sides of the split need.

    A fifth more is read for training, because dedup takes some away.
    """
    found = []
    for side, of in ((False, lambda source: not source_held_out(source)), (True, source_held_out)):
        largest = HELD_OUT_DOCUMENT if side else sys.maxsize
        left = {name: _held_out_bytes(budget) if side else round(1.2 * SHARES[name] * budget) for name in LIBRARY}
        for one in pythonlib.documents(of=of):
            if left[one.domain] > 0:
                left[one.domain] -= min(one.size, largest)
                found.append(one)
            if max(left.values()) <= 0:
                break
    return found


def _held_out_bytes(budget: int) -> int:
    """How much text of one domain is held out beside ``budget``."""
    return max(HELD_OUT_LEAST, round(HELD_OUT_SHARE * budget))


def _choose(
    documents: Sequence[Document], budget: int, shares: Mapping[str, float], is_held_out: Callable[[str], bool]
) -> list[Document]:
    """A sample of about ``budget`` bytes to train on, with what is held out beside it, sorted by id.

    Without ``shares`` all domains are one. What a domain cannot fill is not made up by another.
    """
    domains = shares or {"": 1.0}
    chosen: list[Document] = []
    for domain, share in domains.items():
        pool = [one for one in documents if not shares or one.domain == domain]
        test = [_cut(one, HELD_OUT_DOCUMENT) if shares else one for one in pool if is_held_out(one.source)]
        chosen += _sample([one for one in pool if not is_held_out(one.source)], round(share * budget))
        chosen += _sample(test, _held_out_bytes(budget))
    return sorted(chosen, key=lambda one: one.id)


def _sample(documents: Sequence[Document], limit: int) -> list[Document]:
    """Documents in the order of the hash of their id until ``limit`` bytes; the last one is cut at a line's end."""
    chosen: list[Document] = []
    for one in sorted(documents, key=lambda one: hashlib.sha256(one.id.encode("utf-8", "replace")).digest()):
        size = one.size
        if size > limit:
            last = _cut(one, limit)
            return [*chosen, last] if last.text.strip() else chosen
        chosen.append(one)
        limit -= size
    return chosen


def _cut(one: Document, limit: int) -> Document:
    """``one`` with its text up to the last line that ends within ``limit`` bytes."""
    if one.size <= limit:
        return one
    text = one.text.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
    return one.with_text(text[: text.rfind("\n") + 1] or text)


def _package_entry(fetched: debian.Fetched) -> dict[str, Any]:
    """What sources.json says of a package; ``pinned`` is the digest that its reader was written for."""
    package = fetched.package
    return Source(
        f"debian {package.name}",
        package.licence,
        *_extent(fetched.documents),
        digest=fetched.sha256,
        fault=fetched.fault,
        file=fetched.file,
        pinned=package.sha256,
    ).to_dict()


def _extent(documents: Iterable[Document]) -> tuple[int, int]:
    """How many documents, and how many bytes."""
    sizes = [one.size for one in documents]
    return len(sizes), sum(sizes)


def _digest(documents: Iterable[Document]) -> str:
    """SHA-256 (hex) over ids and texts."""
    found = hashlib.sha256()
    for one in documents:
        found.update(json.dumps([one.id, one.text]).encode())
    return found.hexdigest()


def _keep(
    folder: Path,
    request: dict[str, Any],
    chosen: list[Document],
    sources: list[dict[str, Any]],
    held_out: frozenset[str] | None = None,
) -> Corpus:
    """Write the corpus; sources.json last, so that a half-written one is never taken for whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sources.json").unlink(missing_ok=True)
    document.write(folder / "documents.jsonl", chosen)
    digest = hashlib.sha256((folder / "documents.jsonl").read_bytes()).hexdigest()
    facts: dict[str, Any] = {"request": request, "digest": digest, "sources": sources}
    if held_out is not None:
        held_out &= {one.source for one in chosen}
        facts["held_out"] = sorted(held_out)
    atomic.write_json(folder / "sources.json", facts)
    return Corpus(folder / "documents.jsonl", sources, digest, held_out)


def _kept(folder: Path, request: dict[str, Any]) -> Corpus | None:
    """The corpus in ``folder`` if it answers ``request`` and is whole, else None."""
    try:
        facts = json.loads((folder / "sources.json").read_text(encoding="utf-8"))
        content = (folder / "documents.jsonl").read_bytes()
    except (OSError, ValueError):
        return None
    digest = hashlib.sha256(content).hexdigest()
    if not isinstance(facts, dict) or facts.get("request") != request or facts.get("digest") != digest:
        return None
    held_out = None if request["kind"] == "default" else frozenset(facts["held_out"])
    return Corpus(folder / "documents.jsonl", facts["sources"], digest, held_out)
