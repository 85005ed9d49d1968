"""What a model scored on one task file, problem by problem, so that two models can be compared later. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sprat.errors import DataError
from sprat.eval.score import estimate_pass_at_k, wilson_interval

MAX_SAMPLES = 10_000


@dataclass(frozen=True)
class ProblemScore:
    """One problem: how many of its sampled answers were right.

    Attributes:
        id: of the row, unique within the task.
        correct, samples: right answers, and all.
        mean_tokens: tokens of an answer, thinking included.
        digest: SHA-256 (hex) of the question.
        answers: what was said, as text; only as many as were asked to be kept.
    """

    id: str
    correct: int
    samples: int
    mean_tokens: float
    digest: str = ""
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.samples or not 1 <= self.samples <= MAX_SAMPLES:
            what = f"{self.correct} of {self.samples} answers right"
            raise DataError(what, where=f"problem {self.id}", todo="evaluate again")

    @property
    def share(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.samples


@dataclass(frozen=True)
class TaskScore:
    """A task's score: the mean over problems of the share of right answers, with a 95 % interval.

    The interval is Wilson's (Wilson 1927) for as many draws as there are problems: samples of one problem are no
    independent draws, and make it no narrower. With one sample it is the usual one.

    Attributes:
        digest: SHA-256 (hex) of the task's file; two scores can be compared where it is the same.
        problems: at least one, in the order of the task.
        cut: share of answers that ended at ``max_tokens`` or at the end of the context.
        thought: share of answers with a non-empty think.
        faults: answers on which a judge of the user's failed; they count as wrong.
    """

    task: str
    digest: str
    problems: tuple[ProblemScore, ...]
    cut: float = 0.0
    thought: float = 0.0
    faults: int = 0

    def __post_init__(self) -> None:
        where = f"task {self.task}"
        if not self.problems:
            raise DataError("a score of no problems", where=where, todo="evaluate at least one")
        if len({problem.id for problem in self.problems}) < len(self.problems):
            raise DataError("two problems of one id", where=where, todo="evaluate again")
        if len({problem.samples for problem in self.problems}) > 1:
            raise DataError("problems of different numbers of samples", where=where, todo="evaluate again")

    @property
    def count(self) -> int:
        """How many problems."""
        return len(self.problems)

    @property
    def samples(self) -> int:
        """Answers of each problem."""
        return self.problems[0].samples

    @property
    def accuracy(self) -> float:
        """Mean over problems of the share of right answers; pass@1."""
        return sum(problem.correct for problem in self.problems) / (self.count * self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of ``accuracy``."""
        return wilson_interval(self.accuracy * self.count, self.count)

    @property
    def mean_tokens(self) -> float:
        """Mean length of an answer in tokens, thinking included."""
        return sum(problem.mean_tokens for problem in self.problems) / self.count

    def pass_at_k(self, k: int) -> float:
        """Mean over problems of the unbiased pass@k (Chen et al. 2021, arXiv 2107.03374, section 2.1, equation 1).

        Raises:
            DataError: there are fewer than ``k`` samples.
        """
        estimates = (estimate_pass_at_k(problem.samples, problem.correct, k) for problem in self.problems)
        return sum(estimates) / self.count

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what ``from_dict`` reads, and what follows from it (``pass_at_k`` for powers of two)."""
        low, high = self.interval
        exponents = range(self.samples.bit_length())
        return {
            "task": self.task,
            "digest": self.digest,
            "count": self.count,
            "samples": self.samples,
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
            "pass_at_k": {str(2**exponent): self.pass_at_k(2**exponent) for exponent in exponents},
            "mean_tokens": self.mean_tokens,
            "cut": self.cut,
            "thought": self.thought,
            "faults": self.faults,
            "problems": [{**asdict(problem), "answers": list(problem.answers)} for problem in self.problems],
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> TaskScore:
        """Read ``to_dict``.

        Raises:
            KeyError, TypeError, ValueError, DataError: it is not what ``to_dict`` writes.
        """
        problems = tuple(
            ProblemScore(
                id=str(problem["id"]),
                correct=int(problem["correct"]),
                samples=int(problem["samples"]),
                mean_tokens=float(problem["mean_tokens"]),
                digest=str(problem["digest"]),
                answers=tuple(map(str, problem.get("answers") or ())),
            )
            for problem in row["problems"]
        )
        shares = {name: float(row.get(name) or 0.0) for name in ("cut", "thought")}
        return cls(str(row["task"]), str(row["digest"]), problems, faults=int(row.get("faults") or 0), **shares)

    def __str__(self) -> str:
        low, high = self.interval
        parts = [f"{self.task}: {self.accuracy:.1%} of {self.count} ({low:.1%} to {high:.1%})"]
        if self.samples > 1:
            parts.append(f"pass@{self.samples} {self.pass_at_k(self.samples):.1%}")
        parts.append(f"{self.mean_tokens:.0f} tokens each")
        if self.cut:
            parts.append(f"{self.cut:.0%} cut off at the limit")
        if self.faults:
            parts.append(f"the judge failed on {self.faults}")
        return ", ".join(parts)
