"""A task of the user's: a JSONL file with a question, an answer and a judge in each row.

Every row is checked before anything runs, and a row that does not hold is one sentence with its line. All rows are
test problems unless their ``split`` says otherwise. docs/evaluate.md tells the format.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sprat.errors import DataError, TrustError
from sprat.files.json import reject_duplicate_keys
from sprat.files.regular_file import open_regular_file
from sprat.tasks.base import Problem, Split
from sprat.tasks.judge_rows import JUDGES as JUDGES
from sprat.tasks.judge_rows import row_judge
from sprat.tasks.judges import LETTERS, Judge, verdict

DEFAULTS = ("judge", "rel_tol", "extract", "ignore_case", "split")  # what a first line without a question may say
FIELDS = ("id", "question", "messages", "choices", "answer", *DEFAULTS)
ROLES = ("system", "user", "assistant")


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
        return self.verdict(problem, answer) or 0.0

    def verdict(self, problem: Problem, answer: str | None) -> float | None:
        """As ``score``; None where the judge could not find out: training leaves such an answer out."""
        right = False if answer is None else verdict(self.judges[str(problem.meta["id"])], answer)
        return None if right is None else float(right)

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
        judges[row_id] = row_judge(row, defaults, where, problem.question)
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
