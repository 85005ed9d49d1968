r"""The one number that an answer states, by its value; an answer that can be read in two ways states none.

``1,234``, ``-0.5``, ``1.5e3``, ``1/2``, ``\frac{1}{2}``, ``50%`` and ``50 percent`` are numbers; values are exact
fractions, so 0.1 is a tenth. Where the answer has a ``\boxed{…}``, only what stands in it counts. Else by ``extract``:

- ``only``: all numbers of the answer must be of one value, so ``7 or 8`` and ``5 + 7 = 12`` state none;
- ``last``: the last number counts, whatever stands before it.

A number is not read where something beside it changes its value: a letter or an operator that touches it (``5km``,
``2x``, ``10^3``, ``12-5``), a sign that stands apart (``- 5``, ``> 5``), ``million`` behind it, a LaTeX command that is
not only typography, digits of another script, commas that are not those of thousands, dots that say that it goes on.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Literal

Extract = Literal["only", "last"]
MAX_NUMBER_CHARS = 400  # digits of one number; 1e999999999 has ten characters and would fill the memory
MAX_EXPONENT = 400

_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)(?:(?P<numerator>[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)/(?P<denominator>[0-9]+)"
    r"|(?P<decimal>(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE](?P<exponent>[-+]?[0-9]{1,4}))?)"
    r"(?P<percent>%?)"
)
_BOX = re.compile(r"\\f?boxed\s*\{")
_FRACTION = re.compile(r"(?<![\w.])\\[dt]?frac\{([-+\u2212]?[0-9]+)\}\{([0-9]+)\}(?![\w.])", re.ASCII)
_TYPOGRAPHY = re.compile(
    r"\\(?:(?:left|right|text|textbf|mathrm|mathbf|displaystyle|quad)(?![a-zA-Z])|[()\[\],;:\\$ ])"
)
_SEPARATORS = re.compile(r"[\s=()\[\]{}:;\"'`|#!]+|\*\*")
_MAGNITUDES = frozenset(["hundred", "thousand", "million", "billion", "trillion", "dozen", "pi", "\u03c0"])
_OPERATORS = frozenset(["+", "-", "−", "*", "/", "^", "<", ">", "~", "×", "÷", "·", "±", "≈", "≠", "≤", "≥", "√"])


def parse_number(text: str, extract: Extract = "only") -> Fraction | None:
    r"""The number that ``text`` states; None where it states none, or several, or one that cannot be read.

    >>> parse_number("So it is $1,234."), parse_number("\\boxed{50\\%}"), parse_number("7 or 8")
    (Fraction(1234, 1), Fraction(1, 2), None)
    >>> parse_number("5 + 7 = 12", "last")
    Fraction(12, 1)
    """
    boxes = boxed(text)
    if boxes is None:
        return None
    candidates = [number for box in boxes for number in _numbers(box) or [None]] if boxes else _numbers(text)
    if extract == "last" and not boxes:
        candidates = candidates[-1:]
    return candidates[0] if candidates and len(set(candidates)) == 1 else None


def boxed(text: str) -> list[str] | None:
    r"""What stands in each outer ``\boxed{…}`` of ``text``; None where one is never closed.

    >>> boxed(r"\boxed{\frac{1}{2}} or \boxed{3}"), boxed("3"), boxed(r"\boxed{3")
    (['\\frac{1}{2}', '3'], [], None)
    """
    contents, match = [], _BOX.search(text)
    while match:
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            return None
        contents.append(text[match.end() : end - 1].strip())
        match = _BOX.search(text, end)
    return contents


def _numbers(text: str) -> list[Fraction | None]:
    """Each number of ``text``; None for one that cannot be read."""
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\%", "%").replace("!=", "\u2260")
    text = _TYPOGRAPHY.sub(" ", _FRACTION.sub(r"\1/\2", text))
    text = re.sub(r"(?<=[0-9])\s+(?:%|percent\b|per cent\b)", "%", text)
    text = "".join(" " if unicodedata.category(char) == "Sc" else char for char in text)
    words = [word for word in _SEPARATORS.split(text) if word]
    numbers: list[Fraction | None] = []
    for place, word in enumerate(words):
        if any(char.isascii() and char.isdigit() or _is_foreign_digit(char) for char in word):
            neighbors = (words[place - 1] if place else "", words[place + 1] if place + 1 < len(words) else "")
            numbers.append(None if _changes_value(*neighbors) else _value(word))
    return numbers


def _is_foreign_digit(char: str) -> bool:
    """Whether ``char`` is a digit or a number of another script, a superscript or a fraction in one sign."""
    return not char.isascii() and unicodedata.category(char) in ("Nd", "Nl", "No")


def _changes_value(before: str, behind: str) -> bool:
    """Whether what stands beside a number makes another of it."""
    if before in _OPERATORS or behind in _OPERATORS or before.startswith("\\") or behind.startswith("\\"):
        return True
    return behind.rstrip(".,").casefold() in _MAGNITUDES


def _value(word: str) -> Fraction | None:
    """The value of one word; None where it is no number."""
    stripped = word.rstrip(".,")
    match = _NUMBER.fullmatch(stripped)
    if match is None or len(stripped) > MAX_NUMBER_CHARS or word.endswith(".."):
        return None
    if match["decimal"] is not None:
        exponent = int(match["exponent"] or 0)
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = Fraction(match["decimal"].replace(",", "")) * Fraction(10) ** exponent
    elif int(match["denominator"]) == 0:
        return None
    else:
        value = Fraction(int(match["numerator"].replace(",", "")), int(match["denominator"]))
    value = value / 100 if match["percent"] else value
    return value if match["sign"] in ("", "+") else -value
