"""The harness says of our server's completions what it says of the same folder in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sprat
from bench.serving.server import Server, running
from tests.parity.test_lm_eval import PYTHON, ask, run, write_tasks
from tests.smol import smol

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no harness here: python -m bench.oracles lm-eval"),
]
ASK = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
url, model, folder = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={"model": model, "base_url": url + "/v1/completions", "tokenizer": folder, "num_concurrent": 2,
                "max_retries": 1, "tokenizer_backend": "huggingface", "max_length": 512},
    tasks=["local_choice", "local_rolling", "local_written"], task_manager=TaskManager(include_path="."),
    batch_size=2, bootstrap_iters=0)
scores = {task: {key: float(value) for key, value in row.items() if isinstance(value, float)}
          for task, row in found["results"].items()}
said = {task: [sample["resps"] for sample in rows] for task, rows in found["samples"].items()}
print("\\n" + json.dumps([scores, said], default=str))
"""


def ask_server(folder: Path, server: Server, model: Path, key: str) -> Any:
    """Scores and answers of a server on the tasks of ``folder``, as ``ask`` has them of a model."""
    code = f"import os; os.environ['OPENAI_API_KEY'] = {key!r}\n" + ASK
    done = run(folder, "-c", code, server.url, server.model, str(model))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_harness_says_the_same_of_transformers_and_of_our_server(tmp_path: Path) -> None:
    model = tmp_path / "model"
    sprat.save(*sprat.load(smol(), dequantize=True), model)
    write_tasks(tmp_path)
    with running(model, keys=("k1",)) as server:
        ours, we_said = ask_server(tmp_path, server, model, "k1")
    theirs, they_said = ask(tmp_path, "hf", model)
    assert ours["local_choice"] == theirs["local_choice"] and we_said["local_written"] == they_said["local_written"]
    assert ours["local_rolling"]["bits_per_byte,none"] == pytest.approx(
        theirs["local_rolling"]["bits_per_byte,none"], abs=1e-3
    )
    for (mine, greedy), (its, is_greedy) in zip(
        [answer[0] for row in we_said["local_choice"] for answer in row],
        [answer[0] for row in they_said["local_choice"] for answer in row],
        strict=True,
    ):
        assert float(mine) == pytest.approx(float(its), abs=1e-3) and greedy == is_greedy
