"""A run of RL so small that a step takes a tenth of a second, for what is measured of its bookkeeping.

The task: whatever is asked, 7 is right. The policy, some 40,000 parameters, was shown answers that think for one to
twenty digits and then guess one, so answers differ in length, and RL moves it quickly. Each role is the real one, in
a process of its own; workers may be slowed down, group by group, as by stragglers.

    python -m bench.rl_tiny make FOLDER            the policy and the questions: FOLDER/model, FOLDER/ask.jsonl
    python -m bench.rl_tiny run FOLDER NAME JSON   a run with this config, in FOLDER/NAME/run; again: it goes on
    python -m bench.rl_tiny worker SOCKET PARENT   a worker that is slow by SPRAT_RL_DELAY seconds for a token, after
                                                   its answers, or with SPRAT_RL_SLOW_STEPS=1 while it gives them
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sprat.config import OptimConfig, SFTConfig
from sprat.config.rl import RLRunConfig
from sprat.config.sizes import size
from sprat.engine import Engine
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.post.rl import worker
from sprat.post.rl.orchestrator import Commands
from sprat.post.rl.questions import Questions
from sprat.post.rl.reinforce import reinforce
from sprat.post.rl.sampled import Request, SampledAnswer
from sprat.post.sft import sft
from sprat.tokens import Tokenizer
from sprat.trust.run import Run, open_run

DELAY, SLOW_STEPS, STRAGGLERS, SLOWER = "SPRAT_RL_DELAY", "SPRAT_RL_SLOW_STEPS", 0.1, 10.0
SETTINGS: dict[str, Any] = {
    "steps": 12, "prompts_per_step": 8, "group_size": 4, "max_tokens": 32, "lr": 1e-3, "checkpoint_every": 5,
    "gate": False, "minibatch": 16, "held_out": {"share": 0, "every": 0}, "trip_wires": {"action": "off"},
}  # fmt: skip
QUESTIONS = 400


def config_of(**changes: Any) -> RLRunConfig:
    """A tiny run."""
    return RLRunConfig.model_validate(SETTINGS | changes)


def make(folder: Path) -> None:
    """Teach the policy to think for a while and to guess."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(["7 train test 1 2 3\n"] * 4, 300, numbers=10)
    shape = size(
        "pico", vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, first_k_dense_replace=0,
        num_attention_heads=2, n_routed_experts=4, moe_intermediate_size=32, intermediate_size=64,
        max_position_embeddings=128, num_nextn_predict_layers=0,
    )  # fmt: skip
    rng, shown = random.Random(0), []
    for _ in range(800):
        digits = [str(rng.randrange(10)) for _ in range(rng.randrange(1, 20))]
        shown.append((f"{rng.randrange(1000)} train", " ".join(digits), digits[-1]))
    optim = OptimConfig(muon_lr=0.02, adam_lr=0.01, warmup_steps=5)
    config = SFTConfig(steps=80, batch_rows=16, seq_len=64, checkpoint_every=1000, optim=optim)
    run = open_run(folder / "sft", stage="sft", recipe=config, inputs={}, seed=0, ledger=folder / "ledger.jsonl")
    model = Transformer.create(shape, 0)
    sft(model, tokenizer, shown, config, run)
    save(model, tokenizer, folder / "model")
    rows = [{"question": f"{number} train", "answer": "7"} for number in range(QUESTIONS)]
    (folder / "ask.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def run(folder: Path, name: str, config: RLRunConfig) -> Run:
    """Do it, or what is left of it."""
    slow = (sys.executable, "-m", "bench.rl_tiny", "worker")
    commands = Commands(worker=slow) if os.environ.get(DELAY) else None
    questions = Questions(tasks=(str(folder / "ask.jsonl"),))
    return reinforce(folder / "model", questions, folder / name / "run", config, commands=commands)


def slow_sample(engine: Engine, requests: Sequence[Request], version: int) -> list[list[SampledAnswer]]:
    """``worker.sample``, and then a pause: as long as the longest answers, ten times that for one group in ten."""
    if os.environ.get(SLOW_STEPS):
        return _sample_slowly(engine, requests, version)
    answers = worker.sample(engine, requests, version)
    for request, group in zip(requests, answers, strict=True):
        time.sleep(_seconds(request) * max(len(answer.token_ids) for answer in group))
    return answers


def _sample_slowly(engine: Engine, requests: Sequence[Request], version: int) -> list[list[SampledAnswer]]:
    """``worker.sample``, with a pause before each step of the engine, and a look for newer weights after it."""
    look, seconds, worker.POLL_SECONDS = engine.before_step, max(map(_seconds, requests)), 0.0

    def before_step() -> None:
        time.sleep(seconds)
        if look is not None:
            look()

    engine.before_step = before_step
    try:
        return worker.sample(engine, requests, version)
    finally:
        engine.before_step = look


def _seconds(request: Request) -> float:
    """The pause for a token of a group."""
    is_slow = random.Random(request.group).random() < STRAGGLERS
    return float(os.environ[DELAY]) * (SLOWER if is_slow else 1.0)


def main() -> None:
    """See the module's text."""
    command, *words = sys.argv[1:]
    if command == "make":
        make(Path(words[0]))
    elif command == "run":
        run(Path(words[0]), words[1], config_of(**json.loads(words[2])))
    else:
        sys.argv = sys.argv[1:]
        worker.main(slow_sample)


if __name__ == "__main__":
    main()
