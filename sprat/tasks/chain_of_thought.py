"""Chains of thought, written out: the smallest steps that a tiny model can do without thinking.

Each step is one fact (``7+15=22``) on one line, and each line needs only the line before it and one
number of the question. Numbers of two digits are added column by column, because a fact table over
running totals up to 495 is out of reach of a small budget while sums of digits are few.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sprat.tasks import canonical


def running_total(terms: Sequence[int]) -> str:
    """Add signed terms from left to right.

    >>> print(running_total([4, -1, -7]))
    4-1=3
    3-7=-4
    """
    lines, total = [], terms[0]
    for term in terms[1:]:
        lines.append(f"{total}{term:+d}={total + term}")
        total += term
    return "\n".join(lines)


def columns(terms: Sequence[int]) -> str:
    """Add signed two-digit terms: ones, then tens, then the carry.

    >>> print(columns([45, 37, -62]))
    ones
    5+7=12
    12-2=10
    tens
    4+3=7
    7-6=1
    10=1,0
    1+1=2
    2,0
    """
    signs = [-1 if t < 0 else 1 for t in terms]
    ones = [s * (abs(t) % 10) for s, t in zip(signs, terms, strict=True)]
    tens = [s * (abs(t) // 10) for s, t in zip(signs, terms, strict=True)]
    carry, digit = divmod(sum(ones), 10)
    high = sum(tens)
    parts = ["ones", _signed_total(ones, terms), "tens", _signed_total(tens, terms)]
    parts += [f"{sum(ones)}={carry},{digit}", f"{high}{carry:+d}={high + carry}", f"{high + carry},{digit}"]
    return "\n".join(parts)


def _signed_total(digits: Sequence[int], terms: Sequence[int]) -> str:
    """``running_total`` that keeps the operator of the question where the digit is 0 (``7-0=7``)."""
    lines, total = [], digits[0]
    for digit, term in zip(digits[1:], terms[1:], strict=True):
        sign = "-" if term < 0 else "+"
        lines.append(f"{total}{sign}{abs(digit)}={total + digit}")
        total += digit
    return "\n".join(lines)


def signed_terms(expression: str) -> list[int]:
    """The signed terms of a chain of + and -.

    >>> signed_terms("4 - 1 - 7")
    [4, -1, -7]
    """
    return [int(sign + digits) for sign, digits in re.findall(r"([+-]?)\s*(\d+)", expression)]


def chain_sum(expression: str) -> str:
    """Chain for reasoning-gym's ``chain_sum``: columns when a term has two digits.

    A minus before 0 is kept (``3-0=3``), so that every step copies its operator from the question.
    """
    terms = signed_terms(expression)
    if max(abs(t) for t in terms) > 9:
        return columns(terms)
    operators = re.findall(r"(?<=\d)\s*([+-])", expression)
    lines, total = [], terms[0]
    for operator, term in zip(operators, terms[1:], strict=True):
        lines.append(f"{total}{operator}{abs(term)}={total + term}")
        total += term
    return "\n".join(lines)


def arithmetic(expression: str) -> str:
    """Innermost parentheses first, in them products first, then from left to right.

    >>> print(arithmetic("6 + 10 * ( 2 - -3 )"))
    2--3=5
    10*5=50
    6+50=56
    """
    parts = expression.split()
    lines: list[str] = []
    while len(parts) > 1:
        close = parts.index(")") if ")" in parts else len(parts)
        start = max((at for at in range(close) if parts[at] == "("), default=-1) + 1
        if close - start == 1:  # a single number in parentheses
            parts[start - 1 : close + 1] = [parts[start]]
            continue
        inner = parts[start:close]
        at = start + (inner.index("*") if "*" in inner else 1)
        left, operator, right = parts[at - 1 : at + 2]
        a, b = int(left), int(right)
        value = a * b if operator == "*" else a + b if operator == "+" else a - b
        parts[at - 1 : at + 2] = [str(value)]
        lines.append(f"{left}{operator}{right}={value}")
    return "\n".join(lines) if lines else parts[0]


def equation(text: str) -> str:
    """Solve ``a*x + c = d`` in any of reasoning-gym's two-term forms.

    >>> print(equation("5 - 8*e = -51"))
    5+51=56
    56/8=7
    >>> print(equation("z + 5 = 13"))
    13-5=8
    """
    factor, shift, target = canonical.linear(text)
    lines = []
    if shift and factor < 0:
        lines.append(f"{shift}{-target:+d}={shift - target}")
        target, factor = shift - target, -factor
    elif shift:
        lines.append(f"{target}{-shift:+d}={target - shift}")
        target -= shift
    if factor != 1:
        lines.append(f"{target}/{factor}={target // factor}")
    return "\n".join(lines) if lines else f"{target}"


def euclid(numbers: Sequence[int]) -> str:
    """Euclid's algorithm by remainders; what two numbers have in common meets the next.

    >>> print(euclid([18, 48, 10]))
    48%18=12
    18%12=6
    12%6=0
    10%6=4
    6%4=2
    4%2=0
    """
    common, lines = numbers[0], list[str]()
    for number in numbers[1:]:
        a, b = max(common, number), min(common, number)
        while b:
            lines.append(f"{a}%{b}={a % b}")
            a, b = b, a % b
        common = a
    return "\n".join(lines)


def legs(animals: Sequence[tuple[int, int]]) -> str:
    """``(count, legs of one)`` for each kind of animal: product, then running total.

    >>> print(legs([(2, 8), (3, 4)]))
    2*8=16
    3*4=12
    16+12=28
    """
    lines = [f"{count}*{each}={count * each}" for count, each in animals]
    total = [count * each for count, each in animals]
    if len(total) > 1:
        lines.append(running_total(total))
    return "\n".join(lines)
