"""The user's own examples: conversations, preference pairs or plain texts from files as people have them.

``records`` reads the rows, ``forms`` recognizes what they are by their columns, ``turns`` has the rules of turns. One
rule decides about whatever is wrong with a record (it cannot be read, it breaks a rule, an earlier one has its id or
says the same): with ``on_bad="skip"`` it is left out, counted by reason, with the first places of each; with
``"refuse"`` the first one is an error. If no record is good, it is an error in either case.

- The form is that of the columns of a file's first record; columns of no known form are an error at once. A later
  record that lacks a column of it is bad. Files of a folder may have different forms, but all of them give
  conversations, or all preference pairs, or all texts.
- Two records of one file with the same ``id`` are one record too many, and so are two of all files that say the same
  (``content_key``); the first one stays.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sprat.data.example import Example, ExampleT, content_key
from sprat.data.folder import ExclusionTally
from sprat.data.forms import TOO_DEEP, Form, choose_form, parse_example, rename_columns
from sprat.data.record import BadRecord, Record
from sprat.data.records import MAX_RECORD_BYTES, read_records
from sprat.errors import DataError
from sprat.trust.stage_facts import ExcludedText

DUPLICATE, DUPLICATE_ID = "what an earlier record says", "an id that an earlier record has"


@dataclass(frozen=True)
class ExampleSet:
    """Examples of one kind.

    Attributes:
        path: the file or folder that they come from.
        examples: in the order of files and lines.
        forms: those of the files, each once; see ``forms.FORMS``.
        skipped: the records and files that are left out, by reason, with the first places as file:line:column.
        ignored_columns: those that no form reads, sorted.
    """

    path: str
    examples: tuple[Example, ...]
    forms: tuple[str, ...]
    skipped: tuple[ExcludedText, ...]
    ignored_columns: tuple[str, ...]

    def of_kind(self, kind: type[ExampleT]) -> tuple[ExampleT, ...]:
        """The examples, all of which are of ``kind``.

        Raises:
            DataError: they are of another.
        """
        examples = tuple(example for example in self.examples if isinstance(example, kind))
        if len(examples) != len(self.examples):
            what = f"{_kind(self.examples[0])} where {_KINDS[kind.__name__]} are wanted"
            raise DataError(what, where=self.path, todo=f"the form is {', '.join(self.forms)}; give another file")
        return examples


_KINDS = {"Conversation": "conversations", "PreferencePair": "preference pairs", "Text": "plain texts"}


def read_examples(
    path: str | Path,
    *,
    column_map: Mapping[str, str] | None = None,
    on_bad: Literal["skip", "refuse"] = "skip",
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> ExampleSet:
    """The examples of the file or folder at ``path``; see the module's text.

    Args:
        column_map: our names of columns to theirs, as ``{"prompt": "question"}``.
        on_bad: whether a bad record is left out and counted, or an error.
        max_record_bytes: see ``records.read_records``.

    Raises:
        DataError: see ``records.read_records``; columns of no known form; different kinds of examples; a bad record,
            with ``on_bad="refuse"``; no record, or no good one.
        MachineError: see ``records.read_records``.
    """
    if on_bad not in ("skip", "refuse"):
        raise DataError(f"no way to treat bad records: {on_bad!r}", where="on_bad", todo="say skip or refuse")
    tally, examples, columns = ExclusionTally(), list[Example](), set[str]()
    forms: dict[str, Form] = {}  # by file
    ids, keys = set[tuple[str, str]](), set[bytes]()
    first_bad: BadRecord | None = None
    for record in read_records(path, tally, max_record_bytes=max_record_bytes):
        example: Example | BadRecord
        if isinstance(record, BadRecord):
            example = record
        else:
            if record.where.file not in forms:
                forms[record.where.file] = choose_form(record.values, column_map or {}, record.where)
            values = rename_columns(record.values, column_map or {})
            columns |= values.keys()
            example = parse_example(forms[record.where.file], values, record.where)
            if not isinstance(example, BadRecord):
                example = _as_duplicate(record, example, ids, keys) or example
        if isinstance(example, BadRecord):
            if on_bad == "refuse":
                raise example.error()
            first_bad = first_bad or example
            tally.add(f"records: {example.reason}", example.where.short)
            continue
        if examples and type(example) is not type(examples[0]):
            what = f"{_kind(examples[0])} ({examples[0].where.file}) and {_kind(example)} ({example.where.file})"
            raise DataError(f"{what} in one folder", where=str(path), todo="put them into folders of their own")
        examples.append(example)
    if first_bad is not None and not examples:
        raise DataError(f"no good record: {tally}", where=str(path), todo=f"the first: {first_bad.error()}".rstrip("."))
    if not examples:
        raise DataError("no records", where=str(path), todo="give a file that has some")
    known = {column for form in forms.values() for column in form.columns} | {"id"}
    names = tuple(dict.fromkeys(form.name for form in forms.values()))
    return ExampleSet(str(path), tuple(examples), names, tally.excluded(), tuple(sorted(columns - known)))


def _as_duplicate(record: Record, example: Example, ids: set[tuple[str, str]], keys: set[bytes]) -> BadRecord | None:
    """What is wrong with an example that was there before; else it is noted."""
    identity = record.values.get("id")
    try:
        key, id_text = content_key(example), json.dumps(identity, sort_keys=True, default=str)
    except RecursionError:
        return BadRecord(TOO_DEEP, record.where)
    file_id = (record.where.file, id_text)
    if key in keys:
        return BadRecord(DUPLICATE, record.where)
    if identity is not None and file_id in ids:
        return BadRecord(DUPLICATE_ID, record.where, id_text[:40])
    keys.add(key)
    if identity is not None:
        ids.add(file_id)
    return None


def _kind(example: Example) -> str:
    return _KINDS[type(example).__name__]


def split_by_hash(
    examples: Sequence[ExampleT], fraction: float, seed: int
) -> tuple[tuple[ExampleT, ...], tuple[ExampleT, ...]]:
    """Part ``examples`` into training and validation by a hash of what each says, each side in its old order.

    Neither order nor file matters, what says the same is on the same side, and an example that is added moves no other.
    Only where a side would be empty and there are two different examples, the one nearest to the border moves.

    Args:
        fraction: of the examples that are for validation, about; between 0 and 1.
        seed: another one gives another split.

    Raises:
        DataError: ``fraction`` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise DataError(f"a fraction of {fraction}", where="fraction", todo="give a number between 0 and 1")
    hashes = [hashlib.sha256(f"{seed}:".encode() + content_key(example)).digest() for example in examples]
    border = int(fraction * 2**64).to_bytes(8, "big")
    different = sorted(set(hashes))
    count = sum(each[:8] < border for each in different)
    count = min(max(count, 1), len(different) - 1)  # of the different ones, those on the side of validation
    last = different[count - 1] if count > 0 else b""
    sides = [(example, each <= last) for example, each in zip(examples, hashes, strict=True)]
    train = tuple(example for example, is_validation in sides if not is_validation)
    return train, tuple(example for example, is_validation in sides if is_validation)


def parse_column_map(text: str) -> dict[str, str]:
    """Our columns and theirs, as an option of the command line has them; their names may have commas.

    >>> parse_column_map("prompt=question, completion=answer"), parse_column_map("prompt=Frage, lang")
    ({'prompt': 'question', 'completion': 'answer'}, {'prompt': 'Frage, lang'})

    Raises:
        DataError: a part is no pair, or one of ours stands twice.
    """
    result: dict[str, str] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", text):
        ours, equals, theirs = (word.strip() for word in part.partition("="))
        if not equals or not ours or not theirs or ours in result:
            raise DataError(
                f"no column map: {part.strip()!r}", where="map", todo="write prompt=question,completion=answer"
            )
        result[ours] = theirs
    return result
