"""Old against new: the speed of two checkouts of Sprat, interleaved, so that a busy neighbour hurts both alike.

Each checkout works in a process of its own, with the interpreter of its own `.venv`, on the same cores. Both are asked
in turn; the figure is the median over rounds of new speed by old speed of the same round. Where a process's memory
comes to lie moves decoding by a third here, so every round has fresh processes, asked once before the clock counts and
then several times in turns: a process's speed is the median of those.

    decode     greedy tokens of SmolLM2-135M (Q4_1 as shipped) and of a random MLA+MoE model in INT4, 1 and 16 at once
    prefill    a prompt of 512 tokens, the same models
    train      steps of `sprat.train.train` at 0.7 M active parameters, 32 rows of 128 tokens, AdamW
    rl         steps of GRPO on sums, a fresh model of the smallest size, 8 questions by 8 answers

    python -m bench.pair OLD NEW [--rounds 7] [--threads 2] [--only train,rl] [--bar 0.97] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS, SEQ = 32, 128
TURNS = 4  # how often each process is asked in a round, where an answer takes no second
MOE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 32, "num_experts_per_tok": 4,
    "moe_intermediate_size": 256, "intermediate_size": 1536, "first_k_dense_replace": 1,
    "max_position_embeddings": 2048, "num_nextn_predict_layers": 0,
}  # fmt: skip
MICRO: dict[str, Any] = {"vocab_size": 512, "num_hidden_layers": 3, "first_k_dense_replace": 0}


class Speeds:
    """What one checkout measures: each method gives one speed (tokens, or steps, a second)."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._engines: dict[str, Any] = {}

    def decode(self, model: str, batch: int) -> float:
        """Greedy tokens a second of ``batch`` answers at once; reading the prompts is not timed."""
        from sprat import Sampling

        engine, steps = self._engine(model), 96 if batch == 1 else 48
        prompts = [[3 + (7 * row + 5 * place) % 500 for place in range(16)] for row in range(batch)]
        before = engine.stats().sampled_tokens
        for prompt in prompts:
            engine.add(prompt, Sampling(temperature=0, max_tokens=steps))
        while engine.stats().sampled_tokens < before + 4 * batch:
            engine.step()
        began, finished = time.perf_counter(), []
        while engine.busy:
            finished += engine.step()
        seconds = time.perf_counter() - began
        return sum(len(handle.result().token_ids) - 4 for handle in finished) / seconds

    def prefill(self, model: str, round_: int) -> float:
        """Tokens a second of a prompt of 512 tokens that no round has seen before."""
        from sprat import Sampling

        prompt = [3 + (11 * round_ + 7 * place * place) % 500 for place in range(512)]
        engine, began = self._engine(model), time.perf_counter()
        engine.generate([prompt], Sampling(temperature=0, max_tokens=1))
        return 512 / (time.perf_counter() - began)

    def train(self) -> float:
        """Steps of pre-training a second."""
        from bench.train_speed import _tokens, ours
        from sprat.config.sizes import size

        config = size("micro", **MICRO)
        return 1 / statistics.median(ours(config, "adamw", _tokens(512, 0))(10))

    def rl(self) -> float:
        """Steps of GRPO a second; answers are paid for their even number of characters, so that groups differ."""
        from sprat.config import RLConfig, TaskConfig
        from sprat.config.sizes import size
        from sprat.model import Transformer
        from sprat.post.rl.grpo import grpo
        from sprat.tasks import load
        from sprat.tokens import Tokenizer
        from sprat.trust import open_run

        tokenizer = Tokenizer.train(["7 train test 1 2 3\n"] * 4, 300, numbers=10)
        model = Transformer.create(size("pico", vocab_size=tokenizer.vocab_size), 0)
        recipe = RLConfig(steps=24, prompts_per_step=8, group_size=8, max_tokens=48, lr=1e-5, checkpoint_every=10**6)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            run = open_run(place / "rl", stage="rl", recipe=recipe, inputs={}, seed=0, ledger=place / "ledger.jsonl")
            began = time.perf_counter()
            paid = _paid
            grpo(model, tokenizer, [load(TaskConfig(name="sums"))], [1.0], recipe, run, reward=paid, gate=False)
            return recipe.steps / (time.perf_counter() - began)

    def _engine(self, model: str) -> Any:
        """The engine on ``model`` (smol, moe), made on first use."""
        if model not in self._engines:
            import sprat

            loaded, tokenizer = sprat.load("smol") if model == "smol" else _random()
            self._engines[model] = sprat.Engine(loaded, tokenizer, frozen=True, speculate="off")
        return self._engines[model]


def _paid(problem: Any, answer: Any) -> float:
    return float(len(answer.reasoning + answer.content) % 2)


def _random() -> tuple[Any, Any]:
    from sprat import quant
    from sprat.config.sizes import size
    from sprat.model import Transformer
    from sprat.tokens import Tokenizer

    tokenizer = Tokenizer.train(["7 train test 1 2 3\n"] * 4, 300, numbers=10)
    model = Transformer.create(size("small", **MOE), 0)
    if hasattr(quant, "quantize_model"):
        return quant.quantize_model(model, materialize=False), tokenizer
    return quant.quantize(model, materialise=False), tokenizer  # an older checkout


def worker(threads: int) -> None:
    """Answer one JSON list ``[name, *arguments]`` a line with a speed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    speeds = Speeds(threads)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(speeds, name)(*arguments)), file=answers, flush=True)


class Checkout:
    """A worker in the checkout ``folder``."""

    def __init__(self, folder: Path, threads: int) -> None:
        python = folder / ".venv" / "bin" / "python"
        # Not "-m": the old checkout does not know this file, but the one that works is imported from its own folder.
        here, arguments = str(Path(__file__).resolve()), ["--worker", str(threads)]
        script = f"import runpy, sys; sys.argv[1:] = {arguments}; runpy.run_path({here!r}, run_name='__main__')"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [str(python), "-c", script],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, question: list[Any]) -> float:
        """One speed.

        Raises:
            SystemExit: the worker died; its own words stand above.
        """
        assert self._process.stdin and self._process.stdout
        print(json.dumps(question), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"the worker died at {question}")
        return float(json.loads(line))

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def questions() -> dict[str, Callable[[int], list[Any]]]:
    """By name: what is asked in round ``n``."""
    table: dict[str, Callable[[int], list[Any]]] = {}
    for model in ("smol", "moe"):
        for batch in (1, 16):
            table[f"decode {model} x{batch}"] = lambda n, m=model, b=batch: ["decode", m, b]  # type: ignore[misc]
        table[f"prefill {model}"] = lambda n, m=model: ["prefill", m, n]  # type: ignore[misc]
    table["train"] = lambda n: ["train"]
    table["rl"] = lambda n: ["rl"]
    return table


def main() -> int:
    """Print each ratio; 1 where one is under the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="names that a question must begin with, by commas")
    parser.add_argument("--bar", type=float, default=0.97)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker)
        return 0
    if not (asked.old and asked.new):
        parser.error("give two checkouts, each with its .venv")
    only = tuple(filter(None, asked.only.split(",")))
    wanted = {name: ask for name, ask in questions().items() if not only or name.startswith(only)}
    ratios: dict[str, list[float]] = {name: [] for name in wanted}
    speeds: dict[str, list[list[float]]] = {name: [] for name in wanted}
    for number in range(3 if asked.quick else asked.rounds):
        sides = [Checkout(folder.resolve(), asked.threads) for folder in (asked.old, asked.new)]
        for name, ask in wanted.items():
            order = sides if number % 2 else sides[::-1]
            found: dict[int, list[float]] = {id(side): [] for side in sides}
            for turn in range(1 + (1 if name in ("train", "rl") else TURNS)):  # the first warms up
                for side in order:
                    found[id(side)].append(side.ask(ask((1 + TURNS) * number + turn)))
            pair = [statistics.median(found[id(side)][1:]) for side in sides]
            speeds[name].append(pair)
            ratios[name].append(pair[1] / pair[0])
            print(f"round {number + 1}: {name:16} {ratios[name][-1]:.3f}", file=sys.stderr, flush=True)
        for side in sides:
            side.close()
    report = {}
    for name, each in ratios.items():
        old, new = (statistics.median(column) for column in zip(*speeds[name], strict=True))
        report[name] = {"old": old, "new": new, "ratio": statistics.median(each), "least": min(each), "most": max(each)}
    missed = [name for name, row in report.items() if row["ratio"] < asked.bar]
    if asked.json:
        print(json.dumps({"bar": asked.bar, "threads": asked.threads, "speeds": report, "missed": missed}))
    else:
        for name, row in report.items():
            verdict = "MISSED" if name in missed else "met"
            print(
                f"{name:16} {row['old']:9.2f} {row['new']:9.2f} a second  ratio {row['ratio']:.3f} "
                f"({row['least']:.2f} to {row['most']:.2f})  bar {asked.bar}: {verdict}"
            )
        print(f"{len(report) - len(missed)} of {len(report)} bars met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
