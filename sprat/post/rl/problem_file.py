"""A user's problems for RL: a file of questions whose answers a reward of the user's judges.

Every file that fine-tuning reads is read (JSONL, JSON, CSV, TSV, Parquet, folders of them), in the columns that people
of TRL, verl and OpenRLHF have: the question under ``prompt``, ``messages``, ``question``, ``instruction`` or
``problem`` (text or turns), what is right under ``answer``, ``solution``, ``ground_truth``, ``label``, ``target`` or
verl's ``reward_model.ground_truth``, in any form that the reward reads. All other columns go to the reward as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sprat.data.folder import ExclusionTally, warn_of_excluded
from sprat.data.forms import rename_columns
from sprat.data.prompts import ASKED_BEFORE, parse_prompt
from sprat.data.record import BadRecord
from sprat.data.records import read_records
from sprat.data.turns import Fault
from sprat.errors import DataError
from sprat.files.json import canonical_json, to_json_value
from sprat.tasks import Problem, Split
from sprat.tokens.chat import Message

QUESTION_COLUMNS = ("prompt", "messages", "conversations", "question", "instruction", "problem", "text")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "label", "target", "expected_answer", "reward_model")
_HELD_OUT = {"test", "dev", "validation", "valid", "val", "eval"}


@dataclass(frozen=True)
class ProblemFile:
    """The problems of one file; a ``Task`` that leaves judging to the run's reward.

    ``Problem.meta`` holds ``id``, ``row`` (the columns), ``answer_data`` (what is right, as it stands there) and, for
    conversations, ``messages``.
    """

    name: str
    problems: tuple[Problem, ...]
    held_out: tuple[Problem, ...]  # those whose row says so, in a column ``split``
    skipped: tuple[dict[str, Any], ...] = ()

    def problem(self, split: Split, index: int) -> Problem:
        """Problem ``index``, around and around."""
        problems = self.problems if split == "train" or not self.held_out else self.held_out
        return problems[index % len(problems)]

    def score(self, problem: Problem, answer: str | None) -> float:
        """Nobody but the reward knows.

        Raises:
            DataError: always.
        """
        raise DataError("a file of problems has no judge of its own", where=self.name, todo="give a reward")

    def chain_of_thought(self, problem: Problem) -> str:
        """There is none.

        Raises:
            DataError: always.
        """
        raise DataError("a file of problems has no chains of thought", where=self.name, todo="train on another")


def read_problems(path: str | Path, column_map: Mapping[str, str] | None = None) -> ProblemFile:
    """The problems in the file or folder at ``path``; a record without a question is left out and counted.

    Args:
        column_map: our names of columns to theirs: ``question`` (or ``prompt``), ``answer``, ``id``.

    Raises:
        DataError: see ``data.records.read_records``; no record has a question, or ``column_map`` names a column that no
            record has.
    """
    renames, path = _checked(column_map or {}), Path(path)
    tally, by_form, held_out = ExclusionTally(), dict[str, Problem](), set[str]()
    first_bad: BadRecord | None = None
    columns = set[str]()
    for record in read_records(path, tally):
        if not isinstance(record, BadRecord):
            columns |= record.values.keys()
            try:
                problem, split = _problem(record.values, renames, path.stem, len(by_form))
                if problem.canonical in by_form:
                    tally.add(f"records: {ASKED_BEFORE}", record.where.short)
                else:
                    by_form[problem.canonical] = problem
                    held_out |= {problem.canonical} if split in _HELD_OUT else set()
                continue
            except Fault as fault:
                record = BadRecord(fault.reason, record.where, fault.detail)
            except RecursionError:
                record = BadRecord("values nested too deep", record.where)
        first_bad = first_bad or record
        tally.add(f"records: {record.reason}", record.where.short)
    for ours, theirs in renames.items():
        if theirs not in columns:
            todo = f"the columns there are: {', '.join(sorted(columns)[:30]) or 'none'}"
            raise DataError(f"no column {theirs!r}, to be read as {ours!r}", where=str(path), todo=todo)
    train = tuple(problem for form, problem in by_form.items() if form not in held_out)
    if not train:
        todo = f"give records with one of {', '.join(QUESTION_COLUMNS)}, or say which column it is: --map question=COL"
        first = "" if first_bad is None else f", the first: {str(first_bad.error()).rstrip('.')}"
        raise DataError(f"no question to train on{first}", where=str(path), todo=todo)
    warn_of_excluded(tally.excluded(), path)
    others = tuple(problem for form, problem in by_form.items() if form in held_out)
    return ProblemFile(path.stem, train, others, tuple(asdict(each) for each in tally.excluded()))


def _checked(column_map: Mapping[str, str]) -> dict[str, str]:
    """``column_map`` under our names. Raises: DataError: it renames what is not read."""
    renames = {"question" if ours == "prompt" else ours: theirs for ours, theirs in column_map.items()}
    if unknown := sorted(renames.keys() - {"question", "answer", "id", "split", "system"}):
        raise DataError(f"no column of a problem: {unknown[0]!r}", where="map", todo="map question, answer, id, split")
    return renames


def _problem(values: Mapping[str, Any], renames: Mapping[str, str], title: str, index: int) -> tuple[Problem, str]:
    """The problem of a record, and the split that it says.

    Raises:
        Fault: it has no question.
    """
    row = rename_columns(values, renames)
    asked = {name: value for name, value in row.items() if "question" not in renames or name not in QUESTION_COLUMNS}
    if "question" in renames:
        asked["question"] = row.get("question")
    elif asked.get("problem") is not None and not any(asked.get(name) is not None for name in QUESTION_COLUMNS[:5]):
        asked["question"] = asked["problem"]
    turns = parse_prompt(asked)
    answer = _answer(row, renames)
    meta: dict[str, Any] = {"id": _row_id(row.get("id"), index), "row": to_json_value(values), "answer_data": answer}
    if len(turns) > 1:
        meta["messages"] = [{"role": turn.role, "content": turn.content} for turn in turns]
    extra = row.get("extra_info")
    split = row.get("split") or (extra.get("split") if isinstance(extra, Mapping) else "")
    text = answer if isinstance(answer, str) else "" if answer is None else canonical_json(answer)
    return Problem(title, index, _joined(turns), text, meta), str(split).lower()


def _row_id(value: Any, index: int) -> str:
    """What a row is known by, as text that the ledger can hold; its place where it says nothing."""
    text = "" if value is None else str(value).strip()
    return text.encode("utf-8", "replace").decode() or str(index)


def _joined(turns: Sequence[Message]) -> str:
    """A conversation as one text."""
    return "\n\n".join(turn.content for turn in turns)


def _answer(row: Mapping[str, Any], renames: Mapping[str, str]) -> Any:
    """What the row says is right, as a JSON value; None where it says nothing."""
    if "answer" in renames:
        return to_json_value(row.get("answer"))
    for name in ANSWER_COLUMNS:
        value = row.get(name)
        if name == "reward_model":
            value = value.get("ground_truth") if isinstance(value, Mapping) else None
        if value is not None:
            return to_json_value(value)
    return None
