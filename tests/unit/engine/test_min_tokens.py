"""How long an answer must be, and what ends it then."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.engine import Engine, Response, Sampling
from sprat.engine.backends.torch import TorchBackend
from sprat.engine.detokenizer import Detokenizer
from sprat.engine.speculation import SpeculationMode
from sprat.errors import EngineError
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake
from tests.unit.engine.says import says

PROMPT = [3, 4, 5, 6, 7, 8] * 4
OTHER = 9  # a token that ends nothing by itself


def engines(model: Transformer, tokenizer: Tokenizer, mode: SpeculationMode) -> list[Engine]:
    """One whose drafts hold, and one with those of a real model."""
    backends = [Fake(model.config.vocab_size, num_mtp_modules=1), TorchBackend(model)]
    return [Engine(model, tokenizer, backend=backend, speculate=mode) for backend in backends]


@pytest.mark.parametrize("mode", ["off", "ngram", "mtp"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_ends_an_answer_before_min_tokens(
    drafter: Transformer, tokenizer: Tokenizer, mode: SpeculationMode, temperature: float
) -> None:
    eos = tokenizer.special_ids.eos
    for engine in engines(drafter, tokenizer, mode):
        for count in (0, 1, 7):
            eager: dict[str, Any] = {"temperature": temperature, "max_tokens": 30, "min_tokens": count}
            asks = [
                Sampling(**eager, logit_bias={eos: 100.0}),
                Sampling(**eager, logit_bias={OTHER: 100.0, eos: -100.0}, stop_token_ids=(OTHER,)),
            ]
            for last, output in zip((eos, OTHER), engine.generate([PROMPT] * 2, asks), strict=True):
                assert len(output.token_ids) == count + 1 and output.token_ids.index(last) == count
                assert output.finish_reason == "stop"
            *_, done = engine.stream(PROMPT, asks[1])
            assert [done.output] == engine.generate([PROMPT], asks[1])
        assert engine.check() == []


@pytest.mark.parametrize("mode", ["off", "ngram", "mtp"])
def test_ignored_ends_end_nothing(drafter: Transformer, tokenizer: Tokenizer, mode: SpeculationMode) -> None:
    eos = tokenizer.special_ids.eos
    how = Sampling(temperature=0, max_tokens=11, ignore_eos=True, logit_bias={eos: 100.0})
    for engine in engines(drafter, tokenizer, mode):
        (output,) = engine.generate([PROMPT], how)
        assert (output.token_ids, output.finish_reason, output.text) == ([eos] * 11, "length", "")
        *_, done = engine.stream(PROMPT, how)
        assert done.output == output
        (stopped,) = engine.generate([PROMPT], Sampling(**{**vars(how), "stop_token_ids": (eos,), "min_tokens": 3}))
        assert stopped.finish_reason == "stop" and stopped.token_ids == [*stopped.token_ids[:3], eos]
        assert eos not in stopped.token_ids[:3]


@pytest.mark.parametrize("logprobs", [False, True])
def test_what_is_said_behind_an_ignored_end_is_text(model: Transformer, tokenizer: Tokenizer, logprobs: bool) -> None:
    eos, engine = tokenizer.special_ids.eos, Engine(model, tokenizer)
    script = [eos, *tokenizer.encode("the cat"), eos, *tokenizer.encode(" sat"), eos]
    how = Sampling(max_tokens=len(script), ignore_eos=True, logprobs=logprobs, processors=says(script))
    (output,) = engine.generate([PROMPT], how)
    assert (output.text, output.token_ids, output.finish_reason) == ("the cat sat", script, "length")
    *pieces, done = engine.stream(PROMPT, how)
    assert "".join(piece.text for piece in pieces) == "the cat sat" and done.output == output
    assert [token for piece in pieces for token, *_ in piece.logprobs] == (script if logprobs else [])


@pytest.mark.parametrize("mode", ["off", "ngram", "mtp"])
def test_a_form_that_is_complete_ends_the_answer(
    drafter: Transformer, tokenizer: Tokenizer, mode: SpeculationMode
) -> None:
    for engine in engines(drafter, tokenizer, mode):
        how = {"max_tokens": 30, "thinking": False, "ignore_eos": True}
        fixed, free, short = engine.generate(
            [PROMPT] * 3,
            [
                Sampling(min_tokens=25, response=Response.choice(["cat"]), **how),
                Sampling(min_tokens=9, response=Response.regex("[a-f]*"), temperature=0, **how),
                Sampling(response=Response.regex("[a-f]*"), logit_bias={tokenizer.special_ids.eos: 100.0}, **how),
            ],
        )
        assert (fixed.text, fixed.finish_reason) == ("cat", "stop")
        assert len(free.token_ids) > 9 and set(free.text) <= set("abcdef")
        assert (short.text, short.finish_reason) == ("", "stop")


def test_a_stop_token_that_alone_is_allowed_is_said_and_ends_nothing_yet(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    script = [OTHER] * 6
    how = Sampling(max_tokens=20, min_tokens=4, stop_token_ids=(OTHER,), processors=says(script))
    (output,) = Engine(model, tokenizer).generate([PROMPT], how)
    assert (output.token_ids, output.finish_reason) == ([OTHER] * 5, "stop")


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="ab ", max_size=14),
    stops=st.lists(st.text(alphabet="ab ", min_size=1, max_size=3), min_size=1, max_size=3),
    count=st.integers(0, 8),
    whole_words=st.booleans(),
)
def test_a_stop_string_counts_that_is_whole_behind_min_tokens(
    tokenizer: Tokenizer, text: str, stops: list[str], count: int, whole_words: bool
) -> None:
    ids = tokenizer.encode(text) if whole_words else [i for char in text for i in tokenizer.encode(char)]
    free = len(tokenizer.decode(ids[:count]))  # characters within which it is text
    ends = [(end, end - len(stop), stop) for stop in stops for end in range(free + 1, len(text) + 1)]
    places = [(end, start) for end, start, stop in ends if start >= 0 and text[start:end] == stop]
    detokenizer = Detokenizer(tokenizer, thinking=False, stops=stops, min_tokens=count)
    pieces = [piece for token in ids for piece in detokenizer.push(token)] + detokenizer.close()
    assert "".join(piece.text for piece in pieces) == (text[: min(places)[1]] if places else text)
    assert detokenizer.stop == (text[slice(*reversed(min(places)))] if places else "")


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(EngineError, match="min_tokens is 9, above max_tokens 8"):
        Sampling(max_tokens=8, min_tokens=9)
    with pytest.raises(EngineError, match="min_tokens cannot be -1"):
        Sampling(min_tokens=-1)
    assert Sampling(max_tokens=None, min_tokens=9) and Sampling(max_tokens=8, min_tokens=9, fit=True)
