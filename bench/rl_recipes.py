"""What the roads `zero` and `r1` make of a model, by the commands of a user: held-out scores after each stage.

The questions are made here: some digits, of which the last digit of the sum is asked. Thought aloud they are easy, one
partial sum after the other; at once they are not. For the tiny model, which is made here too, six of ten worked
examples show no thinking, so that its likeliest answer is a terse one: what RL can elicit, and a cold start can show.
A fifth of the questions is held out; the model was never shown those, nor is any stage.

Bars: both roads end, `sprat verify` proves them, and the last model is right on more held-out questions than the first
(exact paired test, p < 0.05). For smol (LoRA) the scores are published, whatever comes out.

    python -m bench.rl_recipes [--quick] [--model tiny|smol] [--only zero|r1] [--json] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAX_P = 0.05
COUNT, QUICK_COUNT = 500, 200
ASK = "Add {digits} and give the last digit."
JUDGE = '''
"""1 where the last number of the answer is the right digit."""
import re


def reward(problem, answer):
    numbers = re.findall(r"\\d+", answer.content)
    return float(numbers[-1:] == [problem.answer])
'''
SETTINGS = {
    "tiny": {
        "": ["max_tokens=24", "lr=1e-3", "verifier.workers=2", "gate_problems=100"],
        "zero": ["rl.steps=60"],
        "r1": ["rl-1.steps=30", "rl-2.steps=30", "seq_len=64", "cold.optim.adam_lr=2e-3", "sft.optim.adam_lr=2e-3"],
    },
    "smol": {
        "": ["max_tokens=64"],
        "zero": ["rl.steps=40"],
        "r1": ["rl-1.steps=20", "rl-2.steps=20", "seq_len=256", "cold-answers.problems=200"],
    },
}
QUICK = {
    "": ["max_tokens=24", "lr=1e-3", "verifier.workers=1", "gate=false"],
    "zero": ["rl.steps=12"],
    "r1": ["rl-1.steps=8", "rl-2.steps=8", "seq_len=64", "cold-answers.problems=60", "answers.samples=2"],
}


def digits_of(rng: random.Random) -> list[int]:
    """What is to be added."""
    return [rng.randrange(7) for _ in range(rng.randrange(4, 6))]


def question(digits: list[int]) -> str:
    """In words."""
    return ASK.format(digits=" ".join(map(str, digits)))


def problems(count: int) -> list[dict[str, str]]:
    """The questions, each once; a fifth of them held out."""
    rng, rows = random.Random(7), dict[str, dict[str, str]]()
    while len(rows) < count:
        digits = digits_of(rng)
        side = "test" if len(rows) < count // 5 else "train"
        row = {"question": question(digits), "answer": str(sum(digits) % 10), "split": side}
        rows.setdefault(row["question"], row)
    return list(rows.values())


def write_files(folder: Path, count: int) -> None:
    """Leave ``problems.jsonl``, ``judge.py`` and, for r1, ``general.jsonl`` in ``folder``."""
    (folder / "problems.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in problems(count)), encoding="utf-8")
    (folder / "judge.py").write_text(JUDGE.lstrip(), encoding="utf-8")
    talks = [{"prompt": f"Say {n}.", "completion": f"{n}"} for n in range(60)]
    (folder / "general.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in talks), encoding="utf-8")


def make_tiny(folder: Path, count: int, steps: int) -> None:
    """A mixture of experts that can add aloud, and seldom does; nothing that it was shown asks a held-out question."""
    import torch

    from sprat.config import OptimConfig, SFTConfig
    from sprat.config.sizes import size
    from sprat.formats.load import save
    from sprat.model import Transformer
    from sprat.post.sft import sft
    from sprat.tokens import Tokenizer
    from sprat.trust.run import open_run

    torch.set_num_threads(1)
    rng, shown = random.Random(1), []
    held_out = {row["question"] for row in problems(count) if row["split"] == "test"}
    while len(shown) < steps * 24:
        digits = digits_of(rng)
        totals = [sum(digits[: n + 1]) % 10 for n in range(len(digits))]
        thought = " ".join(map(str, totals)) if rng.random() < 0.4 else ""
        if question(digits) not in held_out:
            shown.append((question(digits), thought, str(totals[-1])))
    tokenizer = Tokenizer.train([question([1, 2, 3])] * 4 + [f"Say {n}. {n}" for n in range(60)], 400, numbers=10)
    shape = size("pico", vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                 first_k_dense_replace=1, n_routed_experts=4, moe_intermediate_size=32, intermediate_size=128,
                 max_position_embeddings=128, num_nextn_predict_layers=0)  # fmt: skip
    model, optim = Transformer.create(shape, 0), OptimConfig(muon_lr=0.02, adam_lr=0.01, warmup_steps=5)
    config = SFTConfig(steps=steps, batch_rows=16, seq_len=64, checkpoint_every=10_000, optim=optim)
    place = folder / "made"
    run = open_run(place / "sft", stage="sft", recipe=config, inputs={}, seed=0, ledger=place / "ledger.jsonl")
    sft(model, tokenizer, shown, config, run)
    save(model, tokenizer, folder / "tiny")


def command(road: str, model: str, *, quick: bool = False) -> list[str]:
    """The line that walks ``road``, without `sprat`."""
    settings = QUICK if quick else SETTINGS[model]
    words = ["road", road, "--model", model, "--data", "problems.jsonl", "--reward", "judge.py:reward"]
    words += ["--general", "general.jsonl"] if road == "r1" else []
    words += ["--lora", "16"] if model == "smol" else []
    words += [word for change in (*settings[""], *settings[road]) for word in ("--set", change)]
    return [*words, "--out", f"runs/{road}"]


def sprat(folder: Path, *words: str) -> dict[str, Any]:
    """What a command prints.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    line = [sys.executable, "-m", "sprat", *words, "--json"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(folder: Path, model: str, roads: list[str], *, quick: bool) -> list[dict[str, Any]]:
    """A row for each road: its scores, in the order of its stages, and whether the bars are met."""
    count = QUICK_COUNT if quick else COUNT
    write_files(folder, count)
    if model == "tiny":
        make_tiny(folder, count, 1500)
    rows = []
    for road in roads:
        began = time.monotonic()
        try:
            found = sprat(folder, *command(road, model, quick=quick))
        except RuntimeError as error:
            rows.append({"road": road, "failed": str(error), "met": False})
            continue
        minutes = (time.monotonic() - began) / 60
        proved = sprat(folder, "verify", f"runs/{road}")["ok"]
        scores = found["held_out"]
        last = scores[-1]
        is_gain = bool(last["gain"] and last["gain"] > 0 and last["p_value"] < MAX_P)
        row = {"road": road, "minutes": minutes, "proved": proved, "scores": scores}
        row["cpu_seconds"] = sum(stage["device_seconds"] for stage in found["stages"])
        row["met"] = proved and (is_gain or quick or model == "smol")
        rows.append(row)
    return rows


def main() -> int:
    """Print each score; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer questions and steps: whether it runs, not how well")
    parser.add_argument("--model", choices=tuple(SETTINGS), default="tiny")
    parser.add_argument("--only", choices=("zero", "r1"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="leave files and runs in this folder")
    asked = parser.parse_args()
    roads = [asked.only] if asked.only else ["zero", "r1"]
    with tempfile.TemporaryDirectory() as place:
        folder = asked.keep or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(folder, asked.model, roads, quick=asked.quick)
    missed = [row for row in rows if not row["met"]]
    if asked.json:
        print(json.dumps({"model": asked.model, "rows": rows, "missed": len(missed)}))
        return 1 if missed else 0
    for row in rows:
        if "failed" in row:
            print(f"{row['road']:5} {row['failed'][-500:]}")
            continue
        print(f"{row['road']}: {row['minutes']:.1f} min, {row['cpu_seconds']:.0f} CPU-s, proved: {row['proved']}")
        for score in row["scores"]:
            right, interval = f"{score['accuracy']:.1%}", f"{score['low']:.1%} to {score['high']:.1%}"
            gain = "" if score["gain"] is None else f"  {100 * score['gain']:+.1f} points, p {score['p_value']:.2g}"
            print(f"    {score['name']:12} {right:>6} ({interval}), {score['tokens']:.0f} tokens{gain}")
    print(f"rl_recipes {asked.model}: {'MISS' if missed else 'PASS'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
