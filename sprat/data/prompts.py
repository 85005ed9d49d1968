"""Questions to put to a teacher, from the files and forms in which people have their data.

A record has one of ``messages``, ``conversations``, ``prompt``, ``question``, ``instruction`` (with ``input``), or
``text``; the first of these counts. What stands behind the user's last turn is left out, so that a file of
conversations is a file of questions too. Two questions that differ in nothing but blanks and Unicode's forms of a
character are one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.data.folder import ExclusionTally
from sprat.data.forms import rename_columns
from sprat.data.record import BadRecord
from sprat.data.records import read_records
from sprat.data.turns import Fault, check_order, drop_empty_system, join_parts, parse_text, parse_turns
from sprat.errors import DataError
from sprat.tokens.chat import Message
from sprat.trust.stage_facts import ExcludedText

NO_QUESTION, ASKED_BEFORE = "no question", "a question that an earlier record has"
_COLUMNS = ("messages", "conversations", "prompt", "question", "instruction", "text")

Prompt = tuple[Message, ...]


@dataclass(frozen=True)
class PromptSet:
    """Questions, each a conversation that ends with the user's turn, and the records that are left out."""

    prompts: tuple[Prompt, ...]
    skipped: tuple[ExcludedText, ...]


def read_prompts(path: str | Path, *, column_map: Mapping[str, str] | None = None) -> PromptSet:
    """The questions in the file or folder at ``path``; see the module's text.

    Args:
        column_map: our names of columns to theirs, as ``{"prompt": "Frage"}``.

    Raises:
        DataError: see ``records.read_records``; or no record has a question.
        MachineError: see ``records.read_records``.
    """
    tally, prompts = ExclusionTally(), dict[tuple[tuple[str, str], ...], Prompt]()
    first_bad: BadRecord | None = None
    for record in read_records(path, tally):
        if not isinstance(record, BadRecord):
            try:
                prompt = parse_prompt(rename_columns(record.values, column_map or {}))
                key = tuple((message.role, normalize(message.content)) for message in prompt)
                if key not in prompts:
                    prompts[key] = prompt
                else:
                    tally.add(f"records: {ASKED_BEFORE}", record.where.short)
                continue
            except Fault as fault:
                record = BadRecord(fault.reason, record.where, fault.detail)
            except RecursionError:
                record = BadRecord("values nested too deep", record.where)
        first_bad = first_bad or record
        tally.add(f"records: {record.reason}", record.where.short)
    if not prompts:
        todo = f"give records with one of {', '.join(_COLUMNS)}, or say which column it is: --map prompt=COLUMN"
        first = "" if first_bad is None else f", the first: {str(first_bad.error()).rstrip('.')}"
        raise DataError(f"no question in it{first}", where=str(path), todo=todo)
    return PromptSet(tuple(prompts.values()), tally.excluded())


def normalize(text: str) -> str:
    """``text`` by which duplicates are known: Unicode's NFKC, each run of blanks one.

    >>> normalize(" two\\n\\twords ")
    'two words'
    """
    return " ".join(unicodedata.normalize("NFKC", text).split())


def parse_prompt(values: Mapping[str, Any]) -> Prompt:
    """The question of a record.

    Raises:
        Fault: there is none.
    """
    column = next((name for name in _COLUMNS if values.get(name) is not None), None)
    if column is None:
        raise Fault(NO_QUESTION)
    value = values[column]
    if column in ("messages", "conversations") or isinstance(value, list):
        turns = parse_turns(value, column)
    else:
        text = parse_text(value, column)
        context = join_parts(values.get("input") or "", "input") if column == "instruction" else ""
        turns = (Message("user", f"{text}\n{context}" if context.strip() else text),)
    system = join_parts(values.get("system") or "", "system")
    turns = (Message("system", system), *turns) if system.strip() else turns
    last = max((place for place, turn in enumerate(turns) if turn.role == "user"), default=-1)
    if last < 0:
        raise Fault(NO_QUESTION, column)
    prompt = drop_empty_system(turns[: last + 1])
    check_order((*prompt, Message("assistant", "an answer")))
    if any(turn.role == "tool" or turn.tool_calls for turn in prompt):
        raise Fault("a conversation that calls tools")
    return prompt
