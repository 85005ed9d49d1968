"""Adapter to reasoning-gym: its questions, its scorers, our split and our chains of thought.

Only full marks count. Its scorers pay a part for much that is wrong: half for "14" where 4 is right, up to 0.16 for any
answer at all; reinforcement learning would gladly collect that. Where the answer is a whole number, only that number as
it is written is right, for one scorer gives full marks to "+04.0" too.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from sprat.errors import DataError, MachineError
from sprat.tasks import canonical, chain_of_thought
from sprat.tasks.base import Problem, Split, is_correct, sample_problem

INTEGER = re.compile(r"-?\d+")
OPTIONAL_EXTENSIONS = ("pycosat",)  # C extensions that reasoning-gym imports for families that are not ours


class GymTask:
    """One reasoning-gym family.

    Args:
        name: title in reports.
        family: reasoning-gym's dataset name, e.g. ``chain_sum``.
        settings: the family's own settings.
    """

    def __init__(self, name: str, family: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self.family = family
        gym = _import_gym()
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        options.setdefault("seed", 0)
        try:
            self._dataset = gym.create_dataset(family, size=1, **options)
        except (ValueError, TypeError, AssertionError) as error:
            todo = "see reasoning-gym's list of families and settings"
            raise DataError(f"reasoning-gym refuses {family}: {error}", where=name, todo=todo) from None

    def problem(self, split: Split, index: int) -> Problem:
        """Problem ``index`` of ``split``."""
        return sample_problem(self.generate, split, index)

    def score(self, problem: Problem, answer: str | None) -> float:
        """1.0 for an answer that the family gives full marks, a whole number as it is written; else 0.0."""
        if answer is None:
            return 0.0
        if INTEGER.fullmatch(problem.answer):
            return float(answer.strip() == problem.answer)
        return float(is_correct(float(self._dataset.score_answer(answer, problem.meta["entry"]))))

    def chain_of_thought(self, problem: Problem) -> str:
        """The chain of thought of this family.

        Raises:
            DataError: nobody wrote a chain for this family yet.
        """
        if self.family not in CHAINS_OF_THOUGHT:
            todo = f"families with chains: {', '.join(sorted(CHAINS_OF_THOUGHT))}"
            raise DataError(f"no chain of thought for {self.family}", where=self.name, todo=todo)
        return CHAINS_OF_THOUGHT[self.family](problem.meta["entry"]["metadata"])

    def generate(self, key: int) -> Problem:
        """Problem number ``key`` of all, whatever its split.

        Raises:
            DataError: reasoning-gym makes none.
        """
        try:
            entry = self._dataset[key]
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
            what = f"reasoning-gym makes no problem of {self.family} by these settings: {error}"
            raise DataError(what, where=self.name, todo="see reasoning-gym's list of families and settings") from None
        meta: dict[str, Any] = {"entry": entry}
        if "num_terms" in entry["metadata"]:
            meta["num_terms"] = entry["metadata"]["num_terms"]
        form = CANONICAL_FORMS[self.family](entry["metadata"]) if self.family in CANONICAL_FORMS else ""
        return Problem(self.name, key, entry["question"].strip(), entry["answer"], meta, form)


def _animals(meta: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(count, legs of one) for each kind of animal."""
    table = importlib.import_module("reasoning_gym.arithmetic.leg_counting").ANIMALS
    return [(count, table[animal]) for animal, count in meta["animals"].items()]


# By the metadata of an entry: its chain of thought, and its canonical form.
CHAINS_OF_THOUGHT: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "basic_arithmetic": lambda meta: chain_of_thought.arithmetic(meta["expression"]),
    "chain_sum": lambda meta: chain_of_thought.chain_sum(meta["expression"]),
    "gcd": lambda meta: chain_of_thought.euclid(meta["numbers"]),
    "leg_counting": lambda meta: chain_of_thought.legs(_animals(meta)),
    "simple_equations": lambda meta: chain_of_thought.equation(meta["equation"]),
}
CANONICAL_FORMS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "basic_arithmetic": lambda meta: canonical.expression(meta["expression"]),
    "chain_sum": lambda meta: canonical.expression(meta["expression"]),
    "gcd": lambda meta: canonical.divisor(meta["numbers"]),
    "leg_counting": lambda meta: canonical.legs(_animals(meta)),
    "simple_equations": lambda meta: canonical.equation(meta["equation"]),
}


def _import_gym() -> Any:
    """reasoning_gym, also where its optional C extensions could not be built.

    Raises:
        MachineError: the package is not installed.
    """
    for name in OPTIONAL_EXTENSIONS:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        todo = "pip install 'sprat[gym]'"
        raise MachineError(f"reasoning-gym cannot be imported: {error}", where="tasks", todo=todo) from None
