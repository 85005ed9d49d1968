"""Seeded requests of every kind, each as a body of one protocol."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tests.serve.lively import FAMILIES, MODES

Json = dict[str, Any]
WORDS = [
    "what is",
    "3 + 4",
    "Paris",
    "in",
    "sunny",
    "東京",
    "Größe",
    "?",
    "\n",
    "say it",
    "</think>",
    "<tool_call>",
    "{",
]
STOPS = ["e", " ", "}", '"', "an", "18", "1", "<", "\n", "é", '"}', "]<", "Par", "say"]
CITY = {"type": "string", "maxLength": 8}
PARAMETERS: list[Json] = [
    {"type": "object", "properties": {"city": CITY, "unit": {"enum": ["C", "F"]}}, "required": ["city"]},
    {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "deep": {
        "type": "object", "properties": {"é": {"type": "boolean"}}, "required": ["é"], "additionalProperties": False}},
     "required": ["deep"], "additionalProperties": False},
    {"type": "object", "properties": {}, "additionalProperties": False},
]  # fmt: skip
FUNCTIONS = [
    {"name": name, "description": "", "parameters": parameters}
    for name, parameters in zip(("get_weather", "dig", "now"), PARAMETERS, strict=True)
]
FORM: Json = {
    "type": "object",
    "properties": {"city": CITY, "warm": {"type": "boolean"}, "list": {"type": "array", "items": CITY, "maxItems": 2}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Case:
    """A request: the protocol and its body, without ``model`` and ``stream``."""

    protocol: str
    family: str
    mode: str
    body: Json
    max_tokens: int
    stops: tuple[str, ...]
    n: int

    def ask(self, *, stream: bool, mode: str = "") -> Json:
        """The body to send, perhaps to a model that drafts in another way."""
        return {**self.body, "model": f"{self.family}-{mode or self.mode}", "stream": stream}


def case(number: int) -> Case:
    """The ``number``-th case, always the same."""
    draw = random.Random(number)
    protocol = ("chat", "messages", "responses", "chat", "completions")[number % 5]
    family, mode = draw.choice(list(FAMILIES)), draw.choice(MODES)
    max_tokens, n = draw.choice([1, 2, 3, 7, 20, 60, 150]), 1
    stops = tuple(draw.sample(STOPS, draw.choice([0, 0, 1, 3])))
    body: Json = {"temperature": draw.choice([0, 0.6, 1, 1.4]), "seed": draw.randrange(1000)}
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))
    if protocol in ("chat", "completions"):
        body["n"] = n = draw.choice([1, 1, 1, 2, 3])
        body |= {"stream_options": {"include_usage": True}} if draw.random() < 0.5 else {}
        body |= draw.choice(
            [{}, {}, {"frequency_penalty": 0.5}, {"min_tokens": min(2, max_tokens)}, {"ignore_eos": True}, {"top_k": 9}]
        )
    body |= {"stop_sequences" if protocol == "messages" else "stop": list(stops)} if stops else {}
    body |= _BODIES[protocol](draw, text)
    limit = "max_output_tokens" if protocol == "responses" else "max_tokens"
    return Case(protocol, family, mode, {**body, limit: max_tokens}, max_tokens, stops, n)


def _choice(draw: random.Random) -> tuple[str, str]:
    """How tools are chosen, "" for no tools; and the form of the content: "", ``object`` or ``schema``."""
    choice = draw.choice(["", "auto", "auto", "required", "named"])
    return choice, draw.choice(["", "", "object", "schema"]) if choice in ("", "auto") else ""


def _completions(draw: random.Random, text: str) -> Json:
    body: Json = {"prompt": text if draw.random() < 0.7 else [text, text[::-1]]}
    body |= draw.choice([{}, {}, {"logprobs": 0}, {"logprobs": 2}])
    return body | draw.choice([{}, {}, {"echo": True}])


def _chat(draw: random.Random, text: str) -> Json:
    body: Json = {"messages": [{"role": "user", "content": text}]}
    if draw.random() < 0.3:
        body["messages"].insert(0, {"role": "system", "content": "be brief"})
    body["thinking"] = {"type": draw.choice(["enabled", "disabled", "auto"])}
    if body["thinking"]["type"] == "enabled" and draw.random() < 0.5:
        body["thinking"]["budget_tokens"] = draw.choice([1, 5, 20])
    body |= draw.choice([{}, {}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}])
    choice, form = _choice(draw)
    if choice:
        functions = draw.sample(FUNCTIONS, draw.randint(1, 3))
        named = {"type": "function", "function": {"name": functions[0]["name"]}}
        body["tools"] = [{"type": "function", "function": function} for function in functions]
        body["tool_choice"] = named if choice == "named" else choice
        body["parallel_tool_calls"] = draw.random() < 0.7
    if form:
        schema = {"type": "json_schema", "json_schema": {"name": "form", "schema": FORM}}
        body["response_format"] = schema if form == "schema" else {"type": "json_object"}
    return body


def _responses(draw: random.Random, text: str) -> Json:
    body: Json = {"input": text, "reasoning": {"effort": draw.choice(["none", "high", None])}}
    if draw.random() < 0.3:
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": draw.choice([0, 2])}
    choice, form = _choice(draw)
    if choice:
        functions = draw.sample(FUNCTIONS, draw.randint(1, 3))
        named = {"type": "function", "name": functions[0]["name"]}
        body["tools"] = [{"type": "function", **function} for function in functions]
        body["tool_choice"] = named if choice == "named" else choice
        body["parallel_tool_calls"] = draw.random() < 0.7
    if form:
        schema = {"type": "json_schema", "name": "form", "schema": FORM}
        body["text"] = {"format": schema if form == "schema" else {"type": "json_object"}}
    return body


def _messages(draw: random.Random, text: str) -> Json:
    body: Json = {"messages": [{"role": "user", "content": text}]}
    body["thinking"] = {"type": draw.choice(["enabled", "disabled", "adaptive"]), "budget_tokens": 20}
    choice, form = _choice(draw)
    if choice:
        functions = draw.sample(FUNCTIONS, draw.randint(1, 3))
        names = {"named": {"type": "tool", "name": functions[0]["name"]}, "required": {"type": "any"}}
        body["tools"] = [{"name": each["name"], "input_schema": each["parameters"]} for each in functions]
        body["tool_choice"] = names.get(choice, {"type": "auto"})
    if form:
        body["output_config"] = {"format": {"type": "json_schema", "schema": FORM}}
    return body


_BODIES = {"chat": _chat, "completions": _completions, "responses": _responses, "messages": _messages}
