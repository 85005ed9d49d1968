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
VOCABULARY, CONTEXT, STEPS, ENOUGH = 1024, 2048, 400, 0.004


def _call(call: dict[str, str]) -> str:
    """A call as Hermes' format has it."""
    return f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {call["arguments"]}}}\n</tool_call>'


def _rows() -> list[tuple[list[dict[str, Any]], bool | None, bool, str]]:
    """Conversations: messages in OpenAI's form, thinking, whether tools are given, and the answer."""
    weather, time = {"id": "call_1", **talk.WEATHER_CALL}, {"id": "call_2", **talk.TIME_CALL}
    one = [*talk.user(talk.WEATHER), {"role": "assistant", "content": "", "calls": [weather]},
           {"role": "tool", "content": talk.WEATHER_RESULT, "tool_call_id": "call_1"}]  # fmt: skip
    two = [*talk.user(talk.TIME_AND_WEATHER), {"role": "assistant", "content": "", "calls": [weather, time]},
           {"role": "tool", "content": talk.WEATHER_RESULT, "tool_call_id": "call_1"},
           {"role": "tool", "content": talk.TIME_RESULT, "tool_call_id": "call_2"}]  # fmt: skip
    both = f"{_call(talk.WEATHER_CALL)}\n{_call(talk.TIME_CALL)}"
    rows: list[tuple[list[dict[str, Any]], bool | None, bool, str]] = []
    for thinking, opening in ((None, ""), (False, ""), (True, f"{talk.SUM_REASONING}\n</think>\n\n")):
        rows += [
            (talk.user(talk.HELLO), thinking, False, opening + talk.HELLO_ANSWER),
            (talk.user(talk.SUM), thinking, False, opening + talk.SUM_ANSWER),
            (talk.user(talk.WEATHER), thinking, True, opening + _call(talk.WEATHER_CALL)),
            (talk.user(talk.TIME_AND_WEATHER), thinking, True, opening + both),
            (one, thinking, True, opening + talk.WEATHER_ANSWER),
            (two, thinking, True, opening + talk.BOTH_ANSWER),
        ]
    return rows


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

    rows = _rows()
    texts = [
        json.dumps(talk.TOOLS),
        "<|im_start|>system user assistant\n",
        "# Tools # You may call one or more functions",
    ]
    texts += [answer for *_, answer in rows] + [str(row["content"]) for messages, *_ in rows for row in messages]
    tokenizer = _tokenizer(texts)
    sequences = []
    for messages, thinking, with_tools, answer in rows:
        prompt = _render(tokenizer, messages, thinking, with_tools)
        sequences.append((prompt, [*tokenizer.encode(answer, parse_special=True), tokenizer.special_ids.eos]))
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    tokens = torch.full((len(sequences), width), tokenizer.special_ids.pad)
    labels = torch.full((len(sequences), width), -100)
    for row, (prompt, answer) in enumerate(sequences):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    config = size(
        "pico", dense=True, vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT,
        bos_token_id=-1, eos_token_id=tokenizer.special_ids.eos, pad_token_id=tokenizer.special_ids.pad,
    )  # fmt: skip
    model = Transformer.create(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.0)
    for _ in range(STEPS):
        loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < ENOUGH:
            break
    assert loss.item() < 10 * ENOUGH, loss.item()
    save(model, tokenizer, folder)
