"""From a chat template to a format: what the template writes on a few probes, read off and checked.

The template is rendered by ``template_worker`` in a sandboxed process. The probes are conversations whose texts are
marks, so what stands between two marks is the template's own: the beginning, the joints between the roles, the opening
of the answer with thinking unsaid, asked for, and forbidden. Further probes show what becomes of blanks around a text
and of reasoning that stands in an answer of the past. Then ``formats.write`` must say on every probe what the template
said; if it does not, the format is not taken, and a warning names the first difference.

Whether a model thinks is no matter of its tokens, and a format is no skill: SmolLM2 and Qwen3 share ChatML. The
template says it: a model that thinks has one that writes, or takes out, ``<think>`` or ``</think>``.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from sprat.errors import DataError
from sprat.tokens.formats import Format, dated, write

log = logging.getLogger(__name__)
SECONDS = 20.0  # of the whole rendering; its CPU time is bounded by itself

Turns = tuple[tuple[str, str], ...]
_MARKS = {name: f"Mark{name}Kram" for name in ("S", "U1", "A1", "U2", "A2", "U3")}
_ROLES = {"S": "system", "U": "user", "A": "assistant"}


def _turns(names: str, around: str = "{}") -> Turns:
    """A conversation of marks.

    >>> _turns("S U1")
    (('system', 'MarkSKram'), ('user', 'MarkU1Kram'))
    """
    return tuple((_ROLES[name[0]], around.format(_MARKS[name])) for name in names.split())


_BLANK = "\n\n\n  {} \n"  # more line breaks than a template puts there itself
_THOUGHT = "Thought</think>\n\n{}"
# name → conversation and whether it shall think
PROBES: dict[str, tuple[Turns, bool | None]] = {
    "one question": (_turns("U1"), None),
    "two questions": (_turns("U1 A1 U2"), None),
    "three questions": (_turns("U1 A1 U2 A2 U3"), None),
    "a system message": (_turns("S U1"), None),
    "a system message, two questions": (_turns("S U1 A1 U2"), None),
    "a system message, three questions": (_turns("S U1 A1 U2 A2 U3"), None),
    "two questions in a row": (_turns("U1 U2"), None),
    "blanks around texts": (_turns("U1 A1 U2", _BLANK), None),
    "blanks around texts, a system message": (_turns("S U1 A1 U2", _BLANK), None),
    "reasoning in a past answer": (_turns("U1") + _turns("A1", _THOUGHT) + _turns("U2"), None),
    "a question, nothing opened": (_turns("U1"), None),
    "an answer, nothing opened": (_turns("U1 A1"), None),
    "thinking asked for": (_turns("U1"), True),
    "thinking forbidden": (_turns("U1"), False),
}


_CLOSED = ("a question, nothing opened", "an answer, nothing opened")


class _Unlike(Exception):
    """The template writes what no format can say."""


@dataclass(frozen=True)
class _Seen:
    """What the template wrote, by probe; None where it refused."""

    texts: dict[str, str | None]

    def joints(self, probe: str) -> list[str]:
        """What stands before, between and behind the marks of a probe, in the order of its turns."""
        text = self.texts[probe]
        if text is None:
            raise _Unlike(f"the template refuses {probe}")
        found = []
        for _, mark in PROBES[probe][0]:
            before, seen, text = text.partition(mark)
            if not seen or mark in text:
                raise _Unlike(f"of {probe} the template does not write each text once and in order")
            found.append(before)
        return [*found, text]


def fitted(base: Format, template: str, tokens: Mapping[str, str]) -> Format:
    """The format that ``template`` writes, with the special tokens of ``base``; if none does, ``base`` and a warning.

    Args:
        tokens: the special tokens that the template may name, by name, as in transformers' ``special_tokens_map``.
    """
    seen, why = _rendered(template, tuple(sorted(tokens.items())))
    try:
        if seen is None:
            raise _Unlike(f"it cannot be rendered: {why}")
        form = _derived(base, template, tokens.get("eos_token", ""), seen)
        _compare(form, seen)
    except _Unlike as unlike:
        log.warning("the chat template is not followed (%s); the format %r is used instead", unlike, base.name)
        return base if _thinks(base, template) else _thoughtless(base)
    return form


@lru_cache(maxsize=16)
def _rendered(template: str, tokens: tuple[tuple[str, str], ...]) -> tuple[_Seen | None, str]:
    """What the template writes on each probe; None with the reason where it could not be asked."""
    probes = []
    for name, (turns, thinking) in PROBES.items():
        rows = [{"role": role, "content": content} for role, content in turns]
        said = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        probes.append({"messages": rows, "add_generation_prompt": name not in _CLOSED, **said})
    job = json.dumps({"template": template, "tokens": dict(tokens), "probes": probes})
    command = [sys.executable, "-I", str(Path(__file__).with_name("template_worker.py"))]
    try:
        done = subprocess.run(
            command, input=job.encode(), capture_output=True, timeout=SECONDS, env={"PATH": os.defpath}, check=False
        )
        answers: list[dict[str, str]] = json.loads(done.stdout) if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return None, type(error).__name__
    if len(answers) != len(PROBES):
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return None, lines[-1] if lines else "its process died"
    if all("error" in answer for answer in answers):
        return None, answers[0]["error"]
    return _Seen({name: answer.get("text") for name, answer in zip(PROBES, answers, strict=True)}), ""


def _derived(base: Format, template: str, eos: str, seen: _Seen) -> Format:
    """The table of strings that the probes show.

    Raises:
        _Unlike: they show no such table.
    """
    first, ending = seen.joints("one question")
    _, asked, answered, _ = seen.joints("two questions")
    before, after = _around_question(seen, eos, asked, answered, ending)
    form = replace(
        base,
        name=base.name if base.required else "template",
        first=first,
        user=(before, after),
        assistant=(asked.removeprefix(after), answered.removesuffix(before)),
        opening=ending.removeprefix(after),
        system=None,
        system_last=False,
        alternates=seen.texts["two questions in a row"] is None,
        trims=(),
        sheds="",
    )
    form = _with_system(form, seen)
    form = _with_thinking(form, template, seen, after)
    return replace(form, trims=_trims(form, seen), sheds=_sheds(seen))


def _around_question(seen: _Seen, eos: str, asked: str, answered: str, ending: str) -> tuple[str, str]:
    """What opens a later question and what closes one, told apart from what closes and opens an answer.

    Args:
        asked, answered, ending: what stands between question and answer, answer and question, and at the end.
    """
    row = seen.texts["two questions in a row"]
    between = None if row is None else seen.joints("two questions in a row")[1]
    said, closed = (
        (seen.texts[probe] or "").rpartition(_MARKS[name])[2] for probe, name in zip(_CLOSED, ("U1", "A1"), strict=True)
    )
    shared = os.path.commonprefix([asked, ending] + ([] if between is None else [between]))
    for after in (said, said.removesuffix(eos), shared):
        if not (asked.startswith(after) and ending.startswith(after)):
            continue
        befores = [answered.removeprefix(end) for end in (closed, closed.removesuffix(eos)) if answered.startswith(end)]
        if between is not None:
            befores = [between.removeprefix(after)] if between.startswith(after) else []
        for before in befores:
            if answered.endswith(before):
                return before, after
    raise _Unlike("the turns cannot be told apart")


def _with_system(form: Format, seen: _Seen) -> Format:
    """``form`` with the place of its system message: before the first question, or inside the last one."""
    text = seen.texts["a system message, two questions"]
    if text is None or _MARKS["S"] not in text:
        return form
    if text.index(_MARKS["S"]) < text.index(_MARKS["U1"]):
        before, behind, _ = seen.joints("a system message")
        return replace(form, system=(before, behind))
    start, _, rest = text.partition(_MARKS["S"])
    lead = start.rpartition(_MARKS["A1"])[2]
    if not lead.startswith(form.assistant[1] + form.user[0]):
        raise _Unlike("the system message stands where no format has it")
    joint = rest.partition(_MARKS["U2"])[0]
    return replace(form, system=(lead.removeprefix(form.assistant[1] + form.user[0]), joint), system_last=True)


def _with_thinking(form: Format, template: str, seen: _Seen, after: str) -> Format:
    """``form`` with what opens an answer that thinks, and one that does not."""
    opened, closed = form.think_tokens
    auto = form.opening
    if not _thinks(form, template):
        return _thoughtless(form)
    asked, forbidden = (
        (seen.texts[probe] or "").rpartition(_MARKS["U1"])[2].removeprefix(after)
        for probe in ("thinking asked for", "thinking forbidden")
    )
    reasons, silent = auto.rstrip().endswith(opened), closed in auto
    tight = asked.endswith(opened)  # tags stand without line breaks
    think = (opened, closed) if tight else (f"{opened}\n", f"\n{closed}\n\n")
    habit = True if reasons else False if silent else None
    way: str | None = asked
    if not asked.rstrip().endswith(opened):
        way = None if silent else auto + think[0]
    if closed not in forbidden:
        forbidden = auto + ("" if silent else think[1] if reasons else "".join(think))
    return replace(form, thinking=way, direct=forbidden, habit=habit, think=think)


def _thinks(form: Format, template: str) -> bool:
    """Whether the model of this template thinks."""
    return any(tag in template for tag in form.think_tokens)


def _thoughtless(form: Format) -> Format:
    """``form`` for a model that does not think."""
    return replace(form, thinking=None, direct=form.opening, habit=None)


def _trims(form: Format, seen: _Seen) -> tuple[tuple[str, str], ...]:
    """Which ends of which text lose their blanks."""
    left, right = _BLANK.split("{}")
    found: dict[str, str] = {}
    plain = ("blanks around texts", {"user": "U1", "assistant": "A1"})
    system = ("blanks around texts, a system message", {"system": "S", "first": "U2" if form.system_last else "U1"})
    for probe, roles in (plain, system):
        text = seen.texts[probe]
        for role, name in roles.items() if text is not None else ():
            before, _, behind = str(text).partition(_MARKS[name])
            lines = before.endswith(left.lstrip("\n"))  # only line breaks went
            found[role] = ("" if before.endswith(left) else "n" if lines else "l") + (
                "" if behind.startswith(right) else "r"
            )
    return tuple((role, ends) for role, ends in found.items() if ends)


def _sheds(seen: _Seen) -> str:
    """What becomes of an answer of the past that holds reasoning."""
    text = seen.texts["reasoning in a past answer"]
    if text is None or "Thought" in text:
        return ""
    return "cut" if "\n\n" + _MARKS["A1"] in text else "strip"


def _compare(form: Format, seen: _Seen) -> None:
    """Raise _Unlike at the first probe on which ``form`` does not say what the template said."""
    for probe, (turns, thinking) in PROBES.items():
        theirs = seen.texts[probe]
        if thinking is not None or probe in _CLOSED:  # we open and close reasoning where a template cannot
            continue
        try:
            ours: str | None = "".join(text for text, _ in write(form, turns, thinking=None, generate=True))
        except DataError:
            ours = None
        unheard = theirs is None or (turns[0][0] == "system" and turns[0][1] not in theirs)
        if ours is None and unheard:  # both refuse, or we refuse where the template drops the system message
            continue
        theirs = dated(theirs or "")
        if ours != theirs:
            raise _Unlike(
                f"on {probe} it writes {_excerpt(theirs, ours)} where we would write {_excerpt(ours, theirs)}"
            )


def _excerpt(text: str | None, other: str | None) -> str:
    """A few characters of ``text`` around the place where ``other`` begins to differ."""
    if text is None:
        return "nothing"
    place = len(os.path.commonprefix([text, other or ""]))
    return repr(text[max(0, place - 20) : place + 30])
