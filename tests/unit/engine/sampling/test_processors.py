"""A request's own rules: penalties as transformers has them, words that never come, thinking that ends in time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sprat.engine import Engine
from sprat.engine.detokenizer import Detokenizer
from sprat.engine.reasoning import ReasoningTracker, think_close_ids
from sprat.engine.sampling.grammar import GrammarCache
from sprat.engine.sampling.processors import BadWords, Penalties, ThinkBudget, build_processors
from sprat.engine.sampling_params import Processor, Sampling
from sprat.errors import EngineError
from sprat.model import Transformer
from sprat.tokens import Tokenizer

VOCAB = 40


def processed(
    processor: Processor, output_ids: list[int], draft_ids: list[int], seed: int = 0, vocab: int = VOCAB
) -> NDArray[np.float32]:
    """Fixed logits as ``processor`` leaves them."""
    logits = np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)
    processor.apply(logits, output_ids, draft_ids)
    return logits


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=30)


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    output_ids=tokens,
    draft_ids=tokens,
    penalty=st.sampled_from([0.5, 1.3, 20.0]),
)
def test_repetition_penalty_is_that_of_transformers(
    prompt: list[int], output_ids: list[int], draft_ids: list[int], penalty: float
) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    processor = Penalties(Sampling(repetition_penalty=penalty), prompt, VOCAB)
    seen = torch.tensor([prompt + output_ids + draft_ids])
    raw = np.random.default_rng(0).normal(0, 3, VOCAB).astype(np.float32)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, torch.from_numpy(raw.copy())[None])[0]
    for _ in range(2):  # nothing that was drafted is remembered
        np.testing.assert_allclose(processed(processor, output_ids, draft_ids), expected.numpy(), rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(output_ids=tokens, draft_ids=tokens, more=tokens)
def test_frequency_and_presence_count_the_answer_alone(
    output_ids: list[int], draft_ids: list[int], more: list[int]
) -> None:
    processor = Penalties(Sampling(frequency_penalty=0.75, presence_penalty=-1.5), [3, 3, 4], VOCAB)
    raw = np.random.default_rng(0).normal(0, 3, VOCAB).astype(np.float32)
    answer: list[int] = []
    for step in (output_ids, more):  # the answer grows, drafts come and go
        answer += step
        for drafted in (draft_ids, []):
            count = np.bincount([*answer, *drafted], minlength=VOCAB)
            expected = raw - 0.75 * count + 1.5 * (count > 0)
            np.testing.assert_allclose(processed(processor, answer, drafted), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5, unique=True),
    output_ids=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    draft_ids=st.lists(st.integers(0, 4), max_size=3),
)
def test_bad_words_are_banned_where_transformers_bans_them(
    tokenizer: Tokenizer, words: list[tuple[int, ...]], output_ids: list[int], draft_ids: list[int]
) -> None:
    from transformers import NoBadWordsLogitsProcessor

    oracle = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=[VOCAB - 1])
    expected = oracle(torch.tensor([output_ids + draft_ids]), torch.zeros(1, VOCAB))[0].isinf().numpy()
    assert (np.isinf(processed(BadWords(words, tokenizer), output_ids, draft_ids)) == expected).all()


def test_a_bad_word_given_as_text_never_comes_out_as_the_tokenizer_spells_it(tokenizer: Tokenizer) -> None:
    word = "cat on"
    processor = BadWords([word], tokenizer)
    for text in (word, f"the {word}"):
        ids = tokenizer.encode(text)
        assert np.isinf(processed(processor, ids[:-1], [], vocab=tokenizer.vocab_size)[ids[-1]])
        assert not np.isinf(processed(processor, ids[:-2], [], vocab=tokenizer.vocab_size)).any()


def plain_tags() -> Tokenizer:
    """A tokenizer of bytes and some pieces whose think tags are ordinary text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "</", "think", ">x", "th", "k>", ">{", ">\u010a"]
    merges = [("<", "/"), ("t", "h"), (">", "x"), ("k", ">"), (">", "{"), (">", "\u010a")]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    processor = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    processor.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    processor.decoder = decoders.ByteLevel()
    processor.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(processor.to_str(), config={"eos_token": "<|endoftext|>"})


@pytest.fixture(scope="module", params=["tags are tokens", "tags are text"])
def either(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    """Both kinds of tokenizer."""
    return tokenizer if request.param == "tags are tokens" else plain_tags()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), thinking=st.sampled_from([True, False, None]))
def test_reasoning_ends_where_the_reader_says_it_ends(
    either: Tokenizer, data: st.DataObject, thinking: bool | None
) -> None:
    tag = st.sampled_from(
        [*either.encode_cached("<think>"), *think_close_ids(either), *either.encode(" </thi<x"), *range(256, 262)]
    )
    ids = data.draw(st.lists(tag, max_size=60))
    opening = [] if thinking is not None or data.draw(st.booleans()) else list(either.encode_cached("<think>"))
    ids = [index for index in opening + ids if index != either.special_ids.eos]
    cut = data.draw(st.integers(0, len(ids)))
    tracker, output_ids, detokenizer = ReasoningTracker(either, thinking), [], Detokenizer(either, thinking=thinking)
    for place, token in enumerate(ids):
        detokenizer.push(token)
        output_ids.append(token)
        draft_ids = ids[len(output_ids) : len(output_ids) + cut]
        drafted = tracker.advance(output_ids, draft_ids)
        assert drafted.end == ReasoningTracker(either, thinking).advance(output_ids + draft_ids).end
        assert (tracker.advance(output_ids).end is not None) == (detokenizer._state == "content"), (place, output_ids)


@pytest.mark.parametrize("thinking", [True, None])
def test_thinking_is_closed_after_so_many_tokens(either: Tokenizer, thinking: bool | None) -> None:
    opening = [] if thinking else list(either.encode_cached("<think>"))
    processor = ThinkBudget(either, thinking, 5)
    output_ids = list(opening)
    tag = think_close_ids(either)
    for place in range(5 + len(tag) + 3):
        logits = processed(processor, output_ids, [], vocab=either.vocab_size)
        forced = np.flatnonzero(np.isfinite(logits)).tolist()
        inside = 5 <= place < 5 + len(tag)
        assert (forced == [tag[place - 5]]) if inside else len(forced) == either.vocab_size
        if not opening and len(output_ids) < processor.starts_at:
            assert not inside
        output_ids.append(forced[0] if inside else either.encode("a")[0])
    drafted = processed(
        ThinkBudget(either, thinking, 5),
        output_ids[: len(opening) + 3],
        output_ids[len(opening) + 3 : len(opening) + 5],
        vocab=either.vocab_size,
    )
    assert np.flatnonzero(np.isfinite(drafted)).tolist() == [tag[0]]


def test_thinking_that_ends_by_itself_is_left_alone(either: Tokenizer) -> None:
    processor = ThinkBudget(either, True, 5)
    output_ids = [either.encode("a")[0], *think_close_ids(either), *either.encode("a cat a cat")]
    assert np.isfinite(processed(processor, output_ids, [], vocab=either.vocab_size)).all()
    processor = ThinkBudget(either, None, 5)
    assert np.isfinite(processed(processor, either.encode("a cat on a mat"), [], vocab=either.vocab_size)).all()


def test_rules_come_in_their_order_and_plain_requests_carry_none(tokenizer: Tokenizer) -> None:
    grammars = GrammarCache(tokenizer, frozenset({tokenizer.special_ids.eos}))
    assert build_processors(Sampling(min_think_tokens=3, thinking=True, stop=("x",)), [1], tokenizer, grammars) == ()
    prompts = []

    def own(prompt: object) -> Processor:
        prompts.append(prompt)
        return ThinkBudget(tokenizer, True, 1)

    sampling = Sampling(
        logit_bias={3: -100, 5: 2.5}, presence_penalty=1, bad_words=("cat",), max_think_tokens=9, processors=(own,)
    )
    processor = build_processors(sampling, [1, 2], tokenizer, grammars)
    assert [type(one).__name__ for one in processor] == [
        "LogitBias",
        "Penalties",
        "BadWords",
        "ThinkBudget",
        "ThinkBudget",
    ]
    assert prompts == [[1, 2]]
    raw = np.zeros(tokenizer.vocab_size, np.float32)
    processor[0].apply(raw, [], [])
    assert (raw[3], raw[5], raw[4]) == (-100, 2.5, 0)
    again = build_processors(sampling, [1, 2], tokenizer, grammars)
    assert not {id(one) for one in processor} & {id(one) for one in again}


def lacking() -> object:
    """Raises where the step would read it."""
    raise ValueError("not yet")


RIGHT = {"starts_at": 0, "supports_drafts": True, "apply": lambda self, logits_V, output_ids, draft_ids: None}
OLD = {"wakes": 0, "speculates": True, "apply": RIGHT["apply"]}


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        (OLD, "no usable starts_at, supports_drafts.*was wakes.*was speculates"),
        ({**RIGHT, "apply": None}, "no usable apply"),
        ({name: value for name, value in RIGHT.items() if name != "apply"}, "no usable apply"),
        *[
            ({**RIGHT, "starts_at": value}, "no usable starts_at \\(")
            for value in (None, "0", 1.0, True, -1, 2**63, np.nan)
        ],
        *[({**RIGHT, "supports_drafts": value}, "no usable supports_drafts") for value in (None, "no", np.ones(2))],
        ({**RIGHT, "starts_at": property(lambda self: lacking())}, "cannot be made: ValueError: not yet"),
    ],
)
def test_a_processor_that_a_step_cannot_read_is_refused_and_its_neighbors_go_on(
    model: Transformer, tokenizer: Tokenizer, attributes: dict[str, object], words: str
) -> None:
    engine = Engine(model, tokenizer)
    neighbor = engine.submit("hi", Sampling(max_tokens=2))
    with pytest.raises(EngineError, match=words) as caught:
        engine.submit("ho", Sampling(max_tokens=2, processors=(lambda prompt: type("Own", (), attributes)(),)))
    assert caught.value.where == "processors"
    assert len(neighbor.result().token_ids) > 0 and engine.check() == []


@pytest.mark.parametrize("number", [0, np.int32(3), 2**63 - 1])
def test_whole_numbers_and_truth_values_of_numpy_are_read_too(tokenizer: Tokenizer, number: int) -> None:
    made = type("Own", (), {**RIGHT, "starts_at": number, "supports_drafts": np.False_})()
    sampling = Sampling(processors=(lambda prompt: made,))
    assert build_processors(sampling, [1], tokenizer, GrammarCache(tokenizer, frozenset())) == (made,)


@pytest.mark.parametrize("name", ["logit_bias", "bad_words", "stop_token_ids"])
def test_an_id_that_the_tokenizer_lacks_is_refused_before_it_costs_anything(tokenizer: Tokenizer, name: str) -> None:
    value = {"logit_bias": {9999: 1}, "bad_words": ((1, 9999),), "stop_token_ids": (9999,)}[name]
    with pytest.raises(EngineError, match="token 9999") as caught:
        build_processors(Sampling(**{name: value}), [1], tokenizer, GrammarCache(tokenizer, frozenset()))  # type: ignore[arg-type]
    assert caught.value.where == name
