"""What serving needs of an engine holds wherever the engine runs: in a thread of this process, or in its own."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from sprat.engine import Engine, Output, Response, Sampling, Tenant
from sprat.errors import EngineError
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.serve.engine_client import EngineClient, Job, JobEvent, JobStream
from sprat.serve.engine_process import ProcessEngineClient
from sprat.serve.engine_thread import ThreadEngineClient
from sprat.tokens import Tokenizer

T = TypeVar("T")
CONTEXT = 4096
ANNA, BERT = Tenant("anna", b"a"), Tenant("bert", b"b")
SLOW = Response.json({"allOf": [{"type": "integer", "multipleOf": p} for p in (1999, 2003)]})  # compiles for over 3 s


@dataclass
class Side:
    """A client that is up, the loop that it lives in, and another engine of the same model to hold it against."""

    client: EngineClient
    run: Callable[[Coroutine[Any, Any, T]], T]
    reference: Engine
    own: Engine | None  # the client's, where it is in this process

    def ids(self, text: str) -> list[int]:
        return self.reference.tokenizer.encode(text)

    def expected(self, ids: list[int], sampling: Sampling) -> Output:
        return self.reference.generate([ids], sampling)[0]

    async def rests(self) -> None:
        """Wait until nobody runs and no block is held, 5 s at most."""
        end = time.monotonic() + 5
        while True:
            stats = await self.client.stats()
            if (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0):
                break
            assert time.monotonic() < end, stats
            await asyncio.sleep(0.01)
        assert self.own is None or self.own.check() == []


@pytest.fixture(scope="module")
def folder(parts: tuple[Transformer, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(*parts, folder)
    return folder


@pytest.fixture(scope="module", params=["thread", "process"])
def side(request: pytest.FixtureRequest, folder: Path) -> Iterator[Side]:
    reference = Engine(*load(folder), frozen=True)
    own = Engine(*load(folder), frozen=True, consume=True) if request.param == "thread" else None
    client = ProcessEngineClient(folder) if own is None else ThreadEngineClient(own)
    with asyncio.Runner() as runner:
        runner.run(client.start())
        yield Side(client, runner.run, reference, own)
        runner.run(client.stop())


async def collect(stream: JobStream) -> list[JobEvent]:
    return [event async for event in stream]


async def until_text(stream: JobStream) -> list[JobEvent]:
    """The events up to the first text."""
    events = []
    async for event in stream:
        events.append(event)
        if event.text:
            break
    return events


def assert_tells(events: list[JobEvent], choice: int, expected: Output) -> None:
    """The events of one choice tell the whole of ``expected``."""
    own = [event for event in events if event.choice == choice and event.kind != "started"]
    for kind, text in (("reasoning", expected.reasoning), ("content", expected.text)):
        assert "".join(event.text for event in own if event.kind == kind) == text
    assert [event.kind for event in own].count("done") == 1 and own[-1].kind == "done"
    done, usage = own[-1], expected.usage
    assert (done.finish_reason, done.prompt_tokens) == (expected.finish_reason, usage.prompt_tokens)
    assert (done.completion_tokens, done.reasoning_tokens) == (usage.completion_tokens, usage.reasoning_tokens)


def endless(seed: int, tokens: int = 3000) -> Sampling:
    """An answer that takes a while."""
    return Sampling(temperature=2, seed=seed, max_tokens=tokens, logit_bias={2: -100.0, 1: -100.0, 0: -100.0})


def test_it_says_what_it_can(side: Side) -> None:
    info = side.client.info
    assert (info.context, info.max_num_seqs, info.adapters) == (CONTEXT, 64, ())
    assert info.vocab_size == side.reference.tokenizer.vocab_size and info.cache_tokens >= CONTEXT
    assert side.client.alive and side.client.failure is None


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, max_tokens=40),
        Sampling(seed=5, max_tokens=40, top_k=20, repetition_penalty=1.3),
        Sampling(seed=6, max_tokens=40, thinking=True, max_think_tokens=9, temperature=1.5),
        Sampling(seed=7, max_tokens=60, temperature=2, stop=("a", "e")),
        Sampling(seed=8, max_tokens=60, temperature=1, response=Response.choice(["door", "house"]), thinking=False),
    ],
)
def test_the_events_of_an_answer_tell_what_the_engine_generates(side: Side, sampling: Sampling) -> None:
    ids = side.ids("please keep what opens the door")
    events = side.run(collect(side.client.submit(Job(ids, [sampling], ANNA))))
    assert [event.kind for event in events].count("started") == 1 and events[0].kind == "started"
    assert events[0].prompt_tokens == len(ids)
    assert_tells(events, 0, side.expected(ids, sampling))


def test_log_probabilities_come_with_their_text_and_the_stop_string_with_the_end(side: Side) -> None:
    ids = side.ids("please keep what opens the door")
    sampling = Sampling(seed=4, max_tokens=80, temperature=2, stop=("e",), logprobs=True, top_logprobs=2)
    events, expected = side.run(collect(side.client.submit(Job(ids, [sampling], ANNA)))), side.expected(ids, sampling)
    rows = [row for event in events for row in event.logprobs]
    assert expected.logprobs is not None and expected.top_logprobs is not None and rows
    whole = zip(expected.token_ids, expected.logprobs, map(tuple, expected.top_logprobs), strict=True)
    assert rows == list(whole)[: len(rows)] and len(rows) >= len(expected.token_ids) - 1
    assert (events[-1].stop, events[-1].finish_reason) == ("e", "stop")


def test_a_prompt_that_is_scored_comes_before_the_text(side: Side) -> None:
    ids = side.ids("please keep what opens the door")
    sampling = Sampling(seed=4, max_tokens=5, logprobs=True, top_logprobs=1, prompt_logprobs=True)
    events = side.run(collect(side.client.submit(Job(ids, [sampling, replace(sampling, seed=5)], ANNA))))
    expected = side.expected(ids, sampling)
    tops = [tuple(top or ()) for top in expected.prompt_top_logprobs or ()]
    for choice in (0, 1):
        kinds = [event.kind for event in events if event.choice == choice and event.kind != "started"]
        assert kinds[0] == "prompt" and kinds.count("prompt") == 1
        (prompt,) = [event for event in events if event.kind == "prompt" and event.choice == choice]
        assert prompt.logprobs == tuple(zip(ids, expected.prompt_logprobs or (), tops, strict=True))


def test_prompts_are_embedded_as_by_the_engine(side: Side) -> None:
    prompts = [side.ids("door"), side.ids("what opens the door of our house")]
    vectors = side.run(side.client.embed(prompts, tenant=ANNA))
    assert vectors == side.reference.embed(prompts) and vectors[0] != vectors[1]
    with pytest.raises(EngineError, match="empty"):
        side.run(side.client.embed([[]]))


def test_several_answers_share_the_computation_of_their_prompt(side: Side) -> None:
    ids = side.ids("our house keeps to itself what opens the door: " * 12)
    samplings = [Sampling(seed=seed, max_tokens=20 + seed, temperature=1.5) for seed in range(4)]

    async def ask() -> tuple[int, list[JobEvent]]:
        await side.rests()
        before = await side.client.stats()
        events = await collect(side.client.submit(Job(ids, samplings, Tenant("new", b"new"))))
        await side.rests()
        after = await side.client.stats()
        computed = (after.prompt_tokens - after.cached_tokens) - (before.prompt_tokens - before.cached_tokens)
        return computed, events

    computed, events = side.run(ask())
    assert computed == len(ids) == events[0].prompt_tokens and events[0].cached_tokens == 0
    assert [event.kind for event in events].count("started") == 1
    for choice, sampling in enumerate(samplings):
        assert_tells(events, choice, side.expected(ids, sampling))


def test_what_is_cached_is_said_at_the_beginning_and_only_to_its_tenant(side: Side) -> None:
    ids = side.ids("swordfish opens what the house keeps to itself, please keep it: " * 10)
    job = Job(ids, [Sampling(temperature=0, max_tokens=3)], ANNA)
    cached = [
        side.run(collect(side.client.submit(each)))[0].cached_tokens for each in (job, job, replace(job, tenant=BERT))
    ]
    assert cached[0] == cached[2] == 0 and len(ids) - 64 < cached[1] < len(ids)


def test_a_crowd_is_answered_as_everyone_alone(side: Side) -> None:
    prompts = [side.ids(f"what opens the door of house {n}") for n in range(24)]
    samplings = [Sampling(seed=n, max_tokens=30) for n in range(24)]

    async def ask() -> list[list[JobEvent]]:
        jobs = [Job(ids, [own], ANNA) for ids, own in zip(prompts, samplings, strict=True)]
        return await asyncio.gather(*(collect(side.client.submit(job)) for job in jobs))

    for events, ids, sampling in zip(side.run(ask()), prompts, samplings, strict=True):
        assert_tells(events, 0, side.expected(ids, sampling))


def test_cancelled_at_any_moment_the_counts_are_exact_and_nothing_is_held(side: Side) -> None:
    """What came is what the engine generates in so many tokens as were counted."""
    rng = random.Random(0)
    jobs = [Job(side.ids(f"door {n}: keep"), [endless(n), endless(n + 1000)], ANNA) for n in range(12)]

    async def ask(job: Job, count: int) -> list[JobEvent]:
        stream, events = side.client.submit(job), list[JobEvent]()
        if not count:
            stream.cancel()
        async for event in stream:
            events.append(event)
            if len(events) == count:
                stream.cancel()
        stream.cancel()
        return events

    async def ask_all() -> list[list[JobEvent]]:
        answers = await asyncio.gather(*map(ask, jobs, [0, 0, 1, *(rng.randint(2, 200) for _ in jobs[3:])]))
        await side.rests()
        return answers

    counts = []
    for events, job in zip(side.run(ask_all()), jobs, strict=True):
        for choice, sampling in enumerate(job.samplings):
            done = next(event for event in events if event.kind == "done" and event.choice == choice)
            assert done.finish_reason == "cancelled" and done.prompt_tokens == len(job.prompt_ids)
            counts.append(tokens := done.completion_tokens)
            if tokens:
                output = side.expected(list(job.prompt_ids), replace(sampling, max_tokens=tokens))
                text = "".join(event.text for event in events if event.choice == choice)
                assert text == output.reasoning + output.text
    assert len(set(counts)) > 3 and max(counts) < 3000


@pytest.mark.parametrize(
    ("text", "sampling", "adapter"),
    [
        ("door", Sampling(max_tokens=5000), None),
        ("door " * 5000, Sampling(max_tokens=5), None),
        ("", Sampling(max_tokens=5), None),
        ("door", Sampling(max_tokens=5), "nobody"),
        ("door", Sampling(max_tokens=5, n=2), None),
        ("door", Sampling(max_tokens=5, stop_token_ids=[10**6]), None),
        ("door", Sampling(max_tokens=5, response=Response.regex("(")), None),
    ],
)
def test_what_the_engine_refuses_is_refused_in_the_same_words(
    side: Side, text: str, sampling: Sampling, adapter: str | None
) -> None:
    ids = side.ids(text)
    with pytest.raises(EngineError) as expected:
        side.reference.submit(ids, sampling, adapter=adapter)
    with pytest.raises(EngineError) as refused:
        side.run(collect(side.client.submit(Job(ids, [sampling], ANNA, adapter))))
    assert type(refused.value) is EngineError and str(refused.value) == str(expected.value)
    assert (refused.value.where, refused.value.todo) == (expected.value.where, expected.value.todo)
    side.run(side.rests())


def test_a_slow_grammar_delays_nobody_else(side: Side) -> None:
    """Nor does a cancelled one compile: those behind it of the same tenant come sooner than it could."""
    quick = Response.regex("do+r")
    form = Sampling(temperature=1, max_tokens=8, response=quick, thinking=False)
    ids = side.ids("what opens the door")

    async def ask() -> float:
        known = Job(ids, [form], ANNA)
        await collect(side.client.submit(known))
        running = side.client.submit(Job(ids, [endless(1)], ANNA))
        await until_text(running)
        slow = asyncio.create_task(collect(side.client.submit(Job(ids, [replace(form, response=SLOW)], ANNA))))
        others = [replace(form, response=Response.json({"multipleOf": n, **json.loads(SLOW.source)})) for n in (3, 5)]
        dropped = [side.client.submit(Job(ids, [other], ANNA)) for other in others]
        plain = Job(ids, [Sampling(max_tokens=5)], ANNA)
        foreign = Job(ids, [replace(form, response=Response.regex("ho+se"))], BERT)
        for job in (plain, known, foreign):
            assert (await collect(side.client.submit(job)))[-1].finish_reason in ("stop", "length")
        assert len([await anext(running) for _ in range(5)]) == 5
        assert not slow.done()
        for stream in dropped:
            stream.cancel()
            assert [event.finish_reason for event in await collect(stream)] == ["cancelled"]
        running.cancel()
        with pytest.raises(EngineError, match="took over 3 s"):
            await slow
        start = time.monotonic()
        last = Job(ids, [replace(form, response=Response.regex("ke+p"))], ANNA)
        assert (await collect(side.client.submit(last)))[-1].kind == "done"
        await side.rests()
        return time.monotonic() - start

    assert side.run(ask()) < 5  # two others would have taken 3 s each
