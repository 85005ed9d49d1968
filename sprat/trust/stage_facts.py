"""Facts that one stage notes and the report reads: one class for who writes and who reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sprat.files import atomic

SAMPLES_FILE = "samples.jsonl"  # beside the checkpoints while a run is open, then in the artefact


@dataclass(frozen=True)
class ExcludedText:
    """Text that is not learned from: why, how many documents or files, and the names of the first few.

    ``bytes`` is how much text that is, 0 where nobody opened the files.
    """

    why: str
    count: int
    bytes: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        ellipsis = ", …" if self.count > len(self.names) else ""
        size = f", {self.bytes:,} bytes" if self.bytes else ""
        return f"{self.count:,} {self.why} ({', '.join(self.names)}{ellipsis}{size})"


@dataclass(frozen=True)
class TextSource:
    """A source of text.

    Attributes:
        name, licence: what it is and on what terms.
        documents, bytes: how much of it is in the corpus.
        digest: SHA-256 (hex): of a package's file, else over ids and texts.
        fault: why it is missing; empty where it is there.
        file, pinned: a package's file, and the digest that its reader was written for.
        left_out: what there was and is not in the corpus.
    """

    name: str
    licence: str = ""
    documents: int = 0
    bytes: int = 0
    digest: str = ""
    fault: str = ""
    file: str = ""
    pinned: str = ""
    left_out: tuple[ExcludedText, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        left_out = [{**asdict(excluded), "names": list(excluded.names)} for excluded in self.left_out]
        return {**asdict(self), "left_out": left_out}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> TextSource:
        """Read ``to_dict``, also from before all of its keys were written.

        Raises:
            KeyError, TypeError, ValueError: it is not what ``to_dict`` writes.
        """
        texts = {key: str(row.get(key) or "") for key in ("licence", "digest", "fault", "file", "pinned")}
        left_out = tuple(
            ExcludedText(str(item["why"]), int(item["count"]), int(item["bytes"]), tuple(map(str, item["names"])))
            for item in row.get("left_out") or ()
        )
        documents, size = (int(row.get(key) or 0) for key in ("documents", "bytes"))
        return cls(str(row["name"]), documents=documents, bytes=size, left_out=left_out, **texts)


@dataclass(frozen=True)
class Sample:
    """What a model answered to one question while it was trained, after ``step`` steps; ``expected`` is its example's.

    ``expected`` is None where the question is the user's. ``finish_reason`` is the engine's: ``length`` where it was
    cut. ``reward`` is what a verifier paid; None where there is none, or it abstained.
    """

    step: int
    prompt: str
    answer: str
    expected: str | None = None
    reasoning: str = ""
    finish_reason: str = ""
    reward: float | None = None

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Sample:
        """Read what ``write_samples`` writes.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        expected = None if row.get("expected") is None else str(row["expected"])
        texts = {name: str(row.get(name) or "") for name in ("reasoning", "finish_reason")}
        reward = None if row.get("reward") is None else float(row["reward"])
        return cls(int(row["step"]), str(row["prompt"]), str(row["answer"]), expected, **texts, reward=reward)


def read_samples(folder: Path) -> list[Sample]:
    """What ``samples.jsonl`` in ``folder`` holds; nothing where there is no such file.

    Raises:
        KeyError, TypeError, ValueError: it is not what ``write_samples`` writes.
    """
    path = folder / SAMPLES_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [Sample.from_dict(json.loads(line)) for line in lines]


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Write ``samples.jsonl`` in ``folder``, whole.

    Raises:
        MachineError: the disk is full.
    """
    rows = [
        {name: value for name, value in asdict(each).items() if name != "reward" or value is not None}
        for each in samples
    ]
    atomic.write_text(folder / SAMPLES_FILE, "".join(json.dumps(row) + "\n" for row in rows))
