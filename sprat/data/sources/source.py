"""What a source of text is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sprat.data.document import Document
from sprat.trust.stage_facts import TextSource

OFFLINE_FAULT = "offline: no package was fetched"


@dataclass(frozen=True)
class SourceRequest:
    """How much text the corpus asks of a source.

    Attributes:
        train_bytes: domain -> UTF-8 bytes to train on; without the domains of which an earlier source has text.
        held_out_bytes: UTF-8 bytes to hold out of each domain, beside those.
        offline: nothing may be fetched.
    """

    train_bytes: Mapping[str, int] = field(default_factory=dict)
    held_out_bytes: int = 0
    offline: bool = False


@dataclass(frozen=True)
class SourceText:
    """What a source has.

    Attributes:
        documents: its text, more than was asked for if it likes; ids are unique among all sources.
        record: from those documents of which the corpus takes something to what sources.json says of the source.
    """

    documents: Sequence[Document]
    record: Callable[[Sequence[Document]], TextSource]


# Text that is on the machine or can be fetched. What cannot be had is the ``fault`` of the record, never an error.
Source = Callable[[SourceRequest], SourceText]
