r"""Judges of a user's answers: whole or nothing, and two candidates are nothing.

What each judge drops from an answer before it compares is written in its docstring, and nothing else is dropped. All
work on text in Unicode's composed form (NFC) without blanks at its ends. ``regex``, ``json_schema`` and ``math`` run
foreign code, in a process of its own (``judge_worker``).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

from sprat.errors import DataError
from sprat.tasks.formula_text import as_expected, formula_of, refusal
from sprat.tasks.judge_process import JUDGE_PROCESS
from sprat.tasks.numeric import Extract, boxed, parse_number

JudgeName = Literal["exact", "numeric", "choice", "regex", "json_schema", "math", "code"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LEAD = re.compile(
    r"(?:the\s+)?(?:(?:final|correct|right)\s+)?(?:answer|choice|option)(?:\s+is)?\s*:?\s+", re.IGNORECASE
)
_LETTER = re.compile(r"\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])[).:]?")
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[).:])\s*(\S.*)", re.DOTALL)


class Judge(Protocol):
    """Says whether an answer is right."""

    @property
    def expected(self) -> str:
        """A right answer, or what it is held against, as a report shows it."""
        ...

    def is_right(self, answer: str) -> bool:
        """Whether ``answer``, all of it, is right; what nobody could find out is not."""
        ...


def verdict(judge: Judge, answer: str) -> bool | None:
    """As ``judge.is_right``; None where it went over its bounds of time or memory, so that nothing is known."""
    bounded = getattr(judge, "verdict", None)
    return judge.is_right(answer) if bounded is None else bounded(answer)


def normalize(text: str, *, ignore_case: bool = False) -> str:
    """``text`` in Unicode's composed form, without blanks at its ends; case-folded where case does not count.

    >>> normalize(" Caf\\u0065\\u0301 ") == "Caf\\u00e9"
    True
    """
    text = unicodedata.normalize("NFC", text).strip()
    return unicodedata.normalize("NFC", text.casefold()) if ignore_case else text


@dataclass(frozen=True)
class Exact:
    """One of ``answers``, character by character but for blanks at the ends (and case, with ``ignore_case``).

    >>> Exact(("Paris",)).is_right(" Paris\\n"), Exact(("Paris",)).is_right("It is Paris")
    (True, False)
    """

    answers: tuple[str, ...]
    ignore_case: bool = False

    @property
    def expected(self) -> str:
        """The first of the right answers."""
        return self.answers[0]

    def is_right(self, answer: str) -> bool:
        """See the class."""
        accepted = {normalize(one, ignore_case=self.ignore_case) for one in self.answers}
        return normalize(answer, ignore_case=self.ignore_case) in accepted


@dataclass(frozen=True)
class Numeric:
    """The value of one of ``answers``; see ``numeric`` for what is a number and which one of a text counts.

    Args:
        rel_tol: how far off an answer may be, as a share of the right one's size; 0: not at all. Of 0, nothing.

    >>> judge = Numeric(("0.5",))
    >>> judge.is_right("The answer is 1/2."), judge.is_right("0.5 or 0.6"), Numeric(("100",), 0.01).is_right("101")
    (True, False, True)
    """

    answers: tuple[str, ...]
    rel_tol: float = 0.0
    extract: Extract = "only"

    def __post_init__(self) -> None:
        for answer in self.answers:
            if parse_number(answer) is None:
                raise DataError(f"{answer!r} is not one number", todo="write it as 1234, 0.5, 1/2 or 50%")

    @property
    def expected(self) -> str:
        """The first of the right answers."""
        return self.answers[0]

    def is_right(self, answer: str) -> bool:
        """See the class."""
        value = parse_number(normalize(answer), self.extract)
        if value is None:
            return False
        right_values = [right for right in map(parse_number, self.answers) if right is not None]
        return any(abs(value - right) <= Fraction(str(self.rel_tol)) * abs(right) for right in right_values)


@dataclass(frozen=True)
class Choice:
    r"""The choice of place ``index``: by its letter (``B``, ``b``, ``(B)``, ``B.``), its text, or both (``B. text``).

    Dropped before: a ``\boxed{…}`` around it, ``**``, "the answer is", one full stop at the end, runs of blanks.

    >>> judge = Choice(("Rome", "Paris"), 1)
    >>> [judge.is_right(text) for text in ("B", "The answer is (b).", "Paris", "B. Paris", "A. Paris", "A or B")]
    [True, True, True, True, False, False]
    """

    choices: tuple[str, ...]
    index: int
    ignore_case: bool = False

    def __post_init__(self) -> None:
        if not 2 <= len(self.choices) <= len(LETTERS):
            raise DataError(f"{len(self.choices)} choices", todo=f"give 2 to {len(LETTERS)}")
        if not 0 <= self.index < len(self.choices):
            raise DataError(f"no choice of place {self.index}", todo=f"give 0 to {len(self.choices) - 1}")
        if len(set(map(self._form, self.choices))) < len(self.choices):
            raise DataError("two choices are the same", todo="leave one out")
        for place, choice in enumerate(self.choices):
            match = _LETTER.fullmatch(choice.strip())
            if match and _place(match) < len(self.choices) and _place(match) != place:
                raise DataError(f"choice {LETTERS[place]} is called {choice!r}", todo="order or name the choices anew")

    @property
    def expected(self) -> str:
        """The letter and the text of the right choice."""
        return f"{LETTERS[self.index]}. {self.choices[self.index]}"

    def is_right(self, answer: str) -> bool:
        """See the class."""
        return self.place(answer) == self.index

    def place(self, answer: str) -> int | None:
        """Which choice ``answer`` names; None where it names none, or more than one."""
        boxes = boxed(answer)
        if boxes is None or len(set(boxes)) > 1:
            return None
        text = normalize(" ".join((boxes[0] if boxes else answer).replace("**", "").split()))
        if boxes and (match := re.fullmatch(r"\\text\{(.*)\}", text)):
            text = match[1]
        forms = [self._form(choice) for choice in self.choices]
        lead = _LEAD.match(text)
        for candidate in (text, text[lead.end() :] if lead else ""):
            for shortened in (candidate, candidate.removesuffix(".")):
                if self._form(shortened) in forms:
                    return forms.index(self._form(shortened))
                if match := _LETTER.fullmatch(shortened):
                    return _place(match) if _place(match) < len(forms) else None
                if match := _LETTER_AND_TEXT.fullmatch(shortened):
                    place = _place(match)
                    if place < len(forms) and forms[place] == self._form(match[3]):
                        return place
        return None

    def _form(self, text: str) -> str:
        return normalize(" ".join(text.split()), ignore_case=self.ignore_case)


def _place(match: re.Match[str]) -> int:
    """The place that the letter of ``match`` stands for."""
    return LETTERS.index(next(group for group in match.groups() if group).upper())


@dataclass(frozen=True)
class Regex:
    """All of the answer, but for blanks at its ends, is matched by the pattern (Python's ``re.fullmatch``).

    An answer that the pattern takes more than a CPU second or two for is not right.
    """

    pattern: str
    ignore_case: bool = False
    where: str = ""

    def __post_init__(self) -> None:
        JUDGE_PROCESS.ask("regex", self.pattern, None, where=self.where)

    @property
    def expected(self) -> str:
        """The pattern."""
        return self.pattern

    def is_right(self, answer: str) -> bool:
        """See the class; what nobody could find out is not right."""
        return bool(self.verdict(answer))

    def verdict(self, answer: str) -> bool | None:
        """As ``is_right``; None where that took more CPU time or memory than there is."""
        return JUDGE_PROCESS.verdict(
            "regex", self.pattern, normalize(answer), ignore_case=self.ignore_case, where=self.where
        )


@dataclass(frozen=True)
class JsonSchema:
    """The answer is one JSON value, and nothing beside it, that the schema describes (needs ``jsonschema``).

    Args:
        schema: as JSON; draft 2020-12 unless its ``$schema`` says otherwise.
    """

    schema: str
    where: str = ""

    def __post_init__(self) -> None:
        JUDGE_PROCESS.ask("json_schema", self.schema, None, where=self.where)

    @property
    def expected(self) -> str:
        """The schema."""
        return self.schema

    def is_right(self, answer: str) -> bool:
        """See the class; what nobody could find out is not right."""
        return bool(self.verdict(answer))

    def verdict(self, answer: str) -> bool | None:
        """As ``is_right``; None where that took more CPU time or memory than there is."""
        return JUDGE_PROCESS.verdict("json_schema", self.schema, normalize(answer), where=self.where)


@dataclass(frozen=True)
class Formula:
    r"""A formula that is worked out as one of ``answers`` is (``formula_text``), and equal to it (``formula_worker``).

    What stands in the ``\boxed{…}``, of which there may be one; else the whole answer, without ``$`` around it. Needs
    ``math-verify``.

    Args:
        question: what was asked; an answer that repeats it is none.
    """

    answers: tuple[str, ...]
    where: str = ""
    question: str = ""

    def __post_init__(self) -> None:
        for answer in self.answers:
            JUDGE_PROCESS.ask("math", formula_of(answer) or answer, None, where=self.where)

    @property
    def expected(self) -> str:
        """The first of the right answers."""
        return self.answers[0]

    def is_right(self, answer: str) -> bool:
        """See the class; what nobody could find out is not right."""
        return bool(self.verdict(answer))

    def verdict(self, answer: str) -> bool | None:
        """Whether ``answer`` is right; None where that took more CPU time or memory than there is."""
        formula = formula_of(normalize(answer))
        if formula is None:
            return False
        is_known = True
        for right in (formula_of(right) or right for right in self.answers):
            if refusal(right, formula, self.question):
                continue
            verdict = JUDGE_PROCESS.verdict("math", right, as_expected(right, formula), where=self.where)
            if verdict:
                return True
            is_known &= verdict is not None
        return False if is_known else None


def accepted_texts(answer: object) -> Sequence[str] | None:
    """A string, a number, or a list of them, as texts; None where it is none of these, or an empty one.

    >>> accepted_texts(7), accepted_texts(["a", 0.5]), accepted_texts({}), accepted_texts([])
    (['7'], ['a', '0.5'], None, None)
    """
    values = answer if isinstance(answer, list) else [answer]
    texts = [value.strip() if isinstance(value, str) else str(value) for value in values]
    is_valid = all(isinstance(value, (str, int, float)) and not isinstance(value, bool) for value in values)
    return texts if texts and is_valid and all(texts) else None
