"""The forms in which people have their data, recognized by the columns of a file, and a record of each as an example.

Where a file fits several forms, the first of ``FORMS`` counts. A ``column_map`` renames columns before that, and a form
whose columns it names comes first. All values keep their blanks. What a record must hold beside its turns (see
``turns``):

- A prompt and a completion that are strings are the user's turn and the assistant's. (TRL joins such strings without a
  chat template; what shall be learned as it is belongs under ``text``.) Of a prompt that is a list of turns, the
  assistant's turns are not learned. A ``label`` (KTO) that is false leaves the record out.
- ``instruction`` and ``input``, where there is one, are joined by a line break, as in LLaMA-Factory; its ``history`` of
  question and answer pairs comes before them.
- A preference pair without a prompt, or with one that is a string beside answers that are whole conversations, has as
  its prompt the turns that both have in common (TRL's implicit prompt); of two strings it is their common beginning,
  or, where they are transcripts (``\\n\\nHuman: … \\n\\nAssistant: …``, as in Anthropic's HH-RLHF), the turns. Answers
  that repeat a prompt of turns are read without it.
- ``system`` is a system turn before the others; ``tools`` the functions that may be called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sprat.data.document import printable_label
from sprat.data.example import Conversation, Example, PreferencePair, Text
from sprat.data.record import BadRecord, Where
from sprat.data.turns import (
    REASONING_KEYS,
    Fault,
    assistant_message,
    check_learned,
    check_order,
    drop_empty_system,
    join_parts,
    parse_reasoning,
    parse_text,
    parse_tools,
    parse_turns,
)
from sprat.errors import DataError
from sprat.tokens.chat import Message

MISSING_COLUMN, LABELED_REJECTED = "a column that is missing", "a completion whose label is false"
SAME_ANSWERS, NO_COMMON_PROMPT = "chosen and rejected that are the same", "answers with no prompt in common"
TOO_DEEP, BAD_HISTORY = "values nested too deep", "a history that is no list of pairs"
_NAMED_COLUMNS = 30  # of a file, in an error
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")

Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """A form: the columns that it needs, those that it also reads, and how a record becomes an example."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Columns, Where], Example]

    @property
    def columns(self) -> tuple[str, ...]:
        """All that it reads."""
        return (*self.required, *self.optional)


def parse_example(form: Form, values: Columns, where: Where) -> Example | BadRecord:
    """A record as an example, or why it is none; see the module's text and that of ``turns``."""
    try:
        for column in form.required:
            if column not in values:
                raise Fault(MISSING_COLUMN, column)
        return form.parse(values, where)
    except Fault as fault:
        return BadRecord(fault.reason, where, fault.detail)
    except RecursionError:
        return BadRecord(TOO_DEEP, where)


def choose_form(columns: Collection[str], column_map: Mapping[str, str], where: Where) -> Form:
    """The form of a file with ``columns``; ``column_map`` says what ours are called there.

    Raises:
        DataError: the columns are those of no form, or ``column_map`` names one that is not there, or none of ours.
    """
    names = sorted(map(printable_label, columns))
    there = ", ".join(names[:_NAMED_COLUMNS]) + (", …" if len(names) > _NAMED_COLUMNS else "") or "none"
    for column, theirs in column_map.items():
        if all(column not in form.columns for form in FORMS):
            ours = ", ".join(sorted({name for form in FORMS for name in form.columns}))
            raise DataError(f"no column of a known form: {column!r}", where="map", todo=f"map one of {ours}")
        if theirs not in columns:
            todo = f"the columns there are: {there}"
            raise DataError(f"no column {theirs!r}, to be read as {column!r}", where=str(where), todo=todo)
    renamed = rename_columns(dict.fromkeys(columns), column_map).keys()
    candidates = [form for form in FORMS if renamed >= set(form.required)]
    if not candidates:
        known = "; ".join(f"{form.name}: {' + '.join(form.required)}" for form in FORMS)
        todo = f"map columns (prompt=THEIRS,completion=THEIRS) to those of a known form ({known})"
        raise DataError(f"columns of no known form: {there}", where=str(where), todo=todo)
    return max(candidates, key=lambda form: len(column_map.keys() & set(form.required)))


def rename_columns(values: Columns, column_map: Mapping[str, str]) -> dict[str, Any]:
    """A record under our names: ``column_map`` is from ours to theirs.

    >>> rename_columns({"question": "2+2", "answer": "4", "prompt": "-"}, {"prompt": "question"})
    {'answer': '4', 'prompt': '2+2'}
    """
    mapped = set(column_map.values()) | column_map.keys()
    renamed = {name: value for name, value in values.items() if name not in mapped}
    return renamed | {ours: values[theirs] for ours, theirs in column_map.items() if theirs in values}


def _conversation(
    prompt: tuple[Message, ...], completion: tuple[Message, ...], record: Columns, where: Where
) -> Example:
    """Where there is a prompt of its own, only ``completion`` is learned."""
    messages = (*_system(record), *map(_unlearned, prompt), *completion)
    check_order(messages)
    check_learned(messages)
    return Conversation(drop_empty_system(messages), where, parse_tools(record.get("tools"), "tools"))


def _parse_messages(record: Columns, where: Where) -> Example:
    return _conversation((), parse_turns(record["messages"], "messages"), record, where)


def _parse_sharegpt(record: Columns, where: Where) -> Example:
    return _conversation((), parse_turns(record["conversations"], "conversations"), record, where)


def _parse_completion(record: Columns, where: Where) -> Example:
    if str(record.get("label")).lower() == "false":
        raise Fault(LABELED_REJECTED)
    return _conversation(_prompt(record["prompt"]), _answer(record, "completion"), record, where)


def _parse_alpaca(record: Columns, where: Where) -> Example:
    instruction = parse_text(record["instruction"], "instruction")
    context = join_parts(record.get("input") or "", "input")
    question = f"{instruction}\n{context}" if context.strip() else instruction
    turns: list[Message] = []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Fault(BAD_HISTORY)
    for index, pair in enumerate(history):
        turns.append(Message("user", parse_text(pair[0], f"history[{index}][0]")))
        turns.append(assistant_message(parse_text(pair[1], f"history[{index}][1]"), None, f"history[{index}][1]"))
    return _conversation((), (*turns, Message("user", question), *_answer(record, "output")), record, where)


def _parse_question(record: Columns, where: Where) -> Example:
    question = Message("user", parse_text(record["question"], "question"))
    return _conversation((question,), _answer(record, "answer"), record, where)


def _parse_text(record: Columns, where: Where) -> Example:
    return Text(parse_text(record["text"], "text"), where)


def _parse_preference(record: Columns, where: Where) -> Example:
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        turns = _split_strings(chosen, rejected)
    else:
        turns = _split_turns(prompt, _turns(chosen, "chosen"), _turns(rejected, "rejected"))
    prompt_turns = (*_system(record), *map(_unlearned, turns[0]))
    for answer in turns[1:]:
        check_order((*prompt_turns, *answer))
    if turns[1] == turns[2]:
        raise Fault(SAME_ANSWERS)
    return PreferencePair(drop_empty_system(prompt_turns), *turns[1:], where, parse_tools(record.get("tools"), "tools"))


_Turns = tuple[Message, ...]


def _split_turns(prompt: Any, chosen: _Turns, rejected: _Turns) -> tuple[_Turns, _Turns, _Turns]:
    """Prompt and answers; each of ``chosen`` and ``rejected`` may hold the prompt."""
    if chosen == rejected:
        raise Fault(SAME_ANSWERS)
    if isinstance(prompt, list):
        given = _prompt(prompt)
        repeated = len(given) if chosen[: len(given)] == given == rejected[: len(given)] else 0
        return given, chosen[repeated:], rejected[repeated:]
    if prompt is not None and chosen[0].role == rejected[0].role == "assistant":
        return _prompt(prompt), chosen, rejected
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    while common and chosen[common - 1].role not in ("user", "tool"):
        common -= 1  # the prompt ends where the assistant is asked; TRL's may end with an answer
    if not common:
        raise Fault(NO_COMMON_PROMPT)
    return chosen[:common], chosen[common:], rejected[common:]


def _split_strings(chosen: str, rejected: str) -> tuple[_Turns, _Turns, _Turns]:
    if _TRANSCRIPT_TURN.match(chosen) and _TRANSCRIPT_TURN.match(rejected):
        return _split_turns(None, _transcript(chosen, "chosen"), _transcript(rejected, "rejected"))
    if chosen == rejected:
        raise Fault(SAME_ANSWERS)
    pairs = enumerate(zip(chosen, rejected, strict=False))
    common = next((index for index, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if common and chosen[common - 1] == " ":
        common -= 1  # as TRL: the blank belongs to the answer
    if not chosen[:common].strip():
        raise Fault(NO_COMMON_PROMPT)
    return _prompt(chosen[:common]), _turns(chosen[common:], "chosen"), _turns(rejected[common:], "rejected")


def _transcript(text: str, name: str) -> _Turns:
    _, *parts = _TRANSCRIPT_TURN.split(join_parts(text, name))
    roles = {"Human": "human", "Assistant": "assistant"}
    turns = [{"role": roles[role], "content": text.strip()} for role, text in zip(parts[::2], parts[1::2], strict=True)]
    return parse_turns(turns, name)


def _system(record: Columns) -> _Turns:
    system = join_parts(record.get("system") or "", "system")
    return (Message("system", system),) if system.strip() else ()


def _prompt(value: Any) -> _Turns:
    """A prompt: the user's turn, or turns."""
    if isinstance(value, list):
        return parse_turns(value, "prompt")
    return (Message("user", parse_text(value, "prompt")),)


def _turns(value: Any, name: str) -> _Turns:
    """An answer: the assistant's turn, or turns."""
    if isinstance(value, list):
        return parse_turns(value, name)
    return _string_answer(value, None, name)


def _answer(record: Columns, name: str) -> _Turns:
    """An answer whose reasoning may stand in a column of its own."""
    if isinstance(record[name], list):
        return parse_turns(record[name], name)
    return _string_answer(record[name], parse_reasoning(record, ""), name)


def _string_answer(value: Any, reasoning: str | None, name: str) -> _Turns:
    message = assistant_message(parse_text(value, name), reasoning, name)
    parse_text(message.content, f"{name}, behind its reasoning")
    return (message,)


def _unlearned(message: Message) -> Message:
    return replace(message, weight=0.0) if message.role == "assistant" else message


_COMMON = ("system", "tools")
FORMS = (
    Form("preference", ("chosen", "rejected"), ("prompt", *_COMMON), _parse_preference),
    Form("messages", ("messages",), _COMMON, _parse_messages),
    Form("sharegpt", ("conversations",), _COMMON, _parse_sharegpt),
    Form("prompt-completion", ("prompt", "completion"), ("label", *REASONING_KEYS, *_COMMON), _parse_completion),
    Form("alpaca", ("instruction", "output"), ("input", "history", *REASONING_KEYS, *_COMMON), _parse_alpaca),
    Form("question-answer", ("question", "answer"), (*REASONING_KEYS, *_COMMON), _parse_question),
    Form("text", ("text",), (), _parse_text),
)
