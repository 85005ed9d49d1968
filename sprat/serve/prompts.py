"""What a request says, as the engine takes it: ids of the prompt, and the settings of each answer.

Everything that a request asks beside text is resolved here: tools are written into the prompt in the model's own form
and held to by a grammar, a form of the answer becomes a grammar, thinking becomes an opened or closed think block, and
"as much as fits" becomes a number. It runs in a thread: tokenising a long conversation takes the processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sprat.errors import DataError
from sprat.serve.choices import Choice
from sprat.serve.engine_client import EngineClient
from sprat.serve.errors import RequestError
from sprat.serve.generation import Generation, Tool

if TYPE_CHECKING:
    from sprat.engine.response import Response
    from sprat.engine.sampling_params import Sampling
    from sprat.tokens.chat import Message
    from sprat.tokens.tokenizer import Tokenizer
    from sprat.tokens.tool_formats import ToolFormat

# What stands before the text, behind it, and before what is filled in: DeepSeek, Qwen, StarCoder/SmolLM, Code Llama
FILL_IN_TOKENS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


@dataclass(frozen=True)
class Prompt:
    """A request, ready for the engine."""

    ids: list[int]
    samplings: list[Sampling]
    choices: list[Choice]


class PromptWriter:
    """Writes prompts for one model.

    Args:
        default_sampling: settings where a request says nothing: what the model's folder says.
        max_model_len: tokens of one request at most, where that is less than the model's context.
        max_tokens: sampled tokens of one request at most; None: what the context holds.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        engine: EngineClient,
        *,
        default_sampling: Mapping[str, Any],
        max_model_len: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        from sprat.tokens.tool_render import select_tool_format

        self.tokenizer, self._engine, self._max_model_len = tokenizer, engine, max_model_len
        self._defaults, self._max_tokens = dict(default_sampling), max_tokens
        self._tool_format: ToolFormat | None = select_tool_format(tokenizer)
        self._control_names = {index: name.encode() for name, index in tokenizer.control_tokens.items()}

    @property
    def context(self) -> int:
        """Tokens of one request at most."""
        info = self._engine.info
        return min(info.context, info.cache_tokens, self._max_model_len or info.context)

    def write(self, generation: Generation, seed: int) -> Prompt:
        """The prompt of a request, and its settings.

        Raises:
            RequestError: 400; it is too long, or asks for what this model cannot.
            EngineError: a setting cannot be.
        """
        from sprat.engine.sampling_params import Sampling

        generation = self.without_unused_tools(generation)
        thinking = self._thinking(generation)
        ids = self.render(generation, thinking)
        settings = {
            **self._defaults,
            **generation.sampling,
            "max_tokens": self._limit(generation, len(ids)),
            "thinking": self._answer_thinking(generation, thinking),
            "max_think_tokens": generation.max_think_tokens if thinking else None,
            "logprobs": generation.logprobs,
            "response": self.response(generation),
            "prompt_logprobs": generation.echo and generation.logprobs,
        }
        samplings = [Sampling(**{**settings, "seed": seed + index}) for index in range(generation.n)]
        bytes_of = self.tokenizer.token_bytes
        echo = self.tokenizer.decode(ids, skip_special_tokens=True) if generation.echo else None
        has_form = generation.response_format is not None
        tools = {tool.name: tool for tool in generation.tools}
        choices = [
            Choice(index, self._parser(generation), bytes_of, echo, self._control_names, has_form, tools)
            for index in range(generation.n)
        ]
        return Prompt(ids, samplings, choices)

    def render(self, generation: Generation, thinking: bool | None) -> list[int]:
        """The ids of a prompt.

        Raises:
            RequestError: 400; the chat format has no place for it.
        """
        from sprat.tokens.chat import render

        if isinstance(generation.prompt, str):
            return self._fill_in(generation) if generation.suffix else self.tokenizer.encode_prompt(generation.prompt)
        if generation.prompt is not None:
            return self._given_ids(generation.prompt, generation.paths.get("ids", "prompt"))
        tools = [schema_of(tool) for tool in generation.tools]
        messages = join_systems(generation.messages)
        try:
            options: dict[str, Any] = {"thinking": thinking, "tool_format": self._readable_format(generation)}
            return render(self.tokenizer, messages, tools=tools, continues=generation.continues, **options)
        except DataError as error:
            param = generation.paths.get(error.where, error.where)
            raise RequestError(400, f"{param}: {error.what}; {error.todo}", param=param, code="not_possible") from None

    def _given_ids(self, ids: tuple[int, ...], where: str) -> list[int]:
        """Ids that the caller wrote at ``where``.

        Raises:
            RequestError: 400; one is no token of this model.
        """
        vocab = self._engine.info.vocab_size
        for index, each in enumerate(ids):
            if not 0 <= each < vocab:
                param = f"{where}[{index}]"
                raise RequestError(400, f"{param}: must be an id of 0 … {vocab - 1}, not {each}", param=param)
        return list(ids)

    def _fill_in(self, generation: Generation) -> list[int]:
        """The ids of a text with a gap.

        Raises:
            RequestError: 400; the model has no tokens for it.
        """
        control = self.tokenizer.control_tokens
        for prefix, suffix, middle in FILL_IN_TOKENS:
            if {prefix, suffix, middle} <= control.keys():
                parts = [(prefix, True), (str(generation.prompt), False), (suffix, True), (generation.suffix, False)]
                return self.tokenizer.encode_parts([*parts, (middle, True)])
        message = "suffix: this model has no tokens that say where a text goes on; leave it out"
        raise RequestError(400, message, param="suffix", code="not_offered")

    def ids(self, generation: Generation) -> list[int]:
        """The ids of the prompt of a request; raises as ``write``."""
        generation = self.without_unused_tools(generation)
        return self.render(generation, self._thinking(generation))

    def unmet_wishes(self, generation: Generation) -> tuple[str, ...]:
        """JSON paths of what is asked for and ignored because this model cannot: to think."""
        return () if self._can_think else generation.thinking_wishes

    @property
    def _can_think(self) -> bool:
        return self.tokenizer.chat_format.thinking_prompt is not None

    def _thinking(self, generation: Generation) -> bool | None:
        """Whether to think: what was said, by the effort where by nothing else; a model that cannot is not made to."""
        thinking = generation.thinking
        if thinking is None and generation.effort:
            thinking = generation.effort != "none"
        return None if thinking and not self._can_think else thinking

    def _answer_thinking(self, generation: Generation, thinking: bool | None) -> bool | None:
        """How the answer begins: what is gone on with may be in its reasoning, and a plain text has none."""
        from sprat.tokens.chat import continued_thinking

        if generation.prompt is not None:
            return False
        return continued_thinking(self.tokenizer, generation.messages[-1]) if generation.continues else thinking

    def _limit(self, generation: Generation, prompt_tokens: int) -> int:
        """Tokens of an answer at most.

        Raises:
            RequestError: 400; the prompt leaves no room, or more is asked for than there is.
        """
        paths = generation.paths
        where, name = paths.get("messages", "messages"), paths.get("max_tokens", "max_tokens")
        asked, most = generation.max_tokens, self._max_tokens
        if asked is not None and generation.sampling.get("fit"):  # it gives way to what there is
            asked = max(1, min(asked, most or asked, self.context - prompt_tokens))
        if asked is not None and most is not None and asked > most:
            message = f"{name} is too large: this server gives at most {most} tokens; lower it or leave it out"
            raise RequestError(400, message, param=name)
        room = self.context - prompt_tokens
        if prompt_tokens == 0:
            raise RequestError(400, f"{where}: there is no text to answer", param=where)
        if room < (1 if asked is None else asked):
            wanted = f"{prompt_tokens} in the {where}" + (f", {asked} in the completion" if asked else "")
            message = (
                f"This model's maximum context length is {self.context} tokens. However, you requested "
                f"{prompt_tokens + (asked or 1)} tokens ({wanted}). Please reduce the length of the {where}"
                + (f" or {name}." if asked else ".")
            )
            raise RequestError(400, message, param=where, code="context_length_exceeded")
        return min(room, most or room) if asked is None else asked

    def without_unused_tools(self, generation: Generation) -> Generation:
        """The request without tools that may not be called.

        Raises:
            RequestError: 400; a form of the answer does not go with them.
        """
        if not generation.tools or generation.tool_choice.mode == "none":
            return replace(generation, tools=())
        paths = generation.paths
        if generation.response_format is not None and generation.tool_choice.mode != "auto":
            where = paths.get("response_format", "response_format")
            message = f"{where}: a call that is required has a form of its own; leave one of them out"
            raise RequestError(400, message, param=where)
        if generation.response_format is not None and generation.response_format["type"] == "regex":
            where = paths.get("response_format", "response_format")
            raise RequestError(400, f"{where}: a pattern does not go with tools; use a JSON schema", param=where)
        return generation

    def text_grammars(self, generation: Generation) -> list[tuple[Response, str]]:
        """What the texts of custom tools must match, each as a grammar of its own, and its JSON path.

        It is compiled before all tools together are, so that whoever wrote a wrong one is told which.
        """
        from sprat.engine.response import Response

        tools = [(tool.parameters, tool.path) for tool in generation.tools if tool.path]
        return [(Response.json(schema["properties"]["input"]), path) for schema, path in tools if schema]

    def _readable_format(self, generation: Generation) -> ToolFormat | None:
        """The form in which tools are called; None where there are none to call."""
        from sprat.tokens.tool_render import select_readable_format

        is_auto = generation.tool_choice.mode == "auto"
        return select_readable_format(self._tool_format, is_auto=is_auto) if generation.tools else None

    def _parser(self, generation: Generation) -> Any:
        from sprat.tokens.tool_parser import ToolCallParser

        tool_format = self._readable_format(generation)
        names = [tool.name for tool in generation.tools]
        return None if tool_format is None else ToolCallParser(tool_format, names)

    def response(self, generation: Generation) -> Response | None:
        """The grammar of an answer; it is written down here, and compiled by the engine.

        Raises:
            EngineError: it is none that can be followed.
        """
        from sprat.engine.response import Response

        form = generation.response_format
        tool_format = self._readable_format(generation)
        if tool_format is not None:
            tools = [
                {"name": tool.name, "parameters": tool.parameters, "strict": tool.strict} for tool in generation.tools
            ]
            choice = generation.tool_choice
            return Response.tool_calls(
                tools,
                tool_format,
                choice=choice.mode,
                name=choice.name,
                parallel=generation.parallel_tool_calls and choice.mode != "named",
                form=None if form is None else form.get("schema", {"type": "object"}),
            )
        if form is None:
            return None
        if form["type"] == "regex":
            return Response.regex(form["pattern"])
        return Response.json(form.get("schema"))


def schema_of(tool: Tool) -> dict[str, Any]:
    """A tool in OpenAI's form, as chat formats write it: what its caller did not say is not said."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = dict(tool.parameters)
    return {"type": "function", "function": function}


def join_systems(messages: tuple[Message, ...]) -> list[Message]:
    """The conversation with all system messages as one, which stands first: most formats have no other place."""
    systems = [message for message in messages if message.role == "system"]
    if not systems or (len(systems) == 1 and messages[0] is systems[0]):
        return list(messages)
    text = "\n\n".join(message.content for message in systems if message.content)
    return [replace(systems[0], content=text), *(each for each in messages if each.role != "system")]
