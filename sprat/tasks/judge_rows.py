"""The judge of one row of a task file: named by the row, or by its answer, and checked before anything runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, get_args

from sprat.errors import DataError
from sprat.tasks.code_tests import CodeTests, code_tests
from sprat.tasks.judges import Choice, Exact, Formula, JsonSchema, Judge, JudgeName, Numeric, Regex, accepted_texts
from sprat.tasks.numeric import Extract

JUDGES: tuple[str, ...] = get_args(JudgeName)
_OPTIONS = {  # which judges read an option
    "rel_tol": ("numeric",),
    "extract": ("numeric",),
    "ignore_case": ("exact", "choice", "regex"),
    "choices": ("choice",),
}


def row_judge(row: Mapping[str, Any], defaults: Mapping[str, Any], where: str, question: str) -> Judge:
    """The judge of a row.

    Raises:
        DataError: the row names none that there is, or its answer or options are none for it.
    """
    answer = row.get("answer")
    if answer is None or answer in ("", [], {}):
        raise DataError("no answer", where=where, todo='give "answer"')
    name = row.get("judge", "choice" if "choices" in row else defaults.get("judge") or _default_judge(answer))
    if name not in JUDGES:
        raise DataError(f"unknown judge {name!r}", where=where, todo=f"use {', '.join(JUDGES)}")
    for option, readers in _OPTIONS.items():
        if option in row and name not in readers:
            raise DataError(f"{option} says nothing to the judge {name!r}", where=where, todo="leave it out")
    options = {**defaults, **row}
    try:
        return _build_judge(name, answer, options, where, question)
    except DataError as error:
        raise DataError(error.what, where=where, todo=error.todo) from None


def _default_judge(answer: object) -> str:
    """Numbers are compared by value, all else as text."""
    values = answer if isinstance(answer, list) else [answer]
    return "numeric" if all(isinstance(value, (int, float)) for value in values) else "exact"


def _build_judge(name: str, answer: Any, options: Mapping[str, Any], where: str, question: str) -> Judge:
    ignore_case = options.get("ignore_case", False)
    if not isinstance(ignore_case, bool):
        raise DataError("ignore_case is neither true nor false", todo="write true or false")
    if name == "choice":
        return _build_choice(answer, options.get("choices"), ignore_case)
    if name == "json_schema":
        if not isinstance(answer, dict):
            raise DataError("answer is no JSON schema", todo='write "answer": {"type": "object", …}')
        return JsonSchema(json.dumps(answer), where)
    if name == "regex":
        if not isinstance(answer, str):
            raise DataError("answer is no regular expression", todo='write "answer": "a|b"')
        return Regex(answer, ignore_case, where)
    if name == "code":
        return CodeTests(code_tests(answer), where)
    texts = accepted_texts(answer)
    if texts is None:
        raise DataError("answer is no text, number or list of them", todo='write "answer": "7" or ["7", "seven"]')
    if name == "exact":
        return Exact(tuple(texts), ignore_case)
    if name == "math":
        return Formula(tuple(texts), where, question)
    rel_tol, extract = options.get("rel_tol", 0), options.get("extract", "only")
    if isinstance(rel_tol, bool) or not isinstance(rel_tol, (int, float)) or not 0 <= rel_tol < 1:
        raise DataError("rel_tol is no number from 0 to below 1", todo="0.01 lets an answer be off by one percent")
    if not math.isfinite(rel_tol) or extract not in get_args(Extract):
        raise DataError(f"unknown extract {extract!r}", todo=f"use {', '.join(get_args(Extract))}")
    return Numeric(tuple(texts), float(rel_tol), extract)


def _build_choice(answer: Any, choices: Any, ignore_case: bool) -> Choice:
    """A choice whose answer is a place from 0, a letter, or the text of one of ``choices``."""
    if choices is None:
        raise DataError("no choices", todo='write "choices": ["Rome", "Paris"]')
    texts = tuple(choice.strip() for choice in choices)
    if isinstance(answer, int) and not isinstance(answer, bool):
        if str(answer) in texts and texts.index(str(answer)) != answer:
            raise DataError(f"answer {answer} may be a place from 0 or a text", todo="give the letter of the choice")
        return Choice(texts, answer, ignore_case)
    place = Choice(texts, 0, ignore_case).place(answer) if isinstance(answer, str) else None
    if place is None:
        raise DataError(f"answer {answer!r} is none of the choices", todo="give its place from 0, its letter or text")
    return Choice(texts, place, ignore_case)
