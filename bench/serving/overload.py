"""Ten times the load that a server can bear, greedy neighbours, retries, and health probes while it is busy."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

from bench.serving import client
from bench.serving.client import Answer, ask, metrics, quantile
from bench.serving.rows import Plan, Row, Say
from bench.serving.server import KEY, OTHER_KEY, Server, running
from bench.serving.standing import idle, request

SEQS, QUEUE, TOKENS = 8, 16, 32
STRESS_TOKENS = 256  # of a model that writes four thousand a second
NOISE = {"temperature": 1.0}  # text that repeats itself would be guessed ahead, and an answer be next to no work
FULL = (429, 503)
SDK_RETRIES = 2  # what openai's SDK does where nobody says otherwise


async def closed_loop(
    server: Server, key: str, at_once: int, seconds: float, tokens: int
) -> tuple[float, list[Answer]]:
    """Answers a second of ``at_once`` clients that ask again as soon as they have theirs, and all that they got."""
    answers, until = list[Answer](), time.perf_counter() + seconds
    draw = random.Random(at_once)

    async def one() -> None:
        while time.perf_counter() < until:
            body = request(server.model, tokens, f"what is {draw.randrange(30)} + {draw.randrange(30)}?", **NOISE)
            answers.append(await ask(server.url, body, key=key, timeout=60))
            if answers[-1].status in FULL:
                await asyncio.sleep(float(answers[-1].headers.get("retry-after", 1)))

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(at_once)))
    return sum(a.well for a in answers) / (time.perf_counter() - began), answers


async def open_loop(server: Server, key: str, rate: float, seconds: float, tokens: int) -> tuple[float, list[Answer]]:
    """As ``closed_loop``, of clients that come ``rate`` a second, whatever becomes of those before them."""
    tasks, began, number = [], time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        while number < passed * rate:
            body = request(server.model, tokens, f"what is {number % 30} + {number % 29}?", **NOISE)
            tasks.append(asyncio.create_task(ask(server.url, body, key=key, timeout=60)))
            number += 1
        await asyncio.sleep(0.005)
    goodput = sum(task.result().well for task in tasks if task.done()) / seconds
    return goodput, list(await asyncio.gather(*tasks))


async def as_an_sdk(server: Server, number: int, tokens: int) -> Answer:
    """One request, and again as often as openai's SDK does, after as long as the server says."""
    body = request(server.model, tokens, f"what is {number % 30} + 5?", stream=False, **NOISE)
    for _ in range(SDK_RETRIES + 1):
        answer = await ask(server.url, body, key=KEY, timeout=60)
        if answer.status not in FULL:
            break
        await asyncio.sleep(float(answer.headers.get("retry-after-ms", 500)) / 1000)  # which the SDK prefers
    return answer


def stress(folder: Path, plan: Plan, say: Say) -> list[Row]:
    """The same of a tiny model, so that hundreds of connections come in a second: shown, and no bar.

    The clients, the gateway and the engine then share two cores, and the clients alone want one.
    """
    rows = overload(folder, plan, say, tokens=STRESS_TOKENS)
    return [Row("stress", row.what, row.figure, unit=row.unit, note=row.note) for row in rows]


def overload(folder: Path, plan: Plan, say: Say, tokens: int = TOKENS) -> list[Row]:
    """Ten times the offered load; a greedy tenant; and SDKs that come again when they are told to."""
    client.many_files()

    async def run(server: Server) -> list[Row]:
        await closed_loop(server, KEY, SEQS, 2, tokens)
        short = max(5.0, plan.overload_seconds / 6)
        peak, _ = await closed_loop(server, KEY, SEQS * 2, short, tokens)
        say(f"overload: {peak:.1f} answers/s at most")
        before_cost = server.processor_seconds()[0]
        goodput, answers = await open_loop(server, KEY, 10 * peak, plan.overload_seconds / 2, tokens)
        cost = server.processor_seconds()[0] - before_cost
        came_first = len(answers)
        await idle(server, 30)
        before = server.memory()
        again, more = await open_loop(server, KEY, 10 * peak, plan.overload_seconds / 2, tokens)
        await idle(server, 30)
        grown = server.memory() / before - 1
        answers += more
        refused = [answer for answer in answers if answer.status in FULL]
        other = [answer for answer in answers if not answer.well and answer.status not in FULL]
        say(f"overload: {len(answers)} came, {len(refused)} were refused, {len(other)} got nothing")
        slow = quantile([answer.seconds for answer in refused], 0.99) if refused else 0.0
        alone, _ = await closed_loop(server, OTHER_KEY, SEQS // 2, short, tokens)
        greedy = asyncio.create_task(open_loop(server, KEY, 10 * peak, short, tokens))
        beside, _ = await closed_loop(server, OTHER_KEY, SEQS // 2, short, tokens)
        await greedy
        await idle(server, 30)
        came = await asyncio.gather(*(as_an_sdk(server, number, tokens) for number in range(120)))
        return [
            Row("overload", "goodput at ten times the load over its peak", min(goodput, again) / peak, 0.9, "at least",
                "x", f"{peak:.1f} answers/s at most, {len(answers)} came"),
            Row("overload", "p99 time of a refusal", slow * 1000, 100, unit="ms", note=f"{len(refused)} refused"),
            Row("overload", "the gateway's processor time for each", cost * 1000 / max(1, came_first), unit="ms"),
            Row("overload", "neither answered nor refused", len(other), 0, note=_faults(other)),
            Row("overload", "memory grown in the second half", grown, 0.05, note=f"{before / 1e6:.0f} MB before"),
            Row("overload", "a tenant's share beside a greedy one, of its fair one", beside / min(alone, peak / 2),
                0.5, "at least", "x", f"{alone:.1f} and {beside:.1f} answers/s"),
            Row("overload", f"of 120 at once, answered with {SDK_RETRIES} retries of an SDK",
                sum(answer.well for answer in came) / 120, 0.95, "at least"),
        ]  # fmt: skip

    cache = ("--kv-cache-memory-bytes", str(256 << 20))  # full within seconds: memory is flat or it is not
    options = ("--max-num-seqs", str(SEQS), "--max-num-queued-reqs", str(QUEUE), *cache)
    with running(folder, *options) as server:
        return asyncio.run(run(server))


def _faults(answers: list[Answer]) -> str:
    """The first words of the faults of ``answers``."""
    return "; ".join(sorted({f"{a.status} {a.fault[:60]}" for a in answers})[:3])


def health(folder: Path, plan: Plan, say: Say) -> list[Row]:
    """100 health probes while the engine reads a long prompt."""

    async def run(server: Server) -> list[Row]:
        long = request(server.model, 2, "It is a long way to the end of this sentence. " * 160)
        await ask(server.url, request(server.model, 2), key=KEY)
        before = await metrics(server.url, KEY)
        began = time.perf_counter()
        reading = asyncio.create_task(ask(server.url, long, key=KEY, timeout=300))
        await asyncio.sleep(0.1)
        seconds, failed, inside = list[float](), 0, 0
        for number in range(100):
            path = ("/health", "/health/live", "/health/ready")[number % 3]
            probe = await ask(server.url, None, path=path, timeout=10)
            seconds.append(probe.seconds)
            failed += probe.status != 200
            inside += not reading.done()
        answer = await reading
        took = time.perf_counter() - began
        say(f"health: the prompt took {took:.1f} s")
        after = await metrics(server.url, KEY)
        prompt = answer.usage["prompt_tokens"] if answer.usage else -1
        counted: dict[str, Any] = {
            name: after.get(name, 0) - before.get(name, 0)
            for name in ("prompt_tokens_total", "generation_tokens_total")
        }
        return [
            Row("health", "slowest of 100 probes", max(seconds) * 1000, 100, unit="ms",
                note=f"{inside} during a prompt of {prompt} tokens, {answer.first:.1f} s"),
            Row("health", "probes that were not answered with 200", failed, 0),
            Row("health", "tokens read or written for probes",
                counted["prompt_tokens_total"] - prompt + counted["generation_tokens_total"] - answer.tokens, 0),
        ]  # fmt: skip

    with running(folder) as server:
        return asyncio.run(run(server))
