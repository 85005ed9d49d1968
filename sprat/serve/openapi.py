"""The bodies of requests, as /openapi.json describes them: the fields that are read, without what is ignored."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def _number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def _integer(low: int, high: int | None = None) -> Schema:
    return {"type": ["integer", "null"], "minimum": low} | ({} if high is None else {"maximum": high})


def _object(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "required": required, "properties": properties}


_MODEL: Schema = {"type": "string", "minLength": 1, "maxLength": 256}
_PART = _object(["type", "text"], type={"enum": ["text"]}, text=_TEXT)
_CONTENT: Schema = {"oneOf": [_TEXT, {"type": "array", "items": _PART}]}
_STOP: Schema = {"type": ["string", "array", "null"], "items": {"type": "string", "minLength": 1}, "maxItems": 64}
_SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _integer(-1, 1_000_000),
    "min_p": _number(0, 1),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "repetition_penalty": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 100},
    "logit_bias": {"type": ["object", "null"], "additionalProperties": {"type": "number"}},
    "seed": {"type": ["integer", "null"]},
    "stop": _STOP,
    "min_tokens": _integer(0),
    "ignore_eos": _FLAG,
    "n": _integer(1, 8),
    "stream": _FLAG,
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _FLAG}},
    "user": {"type": ["string", "null"]},
}
_FUNCTION = _object(["name"], name=_TEXT, description=_TEXT, parameters={"type": "object"}, strict=_FLAG)
_FUNCTION_TOOL = _object(["type", "function"], type={"enum": ["function"]}, function=_FUNCTION)
_FORM = _object(["type"], type={"enum": ["text"]})  # or a grammar, each protocol in its own form
_CUSTOM = _object(["name"], name=_TEXT, description=_TEXT, format=_FORM)
_CUSTOM_TOOL = _object(["type", "custom"], type={"enum": ["custom"]}, custom=_CUSTOM)
_MESSAGE = _object(
    ["role"],
    role={"enum": ["system", "developer", "user", "assistant", "tool"]},
    content=_CONTENT,
    reasoning_content={"type": ["string", "null"]},
    tool_call_id={"type": ["string", "null"]},
    prefix=_FLAG,
)
_CHAT = _object(
    ["model", "messages"],
    model=_MODEL,
    messages={"type": "array", "minItems": 1, "items": _MESSAGE},
    thinking=_object(["type"], type={"enum": ["enabled", "disabled", "adaptive"]}, budget_tokens=_integer(1)),
    reasoning_effort={"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]},
    max_tokens=_integer(1),
    max_completion_tokens=_integer(1),
    logprobs=_FLAG,
    top_logprobs=_integer(0, 20),
    response_format=_object(["type"], type={"enum": ["text", "json_object", "json_schema"]}),
    tools={"type": "array", "maxItems": 128, "items": {"oneOf": [_FUNCTION_TOOL, _CUSTOM_TOOL]}},
    tool_choice={"oneOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]},
    parallel_tool_calls=_FLAG,
    **_SAMPLING,
)
_COMPLETIONS = _object(
    ["model", "prompt"],
    model=_MODEL,
    prompt={"oneOf": [_TEXT, _IDS, {"type": "array", "items": _TEXT}, {"type": "array", "items": _IDS}]},
    suffix={"type": ["string", "null"]},
    echo=_FLAG,
    logprobs=_integer(0, 20),
    max_tokens=_integer(0),
    **_SAMPLING,
)
_RESPONSES = _object(
    ["model", "input"],
    model=_MODEL,
    input={"oneOf": [_TEXT, {"type": "array", "items": {"type": "object"}}]},
    instructions={"type": ["string", "null"]},
    max_output_tokens=_integer(1),
    reasoning={"type": ["object", "null"], "properties": {"effort": {"type": ["string", "null"]}}},
    text={"type": ["object", "null"]},
    tools={"type": ["array", "null"], "items": {"type": "object"}},
    stream=_FLAG,
    temperature=_number(0, 2),
    top_p=_number(0, 1),
)
_MESSAGES = _object(
    ["model", "messages", "max_tokens"],
    model=_MODEL,
    messages={
        "type": "array",
        "minItems": 1,
        "items": _object(["role", "content"], role={"enum": ["user", "assistant"]}, content=_CONTENT),
    },
    max_tokens={"type": "integer", "minimum": 1},
    system=_CONTENT,
    stop_sequences={"type": "array", "items": _TEXT},
    temperature=_number(0, 1),
    top_p=_number(0, 1),
    top_k=_integer(0),
    thinking=_object(["type"], type={"enum": ["enabled", "disabled", "adaptive"]}, budget_tokens=_integer(1)),
    tools={"type": "array", "items": _object(["name", "input_schema"], name=_TEXT, input_schema={"type": "object"})},
    tool_choice={"type": "object"},
    stream=_FLAG,
)
_COUNT = _object(["model", "messages"], **_MESSAGES["properties"])
_INPUT_TOKENS = _object(["input"], **_RESPONSES["properties"])
_EMBEDDINGS = _object(
    ["model", "input"],
    model=_MODEL,
    input={"oneOf": [_TEXT, _IDS, {"type": "array", "items": _TEXT, "minItems": 1}]},
    encoding_format={"enum": ["float", "base64"]},
    dimensions=_integer(1),
)
_SCHEMAS = {
    "/chat/completions": _CHAT,
    "/completions": _COMPLETIONS,
    "/responses": _RESPONSES,
    "/responses/input_tokens": _INPUT_TOKENS,
    "/messages": _MESSAGES,
    "/messages/count_tokens": _COUNT,
    "/embeddings": _EMBEDDINGS,
    "/tokenize": _object([], model=_MODEL, prompt=_TEXT, add_special_tokens=_FLAG),
    "/detokenize": _object(["tokens"], model=_MODEL, tokens=_IDS),
}


def request_schema(path: str) -> Schema:
    """The JSON schema of the body of ``POST path``, without its base."""
    return _SCHEMAS[path]
