"""The harness says of a model in our engine what it says of the same folder in transformers.

Both are asked in the harness's own environment (``python -m bench.oracles lm-eval``), on local tasks; ours also by
``sprat eval --lm-eval``.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import sprat
from bench.oracles import ROOT, python_of
from sprat.config.model import ModelConfig
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.smol import smol

PYTHON = python_of("lm-eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no harness here: python -m bench.oracles lm-eval"),
]
ROWS = [
    ("The capital of France is", ["Paris", "Rome", "Berlin"], 0),
    ("Two plus two is", ["five", "four", "seven"], 1),
    ("The sun rises in the", ["north", "west", "east"], 2),
    ("Water freezes at zero degrees", ["Celsius", "miles", "hours"], 0),
    ("A dog is an", ["animal", "building", "hour"], 0),
    ("The opposite of hot is", ["warm", "cold", "red"], 1),
]
COMMON = (
    "task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: rows.jsonl}}}}\ntest_split: test\n"
)
CHOICE = """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
WRITTEN = """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ASK = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
from sprat.eval.lm_eval import harness_class
harness_class()
name, path, chat, options = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model=name, model_args={"path": path} if name == "sprat" else {"pretrained": path, "dtype": "float32"},
    tasks=["local_choice", "local_rolling", "local_written"], task_manager=TaskManager(include_path="."),
    device="cpu", batch_size=1, apply_chat_template=chat == "chat",
    **{"bootstrap_iters": 0, **json.loads(options)})
scores = {task: {key: float(value) for key, value in row.items() if isinstance(value, float)}
          for task, row in found["results"].items()}
said = {task: [sample["resps"] for sample in rows] for task, rows in found["samples"].items()}
print("\\n" + json.dumps([scores, said], default=str))
"""


def write_tasks(folder: Path) -> None:
    rows = [{"q": q, "choices": c, "gold": g, "text": f"{q} {c[g]}. " * 4} for q, c, g in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("choice", CHOICE), ("rolling", ROLLING), ("written", WRITTEN)):
        (folder / f"local_{name}.yaml").write_text(COMMON.format(name=name) + task)


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The harness's Python in ``folder``, with this checkout and without a hub."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run([str(PYTHON), *words], cwd=folder, env=environment, capture_output=True, text=True)


def ask(folder: Path, name: str, model: Path, chat: str = "plain", **options: Any) -> Any:
    """Scores and answers of a model on the tasks of ``folder``."""
    done = run(folder, "-c", ASK, name, str(model), chat, json.dumps(options))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def evaluate(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``sprat eval`` of the model in ``folder``, with its tasks."""
    return run(folder, "-m", "sprat", "eval", "model", "--include-path", ".", *words)


def random_llama(folder: Path) -> Path:
    """A random Llama with a vocabulary of its own, and a chat format."""
    tokenizer = Tokenizer.train([" ".join([row[0], *row[1]]) for row in ROWS] * 3, 600)
    special = tokenizer.special_ids
    config = ModelConfig(
        architecture="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=special.bos,
        eos_token_id=special.eos,
        initializer_range=0.3,
    )
    sprat.save(Transformer.create(config, seed=3), tokenizer, folder)
    return folder


@pytest.mark.parametrize(("name", "chat"), [("random", "plain"), ("smol", "plain"), ("smol", "chat")])
def test_the_harness_says_the_same_of_transformers_and_of_us(name: str, chat: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    if name == "random":
        random_llama(model)
    else:
        sprat.save(*sprat.load(smol(), dequantize=True), model)
    write_tasks(tmp_path)
    (ours, we_said), (theirs, they_said) = (ask(tmp_path, kind, model, chat) for kind in ("sprat", "hf"))
    assert ours["local_choice"] == theirs["local_choice"] and we_said["local_written"] == they_said["local_written"]
    assert ours["local_rolling"]["bits_per_byte,none"] == pytest.approx(
        theirs["local_rolling"]["bits_per_byte,none"], abs=1e-4
    )
    for task in ("local_choice", "local_rolling"):
        for our_row, their_row in zip(we_said[task], they_said[task], strict=True):
            for [our_answer], [their_answer] in zip(our_row, their_row, strict=True):
                ours_nats = our_answer if task == "local_rolling" else our_answer[0]
                theirs_nats = their_answer if task == "local_rolling" else their_answer[0]
                assert float(ours_nats) == pytest.approx(float(theirs_nats), abs=1e-3)
                assert task == "local_rolling" or our_answer[1] == their_answer[1]  # whether greedy says it


def test_sprat_eval_prints_what_the_harness_says_of_transformers(tmp_path: Path) -> None:
    random_llama(tmp_path / "model")
    write_tasks(tmp_path)
    expected, _ = ask(tmp_path, "hf", tmp_path / "model", limit=4, num_fewshot=1, bootstrap_iters=1000)
    done = evaluate(tmp_path, "--lm-eval", "local_choice,local_wr*", "--limit", "4", "--num-fewshot", "1", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)["lm_eval"]
    assert set(found["results"]) == {"local_choice", "local_written"}
    for task, row in found["results"].items():
        assert {name: row[name] for name in expected[task]} == expected[task]
        assert found["n-shot"][task] == 1 and found["n-samples"][task] == {"original": len(ROWS), "effective": 4}
    table = evaluate(tmp_path, "--lm-eval", "local_choice", "--limit", "4", "--num-fewshot", "1")
    (cells,) = [line.split("|") for line in table.stdout.splitlines() if "|acc " in line]
    score, error = (expected["local_choice"][name] for name in ("acc,none", "acc_stderr,none"))
    assert 0 < score < 1 and error > 0, "these say nothing"
    assert (float(cells[7]), float(cells[9])) == (pytest.approx(score, abs=1e-4), pytest.approx(error, abs=1e-4))


@pytest.mark.parametrize(
    ("tasks", "code", "what"),
    [
        ("local_choice,nowhere", 2, "the harness has no task 'nowhere'"),
        ("arc_easy", 3, "the harness cannot read a task's data"),
    ],
)
def test_a_task_that_cannot_be_asked_is_one_sentence(tasks: str, code: int, what: str, tmp_path: Path) -> None:
    random_llama(tmp_path / "model")
    write_tasks(tmp_path)
    done = evaluate(tmp_path, "--lm-eval", tasks, "--json")
    assert done.returncode == code and f"sprat: {what}" in done.stderr and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["exit_code"] == code
