"""The same problem in other words: one text for all of them, by which problems are split.

Sorted terms, ordered numbers, no names of variables, no template, and one form for an expression whichever task asks
for it; so ``4 - 1 - 7`` of one task keeps ``4 - ( 7 + 1 )`` of another out of training, where it is a test problem.
Problems are the same where no calculation lies between them: what adds 0, multiplies by 1, cancels, repeats or only
changes places says nothing. ``1 + 3`` and ``4``, ``2 * ( 3 + 4 )`` and ``2 * 3 + 2 * 4`` remain two.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence

Terms = dict[tuple[str, ...], int]  # how often each product of sorted factors is added; the product that is 1 has none


def text(question: str) -> str:
    """A question of a task that nobody wrote a form for: its own words, however they are spaced and capitalised.

    >>> text("What  is\\nTHIS?")
    'what is this?'
    """
    return " ".join(question.casefold().split())


def terms(values: Iterable[int]) -> str:
    """A sum of signed terms, in whatever order: zeros add nothing, and opposites leave nothing.

    >>> terms([4, -1, 0, -7]), terms([5, 3, -5]) == terms([3])
    ('sum -1 -7 4', True)
    """
    return f"sum {_format_terms(_sum(values))}"


def expression(source: str) -> str:
    """An expression of integers with ``+ - * /`` and parentheses.

    Parentheses around sums dissolve, as minus signs before them do; factors are sorted, their signs go in front;
    a factor or divisor of 1 or -1 changes at most the sign, and a product with 0 is a term of 0.

    >>> expression("4 - ( 7 + 1 ) - 0") == terms([4, -1, -7])
    True
    >>> expression("3 * -2 + 5") == expression("5 + -2 * 3 * 1")
    True
    """
    return f"sum {_format_terms(_terms(ast.parse(source.strip(), mode='eval').body))}"


def equation(source: str) -> str:
    """``a*x + c = d`` by a and what is added to ``a*x`` to give 0.

    So the name of x, the order of terms, the side that each stands on, zeros and all signs changed at once say nothing.

    >>> equation("5 - 8*e = -51") == equation("8*z - 5 = 51") == equation("51 = 8*x - 5 + 0")
    True
    """
    factor, shift, target = linear(source)
    sign = -1 if factor < 0 else 1
    return f"equation {sign * factor} {_format_terms(_sum([sign * shift, -sign * target]))}"


def linear(source: str) -> tuple[int, int, int]:
    """(a, c, d) of ``a*x + c = d`` in any of reasoning-gym's forms, x on whichever side.

    >>> linear("5 - 8*e = -51"), linear("13 = z + 5")
    ((-8, 5, -51), (-1, 13, 5))
    """
    (factor, shift), (other, target) = map(_side, source.split("="))
    return factor - other, shift, target


def divisor(numbers: Sequence[int]) -> str:
    """The greatest common divisor of ``numbers``: order, repeats, signs and zeros say nothing, and beside a 1 no other.

    A number alone has its own form, which ``gcd(6, 6)`` shares. A multiple of another (12 beside 6) takes a division
    to be seen, so it counts.

    >>> divisor([18, 12, 18, 0]), divisor([6, 6]), divisor([9, 1])
    ('gcd 12 18', 'gcd 6', 'gcd 1')
    """
    magnitudes = {abs(number) for number in numbers} - {0}
    return " ".join(["gcd", *map(str, [1] if 1 in magnitudes else sorted(magnitudes))])


def legs(animals: Iterable[tuple[int, int]]) -> str:
    """(count, legs of one) for each kind of animal: what they are called and their order say nothing.

    Nor do animals without legs, or of which there are none. Three dogs and two cats are not five dogs: 3 + 2 is to be
    calculated. Two dogs are not four ducks: how many there are is read, how many legs one has is known.

    >>> legs([(3, 4), (2, 8), (5, 0), (0, 6)])
    'legs 2x8 3x4'
    """
    return " ".join(["legs", *(f"{count}x{each}" for count, each in sorted(animals) if count and each)])


def _side(source: str) -> tuple[int, int]:
    """The factor of the variable, and the rest, of one side of an equation."""
    factor, shift = 0, 0
    for sign, number, variable in re.findall(r"([+-]?)(\d+)?\*?([a-z])?", source.replace(" ", "")):
        if number or variable:
            value = int(sign + (number or "1"))
            factor, shift = (factor + value, shift) if variable else (factor, shift + value)
    return factor, shift


def _format_terms(sum_terms: Terms) -> str:
    """Signed terms, sorted, each as often as it is added."""
    named = {("-" if count < 0 else "") + ("*".join(term) or "1"): abs(count) for term, count in sum_terms.items()}
    return " ".join(name for name in sorted(named) for _ in range(named[name])) or "0"


def _number(value: int) -> Terms:
    size = abs(value)
    return {() if size == 1 else (str(size),): value // size} if value else {}


def _sum(values: Iterable[int]) -> Terms:
    total: Terms = {}
    for value in values:
        total = _added(total, _number(value))
    return total


def _added(left: Terms, right: Terms, sign: int = 1) -> Terms:
    """Left plus ``sign`` times right, without what cancels."""
    counts = {term: left.get(term, 0) + sign * right.get(term, 0) for term in left | right}
    return {term: count for term, count in counts.items() if count}


def _terms(node: ast.expr) -> Terms:
    match node:
        case ast.Constant(value=int(value)):
            return _number(value)
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as op, operand=operand):
            return _added({}, _terms(operand), -1 if isinstance(op, ast.USub) else 1)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            return _added(_terms(left), _terms(right), -1 if isinstance(op, ast.Sub) else 1)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _product(_terms(left), _terms(right))
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _quotient(_terms(left), _terms(right))
        case _:
            return {(f"({ast.unparse(node)})",): 1}


def _product(left: Terms, right: Terms) -> Terms:
    if not left or not right:
        return {}
    for unit, other in ((left, right), (right, left)):
        if unit in (_number(1), _number(-1)):
            return _added({}, other, unit[()])
    (sign, factors), (other_sign, other_factors) = _factors(left), _factors(right)
    return {tuple(sorted(factors + other_factors)): sign * other_sign}


def _quotient(left: Terms, right: Terms) -> Terms:
    """Signs stay where they are: what is rounded down depends on them."""
    if not left or right in (_number(1), _number(-1)):
        return _added({}, left, right.get((), 1))
    return {(f"({_format_terms(left)} / {_format_terms(right)})",): 1}


def _factors(sum_terms: Terms) -> tuple[int, tuple[str, ...]]:
    """The sign and the factors of a single product; a sum is one factor, with the sign that makes it first by name."""
    (term, count), *other_terms = sum_terms.items()
    if not other_terms and abs(count) == 1:
        return count, term
    text_form, sign = min((_format_terms(_added({}, sum_terms, sign)), sign) for sign in (1, -1))
    return sign, (f"({text_form})",)
