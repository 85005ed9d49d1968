r"""What the text of a formula shows before anybody computes: an answer that is not one, whatever its value.

A library that compares by value takes ``13 \times 17`` for 221, ``6 = 5`` for 5, ``5 \text{ km}`` for ``5 \text{ cm}``
and ``5 \text{ million}`` for 5. A policy that is paid by it learns to write the question as its answer. So an answer
must be as far worked out as the expected one, and say nothing beside it that the expected one or the question does not:

- where a plain number is expected, one plain number (``0.5``, ``\frac{1}{2}``, ``1\frac{1}{2}``, ``5 \times 10^3``,
  ``50\%``), perhaps with ``x =`` before it and the unit that is expected behind it;
- else only operations that the expected answer has as well, beside ``+ - \cdot / ^ \sqrt``, no more relations than it
  has, and nothing that stands word for word in the question.

Every rule only refuses; what passes is still to be found equal by ``formula_worker``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from sprat.tasks.numeric import boxed

MAX_CHARS, MAX_GROWTH = 2000, 6  # of an answer; times as long as the expected one, and 60 characters on top
TOLERANCE = Fraction(1, 10_000)  # where one of two numbers is a decimal that was rounded
MAX_EXPONENT = 400

_UNICODE = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u00f7": "/",
    "\u03c0": "\\pi ", "\u221e": "\\infty ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u00b0": "^\\circ ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u00b1": "\\pm ", "\u222a": "\\cup ", "\u2208": "\\in ",
})  # fmt: skip
_TYPOGRAPHY = re.compile(
    r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr|quad|qquad)(?![a-zA-Z])|\\[,!;: ]|\\\$|(?<!\\)~"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_INT = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>[0-9]*)\\frac(?:\{{(?P<a>-?{_INT})\}}\{{(?P<b>{_INT})\}}|(?P<c>[0-9])(?P<d>[0-9]))"
    rf"|(?P<over>{_INT})/(?P<under>{_INT})|(?P<decimal>{_INT}(?:\.[0-9]+)?|\.[0-9]+))"
    r"(?:(?:\\times|\\cdot|\*)10\^(?:\{(?P<long>-?[0-9]{1,4})\}|(?P<short>[0-9])))?(?P<percent>%?)"
)
_ASSIGNED = re.compile(r"[^=<>\\0-9{}|!:]*[A-Za-z][^=<>\\{}|!:]*(?:_\{[A-Za-z0-9]+\}[^=<>\\{}|!:]*)?=")
_UNIT = re.compile(r"(?:\^\{?\\circ\}?)?(?:[a-z/.\u20ac$]+(?:\^\{?[23]\}?)?)*")
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
)
_FREE_COMMANDS = frozenset(f"frac sqrt cdot times div pi pm mp cup infty in circ mathbb emptyset {_GREEK}".split())
_GROUPS = ({"sin", "cos", "tan", "cot", "sec", "csc"}, {"ln", "log", "exp"}, {"le", "leq", "lt", "ge", "geq", "gt"})
_FUNCTION_WORDS = {"sqrt", "sin", "cos", "tan", "log", "exp"}
_LOGIC = (
    "or and not more less than at least most about approximately between to from plus minus times over if is are no "
    "none any all every some each maybe either both hundred thousand million billion trillion dozen percent half "
    "double twice correct right wrong answer"
)
_LOGIC_WORDS = frozenset(_LOGIC.split())
_TOWER = re.compile(r"\^(?=[^+\-=,;]{0,20}\^)")
_MARKS = "!|%:;'?@#&"  # that change a value, or what is said; as often as the expected answer has them


@dataclass(frozen=True)
class PlainNumber:
    """A number that is worked out: its value, its unit as letters, and how it is written."""

    value: Fraction
    unit: str
    is_percent: bool
    is_decimal: bool


def formula_of(answer: str) -> str | None:
    """The one formula of an answer, without what sets it off from text; None where there is none, or several."""
    boxes = boxed(answer)
    if boxes is None or len(set(boxes)) > 1:
        return None
    text = boxes[0] if boxes else answer.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
            text = text[len(opening) : -len(closing)].strip()
            break
    return None if re.search(r"(?<!\\)\$", text) or not text else text


def plain_number(formula: str) -> PlainNumber | None:
    r"""``formula`` as a number that is worked out, perhaps with ``x =`` before and a unit behind it; None if none.

    >>> plain_number(r"x = 1\frac{1}{2} \text{ cm}")
    PlainNumber(value=Fraction(3, 2), unit='cm', is_percent=False, is_decimal=False)
    >>> plain_number("2 + 3"), plain_number("2x"), plain_number("|5|")
    (None, None, None)
    """
    text = _normalize(formula)
    words = re.sub(r"(?<=[0-9}%])\s+(?=[A-Za-z]{3})", "\\\\unit", _TEXT.sub(r"\\unit\1\\unit", text))
    squeezed = "".join(words.split())
    if match := _ASSIGNED.match(squeezed):
        squeezed = squeezed[match.end() :]
    squeezed = squeezed.removeprefix("\\unit").lstrip("$") if squeezed.startswith("\\unit$") else squeezed.lstrip("$")
    number = _NUMBER.match(squeezed)
    if number is None:
        return None
    rest = squeezed[number.end() :]
    unit = rest.replace("\\unit", "").lower()
    has_loose_letters = rest[:1].isalpha()  # 2x is no number, 2 apples is one
    value = _value(number)
    if value is None or has_loose_letters or not _UNIT.fullmatch(unit):
        return None
    is_decimal = "." in (number["decimal"] or "") or number["percent"] == "%"
    return PlainNumber(value, unit.replace(".", "").replace("\\circ", "°"), number["percent"] == "%", is_decimal)


def as_expected(expected: str, answer: str) -> str:
    r"""``answer`` with the percent sign or the unit of a plain number as the expected one has it, where it left it out
    or wrote it without ``\text``.

    >>> as_expected("18\\%", "18"), as_expected("5\\text{ cm}", "5 cm")
    ('18\\%', '5 \\text{cm}')
    """
    gold, text = plain_number(expected), answer.strip()
    if gold is None:
        return answer
    if gold.unit.isalpha() and re.search(rf"[0-9}}]\s+{gold.unit}\Z", text):
        return f"{text[: -len(gold.unit)]}\\text{{{gold.unit}}}"
    number = plain_number(text)
    return f"{text}\\%" if number and gold.is_percent and not number.is_percent and not number.unit else answer


def refusal(expected: str, answer: str, question: str = "") -> str:
    """Why the formula ``answer`` is not right, whatever its value; empty where its value decides.

    Args:
        expected: a right formula.
        question: what was asked; empty where nobody knows.
    """
    if len(answer) > min(MAX_CHARS, MAX_GROWTH * len(expected) + 60):
        return "it is much longer than the expected answer"
    if strange := set(_normalize(answer)) - set(_normalize(expected)) - set(map(chr, range(32, 127))) - set("\n\t"):
        return f"it holds {sorted(strange)[0]!r}"
    gold, answer = plain_number(expected), as_expected(expected, answer)
    if gold is not None:
        number = plain_number(answer)
        return "it is no plain number" if number is None else _number_refusal(gold, number, question)
    return _echo_refusal(expected, answer, question) or _form_refusal(expected, answer, question)


def _number_refusal(gold: PlainNumber, number: PlainNumber, question: str) -> str:
    """Why ``number`` is not the one that is expected."""
    if number.unit and number.unit != gold.unit:
        asked = set(re.findall(r"[a-z]+", question.lower()))
        words = set(re.findall(r"[a-z]+", number.unit))
        names_angle = "°" not in number.unit or bool(asked & {"degree", "degrees", "angle", "circ"}) or "°" in question
        if gold.unit or not names_angle or words - asked or words & _LOGIC_WORDS:
            return "its unit is not the expected one"
    tolerance = TOLERANCE if gold.is_decimal or number.is_decimal else 0
    is_near = abs(number.value - gold.value) <= tolerance * abs(gold.value)
    return "" if is_near else "its value is another"


def _echo_refusal(expected: str, answer: str, question: str) -> str:
    """Why an answer that stands in the question is none, unless the expected one does."""
    echoed, right, asked = (_squeeze(text) for text in (answer, expected, question))
    is_worked_out = plain_number(answer) is not None or re.fullmatch(r"[\w\\]{1,6}|\\text\{.*\}", echoed)
    return "it stands in the question" if echoed in asked and echoed != right and not is_worked_out else ""


def _form_refusal(expected: str, answer: str, question: str) -> str:
    """Why an answer that is no plain number says more than the expected one, or is less worked out."""
    right, text = _normalize(expected), _normalize(answer)
    commands, allowed = _commands(text), _commands(right) | _FREE_COMMANDS
    for group in _GROUPS:
        allowed |= group if allowed & group or (group & {"le"} and re.search("[<>]", right)) else set()
    if extra := commands - allowed:
        return f"it uses \\{sorted(extra)[0]}, and the expected answer does not"
    if marks := [mark for mark in _MARKS if text.count(mark) > right.count(mark)]:
        return f"it uses {marks[0]}, and the expected answer does not"
    relations = [len(re.findall(r"[<>]|\\(?:leq?|geq?|lt|gt)(?![a-zA-Z])", side)) for side in (right, text)]
    if relations[1] > relations[0]:
        return "it states a relation, and none is asked for"
    if text.count("=") > max(right.count("="), 1 + right.count(",")):
        return "it is a chain of equations"
    if text.count("^") > 1 and len(re.findall(_TOWER, text)) > len(re.findall(_TOWER, right)):
        return "it is a power of powers"
    if re.fullmatch(r"\(.*,.*\)", text, re.DOTALL) and not re.search(r"[(\[]", right):
        return "it is ordered, or an interval"
    if "=" in text and any(not re.search(r"[A-Za-z]", side) for side in re.split(r"=[^,;]*[,;]?", text)[:-1]):
        return "it equates what has no name"
    if set(re.findall(r"[0-9]_\{?[0-9]+|\.\.+", text)) - set(re.findall(r"[0-9]_\{?[0-9]+|\.\.+", right)):
        return "it has another base, or goes on"
    letters = set(re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", right))
    known = _words(right) | _FUNCTION_WORDS | ({"and", "or"} if re.search(r",|;|\bor\b|\band\b", right) else set())
    known |= _words(question) - _LOGIC_WORDS
    loose = {word for word in _words(text) - known if not set(word) <= {letter.lower() for letter in letters}}
    return f"it says {sorted(loose)[0]!r}, and neither question nor expected answer does" if loose else ""


def _normalize(formula: str) -> str:
    """``formula`` without typography, in ASCII where there is a way to write it so."""
    text = formula.translate(_UNICODE).replace("{,}", ",").replace("\\%", "%")
    text = _TYPOGRAPHY.sub(" ", re.sub(r"\\[dtc]frac", r"\\frac", text))
    return text.strip().removesuffix(".")


def _squeeze(text: str) -> str:
    """``text`` without blanks, braces around single signs, and signs of multiplication."""
    text = re.sub(r"\\(?:cdot|times)(?![a-zA-Z])|[*$]", "", _normalize(text))
    return re.sub(r"\{(.)\}", r"\1", "".join(text.split()))


def _commands(text: str) -> set[str]:
    """The LaTeX commands of ``text`` that are not only typography."""
    return {name for name in re.findall(r"\\([a-zA-Z]+)", text) if not re.fullmatch("text.*|math[a-z]+|mbox", name)}


def _words(text: str) -> set[str]:
    """Words of three letters or more, and those in a LaTeX text, in lower case."""
    set_as_text = {word for part in _TEXT.findall(text) for word in re.findall(r"[A-Za-z]+", part)}
    loose = re.findall(r"(?<![A-Za-z\\])[A-Za-z]{3,}", _TEXT.sub(" ", text))
    return {word.lower() for word in (*set_as_text, *loose)}


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of what ``_NUMBER`` matched; None where it has none that is to be computed."""
    exponent = int(match["long"] or match["short"] or 0)
    if len(match[0]) > MAX_EXPONENT or abs(exponent) > MAX_EXPONENT:
        return None
    digits = {name: (text or "").replace(",", "") for name, text in match.groupdict().items()}
    if digits["decimal"]:
        value = Fraction(digits["decimal"])
    else:
        above, below = digits["a"] or digits["c"] or digits["over"], digits["b"] or digits["d"] or digits["under"]
        if int(below) == 0:
            return None
        value = Fraction(int(above), int(below)) + int(digits["whole"] or 0)
    value *= Fraction(10) ** exponent
    value = value / 100 if match["percent"] else value
    return -value if match["sign"] == "-" else value
