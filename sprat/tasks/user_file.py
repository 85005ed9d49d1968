"""A task of the user's: a JSONL file with a question, an answer and a judge in each row.

Every row is checked before anything runs, and a row that does not hold is one sentence with its line. All rows are
test problems unless their ``split`` says otherwise. docs/evaluate.md tells the format.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sprat.errors import DataError, TrustError
from sprat.files.json import reject_duplicate_keys
from sprat.files.regular_file import open_regular_file
from sprat.tasks import judges as judging
from sprat.tasks.base import Problem, Split
from sprat.tasks.judges import LETTERS, Choice, Judge, JudgeName
from sprat.tasks.numeric import Extract

JUDGES: tuple[str, ...] = get_args(JudgeName)
DEFAULTS = ("judge", "rel_tol", "extract", "ignore_case", "split")  # what a first line without a question may say
FIELDS = ("id", "question", "messages", "choices", "answer", *DEFAULTS)
ROLES = ("system", "user", "assistant")
_OPTIONS = {  # which judges read an option
    "rel_tol": ("numeric",),
    "extract": ("numeric",),
    "ignore_case": ("exact", "choice", "regex"),
    "choices": ("choice",),
}


@dataclass(frozen=True)
class UserTask:
    """The problems of one file. ``Problem.meta`` holds ``id``, ``line``, what is ``asked``
    (without the choices) and, for conversations, ``messages``.

    Attributes:
        name: the title in reports.
        problems: of each split, in the order of the file.
        judges: by the id of the problem.
        digest: SHA-256 (hex) of the file.
    """

    name: str
    problems: Mapping[Split, tuple[Problem, ...]]
    judges: Mapping[str, Judge]
    digest: str

    def problem(self, split: Split, index: int) -> Problem:
        """Problem ``index`` of ``split``, around and around.

        Raises:
            DataError: no row is of that split.
        """
        problems = self.problems[split]
        if not problems:
            raise DataError(f"no {split} problem", where=self.name, todo=f'give some rows "split": "{split}"')
        return problems[index % len(problems)]

    def score(self, problem: Problem, answer: str | None) -> float:
        """1.0 for an answer that the judge of the row takes for right, else 0.0."""
        return float(answer is not None and self.judges[str(problem.meta["id"])].is_right(answer))

    def chain_of_thought(self, problem: Problem) -> str:
        """There is none.

        Raises:
            DataError: always.
        """
        raise DataError("a task from a file has no chains of thought", where=self.name, todo="train on another")


def read_task(path: str | Path, *, name: str = "", judge: str | None = None) -> UserTask:
    """The task in the JSONL file at ``path``.

    Args:
        name: the title in reports; the file's name without its ending if not given.
        judge: of rows that name none, before what the file's first line says.

    Raises:
        DataError: there is no such file, it is no UTF-8 JSONL, or a row does not hold; with file and line.
        MachineError: a judge needs a package that is not installed.
    """
    path, defaults = Path(path), {} if judge is None else {"judge": judge}
    content = _read(path)
    problems: dict[Split, list[Problem]] = {split: [] for split in get_args(Split)}
    judges: dict[str, Judge] = {}
    lines_by_form: dict[str, int] = {}
    lines_by_id: dict[str, int] = {}
    title = name or path.stem
    for number, row in _rows(content, path):
        where = f"{path}, line {number}"
        if row and not lines_by_id and not row.keys() - set(DEFAULTS):
            defaults |= row
            continue
        _check_fields(row, where)
        problem, split = _problem(row, defaults, title, number, len(lines_by_id), where)
        row_id = str(problem.meta["id"])
        for kind, key, lines in (("id", row_id, lines_by_id), ("question", problem.canonical, lines_by_form)):
            if key in lines:
                todo = "leave one of them out" if kind == "question" else "give each row its own"
                raise DataError(f"the {kind} of line {lines[key]} again", where=where, todo=todo)
            lines[key] = number
        judges[row_id] = _judge(row, defaults, where, problem.question)
        problems[split].append(_with_answer(problem, judges[row_id]))
    if not judges:
        raise DataError("no row in it", where=str(path), todo='write {"question": …, "answer": …}, a row a line')
    by_split = {split: tuple(rows) for split, rows in problems.items()}
    return UserTask(title, by_split, judges, hashlib.sha256(content).hexdigest())


def _read(path: Path) -> bytes:
    """The file's bytes, without the mark that some editors write at the front."""
    try:
        with open_regular_file(path) as stream:
            content = stream.read()
    except (OSError, TrustError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else "cannot be read as a file"
        raise DataError(what, where=str(path), todo="give the path of a JSONL file") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("UTF-16, not UTF-8", where=f"{path}, line 1", todo="save the file as UTF-8")
    return content.removeprefix(b"\xef\xbb\xbf")


def _rows(content: bytes, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line, row) of each line that is not blank.

    Raises:
        DataError: a line is not a JSON object in UTF-8.
    """
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").strip()
            if not text:
                continue
            row = json.loads(text, object_pairs_hook=reject_duplicate_keys, parse_constant=_refuse_constant)
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise DataError("half a character (a lone surrogate)", where=where, todo="write it whole") from None
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1} is not UTF-8"
            raise DataError(what, where=where, todo="save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            what = f"no JSON: {error.msg} at column {error.colno}"
            raise DataError(what, where=where, todo="write one JSON object a line") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"no JSON: {error}", where=where, todo="write one JSON object a line") from None
        if not isinstance(row, dict):
            raise DataError("not a JSON object", where=where, todo="write one JSON object a line")
        rows.append((number, row))
    return rows


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_fields(row: Mapping[str, Any], where: str) -> None:
    """No field is but nearly one of ours; other fields are the user's own, and not read."""
    for key in row.keys() - set(FIELDS):
        near = difflib.get_close_matches(key.casefold(), FIELDS, 1, 0.8)
        if near:
            raise DataError(f"unknown field {key!r}", where=where, todo=f"{near[0]!r} may be meant")


def _problem(
    row: Mapping[str, Any], defaults: Mapping[str, Any], title: str, number: int, index: int, where: str
) -> tuple[Problem, Split]:
    """The problem of a row, whose answer is still to be filled in, and its split."""
    messages = _messages(row, where)
    asked, choices = messages[-1]["content"], row.get("choices")
    if choices is not None:
        if not isinstance(choices, list) or not all(isinstance(item, str) and item.strip() for item in choices):
            raise DataError("choices is no list of texts", where=where, todo='write "choices": ["Rome", "Paris"]')
        lettered = [f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False)]
        ending = "\n".join(["", "", *lettered, "", "Answer with the letter of the right choice."])
        messages = [*messages[:-1], {"role": "user", "content": asked + ending}]
    row_id = row.get("id", number)
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int)) or not str(row_id).strip():
        raise DataError("id is no text and no whole number", where=where, todo="give each row its own id, or none")
    split = row.get("split", defaults.get("split", "test"))
    if split not in get_args(Split):
        raise DataError(f"unknown split {split!r}", where=where, todo=f"use {', '.join(get_args(Split))}")
    meta: dict[str, Any] = {"id": str(row_id), "line": number, "asked": asked}
    if len(messages) > 1:
        meta["messages"] = messages
    question = "\n\n".join(message["content"] for message in messages)
    return Problem(title, index, question, "", meta), split


def _messages(row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The conversation that asks, the question its last turn."""
    if ("question" in row) == ("messages" in row):
        what = "both question and messages" if "question" in row else "no question"
        raise DataError(what, where=where, todo='give "question" (a text) or "messages" (a list)')
    if "question" in row:
        if not isinstance(row["question"], str) or not row["question"].strip():
            raise DataError("question is no text, or blank", where=where, todo="write what is asked")
        return [{"role": "user", "content": row["question"]}]
    messages = row["messages"]
    todo = 'write [{"role": "user", "content": "…"}]'
    if not isinstance(messages, list) or not messages:
        raise DataError("messages is no list of turns", where=where, todo=todo)
    for turn in messages:
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"} or turn["role"] not in ROLES:
            raise DataError(f"a message is not a role ({', '.join(ROLES)}) and content", where=where, todo=todo)
        if not isinstance(turn["content"], str) or not turn["content"].strip():
            raise DataError("the content of a message is no text, or blank", where=where, todo=todo)
    if messages[-1]["role"] != "user":
        raise DataError("the last message is not the user's", where=where, todo="end with the question")
    return messages


def _with_answer(problem: Problem, judge: Judge) -> Problem:
    return Problem(problem.task, problem.index, problem.question, judge.expected, problem.meta, problem.canonical)


def _judge(row: Mapping[str, Any], defaults: Mapping[str, Any], where: str, question: str) -> Judge:
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
        return judging.JsonSchema(json.dumps(answer), where)
    if name == "regex":
        if not isinstance(answer, str):
            raise DataError("answer is no regular expression", todo='write "answer": "a|b"')
        return judging.Regex(answer, ignore_case, where)
    texts = judging.accepted_texts(answer)
    if texts is None:
        raise DataError("answer is no text, number or list of them", todo='write "answer": "7" or ["7", "seven"]')
    if name == "exact":
        return judging.Exact(tuple(texts), ignore_case)
    if name == "math":
        return judging.Formula(tuple(texts), where, question)
    rel_tol, extract = options.get("rel_tol", 0), options.get("extract", "only")
    if isinstance(rel_tol, bool) or not isinstance(rel_tol, (int, float)) or not 0 <= rel_tol < 1:
        raise DataError("rel_tol is no number from 0 to below 1", todo="0.01 lets an answer be off by one percent")
    if not math.isfinite(rel_tol) or extract not in get_args(Extract):
        raise DataError(f"unknown extract {extract!r}", todo=f"use {', '.join(get_args(Extract))}")
    return judging.Numeric(tuple(texts), float(rel_tol), extract)


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
