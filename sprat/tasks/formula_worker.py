"""Asks math-verify whether two formulas are the same, and checks by numbers what it says. Runs in ``judge_worker``.

math-verify reads a formula loosely and compares loosely: it takes ``0.0`` for ``10^{-7}`` (it looks at six places),
``1/2006!`` for ``1/2004!`` (their difference vanishes), ``101_3`` for ``101``. It was made to score benchmarks, whose
answers nobody bends; a policy in training does. So its yes is held against the numbers: what has a value must be close
by the size of that value, and what has variables must agree where they are given values. Its no is never changed.

It must not import sprat.
"""

from __future__ import annotations

from typing import Any

RELATIVE_TOLERANCE = 1e-4  # where one side is a decimal that was rounded
EXACT_TOLERANCE = 1e-45  # where neither is
DIGITS = 60
POINTS = (("7", "3"), ("11", "17"), ("29", "13"))  # p/q, of which each variable gets its own multiple


def is_same(source: str, answer: str | None) -> bool:
    """Whether the answer is the formula ``source`` (LaTeX); without an answer, whether that can be read.

    Only its LaTeX reader is asked: the other one executes what it reads.

    Raises:
        ValueError: it cannot read the formula.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> Any:
        return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None, fallback_mode="no_fallback")

    gold = read(source)
    if not gold:
        raise ValueError("math-verify cannot read the formula")
    if answer is None:
        return True
    target = read(answer)
    if not target or not verify(gold, target, timeout_seconds=None, strict=True):
        return False
    return agrees(gold[0], target[0]) is not False


def compare(request: dict[str, Any], answer: str | None) -> bool:
    """What math-verify says of two texts by the options of the request, without its own timers.

    Args:
        request: ``gold`` (a text), ``gold_reader`` and ``answer_reader`` (options of its ``parse``; ``targets`` are
            pairs of a kind, ``latex``, ``expr`` or ``string``, and its options) and ``verify`` (options of that).
    """
    import math_verify

    kinds = {
        "latex": math_verify.LatexExtractionConfig,
        "expr": math_verify.ExprExtractionConfig,
        "string": math_verify.StringExtractionConfig,
    }

    def read(text: str, options: dict[str, Any]) -> Any:
        options = dict(options)
        targets = [kinds[kind](**settings) for kind, settings in options.pop("targets", [["latex", {}], ["expr", {}]])]
        return math_verify.parse(text, targets, **options, parsing_timeout=None)

    gold = read(request["gold"], request.get("gold_reader", {}))
    target = read(answer or "", request.get("answer_reader", {}))
    return bool(math_verify.verify(gold, target, **request.get("verify", {}), timeout_seconds=None))


def agrees(gold: Any, target: Any) -> bool | None:
    """Whether two expressions of SymPy have the same values; None where they have none that can be compared."""
    import sympy

    gold, target = _value_side(gold), _value_side(target)
    if isinstance(gold, (sympy.FiniteSet, sympy.Tuple)) or isinstance(target, (sympy.FiniteSet, sympy.Tuple)):
        return _collections_agree(gold, target)
    if isinstance(gold, sympy.Interval) and isinstance(target, sympy.Interval):
        ends = [agrees(gold.start, target.start), agrees(gold.end, target.end)]
        return False if False in ends else None if None in ends else True
    if not isinstance(gold, sympy.Expr) or not isinstance(target, sympy.Expr):
        return None
    has_decimal = gold.has(sympy.Float) or target.has(sympy.Float)
    tolerance = RELATIVE_TOLERANCE if has_decimal else EXACT_TOLERANCE
    symbols = sorted(gold.free_symbols | target.free_symbols, key=str)
    verdicts = [_agree_at(gold, target, symbols, point, tolerance) for point in (POINTS if symbols else POINTS[:1])]
    return False if False in verdicts else True if True in verdicts else None


def _agree_at(gold: Any, target: Any, symbols: list[Any], point: tuple[str, str], tolerance: float) -> bool | None:
    """Whether both have the same value where each variable is its own multiple of ``point``."""
    import sympy

    values = {symbol: sympy.Rational(*point) * (place + 1) / 5 for place, symbol in enumerate(symbols)}
    try:
        exact_gold, exact_target = (side.subs(values).doit() for side in (gold, target))
        if exact_gold.is_Rational and exact_target.is_Rational and tolerance == EXACT_TOLERANCE:
            return bool(exact_gold == exact_target)
        left, right = complex_value(exact_gold), complex_value(exact_target)
    except Exception:  # whatever SymPy cannot evaluate has no value here
        return None
    if left is None or right is None:
        return None
    return bool(abs(left - right) <= tolerance * abs(left))


def complex_value(expression: Any) -> Any:
    """The value of an expression without variables, to ``DIGITS`` digits; None where it has none."""
    import sympy

    value = expression.evalf(DIGITS)
    real, imaginary = value.as_real_imag()
    if not (real.is_Number and imaginary.is_Number and real.is_finite and imaginary.is_finite):
        return None
    return real + sympy.I * imaginary if imaginary else real


def _value_side(expression: Any) -> Any:
    """The right side of ``x = value``, else the expression."""
    import sympy

    while isinstance(expression, sympy.Eq):
        expression = expression.rhs
    return expression


def _collections_agree(gold: Any, target: Any) -> bool | None:
    """Whether each element of one is one of the other's, and as many; a number is a set of one."""
    import sympy

    kinds = (sympy.FiniteSet, sympy.Tuple)
    sides = [list(side.args) if isinstance(side, kinds) else [side] for side in (gold, target)]
    if len(sides[0]) != len(sides[1]):
        return None  # intervals that were read as pairs, and such: math-verify knows
    remaining, unknown = sides[1], False
    for element in sides[0]:
        verdicts = [agrees(element, other) for other in remaining]
        if True in verdicts:
            remaining = [other for place, other in enumerate(remaining) if place != verdicts.index(True)]
        elif None in verdicts:
            unknown = True
        else:
            return False
    return None if unknown else True
