"""The corpus of a run: documents.jsonl with the text, sources.json with where it came from and on what terms.

Nobody's text is in this repository. The default corpus is put together on the user's machine from what is
there (the Python installation's own library) and what a package brings (Perl's manual), and
where the package cannot be had, the library alone serves and sources.json says why. Once made, a corpus
is kept and never fetched again, so that a run that goes on reads the very same text; only one that was made
offline is made anew for who asks for more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.data import dedup, ingest
from sprat.data.document import Document, count_and_bytes, digest_documents, read_documents, write_documents
from sprat.data.folder import ExclusionTally
from sprat.data.sources import SOURCES
from sprat.data.sources.source import OFFLINE_FAULT, SourceRequest, SourceText
from sprat.data.text_split import (
    MAX_HELD_OUT_DOCUMENT_BYTES,
    TextSplit,
    held_out_sources,
    is_held_out_source,
    split_documents,
)
from sprat.errors import DataError
from sprat.files.json import read_json, write_json
from sprat.trust.stage_facts import ExcludedText, TextSource

VERSION = 2
TEXT_VERSION = 2  # of a corpus of the user's text: its held-out side depends on sizes
DOMAIN_SHARES = {"prose": 0.55, "docstring": 0.25, "code": 0.20}
READ_MARGIN = 1.2  # read for training, of what is wanted of a domain: dedup takes some away
HELD_OUT_SHARE = 0.025  # of the budget, for each domain, beside the budget
MIN_HELD_OUT_BYTES = 60_000  # bytes
MIN_TEXT_BYTES = 1000  # bytes of the user's text


@dataclass(frozen=True)
class Corpus:
    """Documents on disk.

    Attributes:
        documents_path: the file documents.jsonl; sources.json lies beside it.
        sources: one entry for each source of text, as ``Source.to_dict`` writes it.
        digest: SHA-256 (hex) of documents.jsonl.
        held_out: of the user's own text, the names of the documents' sources that are held out, chosen before the
            text was cut to the budget; None for the default corpus, where the name of a source decides.
    """

    documents_path: Path
    sources: list[dict[str, Any]]
    digest: str
    held_out: frozenset[str] | None = None

    def read(self) -> list[Document]:
        """The documents, in the order of the file."""
        return list(read_documents(self.documents_path))

    def split(self) -> TextSplit:
        """The training and the held-out documents."""
        return split_documents(self.read(), is_held_out_source if self.held_out is None else self.held_out.__contains__)

    @property
    def faults(self) -> list[str]:
        """Why a source is missing, one sentence each; empty when all is there."""
        return [str(source["fault"]) for source in self.sources if source.get("fault")]

    @property
    def excluded(self) -> list[ExcludedText]:
        """What the user gave and the corpus does not hold; empty when all is there."""
        return [excluded_text for source in self.sources for excluded_text in TextSource.from_dict(source).left_out]


def default_corpus(folder: str | Path, *, budget_bytes: int, offline: bool = False) -> Corpus:
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
    saved = _load_saved(folder, request)
    if saved is not None and (offline or OFFLINE_FAULT not in saved.faults):
        return saved
    texts: list[SourceText] = []
    for source in SOURCES:
        covered = {document.domain for text in texts for document in text.documents}
        shares = {domain: share for domain, share in DOMAIN_SHARES.items() if domain not in covered}
        train_bytes = {domain: round(READ_MARGIN * share * budget_bytes) for domain, share in shares.items()}
        texts.append(source(SourceRequest(train_bytes, _held_out_bytes(budget_bytes), offline)))
    documents = dedup.exact_dedup(document for text in texts for document in text.documents)
    chosen = _sample_domains(list(documents), budget_bytes, DOMAIN_SHARES, is_held_out_source)
    if not chosen:
        raise DataError("this machine has no text to learn from", where=str(folder), todo="give your own: --text DIR")
    ids = [{document.id for document in text.documents} for text in texts]
    samples = [[document for document in chosen if document.id in own_ids] for own_ids in ids]
    records = [text.record(sample).to_dict() for text, sample in zip(texts, samples, strict=True)]
    return _save(folder, request, chosen, records)


def text_corpus(path: str | Path, folder: str | Path, *, budget_bytes: int) -> Corpus:
    """A corpus of the user's own text (see ``ingest.read_texts``), made once and then read from ``folder``.

    What is left out stands in the source's ``left_out``: what ``ingest.read_texts`` leaves out, copies, and what is
    beyond ``budget_bytes`` (documents are taken in the order of the hash of their names until it is full).

    Raises:
        DataError: the text is missing, empty, binary or too little.
    """
    tally = ExclusionTally()
    folder, documents = Path(folder), list(ingest.read_texts(path, tally))
    text = digest_documents(documents)
    request = {"version": TEXT_VERSION, "kind": "text", "budget_bytes": budget_bytes, "text": text}
    request["left_out"] = str(tally)
    saved = _load_saved(folder, request)
    if saved is not None:
        return saved
    size = sum(document.size for document in documents)
    if size < MIN_TEXT_BYTES:
        what = f"{size} bytes of text are too little to learn from"
        raise DataError(what, where=str(path), todo=f"give at least {MIN_TEXT_BYTES} bytes")
    unique = list(dedup.exact_dedup(documents))
    held_out = held_out_sources(unique)
    chosen = _sample_domains(unique, budget_bytes, {}, held_out.__contains__)
    split_documents(chosen, held_out.__contains__).require_both_sides(path)
    _count_excluded(tally, "documents that others say too", documents, unique)
    _count_excluded(tally, f"documents beyond data.text_bytes={budget_bytes}", unique, chosen)
    licence = ", ".join(sorted({document.licence for document in documents}))
    entry = TextSource(Path(path).name, licence, *count_and_bytes(chosen), digest=text, left_out=tally.excluded())
    return _save(folder, request, chosen, [entry.to_dict()], held_out)


def _count_excluded(tally: ExclusionTally, why: str, before: list[Document], after: list[Document]) -> None:
    """Count the documents of ``before`` that are not in ``after``, or only in part."""
    sizes_after = {document.id: document.size for document in after}
    for document in before:
        size = document.size - sizes_after.get(document.id, 0)
        if document.id not in sizes_after:
            tally.add(why, document.id, size)
        elif size:
            tally.add(f"parts of {why}", document.id, size)


def _held_out_bytes(budget: int) -> int:
    """How much text of one domain is held out beside ``budget``."""
    return max(MIN_HELD_OUT_BYTES, round(HELD_OUT_SHARE * budget))


def _sample_domains(
    documents: Sequence[Document], budget: int, shares: Mapping[str, float], is_held_out: Callable[[str], bool]
) -> list[Document]:
    """A sample of about ``budget`` bytes to train on, with what is held out beside it, sorted by id.

    Without ``shares`` all domains are one. What a domain cannot fill is not made up by another.
    """
    domains = shares or {"": 1.0}
    chosen: list[Document] = []
    for domain, share in domains.items():
        pool = [document for document in documents if not shares or document.domain == domain]
        test = [document for document in pool if is_held_out(document.source)]
        if shares:
            test = [_truncate(document, MAX_HELD_OUT_DOCUMENT_BYTES) for document in test]
        chosen += _sample([document for document in pool if not is_held_out(document.source)], round(share * budget))
        chosen += _sample(test, _held_out_bytes(budget))
    return sorted(chosen, key=lambda document: document.id)


def _sample(documents: Sequence[Document], limit: int) -> list[Document]:
    """Documents in the order of the hash of their id until ``limit`` bytes; the last one is cut at a line's end."""
    chosen: list[Document] = []
    for document in sorted(documents, key=lambda item: hashlib.sha256(item.id.encode("utf-8", "replace")).digest()):
        size = document.size
        if size > limit:
            last = _truncate(document, limit)
            return [*chosen, last] if last.text.strip() else chosen
        chosen.append(document)
        limit -= size
    return chosen


def _truncate(document: Document, limit: int) -> Document:
    """``document`` with its text up to the last line that ends within ``limit`` bytes."""
    if document.size <= limit:
        return document
    text = document.text.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
    return document.with_text(text[: text.rfind("\n") + 1] or text)


def _save(
    folder: Path,
    request: dict[str, Any],
    chosen: list[Document],
    sources: list[dict[str, Any]],
    held_out: frozenset[str] | None = None,
) -> Corpus:
    """Write the corpus; sources.json last, so that a half-written one is never taken for whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sources.json").unlink(missing_ok=True)
    write_documents(folder / "documents.jsonl", chosen)
    digest = hashlib.sha256((folder / "documents.jsonl").read_bytes()).hexdigest()
    facts: dict[str, Any] = {"request": request, "digest": digest, "sources": sources}
    if held_out is not None:
        held_out &= {document.source for document in chosen}
        facts["held_out"] = sorted(held_out)
    write_json(folder / "sources.json", facts)
    return Corpus(folder / "documents.jsonl", sources, digest, held_out)


def _load_saved(folder: Path, request: dict[str, Any]) -> Corpus | None:
    """The corpus in ``folder`` if it answers ``request`` and is whole, else None."""
    try:
        facts = read_json(folder / "sources.json")
        content = (folder / "documents.jsonl").read_bytes()
    except OSError:
        return None
    digest = hashlib.sha256(content).hexdigest()
    if facts is None or facts.get("request") != request or facts.get("digest") != digest:
        return None
    held_out = None if request["kind"] == "default" else frozenset(facts["held_out"])
    return Corpus(folder / "documents.jsonl", facts["sources"], digest, held_out)
