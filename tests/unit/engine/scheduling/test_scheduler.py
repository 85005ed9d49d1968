"""Nobody starves, nobody waits for ever, and whoever has to make way says in the end what it would have said."""

from __future__ import annotations

from typing import Any

import pytest

from sprat.engine import Engine, Sampling, Tenant
from sprat.engine.backend import BLOCK_SIZE
from sprat.errors import EngineError
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake

A, B = Tenant("a"), Tenant("b")
LONG = [7 + place % 90 for place in range(150)]


def engine_of(model: Transformer, tokenizer: Tokenizer, **settings: Any) -> tuple[Engine, Fake]:
    fake = Fake(model.config.vocab_size)
    return Engine(model, tokenizer, backend=fake, speculate="off", **settings), fake


def test_one_request_is_not_starved_by_a_thousand(model: Transformer, tokenizer: Tokenizer) -> None:
    engine, _ = engine_of(model, tokenizer, max_batch=2)
    how = Sampling(temperature=0, max_tokens=4)
    for number in range(1000):
        engine.add([5, number % 400], how, tenant=A)
    engine.step()
    single = engine.add([6, 6], how, tenant=B)
    order: list[int] = []
    while single not in order:
        order += [handle.id for handle in engine.step()]
    assert order.index(single) <= 3


def test_a_long_prompt_does_not_hold_up_a_short_one(drafter: Transformer, tokenizer: Tokenizer) -> None:
    engine, fake = engine_of(drafter, tokenizer, step_tokens=64)
    engine.add([5 + place % 300 for place in range(3000)], Sampling(temperature=0, max_tokens=1), tenant=A)
    engine.step()
    engine.step()
    short = engine.add([5, 6, 7], Sampling(temperature=0, max_tokens=1), tenant=B)
    assert [handle.id for handle in engine.step()] == [short]
    while engine.busy:
        engine.step()
    assert max(len(batch.tokens_T) for batch in fake.batches) <= 64
    assert len(fake.batches) <= 3000 // 64 + 3


def test_answers_go_on_while_a_prompt_is_read(drafter: Transformer, tokenizer: Tokenizer) -> None:
    engine, fake = engine_of(drafter, tokenizer, step_tokens=100)
    talking = engine.submit([5, 6, 7], Sampling(temperature=0, max_tokens=40))
    engine.step()
    engine.add([5 + place % 300 for place in range(1000)], Sampling(temperature=0, max_tokens=1))
    before = len(talking.sequence.output_ids)
    for _ in range(8):
        engine.step()
    assert len(talking.sequence.output_ids) == before + 8
    assert all(len(batch.tokens_T) == 100 for batch in fake.batches[1:9])


@pytest.mark.parametrize("step_tokens", [1, 64, 70, 1000])
def test_a_prompt_in_pieces_says_what_a_whole_one_says(
    drafter: Transformer, tokenizer: Tokenizer, step_tokens: int
) -> None:
    how = Sampling(max_tokens=12, seed=2, logprobs=True)
    whole = Engine(drafter, tokenizer, step_tokens=4096).generate([LONG, LONG[:65]], how)
    pieces = Engine(drafter, tokenizer, step_tokens=step_tokens).generate([LONG, LONG[:65]], how)
    for one, other in zip(whole, pieces, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_makes_way_says_the_same_in_the_end(drafter: Transformer, tokenizer: Tokenizer, temperature: float) -> None:
    how = [Sampling(temperature=temperature, max_tokens=130, seed=seed, logprobs=True) for seed in range(4)]
    prompts = [LONG[seed : seed + 60] for seed in range(4)]
    roomy = Engine(drafter, tokenizer)
    tight = Engine(drafter, tokenizer, cache_bytes=6 * roomy.backend.block_bytes)
    free = roomy.generate(prompts, how)
    crowded = tight.generate(prompts, how)
    assert [one.token_ids for one in crowded] == [one.token_ids for one in free]
    for one, other in zip(crowded, free, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert roomy.stats().preemptions == 0 < tight.stats().preemptions
    assert tight.stats().blocks <= 6 and tight.check() == []


def test_the_youngest_of_the_most_served_tenant_makes_way_and_comes_back_first(
    drafter: Transformer, tokenizer: Tokenizer
) -> None:
    # Five blocks. A's two requests and B's one hold one each until they have 64 tokens; then all need a second one. By
    # hand: A was served twice what B was, so B and A's older request get theirs, and A's younger one makes way.
    engine, _ = engine_of(drafter, tokenizer, cache_bytes=5 * Fake.block_bytes, max_batch=3)
    how = Sampling(temperature=0, max_tokens=100, logit_bias={tokenizer.special_ids.eos: -100})
    older, younger = (engine.add([5, number], how, tenant=A) for number in (1, 2))
    single = engine.add([6, 3], how, tenant=B)
    waits = engine.add([7, 4], how, tenant=A)
    while not engine.stats().preemptions:
        engine.step()
    scheduler = engine.core.scheduler
    assert sorted(sequence.id for sequence in scheduler.running) == [older, single]
    assert [sequence.id for sequence in scheduler.queue.waiting] == [younger, waits]
    order: list[int] = []
    while engine.busy:
        order += [handle.id for handle in engine.step()]
    assert order[-1] == waits and engine.check() == []


def test_the_oldest_keeps_its_place_though_a_stranger_is_younger(drafter: Transformer, tokenizer: Tokenizer) -> None:
    engine, _ = engine_of(drafter, tokenizer, cache_bytes=3 * Fake.block_bytes)
    how = Sampling(temperature=0, max_tokens=100, logit_bias={tokenizer.special_ids.eos: -100})
    served = engine.add([5 + place % 90 for place in range(60)], how, tenant=A)  # 60 tokens to B's 2
    stranger = engine.add([6, 3], how, tenant=B)
    while not engine.stats().preemptions and engine.busy:
        engine.step()
    assert [sequence.id for sequence in engine.core.scheduler.running] == [stranger]
    assert [sequence.id for sequence in engine.core.scheduler.queue.waiting] == [served]


def test_tenants_are_served_alike_and_absence_earns_nothing(model: Transformer, tokenizer: Tokenizer) -> None:
    engine, _ = engine_of(model, tokenizer, max_batch=1)
    how = Sampling(temperature=0, max_tokens=4, logit_bias={tokenizer.special_ids.eos: -100})
    short = Sampling(temperature=0, max_tokens=1)
    first = [engine.add([5, number], how, tenant=A) for number in range(6)]
    ended: list[int] = []
    while len(ended) < 3:
        ended += [handle.id for handle in engine.step()]
    late = [engine.add([6, number], how, tenant=B) for number in range(6)]  # from now on turn by turn, not six at once
    while engine.busy:
        ended += [handle.id for handle in engine.step()]
    turns = ["A" if number in first else "B" for number in ended[3:]]
    assert turns.count("B") == 6 and "".join(turns).index("BBB") >= 5
    # A prompt of 190 tokens counts: while B's are short, it has many turns before A's next one.
    long = [engine.add([9, *range(5, 150)], short, tenant=A), engine.add([8, *range(5, 150)], short, tenant=A)]
    many = [engine.add([7, number], short, tenant=B) for number in range(9)]
    ended = []
    while engine.busy:
        ended += [handle.id for handle in engine.step()]
    assert ended == [long[0], *many, long[1]] and late


def test_what_is_answered_counts_as_what_is_asked(model: Transformer, tokenizer: Tokenizer) -> None:
    engine, _ = engine_of(model, tokenizer, max_batch=1)
    bias = {tokenizer.special_ids.eos: -100}
    many, one = (Sampling(temperature=0, max_tokens=count, logit_bias=bias) for count in (40, 1))
    long = [engine.add([5, number], many, tenant=A) for number in range(2)]
    short = [engine.add([6, number], one, tenant=B) for number in range(9)]
    ended: list[int] = []
    while engine.busy:
        ended += [handle.id for handle in engine.step()]
    assert ended == [long[0], *short, long[1]]  # 2 + 39 tokens of A, then 9 times 2 of B


def test_siblings_compute_their_prompt_once_and_share_its_blocks(model: Transformer, tokenizer: Tokenizer) -> None:
    engine, fake = engine_of(model, tokenizer, max_batch=32)
    outputs = engine.generate([LONG, LONG[:64], LONG[:63]], Sampling(max_tokens=20, n=8))
    assert sum(len(batch.tokens_T) for batch in fake.batches[:1]) == 150 + 64 + 63
    assert len({tuple(output.token_ids) for output in outputs}) == 24
    first = fake.batches[1].block_tables_SW
    assert len(set(first[:8, :2].ravel().tolist())) == 2 and len(set(first[:8, 2].tolist())) == 8
    assert len(set(first[8:16, 0].tolist())) == 1 and len(set(first[16:24, 0].tolist())) == 8
    assert engine.check() == []


def test_a_cancelled_request_frees_its_blocks_within_one_step(drafter: Transformer, tokenizer: Tokenizer) -> None:
    engine, _ = engine_of(drafter, tokenizer, step_tokens=100)
    how = Sampling(temperature=0, max_tokens=50)
    answering, reading, waiting = (engine.add(prompt, how) for prompt in (LONG, LONG * 5, LONG * 4))
    engine.step()
    engine.step()
    assert engine.stats().blocks_used >= 3
    for number in (answering, reading, waiting):
        assert engine.cancel(number)
    engine.step()
    assert engine.stats().blocks_used == 0 and not engine.busy and engine.check() == []


def test_a_request_that_can_never_fit_is_refused_at_once(drafter: Transformer, tokenizer: Tokenizer) -> None:
    engine, fake = engine_of(drafter, tokenizer, cache_bytes=3 * Fake.block_bytes)
    with pytest.raises(EngineError, match=f"exceed the memory for {3 * BLOCK_SIZE}"):
        engine.submit(LONG, Sampling(max_tokens=50))
    assert engine.generate([LONG], Sampling(max_tokens=42))[0].token_ids
    with pytest.raises(EngineError, match="one block needs"):
        engine_of(drafter, tokenizer, cache_bytes=1)
    assert engine.check() == []


def test_memory_that_turns_out_smaller_fails_only_what_cannot_run(drafter: Transformer, tokenizer: Tokenizer) -> None:
    fake = Fake(drafter.config.vocab_size, max_blocks=16)
    engine = Engine(drafter, tokenizer, backend=fake, speculate="off")
    large = engine.submit([5 + place % 300 for place in range(1200)], Sampling(max_tokens=5))
    small = [engine.submit(LONG, Sampling(max_tokens=40, seed=seed)) for seed in range(9)]
    for handle in small:
        assert handle.result().finish_reason in ("length", "stop")
    with pytest.raises(EngineError, match="do not fit into the memory"):
        large.result()
    assert engine.check() == [] and not engine.busy


@pytest.mark.parametrize("fault", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_a_step_that_fails_leaves_a_clean_engine(
    model: Transformer, tokenizer: Tokenizer, fault: BaseException
) -> None:
    engine, fake = engine_of(model, tokenizer, max_batch=1)
    running, waiting = (engine.submit([5, seed], Sampling(max_tokens=9, seed=seed)) for seed in range(2))
    engine.step()
    fake.fails = fault
    with pytest.raises(KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else EngineError):
        engine.step()
    fake.fails = None
    with pytest.raises(EngineError, match="out of luck|interrupted"):
        running.result()
    assert waiting.result().token_ids and engine.check() == [] and not engine.busy
    assert engine.stats().blocks_used == 0


def test_an_interrupted_call_leaves_nothing_behind(model: Transformer, tokenizer: Tokenizer) -> None:
    engine, fake = engine_of(model, tokenizer)
    fake.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.generate([LONG[:5]] * 3, Sampling(max_tokens=9))
    fake.fails = None
    assert not engine.busy and engine.check() == []
