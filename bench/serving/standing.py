"""The bars of a server that stands when everybody comes: each starts a server, presses it, and gives its rows.

The model is a tiny random one, so that the server and not the model is what is pressed.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

from bench.serving import client
from bench.serving.client import Answer, ask, metrics, quantile
from bench.serving.rows import Plan, Row, Say
from bench.serving.server import KEY, OTHER_KEY, Server, running

CONTEXT = 2048


def tiny_model(folder: Path) -> Path:
    """A random model of two layers with a context of 2,048 tokens."""
    from sprat.config.sizes import size
    from sprat.formats.load import save
    from sprat.model import Transformer
    from sprat.tokens import Tokenizer

    tokenizer = Tokenizer.train([f"what is {a} + {b}? the sum is {a + b}." for a in range(30) for b in range(30)], 512)
    ids = tokenizer.special_ids
    config = size(
        "pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT,
        bos_token_id=ids.bos, eos_token_id=ids.eos, pad_token_id=ids.pad,
    )  # fmt: skip
    save(Transformer.create(config, seed=0), tokenizer, folder)
    return folder


def request(model: str, tokens: int, text: str = "what is 3 + 4?", **fields: Any) -> dict[str, Any]:
    """A streamed chat of exactly ``tokens`` tokens."""
    return {
        "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "ignore_eos": True,
        "stream": True, "thinking": {"type": "disabled"}, **fields,
    }  # fmt: skip


async def idle(server: Server, seconds: float) -> float:
    """Seconds until nothing runs and nothing waits; infinite after ``seconds``."""
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        seen = await metrics(server.url, server.key)
        if seen and not seen["num_requests_running"] and not seen["num_requests_waiting"]:
            return passed
        await asyncio.sleep(0.02)
    return float("inf")


def leave(folder: Path, plan: Plan, say: Say) -> list[Row]:
    """Clients leave in the midst of their answers, half of them without a stream."""

    async def wave(server: Server, number: int) -> tuple[float, int, float]:
        say(f"leave: wave {number + 1}")
        tasks = []
        for index in range(plan.leavers):
            body = request(server.model, CONTEXT - 200, f"what is {index} + {number}?", stream=index % 2 == 0)
            tasks.append(asyncio.create_task(ask(server.url, body, key=KEY)))
        limit = time.monotonic() + 30
        while time.monotonic() < limit:
            seen = await metrics(server.url, KEY)
            if seen.get("num_requests_running", 0) >= plan.leavers * 0.9:
                break
            await asyncio.sleep(0.05)
        running_now = int((await metrics(server.url, KEY)).get("num_requests_running", 0))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        ended = await idle(server, 10)
        after = await metrics(server.url, KEY)
        await asyncio.sleep(1)
        later = await metrics(server.url, KEY)
        grown = later.get("generation_tokens_total", 1) - after.get("generation_tokens_total", 0)
        return ended, running_now, grown

    with running(folder, "--max-num-seqs", str(plan.leavers)) as server:
        found = [asyncio.run(wave(server, number)) for number in range(plan.waves)]
        seen = asyncio.run(metrics(server.url, KEY))
    ended, ran, grown = zip(*found, strict=True)
    what = f"{plan.leavers * plan.waves} clients leave: ended after"
    return [
        Row("leave", what, max(ended), 1.0, unit="s", note=f"of them running: {sum(ran)}"),
        Row("leave", "requests that still run", seen.get("num_requests_running", float("inf")), 0),
        Row("leave", "share of the cache in use", seen.get("kv_cache_usage_perc", float("inf")), 0.0),
        Row("leave", "tokens still written a second later", max(grown), 0, unit="tokens"),
    ]


async def _half_open(server: Server, kind: int, closed: list[list[float]]) -> None:
    """One connection that never becomes a request: silent, part of a head, part of a body, a byte a second."""
    began = time.perf_counter()
    with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
        reader, writer = await client.connect(server.url)
        head = client.head(server.url, client.CHAT, KEY, 4000)
        if kind == 1:
            writer.write(head[:40])
        elif kind == 2:
            writer.write(head + b'{"model": "')

        async def drip() -> None:
            for byte in head + b" " * 4000:
                writer.write(bytes([byte]))
                await asyncio.sleep(1)

        dripping = asyncio.create_task(drip()) if kind == 3 else None
        async with asyncio.timeout(60):
            while await reader.read(4096):
                pass
        if dripping:
            dripping.cancel()
        writer.close()
    closed[kind].append(time.perf_counter() - began)


async def _healthy(server: Server, count: int, at_once: int) -> list[Answer]:
    """``count`` short streams, ``at_once`` at a time."""
    turns, answers = asyncio.Semaphore(at_once), list[Answer]()

    async def one(index: int) -> None:
        async with turns:
            body = request(server.model, 24, f"what is {index % 30} + 3?")
            answers.append(await ask(server.url, body, key=OTHER_KEY, timeout=60))

    await asyncio.gather(*(one(index) for index in range(count)))
    return answers


def half_open(folder: Path, plan: Plan, say: Say) -> list[Row]:
    """Connections that never become requests, beside clients that are well."""
    client.many_files()

    async def run(server: Server) -> list[Row]:
        await _healthy(server, plan.healthy, 4)  # what is new is slow, and would flatter those that come later
        alone = await _healthy(server, plan.healthy, 4)
        closed: list[list[float]] = [[], [], [], []]
        tasks = [asyncio.create_task(_half_open(server, n % 4, closed)) for n in range(plan.half_open)]
        await asyncio.sleep(0.5)
        pressed, began = list[Answer](), time.perf_counter()
        while time.perf_counter() - began < 30 and not all(task.done() for task in tasks):
            pressed += await _healthy(server, plan.healthy, 4)
            say(f"half-open: {sum(map(len, closed))} of {plan.half_open} closed")
            await asyncio.sleep(0.2)
        await asyncio.gather(*tasks)
        alone += await _healthy(server, plan.healthy, 4)
        lost = sum(not answer.well for answer in pressed)
        before, after = (quantile([a.first for a in answers], 0.99) for answers in (alone, pressed))
        bodies = max(closed[2], default=float("inf"))
        heads = max(max(closed[kind], default=float("inf")) for kind in (0, 1, 3))
        return [
            Row("half-open", f"of {len(pressed)} streams beside {plan.half_open} connections: lost", lost, 0),
            Row("half-open", "p99 first token over unloaded", after / before, 2.0, unit="x",
                note=f"{before * 1000:.1f} ms and {after * 1000:.1f} ms"),
            Row("half-open", "silent, partial head, a byte a second: closed within", heads, 15.0, unit="s"),
            Row("half-open", "partial body: closed within", bodies, 35.0, unit="s"),
        ]  # fmt: skip

    with running(folder) as server:
        return asyncio.run(run(server))


def schemas(folder: Path, plan: Plan, say: Say) -> list[Row]:
    """Requests with a schema that is slow to compile, before a queue of 16."""
    running_at_once, queued = 4, 16

    def body(model: str, number: int, size: int) -> dict[str, Any]:
        # the numbers that two neighbors divide: an automaton of size² states, another one for each number
        both = [{"type": "integer", "multipleOf": size + number}, {"type": "integer", "multipleOf": size + number + 1}]
        form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"allOf": both}}}
        return {**request(model, 2, stream=False), "response_format": form}

    async def run(server: Server) -> list[Row]:
        size, one = 300, await ask(server.url, body(server.model, 0, 100), key=KEY)
        while one.seconds < plan.schema_seconds and size < 5000:
            size = int(size * 1.3)
            one = await ask(server.url, body(server.model, 0, size), key=KEY)
        say(f"schemas: neighbors of {size} took {one.seconds:.2f} s (status {one.status})")
        honest = {"type": "json_schema", "json_schema": {"name": "b", "schema": {"enum": ["yes", "no"]}}}
        kind = {**request(server.model, 4, stream=False), "response_format": honest}
        alone = [await ask(server.url, kind, key=OTHER_KEY) for _ in range(9)]
        used = sum(server.processor_seconds())

        async def later(number: int) -> Answer:
            await asyncio.sleep(number / plan.schemas)
            return await ask(server.url, body(server.model, number + 1, size), key=KEY, timeout=300)

        storm = [asyncio.create_task(later(number)) for number in range(plan.schemas)]
        await asyncio.sleep(0.3)
        beside = [await ask(server.url, kind, key=OTHER_KEY) for _ in range(9)]
        await asyncio.sleep(1.0)  # all of the storm have come
        full = [ask(server.url, body(server.model, n + 1, size + 9), key=KEY, timeout=300) for n in range(plan.schemas)]
        at_once = [answer.seconds for answer in await asyncio.gather(*full) if answer.status in (429, 503)]
        answers = await asyncio.gather(*storm)
        used = sum(server.processor_seconds()) - used
        refused = [answer for answer in answers if answer.status in (429, 503)]
        slow = max((answer.seconds for answer in refused), default=float("inf"))
        before, after = (statistics.median(a.seconds for a in each) for each in (alone, beside))
        return [
            Row("schemas", f"of {plan.schemas}, each {one.seconds:.1f} s to compile: refused", len(refused),
                plan.schemas - queued - running_at_once, "at least"),
            Row("schemas", "slowest refusal, all within a second", slow * 1000, 100, unit="ms",
                note=_quantiles(refused)),
            Row("schemas", "slowest refusal of as many more, all at one moment", max(at_once, default=0) * 1000,
                unit="ms", note="most of it the client's own time"),
            Row("schemas", "processor seconds, in compilations of one", used / max(one.seconds, 1e-3),
                2.0 * (queued + running_at_once), unit="x"),
            Row("schemas", "an honest, known schema of another tenant: answered", sum(a.well for a in beside), 9,
                "at least"),
            Row("schemas", "its median time over unloaded", after / before, 3.0, unit="x",
                note=f"{before * 1000:.0f} ms and {after * 1000:.0f} ms"),
        ]  # fmt: skip

    options = ("--max-num-seqs", str(running_at_once), "--max-num-queued-reqs", str(queued))
    with running(folder, *options) as server:
        return asyncio.run(run(server))


def _quantiles(answers: list[Answer]) -> str:
    """How long answers took, in the middle and at the end."""
    seconds = [answer.seconds for answer in answers] or [0.0]
    return ", ".join(f"p{100 * at:.0f} {quantile(seconds, at) * 1000:.0f} ms" for at in (0.5, 0.9, 0.99))


def tenants(folder: Path, plan: Plan, say: Say) -> list[Row]:
    """What one tenant asked is no faster for another: neither by the counts of the cache nor by the clock."""
    chance, count = 0.25, 4

    def text(trial: int, guess: int) -> str:
        return f"secret {trial} {guess} " + f"what is {trial} + {guess}? " * 60

    async def run(server: Server) -> list[Row]:
        async def probe(key: str, trial: int, guess: int) -> Answer:
            return await ask(server.url, request(server.model, 1, text(trial, guess), stream=False), key=key)

        def hit(answer: Answer) -> int:
            return int(answer.usage["prompt_cache_hit_tokens"]) if answer.usage else 10**6

        own, others, right = 0, 0, 0
        for trial in range(plan.trials):
            secret = (trial * 7 + 3) % count
            await probe(KEY, trial, secret)
            own += hit(await probe(KEY, trial, secret))
            others += hit(await probe(f"witness-{trial}", trial, secret))  # who never asked anything before
            guesses = [await probe(OTHER_KEY, trial, guess) for guess in range(count)]
            right += min(range(count), key=lambda guess: guesses[guess].seconds) == secret
        spread = 3 * (chance * (1 - chance) / plan.trials) ** 0.5
        return [
            Row("tenants", "hit tokens of the tenant that asked it before", own, plan.trials, "at least", "tokens"),
            Row("tenants", "hit tokens of another tenant with the same prompt", others, 0, unit="tokens"),
            Row("tenants", f"the clock guesses the secret of {count} (chance {chance})", right / plan.trials,
                chance + spread),
        ]  # fmt: skip

    keys = (KEY, OTHER_KEY, *(f"witness-{trial}" for trial in range(plan.trials)))
    with running(folder, keys=keys) as server:
        return asyncio.run(run(server))
