"""From a chat template to a format: what the template writes on a few probes, read off and checked.

The template is rendered by ``chat_template_worker`` in a sandboxed process. The probes are conversations whose texts
are markers, so what stands between two markers is the template's own: the beginning, the segments between the roles,
the generation prompt with thinking unsaid, asked for, and forbidden. Further probes show what becomes of blanks around
a text and of reasoning that stands in an answer of the past. Then ``chat_formats.render_parts`` must say on every probe
what the template said; if it does not, the format is not taken, and a warning names the first difference.

Whether a model thinks is no matter of its tokens, and a format is no skill: SmolLM2 and Qwen3 share ChatML. The
template says it: a model that thinks has one that writes, or takes out, ``<think>`` or ``</think>``.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sprat.errors import DataError
from sprat.tokens.chat_formats import ChatFormat, fill_dates, render_parts

log = logging.getLogger(__name__)
TIMEOUT_SECONDS = 20.0  # of the whole rendering; its CPU time is bounded by itself

Turns = tuple[tuple[str, str], ...]
_MARKERS = {name: f"Mark{name}Kram" for name in ("S", "U1", "A1", "U2", "A2", "U3")}
_ROLES = {"S": "system", "U": "user", "A": "assistant"}


def _turns(names: str, around: str = "{}") -> Turns:
    """A conversation of markers.

    >>> _turns("S U1")
    (('system', 'MarkSKram'), ('user', 'MarkU1Kram'))
    """
    return tuple((_ROLES[name[0]], around.format(_MARKERS[name])) for name in names.split())


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


_PROMPTLESS_PROBES = ("a question, nothing opened", "an answer, nothing opened")


class _TemplateMismatch(Exception):
    """The template writes what no format can say."""


class _ProbeTexts(dict[str, str | None]):
    """What the template wrote, by probe; None where it refused."""

    def after(self, probe: str, marker: str) -> str:
        """What stands behind a marker of a probe; nothing where the template refused."""
        return (self[probe] or "").rpartition(_MARKERS[marker])[2]

    def segments(self, probe: str) -> list[str]:
        """What stands before, between and behind the markers of a probe, in the order of its turns."""
        text = self[probe]
        if text is None:
            raise _TemplateMismatch(f"the template refuses {probe}")
        result = []
        for _, marker in PROBES[probe][0]:
            before, match, text = text.partition(marker)
            if not match or marker in text:
                raise _TemplateMismatch(f"of {probe} the template does not write each text once and in order")
            result.append(before)
        return [*result, text]


def format_from_template(base: ChatFormat, template: str, tokens: Mapping[str, str]) -> ChatFormat:
    """The format that ``template`` writes, with the special tokens of ``base``; if none does, ``base`` and a warning.

    Args:
        tokens: the special tokens that the template may name, by name, as in transformers' ``special_tokens_map``.
    """
    texts, reason = _render_probes(template, tuple(sorted(tokens.items())))
    try:
        if texts is None:
            raise _TemplateMismatch(f"it cannot be rendered: {reason}")
        chat_format = _derive_format(base, template, tokens.get("eos_token", ""), texts)
        _compare(chat_format, texts)
    except _TemplateMismatch as mismatch:
        log.warning("the chat template is not followed (%s); the format %r is used instead", mismatch, base.name)
        return replace(base if _has_thinking(base, template) else _without_thinking(base), mismatch=str(mismatch))
    return chat_format


def run_worker(
    template: str, tokens: Mapping[str, str], probes: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, str]], str]:
    """What the sandboxed process answers (``chat_template_worker.render``); nothing, and why, where it died."""
    request = json.dumps({"template": template, "tokens": tokens, "probes": probes})
    command = [sys.executable, "-I", str(Path(__file__).with_name("chat_template_worker.py"))]
    options: dict[str, Any] = {"capture_output": True, "timeout": TIMEOUT_SECONDS, "env": {"PATH": os.defpath}}
    try:
        process = subprocess.run(command, input=request.encode(), check=False, **options)
        answers: list[dict[str, str]] = json.loads(process.stdout) if process.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return [], type(error).__name__
    if len(answers) == len(probes):
        return answers, ""
    lines = process.stderr.decode("utf-8", "replace").strip().splitlines()
    return [], lines[-1] if lines else "its process died"


@lru_cache(maxsize=16)
def _render_probes(template: str, tokens: tuple[tuple[str, str], ...]) -> tuple[_ProbeTexts | None, str]:
    """What the template writes on each probe; None with the reason where it could not be asked."""
    probes = []
    for name, (turns, thinking) in PROBES.items():
        rows = [{"role": role, "content": content} for role, content in turns]
        flags = {} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}
        probes.append({"messages": rows, "add_generation_prompt": name not in _PROMPTLESS_PROBES, **flags})
    answers, reason = run_worker(template, dict(tokens), probes)
    if all("error" in answer for answer in answers):
        return None, reason or answers[0]["error"]
    return _ProbeTexts({name: answer.get("text") for name, answer in zip(PROBES, answers, strict=True)}), ""


def _derive_format(base: ChatFormat, template: str, eos: str, texts: _ProbeTexts) -> ChatFormat:
    """The table of strings that the probes show.

    Raises:
        _TemplateMismatch: they show no such table.
    """
    first, ending = texts.segments("one question")
    _, user_to_assistant, assistant_to_user, _ = texts.segments("two questions")
    before, after = _user_wrapping(texts, eos, user_to_assistant, assistant_to_user, ending)
    chat_format = replace(
        base,
        name=base.name if base.marker_tokens else "template",
        first_user_prefix=first,
        user=(before, after),
        assistant=(user_to_assistant.removeprefix(after), assistant_to_user.removesuffix(before)),
        generation_prompt=ending.removeprefix(after),
        system=None,
        system_in_last_user=False,
        strict_alternation=texts["two questions in a row"] is None,
        strip_rules=(),
        past_reasoning="",
    )
    chat_format = _with_system(chat_format, texts)
    chat_format = _with_thinking(chat_format, template, texts, after)
    strip_rules, past_reasoning = _find_strip_rules(chat_format, texts), _find_past_reasoning(texts)
    return replace(chat_format, strip_rules=strip_rules, past_reasoning=past_reasoning)


def _user_wrapping(
    texts: _ProbeTexts, eos: str, user_to_assistant: str, assistant_to_user: str, ending: str
) -> tuple[str, str]:
    """What opens a later question and what closes one, told apart from what closes and opens an answer.

    Args:
        user_to_assistant, assistant_to_user: what stands between question and answer, answer and question.
        ending: what stands at the end.
    """
    row = texts["two questions in a row"]
    between = None if row is None else texts.segments("two questions in a row")[1]
    user_end, assistant_end = map(texts.after, _PROMPTLESS_PROBES, ("U1", "A1"))
    shared = os.path.commonprefix([user_to_assistant, ending] + ([] if between is None else [between]))
    for after in (user_end, user_end.removesuffix(eos), shared):
        if not (user_to_assistant.startswith(after) and ending.startswith(after)):
            continue
        ends = (assistant_end, assistant_end.removesuffix(eos))
        prefixes = [assistant_to_user.removeprefix(end) for end in ends if assistant_to_user.startswith(end)]
        if between is not None:
            prefixes = [between.removeprefix(after)] if between.startswith(after) else []
        for before in prefixes:
            if assistant_to_user.endswith(before):
                return before, after
    raise _TemplateMismatch("the turns cannot be told apart")


def _with_system(chat_format: ChatFormat, texts: _ProbeTexts) -> ChatFormat:
    """``chat_format`` with the place of its system message: before the first question, or inside the last one."""
    text = texts["a system message, two questions"]
    if text is None or _MARKERS["S"] not in text:
        return chat_format
    if text.index(_MARKERS["S"]) < text.index(_MARKERS["U1"]):
        before, following, _ = texts.segments("a system message")
        return replace(chat_format, system=(before, following))
    start, _, rest = text.partition(_MARKERS["S"])
    prefix = start.rpartition(_MARKERS["A1"])[2]
    turn_start = chat_format.assistant[1] + chat_format.user[0]
    if not prefix.startswith(turn_start):
        raise _TemplateMismatch("the system message stands where no format has it")
    suffix = rest.partition(_MARKERS["U2"])[0]
    return replace(chat_format, system=(prefix.removeprefix(turn_start), suffix), system_in_last_user=True)


def _with_thinking(chat_format: ChatFormat, template: str, texts: _ProbeTexts, after: str) -> ChatFormat:
    """``chat_format`` with what opens an answer that thinks, and one that does not."""
    open_tag, close_tag = chat_format.think_tags
    generation_prompt = chat_format.generation_prompt
    if not _has_thinking(chat_format, template):
        return _without_thinking(chat_format)
    enabled = texts.after("thinking asked for", "U1").removeprefix(after)
    disabled = texts.after("thinking forbidden", "U1").removeprefix(after)
    opens_reasoning, closes_reasoning = generation_prompt.rstrip().endswith(open_tag), close_tag in generation_prompt
    no_line_breaks = enabled.endswith(open_tag)  # tags stand without line breaks
    think_delimiters = (open_tag, close_tag) if no_line_breaks else (f"{open_tag}\n", f"\n{close_tag}\n\n")
    default_thinking = True if opens_reasoning else False if closes_reasoning else None
    thinking_prompt: str | None = enabled
    if not enabled.rstrip().endswith(open_tag):
        thinking_prompt = None if closes_reasoning else generation_prompt + think_delimiters[0]
    if close_tag not in disabled:
        closing = think_delimiters[1] if opens_reasoning else "".join(think_delimiters)
        disabled = generation_prompt + ("" if closes_reasoning else closing)
    chat_format = replace(chat_format, thinking_prompt=thinking_prompt, no_thinking_prompt=disabled)
    return replace(chat_format, default_thinking=default_thinking, think_delimiters=think_delimiters)


def _has_thinking(chat_format: ChatFormat, template: str) -> bool:
    """Whether the model of this template thinks."""
    return any(tag in template for tag in chat_format.think_tags)


def _without_thinking(chat_format: ChatFormat) -> ChatFormat:
    """``chat_format`` for a model that does not think."""
    prompt = chat_format.generation_prompt
    return replace(chat_format, thinking_prompt=None, no_thinking_prompt=prompt, default_thinking=None)


def _find_strip_rules(chat_format: ChatFormat, texts: _ProbeTexts) -> tuple[tuple[str, str], ...]:
    """Which ends of which text lose their blanks."""
    left, right = _BLANK.split("{}")
    strip_ends: dict[str, str] = {}
    plain = ("blanks around texts", {"user": "U1", "assistant": "A1"})
    first = "U2" if chat_format.system_in_last_user else "U1"
    system = ("blanks around texts, a system message", {"system": "S", "first": first})
    for probe, roles in (plain, system):
        text = texts[probe]
        for role, name in roles.items() if text is not None else ():
            before, _, following = str(text).partition(_MARKERS[name])
            lines = before.endswith(left.lstrip("\n"))  # only line breaks went
            start = "" if before.endswith(left) else "n" if lines else "l"
            strip_ends[role] = start + ("" if following.startswith(right) else "r")
    return tuple((role, ends) for role, ends in strip_ends.items() if ends)


def _find_past_reasoning(texts: _ProbeTexts) -> str:
    """What becomes of an answer of the past that holds reasoning."""
    text = texts["reasoning in a past answer"]
    if text is None or "Thought" in text:
        return ""
    return "cut" if "\n\n" + _MARKERS["A1"] in text else "strip"


def _compare(chat_format: ChatFormat, texts: _ProbeTexts) -> None:
    """Raise _TemplateMismatch at the first probe on which ``chat_format`` does not say what the template said."""
    for probe, (turns, thinking) in PROBES.items():
        theirs = texts[probe]
        # we open and close reasoning where a template cannot
        if thinking is not None or probe in _PROMPTLESS_PROBES:
            continue
        try:
            parts = render_parts(chat_format, turns, thinking=None, add_generation_prompt=True)
            ours: str | None = "".join(text for text, _ in parts)
        except DataError:
            ours = None
        not_rendered = theirs is None or (turns[0][0] == "system" and turns[0][1] not in theirs)
        if ours is None and not_rendered:  # both refuse, or we refuse where the template drops the system message
            continue
        theirs = fill_dates(theirs or "")
        if ours != theirs:
            would = f"where we would write {_excerpt(ours, theirs)}"
            raise _TemplateMismatch(f"on {probe} it writes {_excerpt(theirs, ours)} {would}")


def _excerpt(text: str | None, other: str | None) -> str:
    """A few characters of ``text`` around the position where ``other`` begins to differ."""
    if text is None:
        return "nothing"
    position = len(os.path.commonprefix([text, other or ""]))
    return repr(text[max(0, position - 20) : position + 30])
