"""Requests as clients send them, each cut short to what is special about it, with what shall come of it.

Bodies of Claude Code 2.1, Codex 0.171, opencode 1.18, Cline 3.0, Continue 1.5, langchain-anthropic 1.7, LlamaIndex
0.14, pydantic-ai 2.68, openai-agents 0.24 and instructor 1.17 were read off their own wire; those of the others are
what their users report that they send.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages?beta=true"
NOTE = "left out, as this model reads text alone]"
EPHEMERAL: Json = {"type": "ephemeral"}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CITY: Json = {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
NO_ARGUMENTS: Json = {"type": "object", "properties": {}}
FUNCTION: Json = {"name": "weather", "description": "w", "parameters": CITY}
TOOL: Json = {"type": "function", "function": FUNCTION}
STRICT: Json = {"type": "function", "function": {**FUNCTION, "strict": True}}
NOW: Json = {"type": "function", "function": {"name": "now", "description": "n", "parameters": NO_ARGUMENTS}}
OWN: Json = {"name": "weather", "description": "w", "input_schema": CITY}
FLAT: Json = {"type": "function", **FUNCTION, "strict": False}
SEARCH: Json = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
LARK: Json = {"type": "custom", "name": "apply_patch", "description": "Edits.", "format": {
    "type": "grammar", "syntax": "lark", "definition": "start: begin_patch"}}  # fmt: skip
USE: Json = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}
CALL: Json = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
ITEM: Json = {"type": "function_call", "status": "completed", "id": "fc_1", "name": "weather",
              "arguments": '{"city": "Paris"}', "call_id": "c1"}  # fmt: skip


def user(text: str = "Hi") -> Json:
    """A turn of the user's."""
    return {"role": "user", "content": text}


@dataclass(frozen=True)
class Sent:
    """A request that a client sends.

    Attributes:
        client: what sends it, and what is special about it.
        body: without ``model``; a few tokens are asked for where it says nothing of that.
        status: that it is answered with.
        param: of a refusal, the path of the field.
        ignored: paths that are listed as ignored, among others.
        reads: a plain body of the same endpoint, of which the model reads just as much: the same number of tokens.
        calls: names of the tools that are called, where some are.
    """

    client: str
    path: str
    body: Json
    status: int = 200
    param: str = ""
    ignored: tuple[str, ...] = ()
    reads: Json | None = None
    calls: tuple[str, ...] = field(default=())


CLAUDE_CODE: Json = {
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.c7a; cc_entrypoint=sdk-cli;"},
        {"type": "text", "text": "You are an agent.", "cache_control": EPHEMERAL},
    ],
    "metadata": {"user_id": '{"device_id":"7fce","account_uuid":"","session_id":"a"}'},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "max_tokens": 32000,
    "stream": True,
}
CODEX: Json = {
    "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"summary": "auto"}, "stream": True,
    "store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "01a2",
    "client_metadata": {"turn_id": "01a2"},
}  # fmt: skip


def tool_result(content: Any, **fields: Any) -> list[Json]:
    """The turns of a call in Anthropic's form."""
    answer = {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **fields}
    return [user(), {"role": "assistant", "content": [USE]}, {"role": "user", "content": [answer]}]


def output(content: Any) -> list[Json]:
    """The items of a call in the form of OpenAI's Responses."""
    return [user(), ITEM, {"type": "function_call_output", "id": "fco_1", "call_id": "c1", "output": content}]


def tool_answer(content: Any, call: Json = CALL, said: Any = None) -> list[Json]:
    """The turns of a call in the form of OpenAI's chat."""
    return [
        user(), {"role": "assistant", "content": said, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": content},
    ]  # fmt: skip


IMAGE: Json = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
ANTHROPIC = [
    Sent(
        "Claude Code: its agents behind the user's turn, a bill before the system's prompt", MESSAGES,
        {**CLAUDE_CODE, "tools": [OWN], "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": EPHEMERAL}]},
            {"role": "system", "content": "Agents: none"}]},
        ignored=("context_management", "system[].text"),
        reads={"system": "You are an agent.\n\nAgents: none", "messages": [user()], "tools": [OWN],
               "thinking": {"type": "adaptive"}},
    ),
    Sent(
        "Claude Code: a fixed budget for thinking", MESSAGES,
        {"thinking": {"type": "enabled", "budget_tokens": 31999}, "max_tokens": 32000, "messages": [user()]},
    ),
    Sent("Claude Code: is there quota", MESSAGES, {"max_tokens": 1, "messages": [user("quota")]}),
    Sent(
        "Claude Code: a picture that Read has read", MESSAGES,
        {**CLAUDE_CODE, "tools": [OWN], "messages": tool_result([IMAGE])},
        ignored=("messages[].content[].content[].source",),
        reads={"system": "You are an agent.", "tools": [OWN], "messages": tool_result(f"[image: {NOTE}"),
               "thinking": {"type": "adaptive"}},
    ),
    Sent(
        "Claude Code: a tool that was searched for, and a failure", MESSAGES,
        {**CLAUDE_CODE, "tools": [{**OWN, "defer_loading": True, "eager_input_streaming": True}],
         "messages": tool_result([{"type": "tool_reference", "tool_name": "weather"}], is_error=True)},
        ignored=("tools[].defer_loading",),
    ),
    Sent(
        "Claude Code: WebSearch asks for a search by Anthropic alone", MESSAGES,
        {"max_tokens": 99, "tools": [SEARCH], "tool_choice": {"type": "auto"}, "messages": [user()]},
        status=400, param="tools[0].type",
    ),
    Sent(
        "Agent SDK of Anthropic: their search beside one's own tools", MESSAGES,
        {"max_tokens": 4, "tools": [SEARCH, OWN], "messages": [user()]},
        ignored=("tools[0]",), reads={"tools": [OWN], "messages": [user()]},
    ),
    Sent(
        "Claude Code: a conversation that their server had searched the web in", MESSAGES,
        {"max_tokens": 4, "messages": [user(), {"role": "assistant", "content": [
            {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "q"}},
            {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
            {"type": "text", "text": "Found.", "citations": None}]}, user()]},
        reads={"messages": [user(), {"role": "assistant", "content": "Found."}, user()]},
    ),
    Sent("Claude Code: what it would cost", "/v1/messages/count_tokens?beta=true",
         {**{name: CLAUDE_CODE[name] for name in ("system", "thinking", "context_management")}, "tools": [OWN, SEARCH],
          "messages": [user()]}, ignored=("context_management", "tools[1]")),
    Sent(
        "Anthropic's SDK: a text file, and what a search found", MESSAGES,
        {"max_tokens": 4, "messages": [{"role": "user", "content": [
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "A file"},
             "citations": {"enabled": True}},
            {"type": "search_result", "source": "u", "title": "t", "content": [{"type": "text", "text": "x"}]},
            {"type": "text", "text": "Hi"}]}]},
        reads={"messages": [user("A file\nt\nu\nx\nHi")]},
    ),
    Sent("Anthropic's SDK: a picture of the user's", MESSAGES,
         {"max_tokens": 4, "messages": [{"role": "user", "content": [IMAGE]}]}, status=400,
         param="messages[0].content[0].source"),
    Sent(
        "langchain-anthropic: a call with its caller, an answer in parts", MESSAGES,
        {"max_tokens": 4096, "system": "s", "tools": [OWN], "messages": [
            user(), {"role": "assistant", "content": [{**USE, "caller": {"type": "direct"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "is_error": False,
                                          "content": [{"type": "text", "text": "sunny"}, IMAGE]}]}]},
        reads={"system": "s", "tools": [OWN], "messages": tool_result(f"sunny\n[image: {NOTE}")},
    ),
    Sent(
        "pydantic-ai: an answer by a tool that must be called", MESSAGES,
        {"max_tokens": 200, "stream": False, "system": [{"type": "text", "text": "s"}, {"type": "text", "text": "m"}],
         "tool_choice": {"type": "any"}, "tools": [OWN], "messages": [{"role": "user", "content": [
             {"type": "text", "text": "Hi"}]}]},
        calls=("weather",),
    ),
]  # fmt: skip
OPENAI_RESPONSES = [
    Sent(
        "Codex: its first turn, tools in a namespace and a search", RESPONSES,
        {**CODEX, "input": [
            {"type": "message", "id": "msg_1", "role": "developer", "content": [{"type": "input_text", "text": "A"}]},
            {"type": "message", "id": "msg_2", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
         "tools": [FLAT, {"type": "namespace", "name": "mcp__clock", "description": "d", "tools": [
             {"type": "function", "name": "now", "description": "n", "strict": False, "parameters": NO_ARGUMENTS}]},
             {"type": "web_search", "external_web_access": False}]},
        ignored=("tools[2]", "client_metadata", "reasoning.summary"),
        reads={"instructions": "A", "input": "Hi", "tools": [FLAT, {
            "type": "function", "name": "mcp__clock__now", "description": "n", "parameters": NO_ARGUMENTS}]},
    ),
    Sent(
        "Codex: a picture that it looked at", RESPONSES,
        {**CODEX, "tools": [FLAT], "input": output([
            {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}", "detail": "high"}])},
        ignored=("input[].output[].image_url",),
        reads={"tools": [FLAT], "input": output(f"[image: {NOTE}")},
    ),
    Sent(
        "Codex: a call in a namespace, reasoning without content, rules behind the turn", RESPONSES,
        {**CODEX, "tools": [FLAT, LARK], "input": [
            user(), {"type": "reasoning", "summary": [], "content": None, "encrypted_content": ""},
            {**ITEM, "name": "now", "namespace": "mcp__clock", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "noon"},
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "A"}]}]},
        ignored=("tools[1]",),
    ),
    Sent(
        "Codex: a conversation that another server searched in", RESPONSES,
        {**CODEX, "tools": [FLAT], "input": [
            user(), {"type": "tool_search_call", "call_id": "c0", "status": "completed", "execution": "client",
                     "arguments": {"query": "x"}},
            {"type": "tool_search_output", "call_id": "c0", "status": "completed", "execution": "client", "tools": []},
            {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "other"}},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes"}]}, user()]},
        reads={"tools": [FLAT], "input": [user(), {"role": "assistant", "content": "Yes"}, user()]},
    ),
    Sent(
        "Codex: edits by a tool in free text", RESPONSES,
        {"input": "Hi", "tools": [{"type": "custom", "name": "pick", "format": {
            "type": "grammar", "syntax": "regex", "definition": "^(red|blue)$"}}], "tool_choice": "required",
         "max_output_tokens": 200},
        calls=("pick",),
    ),
    Sent(
        "openai-agents: a call and its answer, sent back as they came", RESPONSES,
        {"include": [], "instructions": "s", "store": False, "parallel_tool_calls": True,
         "reasoning": {"effort": "low", "summary": "auto"}, "tools": [{**FLAT, "strict": True}],
         "input": [user(), ITEM, {"call_id": "c1", "output": "sunny", "type": "function_call_output"}]},
    ),
    Sent(
        "LlamaIndex: nulls for what is not asked for", RESPONSES,
        {"include": None, "input": "Hi", "instructions": None, "max_output_tokens": 4, "metadata": None, "tools": [],
         "previous_response_id": None, "store": False, "stream": False, "temperature": 0.1, "top_p": 1.0,
         "truncation": "disabled", "user": None},
    ),
    Sent("openai's SDK: how many tokens", "/v1/responses/input_tokens",
         {"input": output("sunny"), "tools": [FLAT], "reasoning": {"effort": "high"}, "personality": "friendly"},
         ignored=("personality",)),
]  # fmt: skip
OPENAI_CHAT = [
    Sent("opencode: a title, from two turns of the user's in a row", CHAT,
         {"max_tokens": 8, "reasoning_effort": "low", "stream": True, "stream_options": {"include_usage": True},
          "messages": [{"role": "system", "content": "A title."}, user("A title:\n"), user('"say hi"')]}),
    Sent("Cline: what its tool looked at", CHAT,
         {"tools": [TOOL], "tool_choice": "auto", "stream": True, "stream_options": {"include_usage": True},
          "messages": tool_answer([{"type": "text", "text": "sunny"}, {
              "type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}])},
         ignored=("messages[].content[].image_url",),
         reads={"tools": [TOOL], "messages": tool_answer(f"sunny[image: {NOTE}")}),
    Sent("Continue: more strings to stop at than OpenAI takes", CHAT,
         {"stream": True, "max_tokens": 8, "stop": ["\nclass ", "\ndef ", *(f"<|{n}|>" for n in range(38))],
          "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
         reads={"messages": [user()]}),
    Sent("Continue: code to go on with", "/v1/completions",
         {"prompt": "def add(a, b):", "stream": True, "max_tokens": 8, "temperature": 0.01, "suffix": None,
          "stop": ["<|endoftext|>", "\n\n", "```"] * 8}),
    Sent("Zed: keys of caches, one call at a time", CHAT,
         {"stream": True, "max_completion_tokens": 8, "stop": [], "temperature": 1.0, "tools": [TOOL],
          "tool_choice": "auto", "parallel_tool_calls": False, "prompt_cache_key": "thread", "reasoning_effort": "none",
          "messages": [user()]}, ignored=("prompt_cache_key",)),
    Sent("Open WebUI: fields of its own", CHAT,
         {"stream": False, "max_completion_tokens": 8, "metadata": {"task": "title_generation", "chat_id": "a"},
          "chat_id": "a", "session_id": "b", "features": {"web_search": False}, "files": [], "tool_ids": None,
          "messages": [user()]}, ignored=("metadata", "chat_id", "features")),
    Sent("Aider by litellm: parts with marks for caches, an answer to go on with", CHAT,
         {"max_tokens": 8, "temperature": 0, "stream": True, "messages": [
             {"role": "system", "content": [{"type": "text", "text": "s", "cache_control": EPHEMERAL}]},
             user(), {"role": "assistant", "content": "Hello", "prefix": True}]},
         ignored=("messages[].content[].cache_control",)),
    Sent("rig: an answer without parts beside its calls", CHAT,
         {"max_tokens": 8, "tools": [TOOL], "messages": [
             {"role": "system", "content": [{"type": "text", "text": "s"}]}, *tool_answer("8", said=[])]}),
    Sent("LlamaIndex: a tool without arguments, strict and not", CHAT,
         {"max_tokens": 8, "temperature": 0.1, "tool_choice": "auto", "parallel_tool_calls": False,
          "tools": [STRICT, NOW], "messages": tool_answer("sunny")}),
    Sent("LangChain: an answer of a tool that said nothing", CHAT,
         {"max_tokens": 8, "tools": [TOOL], "messages": tool_answer(None)},
         reads={"tools": [TOOL], "messages": tool_answer("")}),
    Sent("Ollama's clients: arguments as an object", CHAT,
         {"max_tokens": 8, "tools": [TOOL], "messages": tool_answer("sunny", {
             "id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}})},
         reads={"tools": [TOOL], "messages": tool_answer("sunny")}),
    Sent("LM Studio's clients: no limit is -1", CHAT,
         {"max_tokens": -1, "stop": ["a", "e", " "], "messages": [user()]}),
    Sent("instructor: the one tool by its name", CHAT,
         {"tools": [STRICT], "tool_choice": {"type": "function", "function": {"name": "weather"}},
          "messages": [user()], "max_tokens": 200}, calls=("weather",)),
    Sent("openai's SDK: a custom tool beside a function", CHAT,
         {"tools": [TOOL, {"type": "custom", "custom": {"name": "pick", "format": {"type": "grammar", "grammar": {
             "syntax": "regex", "definition": "(red|blue)"}}}}], "messages": [user()], "max_tokens": 200,
          "tool_choice": {"type": "custom", "custom": {"name": "pick"}}}, calls=("pick",)),
    Sent("openai's SDK: an answer sent back with all of its nulls", CHAT,
         {"max_tokens": 8, "tools": None, "functions": None, "function_call": None, "logit_bias": None, "audio": None,
          "modalities": ["text"], "service_tier": "auto", "store": False, "verbosity": "low", "prediction": None,
          "messages": [user(), {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None,
                                "function_call": None, "tool_calls": None}, user()]},
         reads={"messages": [user(), {"role": "assistant", "content": "Hi"}, user()]}),
    Sent("a base URL that ends in a slash", "//v1/chat/completions", {"max_tokens": 4, "messages": [user()]}),
    Sent("pydantic-ai: two systems, then a form by a tool", CHAT,
         {"stream": False, "tool_choice": "required", "tools": [STRICT], "max_tokens": 200, "messages": [
             {"role": "system", "content": "s"}, {"role": "system", "content": "m"}, user()]}, calls=("weather",)),
]  # fmt: skip
EMBEDDINGS = [
    Sent("LlamaIndex: short vectors in base64", "/v1/embeddings",
         {"input": ["Hi", "Ho"], "dimensions": 8, "encoding_format": "base64"}),
    Sent("Open WebUI: many texts", "/v1/embeddings", {"input": ["Hi"] * 20, "prefix": None}),
]  # fmt: skip
REQUESTS = [*ANTHROPIC, *OPENAI_RESPONSES, *OPENAI_CHAT, *EMBEDDINGS]
