"""The engine: same answers alone and in a crowd, nothing leaked, one clear sentence for what cannot be."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.engine import Engine, Output, Sampling
from sprat.errors import EngineError
from sprat.model import Transformer
from sprat.tokens import Message, Tokenizer, render, split_reasoning

QUESTIONS = ["what is it?", "the cat", "12 + 13 = ", "is it a cat? the cat sat on the mat; it is a cat.", "é"]


def greedy_naively(model: Transformer, ids: list[int], count: int, end: int, vocab: int) -> list[int]:
    """Argmax over the whole forward pass, token by token."""
    said: list[int] = []
    with torch.no_grad():
        while len(said) < count and end not in said:
            said.append(int(model(torch.tensor([ids + said]))[0, -1, :vocab].argmax()))
    return said


def test_greedy_answers_are_those_of_a_plain_argmax_loop(model: Transformer, tokenizer: Tokenizer) -> None:
    outputs = Engine(model, tokenizer, max_batch=3).generate(QUESTIONS, Sampling(temperature=0, max_tokens=12))
    for question, output in zip(QUESTIONS, outputs, strict=True):
        ids = render(tokenizer, [Message("user", question)])
        assert output.prompt_ids == ids
        assert output.token_ids == greedy_naively(model, ids, 12, tokenizer.special_ids.eos, tokenizer.vocab_size)


def test_the_same_seed_says_the_same_alone_and_in_a_crowd(model: Transformer, tokenizer: Tokenizer) -> None:
    how = [Sampling(max_tokens=20, seed=s, thinking=s % 2 == 0, temperature=0.9, logprobs=True) for s in range(5)]
    crowd = Engine(model, tokenizer, max_batch=2).generate(QUESTIONS, how)
    for question, one, output in zip(QUESTIONS, how, crowd, strict=True):
        alone = Engine(model, tokenizer).generate([question], one)[0]
        assert alone.token_ids == output.token_ids
        assert alone.logprobs == pytest.approx(output.logprobs, abs=1e-4)
    other = Engine(model, tokenizer).generate(QUESTIONS, Sampling(max_tokens=20, seed=77))
    assert [o.token_ids for o in other] != [o.token_ids for o in crowd]


def test_logprobs_are_what_a_trainer_recomputes(model: Transformer, tokenizer: Tokenizer) -> None:
    how = Sampling(max_tokens=15, temperature=0.8, top_p=0.9, thinking=True, logprobs=True, seed=4)
    for output in Engine(model, tokenizer).generate(QUESTIONS, how):
        ids = torch.tensor([output.prompt_ids + output.token_ids])
        with torch.no_grad():
            logprob = (model(ids)[0, :-1] / 0.8).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert output.logprobs == pytest.approx(logprob[len(output.prompt_ids) - 1 :].tolist(), abs=1e-4)


def test_samples_of_one_prompt_share_its_prefill_and_differ(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_batch=8)
    outputs = engine.generate(QUESTIONS[:2], Sampling(max_tokens=10, n=4))
    assert len({tuple(o.token_ids) for o in outputs}) == 8
    repeated = engine.generate([q for q in QUESTIONS[:2] for _ in range(4)], Sampling(max_tokens=10))
    assert [o.token_ids for o in repeated] == [o.token_ids for o in outputs]
    for at, output in enumerate(outputs):
        usage = output.usage
        assert usage.cache_hit_tokens == (usage.prompt_tokens if at % 4 else 0)
        assert usage.cache_hit_tokens + usage.cache_miss_tokens == usage.prompt_tokens == len(output.prompt_ids)
        assert usage.completion_tokens == len(output.token_ids)
    assert engine.check() == []


def test_forced_thinking_never_ends_before_it_began(model: Transformer, tokenizer: Tokenizer) -> None:
    close, end = tokenizer.special_ids.think_close, tokenizer.special_ids.eos
    eager = Transformer.create(model.config, 3)
    with torch.no_grad():
        eager.head.weight.zero_()
        eager.head.weight[close] = eager.norm.weight
        eager.embed_tokens.weight.fill_(1.0)  # with constant inputs the head now likes </think> best
    for floor in (0, 4):
        how = Sampling(temperature=0, max_tokens=8, thinking=True, min_think_tokens=floor)
        for output in Engine(eager, tokenizer).generate(QUESTIONS, how):
            first = max(1, floor)
            assert not {close, end} & set(output.token_ids[:first])
    plain = Engine(model, tokenizer).generate(QUESTIONS * 4, Sampling(max_tokens=25, thinking=True))
    for output in plain:
        answer = split_reasoning(tokenizer, output.token_ids, thinking=True)
        assert (output.reasoning, output.text, output.closed) == (answer.reasoning, answer.content, answer.closed)
        said = output.token_ids
        inside = said[: said.index(close)] if close in said else said
        assert output.usage.reasoning_tokens == len([t for t in inside if t != end])


def test_a_stream_says_what_generate_says(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    for seed in range(3):
        how = Sampling(max_tokens=30, seed=seed, thinking=(None, True, False)[seed % 3], temperature=1.2)
        pieces = list(engine.stream(QUESTIONS[1], how))
        whole = engine.generate([QUESTIONS[1]], how)[0]
        assert pieces[-1].kind == "done" and pieces[-1].output == whole
        assert "".join(p.text for p in pieces if p.kind == "content") == whole.text
        assert "".join(p.text for p in pieces if p.kind == "reasoning") == whole.reasoning


def test_a_stop_string_ends_the_request_and_is_cut(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    how = Sampling(max_tokens=40, seed=3, thinking=False)
    whole = engine.generate([QUESTIONS[0]], how)[0]
    stop = whole.text[6:9]
    cut = engine.generate([QUESTIONS[0]], Sampling(max_tokens=40, seed=3, thinking=False, stop=(stop,)))[0]
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < len(whole.token_ids)
    assert engine.check() == [] and not engine.busy


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_requests_come_and_go_in_any_order_and_no_row_leaks(
    model: Transformer, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    engine = Engine(model, tokenizer, max_batch=3, step_tokens=20)
    alive: list[int] = []
    finished: dict[int, Output] = {}
    submitted = 0
    for action in data.draw(st.lists(st.sampled_from(["add", "add", "step", "step", "step", "cancel"]), max_size=25)):
        if action == "add":
            how = Sampling(max_tokens=data.draw(st.integers(1, 6)), seed=submitted)
            alive.append(engine.add(data.draw(st.sampled_from(QUESTIONS)), how))
            submitted += 1
        elif action == "cancel" and alive:
            assert engine.cancel(number := alive.pop(data.draw(st.integers(0, len(alive) - 1)))) or number in finished
        else:
            finished |= {handle.id: handle.result() for handle in engine.step()}
        assert engine.check() == []
    while engine.busy:
        finished |= {handle.id: handle.result() for handle in engine.step()}
    assert engine.check() == [] and set(alive) <= set(finished)
    assert engine.stats().blocks_used == 0
    assert not engine.cancel(10**6)


def test_a_cancelled_request_keeps_what_it_said(model: Transformer, tokenizer: Tokenizer) -> None:
    engine, stop = Engine(model, tokenizer, max_batch=1), threading.Event()
    stream = engine.stream(QUESTIONS[0], Sampling(max_tokens=60, thinking=False), stop)
    queued = engine.submit(QUESTIONS[1], Sampling(max_tokens=60), cancel=stop)
    first = next(stream)
    stop.set()
    last = list(stream)[-1]
    assert first.kind == "content" and last.output is not None
    assert last.output.finish_reason == "cancelled" and last.output.text.startswith(first.text)
    assert queued.result().finish_reason == "cancelled" and queued.result().token_ids == []
    assert engine.check() == [] and not engine.busy
    abandoned = engine.stream(QUESTIONS[0], Sampling(max_tokens=60))
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    engine.step()
    assert not engine.busy


def test_many_threads_share_one_running_engine(model: Transformer, tokenizer: Tokenizer) -> None:
    expected = [Engine(model, tokenizer).generate([q], Sampling(max_tokens=15, seed=9))[0].token_ids for q in QUESTIONS]
    engine = Engine(model, tokenizer, max_batch=3)
    engine.start()
    got: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        question, how = QUESTIONS[number % 5], Sampling(max_tokens=15, seed=9)
        if number % 2:
            got[number] = engine.generate([question], how)[0].token_ids
        else:
            output = list(engine.stream(question, how))[-1].output
            got[number] = output.token_ids if output else []

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    left = engine.submit(QUESTIONS[0], Sampling(max_tokens=150, temperature=0))
    engine.stop()
    assert left.result().finish_reason in ("cancelled", "stop", "length")
    assert got == {number: expected[number % 5] for number in range(10)}
    assert engine.check() == [] and not engine.busy


def test_a_prompt_longer_than_one_step_computes_still_runs(model: Transformer, tokenizer: Tokenizer) -> None:
    long = [tokenizer.special_ids.bos, *tokenizer.encode("the cat sat on the mat; " * 9)]
    long = (long * 5)[:180]
    how = Sampling(temperature=0, max_tokens=None)
    output = Engine(model, tokenizer, step_tokens=8).generate([long, QUESTIONS[0]], how)[0]
    room = model.config.max_position_embeddings - len(long)
    assert output.token_ids == greedy_naively(model, long, room, tokenizer.special_ids.eos, tokenizer.vocab_size)


def test_what_cannot_be_asked_is_one_clear_sentence(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_tokens_cap=50)
    short = Sampling(max_tokens=5)
    for prompt, how, words in [
        ("", short, "empty"),
        ("  ", short, "empty"),
        ([], short, "empty"),
        ([Message("user", "")], short, "empty"),
        ([10**6], short, "no token"),
        ([-1], short, "no token"),
        (["a"], short, "no token of this model.*sprat.tokens.Message"),
        ([Message("user", "a"), 5], short, "no token of this model.*sprat.tokens.Message"),
        ({"role": "user", "content": "a"}, short, "no token.*no message.*role and content"),
        (Message("user", "a"), short, "no token.*no message.*role and content"),
        (None, short, "no token.*no message"),
        (torch.tensor([5, 6]), short, "no token.*no message"),
        ([Message("user", None)], short, "no message"),  # type: ignore[arg-type]
        ([{"role": "user"}], short, "no message.*just role and content"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], short, "no message"),
        ([{"role": "user", "content": "a", "name": "b"}], short, "no message"),
        ([{"role": "user", "content": " "}], short, "empty"),
        ([1] * 196, short, "exceed the context of 200"),
        ([1] * 300, Sampling(max_tokens=None), "exceed the context of 200"),
        ("hi", Sampling(max_tokens=51), "50 at most"),
    ]:
        with pytest.raises(EngineError, match=words):
            engine.generate([prompt], how)  # type: ignore[list-item]
    for ask in (engine.submit, engine.add, engine.stream):
        with pytest.raises(EngineError, match="one answer"):
            ask("hi", Sampling(n=2))
    with pytest.raises(EngineError, match="differ in number"):
        engine.generate(["a", "b"], [short])
    with pytest.raises(EngineError, match="limit"):
        Engine(model, tokenizer, max_batch=0)
    assert not engine.busy and engine.check() == []


def test_dicts_of_role_and_content_are_messages(model: Transformer, tokenizer: Tokenizer) -> None:
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    ours, theirs = ([make(*turn) for turn in turns] for make in (Message, lambda r, c: {"role": r, "content": c}))
    expected, found = Engine(model, tokenizer).generate([ours, theirs], Sampling(temperature=0, max_tokens=3))
    assert (found.prompt_ids, found.token_ids) == (expected.prompt_ids, expected.token_ids)


def test_a_model_that_breaks_fails_its_requests_and_not_the_next_ones(tokenizer: Tokenizer, model: Transformer) -> None:
    broken = Transformer.create(model.config, 3)
    kept = broken.norm.weight.detach().clone()
    engine = Engine(broken, tokenizer)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with pytest.raises(EngineError, match="not finite"):
        engine.generate(QUESTIONS, Sampling(max_tokens=3))
    engine.start()
    with pytest.raises(EngineError, match="not finite"):
        engine.submit("hi", Sampling(max_tokens=3)).result()
    with torch.no_grad():
        broken.norm.weight.copy_(kept)
    assert engine.submit("hi", Sampling(max_tokens=3)).result().token_ids
    engine.stop()
    assert engine.check() == []
