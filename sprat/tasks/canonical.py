"""The same problem in other words: one text for all of them, by which problems are split.

Sorted terms, ordered numbers, no names of variables, no template, and one form for an expression whichever task asks
for it; so ``4 - 1 - 7`` of one task keeps ``4 - ( 7 + 1 )`` of another out of training, where it is a test problem.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence


def text(question: str) -> str:
    """A question of a task that nobody wrote a form for: its own words, however they are spaced and capitalised.

    >>> text("What  is\\nTHIS?")
    'what is this?'
    """
    return " ".join(question.casefold().split())


def terms(values: Iterable[int]) -> str:
    """A sum of signed terms, in whatever order.

    >>> terms([4, -1, -7])
    'sum -7 -1 4'
    """
    return " ".join(["sum", *map(str, sorted(values))])


def expression(source: str) -> str:
    """An expression of integers with ``+ - *`` and parentheses: parentheses around sums dissolve, factors are sorted.

    >>> expression("4 - ( 7 + 1 )") == terms([4, -1, -7])
    True
    >>> expression("3 * -2 + 5") == expression("5 + -2 * 3")
    True
    """
    parts = _parts(ast.parse(source.strip(), mode="eval").body, 1)
    if all(isinstance(part, int) for part in parts):
        return terms(part for part in parts if isinstance(part, int))
    return " ".join(["sum", *sorted(map(str, parts))])


def equation(source: str) -> str:
    """``a*x + c = d`` in any order and with any name for x: a, c and d, all of them negated where a is negative.

    >>> equation("5 - 8*e = -51") == equation("8*z - 5 = 51")
    True
    """
    factor, shift, target = linear(source)
    sign = -1 if factor < 0 else 1
    return f"equation {sign * factor} {sign * shift} {sign * target}"


def linear(source: str) -> tuple[int, int, int]:
    """(a, c, d) of ``a*x + c = d`` in any of reasoning-gym's forms.

    >>> linear("5 - 8*e = -51")
    (-8, 5, -51)
    """
    left, right = source.split("=")
    factor, shift = 0, 0
    for sign, number, variable in re.findall(r"([+-]?)\s*(\d+)?\*?([a-z])?", left.replace(" ", "")):
        if number or variable:
            value = int(sign + (number or "1"))
            factor, shift = (factor + value, shift) if variable else (factor, shift + value)
    return factor, shift, int(right)


def divisor(numbers: Sequence[int]) -> str:
    """The greatest common divisor of ``numbers``, in whatever order.

    >>> divisor([18, 12])
    'gcd 12 18'
    """
    return " ".join(["gcd", *map(str, sorted(numbers))])


def legs(animals: Iterable[tuple[int, int]]) -> str:
    """(count, legs of one) for each kind of animal: what they are called and their order say nothing.

    >>> legs([(3, 4), (2, 8)])
    'legs 2x8 3x4'
    """
    return " ".join(["legs", *(f"{count}x{each}" for count, each in sorted(animals))])


def _parts(node: ast.expr, sign: int) -> list[int | str]:
    """The signed terms of a sum; a product is one term, its factors sorted and its sign in front."""
    match node:
        case ast.Constant(value=int(value)):
            return [sign * value]
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as op, operand=operand):
            return _parts(operand, -sign if isinstance(op, ast.USub) else sign)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            return _parts(left, sign) + _parts(right, -sign if isinstance(op, ast.Sub) else sign)
        case ast.BinOp(op=ast.Mult()):
            return [_product(node, sign)]
        case _:
            return [f"{'-' if sign < 0 else ''}({ast.unparse(node)})"]


def _product(node: ast.expr, sign: int) -> str:
    factors: list[str] = []

    def gather(one: ast.expr) -> None:
        nonlocal sign
        if isinstance(one, ast.BinOp) and isinstance(one.op, ast.Mult):
            gather(one.left)
            gather(one.right)
            return
        parts = _parts(one, 1)
        if len(parts) == 1:
            value = str(parts[0])
            sign = -sign if value.startswith("-") else sign
            factors.append(value.removeprefix("-"))
        else:
            factors.append(f"({' '.join(sorted(map(str, parts)))})")

    gather(node)
    return ("-" if sign < 0 else "") + "*".join(sorted(factors))
