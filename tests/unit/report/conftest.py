"""A pipeline folder of finished runs with plausible numbers, as the quickstart leaves it, made in a second."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from sprat.config import Config, QuantConfig, RLConfig, TrainConfig
from sprat.data import corpus
from sprat.eval.score import Score, wilson_interval
from sprat.pipeline import evaluation
from sprat.post.rl.rewards import Response
from sprat.post.rl.rollout import Rollout, rollout_metrics
from sprat.trust import Ledger, open_run

TASKS = ("sums", "chain_sum", "products", "gcd", "letter_counting", "count_bits")
LEVELS = {
    "pretrain": 0.08,
    "pretrain-dense": 0.07,
    "sft": 0.12,
    "rl-seed0": 0.955,
    "rl-seed1": 0.95,
    "rl-seed2": 0.962,
    "sft-labels": 0.81,
    "distill": 0.93,
    "student-scratch": 0.58,
    "quantize": 0.92,
}
QUESTION = "What is 12 + 7 + 19? <b>Think</b> & answer."


def score(task: str, level: float, label: str, rng: random.Random) -> dict[str, Any]:
    """One row of ``facts["scores"]``, as the pipeline's measure writes it."""
    count = 1000
    correct = round(count * min(0.99, max(0.01, level + rng.uniform(-0.05, 0.05))))
    low, high = wilson_interval(correct, count)
    thinks = label == "thinking" or (label == "greedy" and level > 0.5)
    share = correct / count
    by_length = {n: (round(250 * share ** max(1, n - 3)), 250) for n in range(3, 8)} if task in TASKS[:2] else {}
    sample = {
        "question": QUESTION,
        "expected": "38",
        "reasoning": "12 + 7 = 19\n19 + 19 = 38" if thinks else None,
        "answer": "38" if thinks else "31",
        "score": float(thinks),
    }
    found = Score(
        task=task,
        count=count,
        correct=correct,
        mean=share,
        low=low,
        high=high,
        mean_tokens=21.5 if thinks else 4.2,
        by_length=by_length,
        samples=[sample],
    )
    return evaluation._score_row(found, label, task != TASKS[1])


def rollouts(step: int, rng: random.Random) -> dict[str, float]:
    """The metrics of one step of RL, as GRPO logs them."""
    right = 1 / (1 + math.exp((12 - step) / 3))
    answers = [
        Rollout(
            task="sums",
            prompt_ids=[1],
            token_ids=[0] * round(4 + 17 / (1 + math.exp((10 - step) / 2)) + rng.uniform(0, 1)),
            logprobs=[],
            response=Response("12 + 7 = 19", "38", True, True),
            reward=1.1 * right + rng.uniform(0, 0.08),
            score=float(rng.random() < right),
            prefill_tokens=0,
        )
        for _ in range(8)
    ]
    return rollout_metrics(answers)


def finish(
    pipeline: Path, name: str, recipe: Config, facts: dict[str, Any], rows: list[dict[str, float]], **inputs: Path | str
) -> None:
    """One finished run."""
    seed = int(name[-1]) if name.startswith("rl-seed") else 0
    run = open_run(
        pipeline / name, stage=name, recipe=recipe, inputs=inputs, seed=seed, ledger=pipeline / "ledger.jsonl"
    )
    (run.artifact / "model.safetensors").write_bytes(name.encode())
    for step, row in enumerate(rows):
        run.log(step * 10, **row)
    sum(range(3_000_000))  # some CPU time
    run.add_facts(**facts)
    run.finish(flops=3.4e12 if rows else 0, tokens=900_000)


def model_facts(name: str, rng: random.Random) -> dict[str, Any]:
    """The facts of a stage that ends with a model."""
    size = {"distill": 0.4e6, "student-scratch": 0.4e6, "quantize": 0.12e6}.get(name, 1.9e6)
    return {
        "scores": [
            score(task, {"greedy": LEVELS[name], "thinking": 0.96, "direct": 0.07}[label], label, rng)
            for label in ("greedy", "thinking", "direct")
            for task in TASKS
        ],
        "parameters": {"total": int(size / 4), "active": int(size / 12)},
    }


def make(pipeline: Path) -> Path:
    """Write the whole pipeline."""
    rng = random.Random(0)
    (pipeline.parent / "mine").mkdir()
    (pipeline.parent / "mine" / "a.md").write_text("A text of the user's own.\n" * 400)
    (pipeline.parent / "mine" / "b.html").write_text("<p>")
    made = corpus.text_corpus(pipeline.parent / "mine", pipeline / "corpus", budget_bytes=2000)
    Ledger(pipeline / "ledger.jsonl").root_hash()
    Ledger(pipeline / "ledger.jsonl").add_file(pipeline / "corpus")
    finish(pipeline, "data", TrainConfig(), {"title": "Data", "sources": made.sources}, [])
    loss = [{"loss": 7 * math.exp(-step / 12) + 1.4 + rng.uniform(0, 0.1)} for step in range(60)]
    bits = {
        "prose": {
            "model": 2.21,
            "gzip": 3.05,
            "xz": 2.36,
            "ngram3": 2.62,
            "ngram6": 2.14,
            "ppm": 1.87,
            "bytes": 500_000,
        },
        "docstring": {"model": 2.4, "gzip": 2.71, "xz": 2.55, "ngram3": 2.95, "ngram6": 2.49, "bytes": 400_000},
    }
    facts = model_facts("pretrain", rng) | {
        "bits_per_byte": bits,
        "expert_load": [[rng.uniform(0.6, 1.5) for _ in range(16)] for _ in range(3)],
        "expert_domain": {d: [[rng.uniform(0, 3) for _ in range(16)]] for d in ("prose", "docstring", "sums")},
    }
    finish(pipeline, "pretrain", TrainConfig(), facts, loss, data=pipeline / "data")
    dense = {domain: {**row, "model": row["model"] + 0.12} for domain, row in bits.items()}
    facts = model_facts("pretrain-dense", rng) | {
        "control_of": "pretrain",
        "title": "Pre-training, dense twin at equal FLOPs",
        "bits_per_byte": dense,
    }
    finish(pipeline, "pretrain-dense", TrainConfig(), facts, [{"loss": row["loss"] + 0.15} for row in loss])
    finish(pipeline, "sft", TrainConfig(), model_facts("sft", rng), loss[10:40], model=pipeline / "pretrain")
    for seed in range(3):
        curve = [rollouts(step, rng) for step in range(26)]
        name = f"rl-seed{seed}"
        title = {"title": f"RL, seed {seed}"} if seed else {"title": "RL"}
        finish(pipeline, name, RLConfig(seed=seed), model_facts(name, rng) | title, curve, model=pipeline / "sft")
    facts = model_facts("sft-labels", rng) | {"control_of": "rl", "title": "SFT on labels"}
    finish(pipeline, "sft-labels", TrainConfig(), facts, loss[:30], model=pipeline / "sft")
    finish(
        pipeline,
        "distill",
        TrainConfig(),
        model_facts("distill", rng) | {"title": "Student"},
        loss,
        teacher=pipeline / "rl-seed0",
    )
    facts = model_facts("student-scratch", rng) | {"control_of": "distill", "title": "Student from scratch"}
    finish(pipeline, "student-scratch", TrainConfig(), facts, loss, data=pipeline / "data")
    row = score("sums", 0.95, "greedy", rng)
    facts = model_facts("quantize", rng) | {
        "title": "INT4 student",
        "models": {
            "teacher": {"size_bytes": 1_900_000, "tokens_per_second": 10_700.0},
            "student": {"size_bytes": 400_000, "tokens_per_second": 14_000.0},
            "int4": {"size_bytes": 120_000, "tokens_per_second": 16_700.0},
        },
        "significance": [{**evaluation.accuracy_changes([row], [row])[0], "after": 0.94, "p": 0.4}],
    }
    finish(pipeline, "quantize", QuantConfig(), facts, [], model=pipeline / "distill")
    return pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pipeline; tests do not change it."""
    return make(tmp_path_factory.mktemp("base") / "road")
