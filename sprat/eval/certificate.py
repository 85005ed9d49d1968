"""The certificate of a squeezed model: what it lost against its original, one capability at a time. Without torch.

A mean over tasks hides the one that broke, so there is none here. A capability is a task or a text, and its loss is
relative: the share of right answers that is gone, or of bits per byte that came on top. What a bar is held against is
the upper end of the loss's 95 % interval, so that few problems can never prove much.

These are the facts alone, one class for the writer (``sprat.pipeline.certify``) and the readers (``sprat.report``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sprat.errors import DataError
from sprat.eval.comparison import Comparison
from sprat.eval.intervals import Estimate
from sprat.files.json import load_json_object, write_json

VERSION = 1
FILE = "certificate.json"


@dataclass(frozen=True)
class CertifiedModel:
    """One of the two models: its path as it was given, bytes of its weight files, and the SHA-256 (hex) of those."""

    path: str
    bytes: int
    digest: str


@dataclass(frozen=True)
class Machine:
    """Where it was measured: the processor's name, and the threads that computed."""

    processor: str
    threads: int


@dataclass(frozen=True)
class TaskLoss:
    """A task: right answers of both models to the same problems, greedy.

    Attributes:
        answers: the original is ``first``, the squeezed model ``second``.
        loss: relative, of accuracy (Tang et al. 2003); None where the original has no right answer.
    """

    answers: Comparison
    loss: Estimate | None

    @property
    def name(self) -> str:
        """The task's."""
        return self.answers.task


@dataclass(frozen=True)
class TextLoss:
    """A text: how both models predict each token of it. Intervals are over ``unit``s.

    Attributes:
        name: of the text.
        unit: what was drawn independently: "document", or "window" of a text of few documents.
        tokens, bytes: that were predicted.
        window: tokens that the models saw at once at most.
        bits_before, bits_after: bits per byte of the original and of the squeezed model.
        difference: ``bits_after - bits_before``.
        loss: relative, ``bits_after / bits_before - 1``.
        kl_mean, kl_median, kl_p99: KL divergence (original || squeezed) of a token's distribution, in nats.
        kl_max: the largest one; no interval.
        same_top: share of tokens where both find the same token likeliest.
    """

    name: str
    unit: Literal["document", "window"]
    tokens: int
    bytes: int
    window: int
    bits_before: float
    bits_after: float
    difference: Estimate
    loss: Estimate
    kl_mean: Estimate
    kl_median: Estimate
    kl_p99: Estimate
    kl_max: float
    same_top: Estimate


@dataclass(frozen=True)
class LayerFlips:
    """A router: share of tokens whose set of chosen experts changed, and share of chosen experts that were swapped."""

    layer: int
    sets: Estimate
    slots: Estimate


@dataclass(frozen=True)
class RouterFlips:
    """Routers of a mixture of experts on the text ``text``: over all layers, and layer by layer (counted from 0)."""

    text: str
    sets: Estimate
    slots: Estimate
    layers: tuple[LayerFlips, ...]


@dataclass(frozen=True)
class Continuations:
    """Greedy continuations of the same openings, without a chat template.

    Attributes:
        prompts, max_tokens: how many openings, and how far each was continued.
        diverged: continuations that differ somewhere.
        first_divergence: median over all openings of the index of the first token that differs; None where the median
            is an opening whose continuations do not differ.
        loops_before, loops_after: shares with a loop (``sprat.eval.continuation.has_loop``), Wilson's interval.
        loops_difference: the second less the first, paired (Newcombe 1998).
        tokens_before, tokens_after: mean length.
        finish_before, finish_after: reason ("stop", "length") to count.
    """

    prompts: int
    max_tokens: int
    diverged: int
    first_divergence: Estimate | None
    loops_before: Estimate
    loops_after: Estimate
    loops_difference: Estimate
    tokens_before: float
    tokens_after: float
    finish_before: dict[str, int]
    finish_after: dict[str, int]


@dataclass(frozen=True)
class Speed:
    """One kind of work, both models in turn: median tokens a second of each, and the median of the rounds' ratios.

    Attributes:
        what: e.g. "decode, 1 request".
        before, after: tokens a second of the original and of the squeezed model.
        ratio: ``after / before`` of a round; its interval is of order statistics, over rounds.
    """

    what: str
    before: float
    after: float
    ratio: Estimate


@dataclass(frozen=True)
class Certificate:
    """What MODEL lost against ORIGINAL.

    Attributes:
        max_loss: the bar for the upper end of each capability's loss; None: no bar was set.
        missing: what was not measured and why, a sentence each.
        settings: what else the figures depend on.
    """

    model: CertifiedModel
    original: CertifiedModel
    machine: Machine
    finished: str
    max_loss: float | None = None
    tasks: tuple[TaskLoss, ...] = ()
    texts: tuple[TextLoss, ...] = ()
    routing: tuple[RouterFlips, ...] = ()
    continuations: Continuations | None = None
    speeds: tuple[Speed, ...] = ()
    missing: tuple[str, ...] = ()
    settings: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    version: int = VERSION

    @property
    def capabilities(self) -> dict[str, Estimate | None]:
        """Each capability's relative loss: tasks, then texts."""
        tasks = {f"task {task.name}": task.loss for task in self.tasks}
        return {**tasks, **{f"text {text.name}": text.loss for text in self.texts}}

    def holds(self, loss: Estimate | None) -> bool | None:
        """Whether a capability of this ``loss`` keeps the bar; None without a bar, False where nothing was to lose."""
        if self.max_loss is None:
            return None
        return loss is not None and loss.high <= self.max_loss

    @property
    def failed(self) -> list[str]:
        """The capabilities that do not keep the bar; empty without a bar."""
        return [name for name, loss in self.capabilities.items() if self.holds(loss) is False]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what ``from_dict`` reads, and the verdict."""
        return {**asdict(self), "failed": self.failed}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any], *, where: str = FILE) -> Certificate:
        """Read ``to_dict``.

        Raises:
            DataError: it is not what ``to_dict`` writes.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            certificate = TypeAdapter(cls).validate_python(dict(row))
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(map(str, fault["loc"]))
            todo = "give the certificate.json that sprat certify wrote"
            raise DataError(f"no certificate: {key}: {fault['msg']}", where=where, todo=todo) from None
        if certificate.version != VERSION:
            what = f"a certificate of version {certificate.version}, and this reads {VERSION}"
            raise DataError(what, where=where, todo="certify again")
        return certificate


def write_certificate(certificate: Certificate, folder: str | Path) -> Path:
    """Write ``certificate.json`` into ``folder``; its path.

    Raises:
        MachineError: the disk is full or closed to us.
    """
    path = Path(folder) / FILE
    write_json(path, certificate.to_dict())
    return path


def read_certificate(path: str | Path) -> Certificate:
    """Read what ``write_certificate`` wrote.

    Raises:
        DataError: there is no such file, or it is no certificate.
    """
    path, todo = Path(path), "give the certificate.json that sprat certify wrote"
    try:
        return Certificate.from_dict(
            load_json_object(path, DataError, problem="no certificate", todo=todo), where=str(path)
        )
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), todo=todo) from None
