"""Our own task: sums of a few small numbers, with a judge that takes the number and nothing else."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sprat.errors import DataError
from sprat.tasks import canonical
from sprat.tasks.base import Problem, Split, sample_problem
from sprat.tasks.chain_of_thought import running_total


@dataclass(frozen=True)
class Sums:
    """Sums of ``min_terms`` to ``max_terms`` numbers from 1 to ``max_value``.

    >>> task = Sums("sums")
    >>> task.problem("train", 0).question.startswith("What is ")
    True
    """

    name: str
    min_terms: int = 3
    max_terms: int = 5
    max_value: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("min_terms", "max_terms", "max_value", "seed"):
            if type(getattr(self, key)) is not int:
                raise DataError(f"sums: {key} is no whole number", where=self.name, todo="give one")
        if not 1 <= self.min_terms <= self.max_terms or self.max_value < 1:
            raise DataError("sums: the settings leave no sum", where=self.name, todo="set 1 <= min_terms <= max_terms")

    def problem(self, split: Split, index: int) -> Problem:
        """Problem ``index`` of ``split``."""
        return sample_problem(self._generate, split, index)

    def score(self, problem: Problem, answer: str | None) -> float:
        """1.0 for the right integer, else 0.0."""
        return float(answer is not None and answer.strip() == problem.answer)

    def chain_of_thought(self, problem: Problem) -> str:
        """The running total, a line a step."""
        return running_total(problem.meta["terms"])

    def _generate(self, key: int) -> Problem:
        rng = random.Random(f"sums:{self.seed}:{key}")
        terms = [rng.randint(1, self.max_value) for _ in range(rng.randint(self.min_terms, self.max_terms))]
        question = f"What is {' + '.join(map(str, terms))}?"
        meta = {"terms": terms, "num_terms": len(terms)}
        return Problem(self.name, key, question, str(sum(terms)), meta, canonical.terms(terms))
