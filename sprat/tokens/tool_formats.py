"""How a family of models writes the calls of tools, as tables of strings.

A call is an opening tag, the name, the arguments as the text of a JSON object, and a closing tag, with fixed strings
between them: ``tool_render`` writes calls of the past by this table, ``tool_parser`` reads those that a model writes,
and the engine's grammar makes a model write one. Three families have a form of their own:

- *Hermes* (ChatML: Qwen2.5, Qwen3, Hermes): ``<tool_call>\\n{"name": "f", "arguments": {…}}\\n</tool_call>``. A ChatML
  model whose template knows no tools is told of them in the same words.
- *DeepSeek*: V3 and R1 name the kind of a call and put its arguments into a fence; V3.1 writes the bare object.
- *Llama 3*: the answer is nothing but ``{"name": "f", "parameters": {…}}``. Nothing says that a call begins, so an
  answer may be read as one only where a call was asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

JSON_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.){0,256}")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


@dataclass(frozen=True)
class ToolFormat:
    """The calls of one family.

    Attributes:
        calls: around all calls of an answer.
        call: around each; empty where nothing marks one.
        separator: between two calls.
        body: before the name, between it and the arguments, and behind these.
        head: what a model may write before the arguments, in group ``name`` the name (of a JSON body, in its quotes).
        parallel: whether models of this family were taught to call several at once.
    """

    name: str
    calls: tuple[str, str]
    call: tuple[str, str]
    separator: str
    body: tuple[str, str, str]
    head: re.Pattern[str]
    parallel: bool = True

    @property
    def has_tags(self) -> bool:
        """Whether a call can be told from content, so that a model may be left to choose."""
        return bool(self.call[0])

    @property
    def is_json(self) -> bool:
        """Whether name and arguments are members of one JSON object."""
        return self.head is JSON_HEAD

    def is_in(self, text: str, name: str) -> bool:
        """Whether ``text`` holds a call of ``name`` in this form, or, without one, its tags."""
        opening = self.call[0] + self.body[0] + name if name else self.call[0]
        return bool(opening) and opening in text

    def write(self, calls: list[tuple[str, str]]) -> str:
        """The text of calls, names and arguments, as a model writes them.

        >>> HERMES.write([("now", "{}")])
        '<tool_call>\\n{"name": "now", "arguments": {}}\\n</tool_call>'
        """
        (opening, closing), (before, between, after) = self.call, self.body
        texts = [f"{opening}{before}{name}{between}{arguments}{after}{closing}" for name, arguments in calls]
        return self.calls[0] + self.separator.join(texts) + self.calls[1]


HERMES = ToolFormat(
    name="hermes",
    calls=("", ""),
    call=("<tool_call>", "</tool_call>"),
    separator="\n",
    body=('\n{"name": "', '", "arguments": ', "}\n"),
    head=JSON_HEAD,
)
DEEPSEEK_V3_1 = ToolFormat(
    name="deepseek_v3_1",
    calls=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    call=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    separator="",
    body=("", "<｜tool▁sep｜>", ""),
    head=re.compile(r"(?P<name>[^<\s][^<\n]{0,255})<｜tool▁sep｜>\s*(?=\{)"),
)
DEEPSEEK_V3 = ToolFormat(
    name="deepseek_v3",
    calls=DEEPSEEK_V3_1.calls,
    call=DEEPSEEK_V3_1.call,
    separator="\n",
    body=("function<｜tool▁sep｜>", "\n```json\n", "\n```"),
    head=re.compile(r"\w{0,64}<｜tool▁sep｜>(?P<name>[^<`\n]{1,256})\n```(?:json)?\s*(?=\{)"),
)
LLAMA3 = ToolFormat(
    name="llama3",
    calls=("", ""),
    call=("", ""),
    separator="; ",
    body=('{"name": "', '", "parameters": ', "}"),
    head=JSON_HEAD,
    parallel=False,
)
# What stands around calls must be seen in an answer, also where a vocabulary calls it special.
TOOL_TAGS = frozenset((*HERMES.call, *DEEPSEEK_V3.calls, *DEEPSEEK_V3.call, "<｜tool▁sep｜>"))
