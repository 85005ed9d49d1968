"""Log-probabilities that come with the text: none lost, none twice, each in its channel; and why an answer ended."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from sprat.config.sizes import size
from sprat.engine import Delta, Engine, Output, Response, Sampling
from sprat.engine.backends.torch import TorchBackend
from sprat.engine.speculation import SpeculationMode
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake
from tests.unit.engine.says import says
from tests.unit.engine.test_detokenizer import BYTE_LEVEL

PROMPT = [3, 4, 5, 6, 7, 8] * 4
Entries = list[tuple[int, float, tuple[tuple[int, float], ...]]]


def entries_of(pieces: list[Delta], *kinds: str) -> Entries:
    """What the pieces of some channels carry."""
    return [entry for piece in pieces if piece.kind in kinds for entry in piece.logprobs]


def whole_of(output: Output) -> Entries:
    """The same from a whole answer."""
    assert output.logprobs is not None and output.top_logprobs is not None
    tops = map(tuple, output.top_logprobs)
    return list(zip(output.token_ids, output.logprobs, tops, strict=True))


def read(engine: Engine, prompt: list[int], how: Sampling) -> tuple[list[Delta], Output]:
    """All pieces, and the answer of ``generate`` to the same."""
    *pieces, done = engine.stream(prompt, how)
    (whole,) = engine.generate([prompt], how)
    assert done.output == whole
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == whole.text
    assert "".join(piece.text for piece in pieces if piece.kind == "reasoning") == whole.reasoning
    kinds = [piece.kind for piece in pieces]
    assert kinds == sorted(kinds, reverse=True), "the reasoning comes before the content"
    assert all(piece.text or piece.logprobs for piece in pieces)
    return pieces, whole


@pytest.mark.parametrize("mode", ["off", "ngram", "mtp"])
def test_the_pieces_carry_the_log_probabilities_of_the_answer(
    drafter: Transformer, tokenizer: Tokenizer, mode: SpeculationMode
) -> None:
    ids, ends, seen = tokenizer.special_ids, tokenizer.eos_token_ids, set()
    backends = [Fake(drafter.config.vocab_size, num_mtp_modules=1), TorchBackend(drafter)]
    asks: list[dict[str, Any]] = [{}, {"stop": ("a", "e", "t ")}, {"thinking": True}, {"thinking": False}]
    for backend, (row, ask) in itertools.product(backends, enumerate(asks)):
        engine = Engine(drafter, tokenizer, backend=backend, speculate=mode)
        for seed in range(2):
            bias = {ids.think_close: 4.0 * (row == 2), ids.eos: 6.0 * (row == 0)}
            how = Sampling(max_tokens=35, seed=seed, logprobs=True, top_logprobs=2, logit_bias=bias, **ask)
            pieces, whole = read(engine, PROMPT, how)
            expected = whole_of(whole)
            if whole.finish_reason == "stop" and whole.token_ids[-1] in ends:
                assert not whole.stop
                expected.pop()
            said = [token for token, *_ in expected]
            opened = ask.get("thinking") or (ask.get("thinking") is None and said[:1] == [ids.think_open])
            cut = 0 if not opened else said.index(ids.think_close) + 1 if ids.think_close in said else len(said)
            assert entries_of(pieces, "reasoning") == expected[:cut]
            assert entries_of(pieces, "content") == expected[cut:]
            seen.add((whole.finish_reason, bool(whole.stop), 0 < cut < len(said)))
    assert {("stop", True, False), ("stop", False, False)} <= seen
    assert any(thought for *_, thought in seen) and any(reason == "length" for reason, *_ in seen)


def test_who_does_not_ask_gets_none(model: Transformer, tokenizer: Tokenizer) -> None:
    assert not entries_of(list(Engine(model, tokenizer).stream(PROMPT, Sampling(max_tokens=9))), "reasoning", "content")


@pytest.fixture(scope="module")
def bytes_engine() -> Engine:
    """A model whose every token is a byte, and whose think tags are text."""
    config = size("pico", vocab_size=BYTE_LEVEL.vocab_size, max_position_embeddings=200)
    return Engine(Transformer.create(config, 3), BYTE_LEVEL)


@pytest.mark.parametrize(
    ("said", "ask", "reasoning", "content", "stop"),
    [
        ("<think>ab</think>cd", {}, "<think>ab</think>", "cd", ""),
        (" \n<think>a</think>", {}, " \n<think>a</think>", "", ""),
        ("<thing>", {}, "", "<thing>", ""),
        ("<thi", {}, "", "<thi", ""),
        ("ab</think>\n\nc", {"thinking": True}, "ab</think>", "\n\nc", ""),
        ("ab</thi", {"thinking": True}, "ab</thi", "", ""),
        ("one, two", {"stop": ("xx", ", t", "tw")}, "", "one, t", ", t"),
        ("one, two", {"stop": ("two",)}, "", "one, two", "two"),
        ("é€", {}, "", "é€", ""),
    ],
)
def test_tokens_that_are_held_back_come_in_their_channel(
    bytes_engine: Engine, said: str, ask: dict[str, Any], reasoning: str, content: str, stop: str
) -> None:
    script = BYTE_LEVEL.encode(said)
    assert len(script) == len(said.encode())
    how = Sampling(max_tokens=len(script), logprobs=True, top_logprobs=1, temperature=0, processors=says(script), **ask)
    pieces, whole = read(bytes_engine, PROMPT, how)
    both = BYTE_LEVEL.encode(reasoning), BYTE_LEVEL.encode(content)
    assert tuple([e[0] for e in entries_of(pieces, kind)] for kind in ("reasoning", "content")) == both
    assert entries_of(pieces, "reasoning", "content") == whole_of(whole)
    assert (whole.stop, whole.finish_reason) == (stop, "stop" if stop else "length")


def test_a_form_carries_its_log_probabilities_too(bytes_engine: Engine) -> None:
    how = Sampling(max_tokens=20, logprobs=True, top_logprobs=1, response=Response.choice(["yes", "no"]))
    pieces, whole = read(bytes_engine, PROMPT, how)
    assert BYTE_LEVEL.decode([token for token, *_ in entries_of(pieces, "content")]) == whole.text in ("yes", "no")
