"""The sampler: each row its own settings, its own rules and its own noise, whoever is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as GenericSequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.sampling.sampler import Sampler
from sprat.engine.sampling_params import Processor
from sprat.engine.sequence import Sampling, Sequence, noise_key
from sprat.errors import EngineError
from sprat.tokens import Tokenizer


def sampler_of(
    tokenizer: Tokenizer, *samplings: Sampling, min_think_tokens: int = 0, rules: Any = ()
) -> tuple[Sampler, list[Sequence]]:
    """A sampler whose slots hold one request each."""
    sampler = Sampler(tokenizer, len(samplings), frozenset({tokenizer.special_ids.eos}))
    sequences = []
    for slot, sampling in enumerate(samplings):
        sequence = Sequence(
            slot, [1], sampling, 9, noise_key(sampling.seed, slot, [1]), min_think_tokens=min_think_tokens
        )
        sequence.processors = tuple(rules)
        sequences.append(sequence)
        sampler.add(slot, sequence)
    return sampler, sequences


def logits_of(rows: int, tokenizer: Tokenizer, seed: int = 0, more: int = 7) -> Tensor:
    """Logits of a model that has some ids more than its tokenizer."""
    return torch.randn(rows, tokenizer.vocab_size + more, generator=torch.Generator().manual_seed(seed)) * 3


class Only:
    """Allows one token."""

    supports_drafts = True

    def __init__(self, token: int, starts_at: int = 0) -> None:
        self.token, self.starts_at = token, starts_at
        self.seen: list[tuple[list[int], list[int]]] = []

    def apply(
        self, logits_V: NDArray[np.float32], output_ids: GenericSequence[int], draft_ids: GenericSequence[int]
    ) -> None:
        """Ban the others."""
        self.seen.append((list(output_ids), list(draft_ids)))
        logits_V[np.arange(len(logits_V)) != self.token] = -np.inf


class Broken:
    """Fails as foreign code can."""

    starts_at, supports_drafts = 0, False

    def __init__(self, fault: Any) -> None:
        self.fault = fault

    def apply(
        self, logits_V: NDArray[np.float32], output_ids: GenericSequence[int], draft_ids: GenericSequence[int]
    ) -> None:
        """Raise, or leave nothing that can be sampled."""
        if isinstance(self.fault, Exception):
            raise self.fault
        logits_V.fill(self.fault)


def test_logprobs_are_those_of_the_whole_distribution_whatever_was_cut(tokenizer: Tokenizer) -> None:
    logits = logits_of(4, tokenizer)
    samplings = [
        Sampling(temperature=0.6, logprobs=True),
        Sampling(temperature=1.5, top_k=3, top_p=0.8, logprobs=True, top_logprobs=20),
        Sampling(temperature=0, logprobs=True, top_logprobs=2),
        Sampling(temperature=1, min_p=0.2, logprobs=True),
    ]
    temperature = torch.tensor([0.6, 1.5, 1.0, 1.0])
    whole = (logits / temperature[:, None]).log_softmax(-1)
    before = logits.clone()
    for min_think_tokens, rules in ((0, ()), (1, ()), (0, (Only(17),))):
        sampler, _ = sampler_of(tokenizer, *samplings, min_think_tokens=min_think_tokens, rules=rules)
        samples = sampler.sample(logits, np.arange(4))
        assert samples.logprobs_R is not None and samples.logprobs_R.dtype == np.float32
        expected = whole.gather(1, torch.from_numpy(samples.tokens_R)[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(samples.logprobs_R), expected, atol=2e-6, rtol=1e-6)
        assert sorted(samples.top_logprobs) == [1, 2] and not samples.errors
        for row, count in ((1, 20), (2, 2)):
            values, ids = whole[row].topk(count)
            assert [index for index, _ in samples.top_logprobs[row]] == ids.tolist()
            torch.testing.assert_close(
                torch.tensor([p for _, p in samples.top_logprobs[row]]), values, atol=2e-6, rtol=1e-6
            )
    assert torch.equal(logits, before)


def test_banned_and_padded_tokens_never_come_out(tokenizer: Tokenizer) -> None:
    logits = torch.zeros(60, tokenizer.vocab_size + 3)
    logits[:, [tokenizer.special_ids.eos, tokenizer.special_ids.think_close]] = 50
    logits[:, -1] = 60
    for temperature in (0.0, 1.0):
        sampler, _ = sampler_of(tokenizer, *[Sampling(temperature=temperature)] * 60, min_think_tokens=2)
        slots = np.arange(60)
        ends = {tokenizer.special_ids.eos, tokenizer.special_ids.think_close}
        for _ in range(2):
            tokens = sampler.sample(logits, slots).tokens_R
            assert not set(tokens.tolist()) & ends and tokens.max() < tokenizer.vocab_size
            sampler.advance(slots)
        assert set(sampler.sample(logits, slots).tokens_R.tolist()) <= ends
        assert set(sampler.sample(logits[:1], slots[:1]).tokens_R.tolist()) <= ends


def test_a_request_samples_the_same_alone_and_in_a_crowd(tokenizer: Tokenizer) -> None:
    logits = logits_of(4, tokenizer, 4)
    samplings = [
        Sampling(temperature=0),
        Sampling(seed=5),
        Sampling(temperature=0.3, top_k=2, seed=6),
        Sampling(top_p=0.7),
    ]
    sampler, _ = sampler_of(tokenizer, *samplings)
    together = sampler.sample(logits, np.arange(4)).tokens_R.tolist()
    assert together[0] == int(logits[0, : tokenizer.vocab_size].argmax())
    assert sampler.sample(logits.flip(0), np.arange(4)[::-1].copy()).tokens_R.tolist() == together[::-1]
    for slot in range(4):
        alone = sampler.sample(logits[slot : slot + 1], np.array([slot]))
        assert alone.tokens_R.dtype == np.int64 and alone.tokens_R.tolist() == [together[slot]]


def test_noise_depends_on_the_seed_the_prompt_and_which_of_its_answers_it_is(tokenizer: Tokenizer) -> None:
    keys = [noise_key(seed, stream, prompt) for seed in (0, 1) for stream in (0, 1) for prompt in ([1], [1, 2], [2, 1])]
    assert len(set(keys)) == 12 and all(0 <= key < 2**64 for key in keys)
    flat = torch.zeros(1, tokenizer.vocab_size)
    sampler, _ = sampler_of(tokenizer, *[Sampling(seed=seed) for seed in range(50)])
    tokens = sampler.sample(flat.expand(50, -1), np.arange(50)).tokens
    assert len(set(tokens)) > 35, "of some 500 equal tokens, 50 draws repeat about three"


def test_noise_follows_the_answer_and_a_request_that_comes_back_goes_on_where_it_was(tokenizer: Tokenizer) -> None:
    sampler, sequences = sampler_of(tokenizer, *[Sampling(seed=3)] * 2)
    flat, slots = torch.zeros(1, tokenizer.vocab_size), np.array([0])
    output_ids = []
    for _ in range(6):
        output_ids.append(int(sampler.sample(flat, slots).tokens_R[0]))
        sequences[0].output_ids.append(output_ids[-1])
        sampler.advance(slots)
    assert len(set(output_ids)) > 2
    sequences[0].output_ids = output_ids[:4]
    sampler.remove(0)
    sampler.add(1, sequences[0])
    assert sampler.sample(flat, np.array([1])).tokens_R[0] == output_ids[4]


def test_rows_with_drafts_before_them_are_sampled_as_if_the_drafts_were_settled(tokenizer: Tokenizer) -> None:
    sampling = Sampling(seed=8, presence_penalty=2, frequency_penalty=1)
    from sprat.engine.sampling.penalties import Penalties

    def fresh() -> tuple[Sampler, list[Sequence]]:
        return sampler_of(tokenizer, sampling, rules=(Penalties(sampling, [1], tokenizer.vocab_size),))

    logits = logits_of(5, tokenizer, 9)
    sampler, sequences = fresh()
    plain = []
    for row in range(5):
        plain.append(int(sampler.sample(logits[row : row + 1], np.array([0])).tokens_R[0]))
        sequences[0].output_ids.append(plain[-1])
        sampler.advance(np.array([0]))
    sampler, sequences = fresh()
    for wrong in ([5, 5, 5, 5], plain[:4]):  # a refused draft leaves no trace
        samples = sampler.sample(logits, np.zeros(5, np.int64), np.arange(5), {0: wrong})
    assert samples.tokens_R.tolist() == plain


def test_a_processor_sleeps_until_it_can_matter_and_sees_what_was_said(tokenizer: Tokenizer) -> None:
    rule = Only(33, starts_at=2)
    sampler, sequences = sampler_of(tokenizer, Sampling(temperature=0), rules=(rule,))
    logits, slots = logits_of(1, tokenizer), np.array([0])
    for token in (4, 5):
        assert sampler.sample(logits, slots).tokens_R[0] == int(logits[0, : tokenizer.vocab_size].argmax())
        sequences[0].output_ids.append(token)
        sampler.advance(slots)
    assert not rule.seen
    assert sampler.sample(logits, slots).tokens_R[0] == 33 and rule.seen == [([4, 5], [])]
    samples = sampler.sample(logits.expand(3, -1), np.zeros(3, np.int64), np.arange(3), {0: [7, 8]})
    assert rule.seen[1:] == [([4, 5], []), ([4, 5], [7]), ([4, 5], [7, 8])] and samples.tokens_R.tolist() == [33] * 3


@pytest.mark.parametrize(
    "fault", [ValueError("oops"), EngineError("too hard", where="response"), -np.inf, np.nan, np.inf]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_rule_fails_its_own_request_alone(tokenizer: Tokenizer, temperature: float, fault: Any) -> None:
    rules: tuple[Processor, ...] = (Broken(fault),)
    sampler, _ = sampler_of(tokenizer, Sampling(temperature=temperature), rules=rules)
    assert not sampler.supports_drafts[0]
    assert list(sampler.sample(logits_of(1, tokenizer), np.array([0])).errors) == [0]
    sampler, _ = sampler_of(tokenizer, *[Sampling(temperature=temperature, seed=2)] * 3)
    logits = logits_of(3, tokenizer)
    plain = sampler.sample(logits, np.arange(3)).tokens_R
    sequence = Sequence(9, [1], Sampling(temperature=temperature), 9, 1)
    sequence.processors = rules
    sampler.add(1, sequence)
    samples = sampler.sample(logits, np.arange(3))
    assert list(samples.errors) == [1] and isinstance(samples.errors[1], EngineError)
    assert samples.tokens_R[[0, 2]].tolist() == plain[[0, 2]].tolist()


class Returns(Only):
    """Ends with what another library's rule ends with."""

    def __init__(self, given: Callable[[NDArray[np.float32]], object]) -> None:
        super().__init__(33)
        self.given = given

    def apply(  # type: ignore[override]
        self, logits_V: NDArray[np.float32], output_ids: GenericSequence[int], draft_ids: GenericSequence[int]
    ) -> object:
        """Change the logits, and return what nobody asked for."""
        super().apply(logits_V, output_ids, draft_ids)
        return self.given(logits_V)


@pytest.mark.parametrize("given", [np.zeros_like, lambda logits_V: logits_V[:], lambda logits_V: torch.ones(3), list])
def test_a_rule_that_returns_its_logits_is_refused_alone(
    tokenizer: Tokenizer, given: Callable[[NDArray[np.float32]], object]
) -> None:
    sampler, _ = sampler_of(tokenizer, *[Sampling(temperature=0)] * 2)
    sequence = Sequence(9, [1], Sampling(temperature=0), 9, 1)
    sequence.processors = (Returns(given),)
    sampler.add(1, sequence)
    samples = sampler.sample(logits_of(2, tokenizer), np.arange(2))
    assert list(samples.errors) == [1]
    assert "Returns.apply returned a" in str(samples.errors[1]) and "in place" in samples.errors[1].todo
    sequence.processors = (Returns(lambda logits_V: logits_V),)  # as ``np.add(…, out=logits_V)`` does
    samples = sampler.sample(logits_of(2, tokenizer), np.arange(2))
    assert samples.errors == {} and samples.tokens[1] == 33


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rules", [(), (Only(3),)])
def test_a_broken_model_is_named_and_not_sampled(
    tokenizer: Tokenizer, temperature: float, rules: tuple[Processor, ...]
) -> None:
    logits = logits_of(3, tokenizer)
    sampler, _ = sampler_of(tokenizer, *[Sampling(temperature=temperature, logprobs=True)] * 3, rules=rules)
    plain = sampler.sample(logits, np.arange(3))
    logits[1, 3] = torch.nan
    with pytest.raises(EngineError, match="not finite"):
        sampler.sample(logits[1:2], np.arange(1, 2))
    samples = sampler.sample(logits, np.arange(3))
    assert list(samples.errors) == [1] and "not finite" in str(samples.errors[1])
    assert samples.logprobs_R is not None and plain.logprobs_R is not None
    for row in (0, 2):
        assert (samples.tokens[row], samples.logprobs_R[row]) == (plain.tokens[row], plain.logprobs_R[row])
