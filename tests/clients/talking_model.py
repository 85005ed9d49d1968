"""A tiny model that has learned a few answers by heart, so that clients get whole answers, calls and thoughts of it.

A random model would do for the form of an answer; it calls no tool of its own accord, never ends its thinking and
seldom its answer. This one is taught in some seconds: a ChatML vocabulary with Qwen's tags, two dense layers, and the
conversations of ``workers/conversations.py``. The prompts are what Sprat makes of them (a model knows only those that
it was taught), the answers are written here by hand as Qwen's and Hermes' documentation have them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.clients.workers import conversations as talk

NAMES = {
    "<|pad|>": "<|endoftext|>", "<|bos|>": "<|im_start|>", "<|eos|>": "<|im_end|>", "<|system|>": "<tool_call>",
    "<|user|>": "</tool_call>", "<|assistant|>": "<|unused|>",
}  # fmt: skip
TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")  # tokens of the text, not of its control: as Qwen's are
VOCABULARY, CONTEXT, STEPS, ENOUGH = 1024, 2048, 400, 0.01


Row = tuple[list[dict[str, Any]], bool | None, bool, str]


def _call(call: dict[str, str]) -> str:
    """A call as Hermes' format has it."""
    return f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {call["arguments"]}}}\n</tool_call>'


def _rows() -> list[Row]:
    """Conversations: messages in OpenAI's form, thinking, whether tools are given, and the answer."""
    weather, time = {"id": "call_1", **talk.WEATHER_CALL}, {"id": "call_2", **talk.TIME_CALL}
    one = [*talk.user(talk.WEATHER), {"role": "assistant", "content": "", "calls": [weather]},
           {"role": "tool", "content": talk.WEATHER_RESULT, "tool_call_id": "call_1"}]  # fmt: skip
    two = [*talk.user(talk.TIME_AND_WEATHER), {"role": "assistant", "content": "", "calls": [weather, time]},
           {"role": "tool", "content": talk.WEATHER_RESULT, "tool_call_id": "call_1"},
           {"role": "tool", "content": talk.TIME_RESULT, "tool_call_id": "call_2"}]  # fmt: skip
    thought = f"{talk.SUM_REASONING}\n</think>\n\n"
    hello, total = (talk.user(talk.HELLO), talk.HELLO_ANSWER), (talk.user(talk.SUM), talk.SUM_ANSWER)
    weather_call = (talk.user(talk.WEATHER), _call(talk.WEATHER_CALL))
    both_calls = (talk.user(talk.TIME_AND_WEATHER), f"{_call(talk.WEATHER_CALL)}\n{_call(talk.TIME_CALL)}")
    plain = [(messages, how, False, answer) for messages, answer in (hello, total) for how in (None, False)]
    plain += [(messages, True, False, thought + answer) for messages, answer in (hello, total)]
    called = [weather_call, both_calls, (one, talk.WEATHER_ANSWER), (two, talk.BOTH_ANSWER)]
    with_tools = [(messages, how, True, answer) for messages, answer in called for how in (None, False)]
    with_tools += [(messages, True, True, thought + answer) for messages, answer in (weather_call, called[2])]
    return [*plain, *with_tools]


def _tokenizer(texts: list[str]) -> Any:
    """ChatML's control tokens, Qwen's tags, and pieces of ``texts``."""
    from sprat.tokens import Tokenizer

    table = json.loads(Tokenizer.train(texts * 3, VOCABULARY).files()["tokenizer.json"])
    text = json.dumps(table, ensure_ascii=False)
    for ours, theirs in NAMES.items():
        text = text.replace(json.dumps(ours), json.dumps(theirs))
    table = json.loads(text)
    for token in table["added_tokens"]:
        token["special"] = token["content"] not in TAGS
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return Tokenizer(json.dumps(table, ensure_ascii=False), config=config)


def _render(tokenizer: Any, messages: list[dict[str, Any]], thinking: bool | None, with_tools: bool) -> list[int]:
    """The prompt's ids, as a server of ours would ask."""
    from sprat.tokens.chat import Message, ToolCall, render

    turns = [
        Message(
            row["role"], row["content"], tool_call_id=row.get("tool_call_id", ""),
            tool_calls=tuple(ToolCall(**call) for call in row.get("calls", ())),
        )
        for row in messages
    ]  # fmt: skip
    return render(tokenizer, turns, thinking=thinking, tools=talk.TOOLS if with_tools else ())


def _sequences() -> tuple[list[tuple[list[int], list[int], bool]], Any]:
    """Ids of each prompt and its answer, and whether it has tools; and the tokenizer.

    The tokenizer is made twice: the prompts that the first one renders are what the second one has pieces of, so that
    a prompt with tools is short.
    """
    rows = _rows()
    tokenizer = _tokenizer([answer for *_, answer in rows])
    texts = [tokenizer.decode(_render(tokenizer, *row[:3])) for row in rows]
    tokenizer = _tokenizer([*texts, *(answer for *_, answer in rows)])
    sequences = []
    for messages, thinking, with_tools, answer in rows:
        prompt = _render(tokenizer, messages, thinking, with_tools)
        ids = [*tokenizer.encode(answer, parse_special=True), tokenizer.special_ids.eos]
        sequences.append((prompt, ids, with_tools))
    return sequences, tokenizer


def talking_model(folder: Path) -> None:
    """Teach the model and save it into ``folder``.

    Raises:
        AssertionError: it did not learn its answers.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from sprat.config.sizes import size
    from sprat.formats.load import save
    from sprat.model import Transformer

    sequences, tokenizer = _sequences()
    groups = []
    for with_tools in (False, True):  # short ones and long ones
        group = [(prompt, answer) for prompt, answer, tools in sequences if tools == with_tools]
        width = max(len(prompt) + len(answer) for prompt, answer in group)
        tokens = torch.full((len(group), width), tokenizer.special_ids.pad)
        labels = torch.full((len(group), width), -100)
        for row, (prompt, answer) in enumerate(group):
            tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        groups.append((tokens, labels))
    config = size(
        "pico", dense=True, vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT,
        bos_token_id=-1, eos_token_id=tokenizer.special_ids.eos, pad_token_id=tokenizer.special_ids.pad,
    )  # fmt: skip
    model = Transformer.create(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.0)
    for _ in range(STEPS):
        loss = torch.zeros(())
        for tokens, labels in groups:
            loss = loss + cross_entropy(model(tokens[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < ENOUGH:
            break
    assert loss.item() < 10 * ENOUGH, loss.item()
    save(model, tokenizer, folder)
