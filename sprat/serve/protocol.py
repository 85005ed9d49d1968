"""What may be asked and what is answered: the chat protocol in the OpenAI/DeepSeek form.

Requests are validated strictly, because a silently ignored field is an answer to another question:
an unknown field, a wrong type or a feature that this server lacks is an HTTP 400 whose error object
names the field. What asks for nothing is accepted, since clients send it by habit:
``null`` in every field of OpenAI's that may be left out and, in the fields of what this server lacks, the values
that change nothing (``n: 1``, ``tools: []``, ``store: false``): see
``UnsupportedFields`` and ``UnsupportedMessageFields``.

Whether the model thinks is said in one of two ways, and not at all when the model shall decide:
DeepSeek's ``"thinking": {"type": "enabled" | "disabled"}``, or OpenAI's ``"reasoning_effort"``, of
which ``"none"`` means off and every other level on.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sprat.serve.errors import RequestError

if TYPE_CHECKING:
    from sprat.engine.sequence import Usage

MAX_MESSAGES = 256
MAX_STOP_STRINGS = 16
_PLAIN_TEXT_ONLY = (
    "this server answers in plain text; leave it out, or ask from Python, where "
    "sprat.Sampling(response=sprat.engine.Response.json(schema)) keeps an answer to a form"
)


class _Strict(BaseModel):
    """No unknown keys, no coercion of types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class TextPart(_Strict):
    """One part of a message that is written as a list."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: None = None


class UnsupportedMessageFields(_Strict):
    """OpenAI's fields of a turn, of what this server lacks, with the values that ask for nothing."""

    tool_calls: list[Any] | None = Field(None, max_length=0)
    tool_call_id: None = None
    function_call: None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, max_length=0)


class ChatMessage(UnsupportedMessageFields):
    """One turn. ``reasoning_content`` of past turns is accepted and not shown to the model again.

    ``developer`` is OpenAI's newer name of ``system``.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Thinking(_Strict):
    """DeepSeek's switch."""

    type: Literal["enabled", "disabled"]


class StreamOptions(_Strict):
    """``include_usage`` asks for one last chunk that carries the whole usage."""

    include_usage: bool | None = False
    include_obfuscation: Literal[False] | None = False


class ResponseFormat(_Strict):
    """Only plain text is offered."""

    type: Literal["text"]


class UnsupportedFields(_Strict):
    """OpenAI's fields of what this server lacks, with the values that ask for nothing."""

    n: Literal[1] | None = 1
    frequency_penalty: float | None = Field(0.0, ge=0, le=0)
    presence_penalty: float | None = Field(0.0, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    logprobs: Literal[False] | None = False
    top_logprobs: int | None = Field(None, ge=0, le=0)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = Field(None, max_length=0)
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    moderation: None = None
    web_search_options: None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory"] | None = None
    prompt_cache_options: dict[str, Any] | None = Field(None, max_length=0)
    verbosity: Literal["medium"] | None = None


class ChatRequest(UnsupportedFields):
    """The body of ``POST /v1/chat/completions``."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=0, le=1_000_000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stop_strings = [stop] if isinstance(stop, str) else stop or []
        if len(stop_strings) > MAX_STOP_STRINGS or not all(0 < len(text) <= 256 for text in stop_strings):
            raise ValueError(f"give at most {MAX_STOP_STRINGS} stop strings of 1 to 256 characters")
        return stop

    @field_validator("messages")
    @classmethod
    def _check_roles(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        for message in messages[1:]:
            if message.role in ("system", "developer"):
                raise ValueError(f"only the first message may have the role {message.role!r}")
        if messages[-1].role != "user":
            raise ValueError("the last message must have the role 'user'")
        if not messages[-1].text:
            raise ValueError("the last message is empty")
        return messages

    @model_validator(mode="after")
    def _check_switches(self) -> ChatRequest:
        if self.thinking is not None and self.reasoning_effort is not None:
            raise ValueError("give either 'thinking' or 'reasoning_effort', not both")
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' needs 'stream': true")
        return self

    @property
    def enable_thinking(self) -> bool | None:
        """True: think; False: answer at once; None: the model decides."""
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        if self.reasoning_effort is not None:
            return self.reasoning_effort != "none"
        return None

    @property
    def requested_max_tokens(self) -> int | None:
        """The most tokens the caller wants, thinking included; None when not said."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def field_names(self) -> dict[str, str]:
        """The names by which the caller knows what the engine may refuse."""
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {"max_tokens": limit, "thinking": "thinking" if self.reasoning_effort is None else "reasoning_effort"}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def parse_chat_request(body: bytes) -> ChatRequest:
    """Read a request body.

    Raises:
        RequestError: status 400; names the first field at fault.

    >>> parse_chat_request(b'{"model": "m", "messages": [{"role": "user", "content": "1 + 1"}], "temprature": 0}')
    Traceback (most recent call last):
    sprat.serve.errors.RequestError: unknown field 'temprature'; did you mean 'temperature'?
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # A field of several types reports one fault for each; the deepest knows best what was meant.
        deepest = max((f for f in faults if f["loc"][:1] == faults[0]["loc"][:1]), key=lambda f: len(f["loc"]))
        raise _validation_error(deepest["type"], deepest["loc"], deepest["msg"]) from None


def _validation_error(error_type: str, loc: tuple[int | str, ...], message: str) -> RequestError:
    """One validation fault as the error that the caller sees."""
    if error_type == "json_invalid":
        return RequestError(400, f"the body is not valid JSON: {message}", code="invalid_json")
    if error_type == "model_type" and not loc:
        return RequestError(400, "the body must be a JSON object", code="invalid_json")
    # Union branches add their type's name to the path ("content.str"): the caller only knows real fields.
    param = ".".join(str(part)[:64] for part in loc if part != "str" and "[" not in str(part))
    if "response_format" in loc[:1]:
        return RequestError(400, f"{param}: {_PLAIN_TEXT_ONLY}", param=param, code="not_offered")
    if {*loc[:1]} & UnsupportedFields.model_fields.keys() or {*loc[2:3]} & UnsupportedMessageFields.model_fields.keys():
        message = f"{param}: this server does not offer it; leave it out"
        return RequestError(400, message, param=param, code="not_offered")
    if error_type == "extra_forbidden":
        names = list(ChatRequest.model_fields) if len(loc) == 1 else []
        close_matches = difflib.get_close_matches(str(loc[-1]), names, n=1)
        advice = f"; did you mean {close_matches[0]!r}?" if close_matches else ""
        return RequestError(400, f"unknown field {param!r}{advice}", param=param, code="unknown_parameter")
    message = message.removeprefix("Value error, ")
    return RequestError(400, f"{param}: {message}" if param else message, param=param or None)


def usage_body(usage: Usage) -> dict[str, Any]:
    """The ``usage`` object; counts are tokens and ``hit + miss == prompt`` by construction."""
    hit = max(0, min(usage.cache_hit_tokens, usage.prompt_tokens))
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_cache_hit_tokens": hit,
        "prompt_cache_miss_tokens": usage.prompt_tokens - hit,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
