"""A collection of a teacher's answers that is killed has paid for nothing twice: the teacher's own log says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sprat.config.teach import TracesConfig
from sprat.post.collect import collect_traces
from sprat.post.teachers import Limits
from tests.unit.post.fake_teacher import completion, fake_teacher, reply

COLLECT = """
import sys
from sprat.config.teach import TracesConfig
from sprat.post.collect import collect_traces
from sprat.post.teachers import Limits
config = TracesConfig(teacher_model="wise", licence="MIT")
collect_traces(sys.argv[1], sys.argv[2], config, data=sys.argv[3], limits=Limits(concurrency=2))
"""


@pytest.mark.parametrize(("stop", "in_flight"), [(signal.SIGKILL, 2), (signal.SIGINT, 0)])
def test_a_stopped_collection_asks_nothing_twice_but_what_was_killed_in_flight(
    stop: signal.Signals, in_flight: int, tmp_path: Path
) -> None:
    data, folder = tmp_path / "questions.jsonl", tmp_path / "runs" / "mine-traces"
    data.write_text("".join(json.dumps({"question": str(n)}) + "\n" for n in range(60)))

    def slow(body: dict[str, Any], before: int) -> Any:
        time.sleep(0.05)
        question = body["messages"][-1]["content"]
        return reply(completion(question, id=f"id of {question}"))

    with fake_teacher(slow) as fake:
        words = [sys.executable, "-c", COLLECT, fake.url, str(folder), str(data)]
        process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while len(fake.log) < 8:
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(stop)
        process.wait()
        kept = [json.loads(line) for line in (folder / "checkpoints" / "traces.jsonl").read_text().splitlines()]
        with (folder / "checkpoints" / "traces.jsonl").open("ab") as stream:
            stream.write(b'{"messages": [{"ro')  # as a power cut would leave it
        config = TracesConfig(teacher_model="wise", licence="MIT")
        run = collect_traces(fake.url, folder, config, data=data, limits=Limits(concurrency=2))
        twice = [question for question, count in Counter(fake.log).items() if count > 1]
    answered = {row["messages"][0]["content"] for row in kept}
    assert len(answered) >= 5 and not answered & set(twice) and len(twice) <= in_flight
    assert set(fake.log) == {str(n) for n in range(60)} and run.facts["kept"] == 60
