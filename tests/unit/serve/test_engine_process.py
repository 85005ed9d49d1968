"""The engine's process: it may die, nobody else does, and it does not outlive who started it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sprat.engine import Engine, Sampling, Tenant
from sprat.engine.backend import Batch
from sprat.errors import SpratError
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.serve import engine_process
from sprat.serve.engine_client import EngineDied, Job, JobEvent, JobStream
from sprat.serve.engine_process import ProcessEngineClient
from sprat.serve.engine_thread import ThreadEngineClient
from sprat.tokens import Tokenizer
from tests.unit.serve.scripted import within
from tests.unit.serve.test_engine_client import SLOW

ANNA = Tenant("anna")
LONG = Sampling(temperature=2, seed=1, max_tokens=3000, logit_bias={0: -100.0, 1: -100.0, 2: -100.0})


@pytest.fixture(scope="module")
def folder(parts: tuple[Transformer, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(*parts, folder)
    return folder


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


async def collect(stream: JobStream) -> list[JobEvent]:
    return [event async for event in stream]


async def comes_true(condition: Callable[[], bool], seconds: float = 60) -> bool:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
    return True


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_no_torch_where_the_engine_is_not() -> None:
    code = "import sys, sprat.serve.engine_process as p; p.ProcessEngineClient('x'); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_no_step_looks_through_what_was_loaded_for_garbage(folder: Path) -> None:
    """As the process begins, but with its connection in the hand: it may not be asked what its collector does."""
    program = f"""
        import gc
        from sprat.serve.engine_main import _start_worker

        class Connection:
            def send(self, message):
                print(gc.get_freeze_count(), len(gc.get_objects()))

        _start_worker(Connection(), {{"load": {{"model_folder": {str(folder)!r}, "adapters": {{}}, "settings": {{}}}}}})
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    frozen, others = map(int, subprocess.check_output(command, text=True).split())
    assert frozen > 10_000 and others < frozen / 10


def test_killed_amid_answers_it_fails_them_clearly_and_is_started_again(folder: Path, runner: asyncio.Runner) -> None:
    engine = Engine(*load(folder), frozen=True)
    ids, short = engine.tokenizer.encode("what opens the door"), Sampling(seed=3, max_tokens=20)
    (expected,) = engine.generate([ids], short)
    client = ProcessEngineClient(folder)

    async def scenario() -> None:
        await client.start()
        for blow in (signal.SIGINT, signal.SIGTERM):  # those are the server's, which drains
            os.kill(client.pid, blow)
        streams = [client.submit(Job(ids, [LONG, LONG], ANNA)) for _ in range(3)]
        for stream in streams:
            assert (await anext(stream)).kind == "started"
            assert (await anext(stream)).text
        before = await client.stats()
        assert before.running == 6
        first = client.pid
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(2):
            for stream in streams:
                with pytest.raises(EngineDied, match=r"ended \(signal 9, Killed\)"):
                    await collect(stream)
                stream.cancel()
        assert not client.alive and client.pid == 0 and client.failure is None
        with pytest.raises(EngineDied, match="not up"):
            await collect(client.submit(Job(ids, [short], ANNA)))
        with pytest.raises(EngineDied, match="not up"):
            await client.embed([ids])
        last = await client.stats()
        assert last.steps >= before.steps and (last.running, last.waiting) == (0, 0)
        await comes_true(lambda: client.alive)
        assert client.pid not in (0, first)
        events = await collect(client.submit(Job(ids, [short], ANNA)))
        assert "".join(event.text for event in events) == expected.reasoning + expected.text
        assert events[-1].completion_tokens == expected.usage.completion_tokens
        await client.stop()
        assert not client.alive

    runner.run(scenario())


def test_who_dies_with_its_first_words_is_not_taken_for_alive(
    folder: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = engine_process.EngineProcess.data_received

    def receive_and_die(self: engine_process.EngineProcess, data: bytes) -> None:
        receive(self, data)
        if self.up:
            os.kill(self.pid, signal.SIGKILL)
            self.connection_lost(None)

    monkeypatch.setattr(engine_process.EngineProcess, "data_received", receive_and_die)
    client = ProcessEngineClient(folder)

    async def scenario() -> None:
        await client.start()
        assert not client.alive
        with pytest.raises(EngineDied, match="not up"):
            async with asyncio.timeout(10):
                await collect(client.submit(Job([5], [Sampling(max_tokens=1)], ANNA)))
        await client.stop()

    runner.run(scenario())


def test_stopped_amid_answers_they_end_as_cancelled_with_exact_counts(folder: Path, runner: asyncio.Runner) -> None:
    engine = Engine(*load(folder), frozen=True)
    ids = engine.tokenizer.encode("what opens the door")

    async def scenario(client: ProcessEngineClient | ThreadEngineClient) -> list[JobEvent]:
        await client.start()
        stream = client.submit(Job(ids, [LONG], ANNA))
        events = [await anext(stream) for _ in range(3)]
        rest = asyncio.create_task(collect(stream))
        await client.stop()
        with pytest.raises(EngineDied):
            await collect(client.submit(Job(ids, [LONG], ANNA)))
        return events + await rest

    for client in (ProcessEngineClient(folder), ThreadEngineClient(Engine(*load(folder), frozen=True))):
        events = runner.run(scenario(client))
        done = events[-1]
        assert (done.kind, done.finish_reason) == ("done", "cancelled") and 0 < done.completion_tokens < 3000
        (whole,) = engine.generate([ids], replace(LONG, max_tokens=done.completion_tokens))
        assert "".join(event.text for event in events) == whole.reasoning + whole.text


def test_stopped_amid_embeddings_and_grammars_nobody_is_blamed_and_nobody_waits_on(
    folder: Path, runner: asyncio.Runner
) -> None:
    """A grammar that takes seconds, more of the same tenant behind it, and more embeddings than work at a time."""
    grammars = [replace(SLOW, source=f"{SLOW.source}{' ' * n}") for n in range(2)]

    async def scenario(client: ProcessEngineClient | ThreadEngineClient) -> list[list[object]]:
        await client.start()
        asked = [asyncio.create_task(client.compile(grammar, ANNA)) for grammar in grammars]
        embedding = [asyncio.create_task(client.embed([[5 + n % 300 for n in range(4000)]] * 20)) for _ in range(20)]
        while not (await client.stats()).running:
            await asyncio.sleep(0.01)
        await client.stop()
        async with asyncio.timeout(10):
            return [await asyncio.gather(task, return_exceptions=True) for task in [*asked, *embedding]]

    for client in (ProcessEngineClient(folder), ThreadEngineClient(Engine(*load(folder), frozen=True))):
        results = [result for (result,) in runner.run(scenario(client))]
        errors = [each for each in results if isinstance(each, BaseException) and "took over" not in str(each)]
        assert errors and {type(each) for each in errors} == {EngineDied}, errors


@pytest.mark.parametrize("settings", [{}, {"max_batch": 0}])
def test_an_engine_that_cannot_load_says_why_in_one_sentence(
    folder: Path, tmp_path: Path, runner: asyncio.Runner, settings: dict[str, int]
) -> None:
    where = folder if settings else tmp_path / "nothing"
    with pytest.raises(SpratError) as expected:
        Engine(*load(where), **settings)
    client = ProcessEngineClient(where, **settings)
    with pytest.raises(SpratError) as said:
        runner.run(client.start())
    assert type(said.value) is type(expected.value) and str(said.value) == str(expected.value)
    runner.run(client.stop())


def test_who_dies_of_its_start_stays_down_and_says_why(
    folder: Path, tmp_path: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "MAX_QUICK_DEATHS", 2)
    shutil.copytree(folder, tmp_path / "model")
    client = ProcessEngineClient(tmp_path / "model")

    async def scenario() -> None:
        await client.start()
        (tmp_path / "model" / "config.json").unlink()
        os.kill(client.pid, signal.SIGKILL)
        await comes_true(lambda: client.failure is not None)
        with pytest.raises(EngineDied, match=r"down: .*config\.json"):
            await collect(client.submit(Job([5], [Sampling(max_tokens=1)], ANNA)))
        await client.stop()

    runner.run(scenario())


def test_who_hangs_at_once_again_and_again_stays_down_too(
    folder: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is how long it got on, not how long it was waited for."""
    monkeypatch.setattr(engine_process, "MAX_QUICK_DEATHS", 2)
    monkeypatch.setattr(engine_process, "QUICK_SECONDS", 7.0)
    client = ProcessEngineClient(folder, iteration_timeout_seconds=8)

    async def scenario() -> None:
        await client.start()
        for _ in range(2):
            await comes_true(lambda: client.alive)
            os.kill(client.pid, signal.SIGSTOP)
            await comes_true(lambda: client.stalled)
            assert not client.alive and client.pid
            await comes_true(lambda: not client.stalled)
        await comes_true(lambda: client.failure is not None)
        with pytest.raises(EngineDied, match="down: .*hung"):
            await collect(client.submit(Job([5], [Sampling(max_tokens=1)], ANNA)))
        await client.stop()

    runner.run(scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the end of the socket is noticed after the loading")
@pytest.mark.parametrize("loading", [True, False])
def test_it_does_not_outlive_who_started_it(folder: Path, loading: bool) -> None:
    program = f"""
        import asyncio
        from sprat.serve.engine_process import EngineProcess, Jobs, ProcessEngineClient

        async def main():
            if {loading}:
                print(EngineProcess(Jobs()).pid, flush=True)
            else:
                client = ProcessEngineClient({str(folder)!r})
                await client.start()
                print(client.pid, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    assert within(10, lambda: gone(pid))


def test_nothing_waits_for_a_long_step(folder: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both clients have the same worker; here its engine can be held in the midst of a step."""
    engine, held, go = Engine(*load(folder), frozen=True), threading.Event(), threading.Event()
    run = engine.backend.run

    def slow(batch: Batch) -> object:
        if len(batch.tokens_T) > 100:
            held.set()
            assert go.wait(60)
        return run(batch)

    monkeypatch.setattr(engine.backend, "run", slow)
    client = ThreadEngineClient(engine)

    async def scenario() -> None:
        await client.start()
        stream = client.submit(Job([5] * 300, [Sampling(max_tokens=3)], ANNA))
        assert await asyncio.to_thread(held.wait, 30)
        async with asyncio.timeout(10):
            with pytest.raises(SpratError, match="no adapter"):
                await collect(client.submit(Job([5], [Sampling()], ANNA, "nobody")))
            second, third = (client.submit(Job([5], [Sampling(max_tokens=3)], ANNA)) for _ in range(2))
            third.cancel()
            while (stats := await client.stats()).waiting < 2:
                await asyncio.sleep(0.01)
            assert stats.running == 1
        go.set()
        assert (await collect(stream))[-1].completion_tokens == 3
        assert (await collect(second))[-1].completion_tokens == 3
        (done,) = await collect(third)
        assert (done.finish_reason, done.completion_tokens, done.prompt_tokens) == ("cancelled", 0, 1)
        assert engine.check() == []
        await client.stop()

    runner.run(scenario())
