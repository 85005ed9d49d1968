"""Tokens per second of training, against transformers' DeepseekV3 of the same shape on the same machine.

Both train the same config (full rows of one document each, so that both may use plain causal attention) with
AdamW, fused, gradients clipped to norm 1, in float32, with the same threads. Ours is `sprat.train.train` whole:
drawing batches, logging, router bias, NaN guard. Theirs is (a) `transformers.Trainer`, (b) a bare loop over the
model, and runs with whichever experts implementation is fastest here, found by trial. Rounds are interleaved, so
that a busy neighbour hurts all alike; figures are medians over steps. Both sides run once with the allocator
tuned as `sprat.train.machine` does and once with glibc's defaults; the bars are held against the better of
their two runs and our run as shipped (tuned). MTP is off: their class has none. Muon is listed without a bar.

    python -m bench.train_speed [--quick] [--json] [--threads 2] [--rounds 7]
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BARS = {"trainer": 1.5, "bare": 1.2}
STRETCH = {"trainer": 3.0, "bare": 2.0}
ROWS, SEQ = 32, 128
WARM = 2  # steps that every measurement makes beside those that it counts
QUICK_SECONDS = 270  # of --quick, shared out over its workers; where a step takes too long, fewer are made
PROMISED_SECONDS = 295  # after which --quick ends, whatever the machine is busy with
SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "0.13 M active": ("pico", {"vocab_size": 512}),
    "0.7 M active": ("micro", {"vocab_size": 512, "num_hidden_layers": 3, "first_k_dense_replace": 0}),
}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def _tokens(vocabulary: int, seed: int) -> Any:
    """Rows of seeded tokens with a learnable pattern, [64 batches * ROWS, SEQ + 1] int32."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return generator.integers(0, vocabulary, (64 * ROWS, SEQ + 1), dtype=np.int32)


class _Clock:
    """A source that notes when each batch was asked for, which is when a step begins."""

    def __init__(self, packed: Any) -> None:
        from sprat.data.loader import MixedBatchSource

        self._source = MixedBatchSource([(packed, 1.0)], ROWS, 0)
        self.digest = self._source.digest
        self.times: list[float] = []

    def batch(self, step: int) -> Any:
        """The batch of ``step``."""
        self.times.append(time.perf_counter())
        return self._source.batch(step)


def _gaps(times: list[float]) -> list[float]:
    """Seconds of each step but the first, which warms up."""
    return [b - a for a, b in zip(times[1:-1], times[2:], strict=True)]


def ours(config: Any, optimiser: str, tokens: Any) -> Callable[[int], list[float]]:
    """A function that trains ``steps`` steps with our loop and returns the seconds of each."""
    import numpy as np

    from sprat.config import OptimConfig, TrainConfig
    from sprat.data.pack import PackedDataset
    from sprat.model import Transformer
    from sprat.train import train
    from sprat.trust import open_run

    model = Transformer.create(config, 0)
    packed = PackedDataset(tokens, np.ones_like(tokens), np.ones_like(tokens, dtype=np.uint8))

    def measure(steps: int) -> list[float]:
        recipe = TrainConfig(
            steps=steps + WARM, batch_rows=ROWS, seq_len=SEQ, checkpoint_every=10**9, optim=OptimConfig(name=optimiser)
        )
        source = _Clock(packed)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            run = open_run(
                place / "run", stage="bench", recipe=recipe, inputs={}, seed=0, ledger=place / "ledger.jsonl"
            )
            train(model, source, recipe, run, progress=False)
        return _gaps(source.times)

    return measure


def their_model(config: Any, implementation: str) -> Any:
    """transformers' DeepseekV3ForCausalLM of the same shape, fresh."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    table = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type", "torch_dtype")}
    foreign = DeepseekV3Config(**table)
    foreign._experts_implementation = implementation
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(foreign)
    model.config.use_cache = False
    return model.train()


def bare(config: Any, implementation: str, tokens: Any) -> Callable[[int], list[float]]:
    """A function that trains with a plain loop over their model."""
    import torch

    model = their_model(config, implementation)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rows = torch.from_numpy(tokens[:, :-1].astype("int64"))

    def measure(steps: int) -> list[float]:
        times = []
        for step in range(steps + WARM):
            times.append(time.perf_counter())
            batch = rows[(step * ROWS) % len(rows) :][:ROWS]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        return _gaps(times)

    return measure


def trainer(config: Any, implementation: str, tokens: Any) -> Callable[[int], list[float]]:
    """A function that trains with transformers' Trainer."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = their_model(config, implementation)
    rows = torch.from_numpy(tokens[:, :-1].astype("int64"))
    data = [{"input_ids": row, "labels": row} for row in rows]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    def measure(steps: int) -> list[float]:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=ROWS, max_steps=steps + WARM, use_cpu=True, seed=0,
                optim="adamw_torch_fused", max_grad_norm=1.0, report_to=[], save_strategy="no", logging_strategy="no",
                disable_tqdm=True,
            )  # fmt: skip
            Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
        return _gaps(clock.times)

    return measure


def best_implementation(config: Any, tokens: Any, steps: int) -> tuple[str, float]:
    """The experts implementation with which a bare loop over their model is fastest here, and its seconds a step."""
    seconds = {name: min(bare(config, name, tokens)(steps)) for name in IMPLEMENTATIONS}
    best = min(seconds, key=lambda name: seconds[name])
    return best, seconds[best]


def steps_within(seconds: float, step_seconds: float, competitors: int, steps: int) -> int:
    """How many of ``steps`` a round may measure in ``seconds``, if all take as long as theirs; at least one.

    >>> steps_within(60, 0.5, 4, 5), steps_within(60, 3.0, 4, 5), steps_within(-1, 3.0, 4, 5)
    (5, 3, 1)
    """
    affordable = min(steps, seconds / (competitors * step_seconds) - WARM)
    return max(1, int(affordable))


def worker(
    label: str, allocator: str, threads: int, rounds: int, steps: int, limit: float = math.inf
) -> dict[str, Any]:
    """Measure one size in this process: seconds of every step by competitor.

    Args:
        limit: seconds for all of it; no round is begun that would not end in time. One there is always, of fewer steps
            where there is less time.
    """
    start = time.monotonic()
    import torch

    from sprat.config.sizes import size
    from sprat.model import count_parameters
    from sprat.train import machine

    if allocator == "plain":
        machine.raise_malloc_thresholds = lambda: False  # type: ignore[assignment]
    torch.set_num_threads(threads)
    machine.tune_allocator()
    name, changes = SIZES[label]
    config = size(name, **changes)
    tokens = _tokens(config.vocab_size, 0)
    chosen, step_seconds = best_implementation(config, tokens, 4 if limit == math.inf else 1)
    competitors = {
        "sprat": ours(config, "adamw", tokens),
        "bare": bare(config, chosen, tokens),
        "trainer": trainer(config, chosen, tokens),
        "sprat-muon": ours(config, "muon", tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    steps = steps_within(limit - (time.monotonic() - start), step_seconds, len(competitors), steps)
    done = 0
    while done < rounds:
        began = time.monotonic()
        for competitor, measure in competitors.items():
            seconds[competitor].append(statistics.median(measure(steps)))
        done += 1
        if 2 * time.monotonic() - began - start > limit:
            break
    speed = {name: ROWS * SEQ / statistics.median(found) for name, found in seconds.items()}
    counts = count_parameters(config)
    facts = {"size": label, "allocator": allocator, "implementation": chosen, "active": counts.active}
    facts |= {"rounds": done, "steps": steps}
    return {**facts, "total": counts.total, "tokens_per_second": speed}


def verdicts(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each size and opponent: our shipped speed over the better of their two runs."""
    lines = []
    for label in dict.fromkeys(result["size"] for result in results):
        of_size = {r["allocator"]: r["tokens_per_second"] for r in results if r["size"] == label}
        for opponent, bar in BARS.items():
            theirs = max(speed[opponent] for speed in of_size.values())
            # the ratio inside each process is interleaved, hence fair on a busy machine; take the worse one
            ratio = min(speed["sprat"] / speed[opponent] for speed in of_size.values())
            ratio = min(ratio, of_size["tuned"]["sprat"] / theirs)
            lines.append(
                {"size": label, "against": opponent, "ratio": round(ratio, 3), "bar": bar,
                 "stretch": STRETCH[opponent], "passed": ratio >= bar}
            )  # fmt: skip
    return lines


def main() -> int:
    """Run all workers, print figures, bars and verdicts; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description="training speed against transformers")
    parser.add_argument("--quick", action="store_true", help="at most five minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=0, help="interleaved rounds (default 9, quick 5)")
    parser.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=2, metavar=("SIZE", "ALLOCATOR"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing:
        print(f"train_speed: transformers' Trainer needs {' and '.join(missing)}: "
              f"{sys.executable} -m pip install {' '.join(missing)}", file=sys.stderr)  # fmt: skip
        return 9
    rounds, steps = given.rounds or (5 if given.quick else 9), 5 if given.quick else 12
    if given.worker:
        print(json.dumps(worker(*given.worker, given.threads, rounds, steps, given.seconds)))
        return 0
    results: list[dict[str, Any]] = []
    began, left = time.monotonic(), 2 * len(SIZES)
    for label in SIZES:
        for allocator in ("tuned", "plain"):
            command = [sys.executable, "-m", "bench.train_speed", "--worker", label, allocator]
            command += ["--threads", str(given.threads), "--rounds", str(rounds), *(["--quick"] if given.quick else [])]
            command += ["--seconds", str((began + QUICK_SECONDS - time.monotonic()) / left)] if given.quick else []
            left -= 1
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
                    timeout=max(1.0, began + PROMISED_SECONDS - time.monotonic()) if given.quick else None,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                print(f"train_speed: {label} ({allocator}) could not be measured within five minutes: the machine is "
                      "too busy or too slow; try again, or without --quick", file=sys.stderr)  # fmt: skip
                return 9
            if done.returncode:
                print(done.stderr[-2000:], file=sys.stderr)
                return 1
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
            if not given.json:
                _print_result(results[-1])
    lines = verdicts(results)
    passed = all(line["passed"] for line in lines)
    facts = {
        "machine": platform.processor() or platform.machine(),
        "threads": given.threads,
        "rounds": rounds,
        "seed": 0,
    }
    if given.json:
        print(json.dumps({**facts, "results": results, "verdicts": lines, "passed": passed}))
        return 0 if passed else 1
    for line in lines:
        verdict = "stretch reached" if line["ratio"] >= line["stretch"] else "passed" if line["passed"] else "MISSED"
        print(f"{line['size']:14} against {line['against']:8} {line['ratio']:5.2f} x  bar {line['bar']} x  {verdict}")
    worst = min(lines, key=lambda line: float(line["ratio"]) / float(line["bar"]))
    print(f"train_speed: {'PASS' if passed else 'MISS'}: tightest {worst['ratio']:.2f} x against {worst['against']} "
          f"at {worst['size']} (bar {worst['bar']} x), {given.threads} threads, MTP off")  # fmt: skip
    return 0 if passed else 1


def _print_result(result: dict[str, Any]) -> None:
    """One line of figures."""
    speed = "  ".join(f"{name} {value:8,.0f}" for name, value in result["tokens_per_second"].items())
    print(
        f"{result['size']:14} {result['allocator']:6} tok/s: {speed}   (experts: {result['implementation']}; "
        f"{result['rounds']} rounds of {result['steps']} steps)",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
