"""Seconds of a step of GRPO, against TRL's GRPOTrainer on the same machine, generation and update apart.

Both sample groups of answers to the same questions from the same weights in the same format, pay them by the same rule
and move all weights by the same loss once: a small DeepSeek-V3 with random weights, which transformers loads too, and
SmolLM2-135M-Instruct. Ours is ``sprat.post.rl`` as ``sprat rl`` runs it in one process. Theirs is ``GRPOTrainer``, in
float32 and in bfloat16 by autocast, whichever is faster on a trial of one step (vLLM, its fast way, asks for a GPU).
Answers end at a fixed length or earlier, as sampled, so what is compared is time for a generated token. The first step
of each side warms up. Rounds are interleaved; figures are medians over rounds of the ratio of one round.

Bars: a step at least 10 times as fast for the small DeepSeek-V3, 3 times for SmolLM2.

    python -m bench.rl_speed [--quick] [--json] [--threads 2] [--rounds 5]
"""

# P questions of a step, G answers to each

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.finetune_speed import Side
from bench.oracles import make_trl

BARS = {"deepseek-v3": 10.0, "smollm2": 3.0}
SHAPES = {"deepseek-v3": (16, 8, 64), "smollm2": (8, 8, 64)}  # questions, answers to each, tokens of an answer
QUESTIONS, RATE = 64, 1e-6
Measure = Callable[[], dict[str, float]]


def prepare(folder: Path) -> None:
    """Leave in ``folder`` both models in the layout of Hugging Face, and questions as each model is asked them."""
    from sprat.config.sizes import size
    from sprat.data.sources import python_library
    from sprat.formats.load import load, locate, save
    from sprat.model import Transformer
    from sprat.tokens import Tokenizer
    from sprat.tokens.chat import render
    from sprat.tokens.messages import Message

    model, tokenizer = load(locate("smol"), dequantize=True)
    save(model, tokenizer, folder / "smollm2")
    texts = [document.text for document in python_library.documents()][:200]
    own = Tokenizer.train(texts, 1024, numbers=100)
    small = size("micro", vocab_size=own.vocab_size, num_nextn_predict_layers=0)
    save(Transformer.create(small, 0), own, folder / "deepseek-v3")
    for name, tokens in (("smollm2", tokenizer), ("deepseek-v3", own)):
        prompts = [tokens.decode(render(tokens, [Message("user", question(n))])) for n in range(QUESTIONS)]
        (folder / f"{name}.json").write_text(json.dumps(prompts), encoding="utf-8")


def question(number: int) -> str:
    """Question ``number``."""
    return f"What is {11 + number} + {97 - number}?"


def paid(text: str) -> float:
    """The share of vowels: it differs from answer to answer, so that every group has something to teach."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


class Sums:
    """The questions as a task of ours, paid by ``paid``."""

    name = "sums"

    def problem(self, split: str, index: int) -> Any:
        """Question ``index``, around and around."""
        from sprat.tasks import Problem

        return Problem(self.name, index % QUESTIONS, question(index % QUESTIONS), "108")

    def score(self, problem: Any, answer: str | None) -> float:
        """See ``paid``."""
        return paid(answer or "")

    def chain_of_thought(self, problem: Any) -> str:
        """Nobody asks."""
        return ""


def ours(folder: Path, name: str, _: str) -> Measure:
    """Steps of ``train`` in this process, each given back when it is over."""
    import threading

    from sprat.config.rl import RLRunConfig
    from sprat.engine import Engine
    from sprat.formats.load import load
    from sprat.post.rl.grpo import train
    from sprat.post.rl.rollout import InProcess, Rollout
    from sprat.trust.run import open_run

    prompts, group, tokens = SHAPES[name]
    settings = {"steps": 10**6, "prompts_per_step": prompts, "group_size": group, "max_tokens": tokens, "lr": RATE}
    config = RLRunConfig(**settings, checkpoint_every=10**6, format_weight=0.0, gate=False, minibatch=prompts * group)
    model, tokenizer = load(folder / name)
    asked, done, notes = threading.Semaphore(0), threading.Semaphore(0), list[dict[str, float]]()

    class Timed(InProcess):
        """Notes when answers are asked for, when they are there, and when the step is over."""

        def groups(self, step: int) -> list[Rollout]:
            asked.acquire()
            began = time.perf_counter()
            rollouts = super().groups(step)
            sampled = sum(len(rollout.token_ids) for rollout in rollouts)
            notes.append({"began": began, "generate": time.perf_counter() - began, "tokens": sampled})
            return rollouts

        def publish(self, version: int, model: Any, rollbacks: int = 0) -> None:
            super().publish(version, model, rollbacks)
            if notes:
                notes[-1]["seconds"] = time.perf_counter() - notes[-1]["began"]
                done.release()

    source = Timed(Engine(model, tokenizer, max_batch=prompts * group), [Sums()], [1.0], config)  # type: ignore[list-item]
    place = Path(tempfile.mkdtemp())
    run = open_run(place / "run", stage="rl", recipe=config, inputs={}, seed=0, ledger=place / "ledger.jsonl")
    threading.Thread(target=train, args=(model, source, config, run), daemon=True).start()

    def measure() -> dict[str, float]:
        asked.release()
        done.acquire()
        return notes[-1]

    return measure


def theirs(folder: Path, name: str, dtype: str) -> Measure:
    """Steps of ``GRPOTrainer.train`` in TRL's environment."""
    import threading

    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    prompts, group, tokens = SHAPES[name]
    asked, done, notes = threading.Semaphore(0), threading.Semaphore(0), list[dict[str, float]]()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            notes[-1]["seconds"] = time.perf_counter() - notes[-1]["began"]
            done.release()

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            asked.acquire()
            began = time.perf_counter()
            found = super()._generate_and_score_completions(inputs)
            sampled = int(found["completion_mask"].sum())
            notes.append({"began": began, "generate": time.perf_counter() - began, "tokens": sampled})
            return found

    micro = min(16, prompts * group)  # of more rows the logits alone take gigabytes, and time
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=dtype == "bfloat16", per_device_train_batch_size=micro,
        gradient_accumulation_steps=prompts * group // micro, steps_per_generation=prompts * group // micro,
        num_iterations=1, num_generations=group, max_steps=10**6, max_completion_length=tokens, temperature=1.0,
        top_p=1.0, top_k=0, loss_type="dapo", beta=0.0, epsilon=0.2, epsilon_high=0.28, scale_rewards="group",
        importance_sampling_level="token", mask_truncated_completions=False, learning_rate=RATE,
        lr_scheduler_type="constant", optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0,
        gradient_checkpointing=False, save_strategy="no", logging_steps=10**6, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, use_vllm=False,
    )  # fmt: skip
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(folder / name), args=arguments, callbacks=[Clock()],
        reward_funcs=lambda completions, **_: [paid(text) for text in completions],
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": prompt} for prompt in json.loads((folder / f"{name}.json").read_text())] * 100
        ),
        processing_class=AutoTokenizer.from_pretrained(folder / name),
    )  # fmt: skip
    threading.Thread(target=trainer.train, daemon=True).start()

    def measure() -> dict[str, float]:
        asked.release()
        done.acquire()
        return notes[-1]

    return measure


def worker(side: str, folder: Path, threads: int, settings: list[Any]) -> None:
    """Do one step for each line read, and answer what it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(threads)
    measure = (ours if side == "ours" else theirs)(folder, *settings)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=answers, flush=True)
    os._exit(0)  # a step that nobody asked for is waiting in its thread


def per_token(found: dict[str, float], part: str = "seconds") -> float:
    """Milliseconds of a step for each token that it sampled."""
    seconds = found["seconds"] - found["generate"] if part == "update" else found[part]
    return 1000 * seconds / found["tokens"]


def measure(folder: Path, python: Path, threads: int, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """One row for each model."""

    def make(side: str, *settings: str) -> Side:
        interpreter = Path(sys.executable) if side == "ours" else python
        return Side(interpreter, side, folder, threads, list(settings), module="bench.rl_speed")

    rows = []
    for name, bar in BARS.items():
        dtype = "float32"
        if not quick:
            trials = {}
            for each in ("float32", "bfloat16"):
                side = make("theirs", name, each)
                trials[each] = [side.ask(), side.ask()][-1]
                side.close()
            dtype = min(trials, key=lambda each: per_token(trials[each]))
        sides = {"ours": make("ours", name, "float32"), "theirs": make("theirs", name, dtype)}
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for each in sides.values():
            each.ask()  # warms up
        for number in range(rounds):
            for side in list(sides) if number % 2 else list(sides)[::-1]:
                found[side].append(sides[side].ask())
        for each in sides.values():
            each.close()
        row: dict[str, Any] = {"model": name, "bar": bar, "their dtype": dtype}
        for part in ("seconds", "generate", "update"):
            pairs = list(zip(found["ours"], found["theirs"], strict=True))
            row[part] = statistics.median(per_token(theirs, part) / per_token(mine, part) for mine, theirs in pairs)
            for side, listed in found.items():
                row[f"{side} {part}"] = statistics.median(per_token(each, part) for each in listed)
        rows.append(row | {"met": row["seconds"] >= bar})
    return rows


def main() -> int:
    """Print a line for each model; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, theirs in float32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        side, folder, settings = asked.worker
        worker(side, Path(folder), asked.threads, json.loads(settings))
        return 0
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        rows = measure(Path(place), make_trl(), asked.threads, 3 if asked.quick else asked.rounds, asked.quick)
    missed = [row["model"] for row in rows if not row["met"]]
    if asked.json:
        print(json.dumps({"rows": rows, "missed": missed}))
        return 1 if missed else 0
    for row in rows:
        verdict = "met" if row["met"] else "MISSED"
        print(f"{row['model']:12} a step {row['seconds']:.1f} x as fast  bar {row['bar']:g} x: {verdict}")
        for part in ("generate", "update"):
            times = f"{row[f'ours {part}']:.2f} and {row[f'theirs {part}']:.2f} ms for a sampled token"
            print(f"{'':12} {part:8} {row[part]:.1f} x ({times}; theirs in {row['their dtype']})")
    print(f"rl_speed: {'MISS' if missed else 'PASS'}: {len(rows) - len(missed)} of {len(rows)} bars met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
