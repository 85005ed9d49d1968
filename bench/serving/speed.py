"""Throughput: our gateway over the engine that stands behind it, and our server over other projects'.

SmolLM2-135M-Instruct, made of the same float32 weights for each engine as in ``bench.inference.models``: our INT4 in
groups of 32, llama.cpp's Q4_0, transformers' float32. All servers get the same questions over the same sockets, one
server at a time, in rounds; a ratio is taken within a round.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.oracles import make_llama_server
from bench.serving.client import Answer, ask, quantile
from bench.serving.prompts import prompts
from bench.serving.rows import Plan, Row, Say
from bench.serving.server import Server, foreign, running

STREAMS = (8, 32)
SHARE, PROCESSOR, LLAMA, TRANSFORMERS = 0.9, 1e-3, 2.0, 4.0
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SLOT = 512  # tokens of context for each of llama.cpp's streams


@dataclass(frozen=True)
class Load:
    """What a server did: tokens a second, its processor seconds by process, and what the streams saw."""

    tokens: int
    seconds: float
    processor: list[float]
    answers: list[Answer]

    @property
    def rate(self) -> float:
        """Tokens a second, reading the questions included."""
        return self.tokens / self.seconds


def press(server: Server, streams: int, tokens: int, number: int) -> Load:
    """``streams`` streams at once.

    Raises:
        RuntimeError: one was not whole.
    """

    async def run() -> list[Answer]:
        fields: dict[str, Any] = {"model": server.model, "max_tokens": tokens, "temperature": 0, "stream": True,
                                  "stream_options": {"include_usage": True}}  # fmt: skip
        if not server.is_strict:
            fields["ignore_eos"] = True
        asked = ({**fields, "messages": [{"role": "user", "content": text}]} for text in prompts(streams, number))
        return list(await asyncio.gather(*(ask(server.url, body, key=server.key, timeout=900) for body in asked)))

    before, began = server.processor_seconds(), time.perf_counter()
    answers = asyncio.run(run())
    seconds = time.perf_counter() - began
    used = [after - then for after, then in zip(server.processor_seconds(), before, strict=False)]
    for answer in answers:
        if answer.status != 200 or answer.fault or not answer.times:
            raise RuntimeError(f"{server.url}: {answer.status} {answer.fault} {answer.body[:300]!r}")
    return Load(sum(answer.tokens or len(answer.times) for answer in answers), seconds, used, answers)


def gateway(model: Path, plan: Plan, say: Say) -> list[Row]:
    """The server over the engine alone at 32 streams, one thread in both."""
    ratios, costs, firsts, gaps, streams = [], [], [], [], STREAMS[-1]
    apart = 1
    for number in range(plan.rounds):
        words = [sys.executable, "-m", "bench.serving.engine_worker", str(model), str(streams), str(plan.tokens)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        alone = json.loads(done.stdout)
        with running(model, "--max-num-seqs", str(streams), threads=1) as server:
            press(server, streams, plan.tokens, 0)
            load = press(server, streams, plan.tokens, 1)
            apart = len(load.processor)
        ratios.append(load.rate / (alone["tokens"] / alone["seconds"]))
        costs.append(load.processor[0] / load.tokens)
        firsts += [answer.first for answer in load.answers]
        gaps += [b - a for answer in load.answers for a, b in zip(answer.times, answer.times[1:], strict=False)]
        say(f"gateway: round {number + 1}: {load.rate:.0f} tokens/s, alone {alone['tokens'] / alone['seconds']:.0f}")
    where = "in a process of its own" if apart > 1 else "NOT apart from the engine: its processor time is both's"
    return [
        Row("gateway", f"tokens/s over the engine alone, {streams} streams", statistics.median(ratios), SHARE,
            "at least", "x", f"{load.rate:.0f} tokens/s in the last round"),
        Row("gateway", "the gateway's processor time a token", statistics.median(costs) * 1000, PROCESSOR * 1000,
            unit="ms", note=where),
        Row("gateway", "time to first token, p50", quantile(firsts, 0.5) * 1000, unit="ms"),
        Row("gateway", "time to first token, p99", quantile(firsts, 0.99) * 1000, unit="ms"),
        Row("gateway", "between tokens, p50", quantile(gaps, 0.5) * 1000, unit="ms"),
        Row("gateway", "between tokens, p99", quantile(gaps, 0.99) * 1000, unit="ms"),
    ]  # fmt: skip


def _with_template(folder: Path) -> Path:
    """The same model with ChatML as its template beside it: transformers answers conversations with no other help."""
    chatting = folder.with_name(f"{folder.name}-chat")
    chatting.mkdir(exist_ok=True)
    for file in folder.iterdir():
        link = chatting / file.name
        if not link.exists():
            link.symlink_to(file.resolve())
    (chatting / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return chatting


@contextmanager
def server_of(name: str, folder: Path, threads: int) -> Iterator[Server]:
    """A running server: sprat, llama.cpp, transformers, or transformers with continuous batching."""
    if name == "sprat":
        with running(folder / "sprat", "--max-num-seqs", str(STREAMS[-1]), threads=threads) as server:
            yield server
        return
    if name == "llama.cpp":
        most, count = str(STREAMS[-1]), str(threads)
        command = [
            str(make_llama_server()), "-m", str(folder / "Q4_0.gguf"), "--host", "127.0.0.1", "--port", "{port}",
            "-np", most, "-c", str(SLOT * STREAMS[-1]), "-t", count, "-tb", count, "-fa", "on", "--no-webui",
        ]  # fmt: skip
        health, model = "/health", "any"
    else:
        program = str(Path(sys.executable).with_name("transformers"))
        chatting = _with_template(folder / "hf")
        command = [program, "serve", str(chatting), "--host", "127.0.0.1", "--port", "{port}",
                   "--device", "cpu"]  # fmt: skip
        command += ["--continuous-batching"] if "batching" in name else []
        health, model = "/health", str(chatting)
    with foreign(command, health, model, threads) as server:
        server.is_strict = "transformers" in name
        yield server


def versus(folder: Path, plan: Plan, say: Say) -> list[Row]:
    """Our server over llama.cpp's and transformers', at 8 and at 32 streams."""
    threads = min(2, os.cpu_count() or 1)
    rates: dict[tuple[str, int], list[float]] = {}
    names = ["sprat", "llama.cpp", "transformers", "transformers, continuous batching"]
    faults: dict[str, str] = {}
    for number in range(plan.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            if name in faults:
                continue
            # transformers answers one at a time, or a little faster: a share of the tokens tells its speed as well
            tokens = plan.tokens if "transformers" not in name else max(8, plan.tokens // 4)
            try:
                with server_of(name, folder, threads) as server:
                    press(server, 2, 4, 90 + number)
                    for streams in STREAMS:
                        load = press(server, streams, tokens, number)
                        rates.setdefault((name, streams), []).append(load.rate)
                        say(f"versus: round {number + 1}: {name}, {streams} streams: {load.rate:.0f} tokens/s")
            except (RuntimeError, subprocess.CalledProcessError) as error:
                faults[name] = str(error)[-300:]
                say(f"versus: {name} is left out: {faults[name]}")
    rows = []
    for streams in STREAMS:
        ours = rates.get(("sprat", streams), [])
        others = {"llama.cpp": (names[1:2], LLAMA), "transformers serve": (names[2:], TRANSFORMERS)}
        for title, (modes, limit) in others.items():
            tried = [rates[mode, streams] for mode in modes if len(rates.get((mode, streams), [])) == len(ours)]
            best = max(tried, key=statistics.median, default=[])
            ratio = statistics.median(a / b for a, b in zip(ours, best, strict=True)) if ours and best else 0.0
            note = (
                f"{statistics.median(ours):.0f} and {statistics.median(best):.0f} tokens/s" if ratio else "not measured"
            )
            rows.append(Row("versus", f"tokens/s over {title}, {streams} streams", ratio, limit, "at least", "x", note))
    return rows
