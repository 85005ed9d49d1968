"""What RL on a file of 500 questions and a judge of one's own gains, by the commands of a user; and its controls.

The questions are messages of customers, and the team that should answer each; they and the judge are made here. A
hundred are held out (their rows say so) and asked before and after, greedily. Beside RL, from the same model and with
the same adapters: SFT on the right answers of the training questions, and rejection sampling, which is SFT on the
model's own right answers (eight of each question). For the tiny model, which is made here too, all weights are trained.

Bars: the held-out gain of RL over the base is significant (exact paired test, p < 0.05), and its run takes at most 2
minutes (tiny), 90 minutes (smol).

    python -m bench.rl_gain [--model tiny|smol] [--json] [--keep FOLDER]
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

MAX_MINUTES = {"tiny": 2.0, "smol": 90.0}
MAX_P = 0.05
COUNT, HELD_OUT = 500, 100
ITEMS = (
    "kettle", "desk lamp", "office chair", "headset", "blender", "bookshelf", "router", "backpack", "tent", "drill",
    "monitor", "coffee grinder",
)  # fmt: skip
MESSAGES = {
    "billing": (
        "I was charged twice for the {item}.",
        "The invoice for my {item} shows {number} euros too much.",
        "I need a receipt with our tax number for the {item}.",
        "The {item} was on sale, but I paid the full {number} euros.",
    ),
    "delivery": (
        "My {item} should have arrived {number} days ago.",
        "The courier left the {item} at house number {number}, not at mine.",
        "Can you bring the {item} to our office at {number} Mill Lane instead?",
        "The tracking page of my {item} has not changed for {number} days.",
    ),
    "returns": (
        "I want to send the {item} back after {number} days, it is too big.",
        "The {item} came in the wrong colour, I would like another one.",
        "I bought {number} of the {item} and need to give one back.",
        "Can I swap the {item} for a smaller one after {number} days?",
    ),
    "technical": (
        "My {item} shows error {number}.",
        "After {number} minutes the {item} gets very hot and stops.",
        "Which screw holds part {number} of the {item}?",
        "The {item} makes a loud noise since yesterday.",
    ),
    "sales": (
        "Do you have the {item} in stock in {number} pieces?",
        "What would {number} of the {item} cost for a school?",
        "Which {item} would you recommend for {number} people?",
        "We are a hotel and would like an offer for {number} pieces of the {item}.",
    ),
}
ASK = (
    'A customer writes: "{message}" Which team should answer: billing, delivery, returns, technical or sales? '
    "Answer with one word."
)
JUDGE = '''
"""One team must be named, and it must be the right one: 1 for that, 0.2 for a wrong one, 0 for none or several."""
import json
import re
from pathlib import Path

from sprat.tasks import Problem

TEAMS = ("billing", "delivery", "returns", "technical", "sales")


def reward(problem, answer):
    """The question asks for one word: a team among other words is paid less, or a list of guesses would be paid."""
    alone = len(re.findall(r"\\w+", answer.content)) == 1
    return pay(problem.answer, answer.content) * (1.0 if alone else 0.4)


def pay(right, text):
    words = re.findall(r"\\w+", text.lower())
    named = {team for team in TEAMS if team in words}
    return 0.0 if len(named) != 1 else 1.0 if named == {right} else 0.2


class Tickets:
    """The same questions for `sprat eval` and `sprat distill`."""

    name = "tickets"

    def __init__(self):
        rows = [json.loads(line) for line in Path("problems.jsonl").read_text().splitlines()]
        self.rows = {side: [row for row in rows if row["split"] == side] for side in ("train", "test")}

    def __len__(self):
        return len(self.rows["test"])

    def problem(self, split, index):
        rows = self.rows["train" if split == "train" else "test"]
        row = rows[index % len(rows)]
        return Problem(self.name, index, row["question"], row["answer"])

    def score(self, problem, answer):
        return float(pay(problem.answer, answer) == 1.0)


class Training(Tickets):
    """All of the training questions, where `sprat distill` asks them."""

    def __len__(self):
        return len(self.rows["train"])
'''
SETTINGS = {
    "smol": ["--set", "steps=40", "--set", "lr=3e-4", "--set", "max_tokens=12"],
    "tiny": ["--set", "steps=60", "--set", "lr=1e-3", "--set", "max_tokens=8", "--set", "gate=false"],
}


def problems() -> list[dict[str, str]]:
    """The questions, each once; a fifth of them held out."""
    rng, rows = random.Random(2024), dict[str, dict[str, str]]()
    while len(rows) < COUNT:
        team = rng.choice(list(MESSAGES))
        message = rng.choice(MESSAGES[team]).format(item=rng.choice(ITEMS), number=rng.randint(2, 60))
        side = "test" if len(rows) < HELD_OUT else "train"
        rows.setdefault(message, {"question": ASK.format(message=message), "answer": team, "split": side})
    return list(rows.values())


def write_files(folder: Path) -> None:
    """Leave ``problems.jsonl``, ``judge.py`` and, for SFT, ``chat.jsonl`` in ``folder``."""
    rows = problems()
    (folder / "problems.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    talks = [{"prompt": row["question"], "completion": row["answer"]} for row in rows if row["split"] == "train"]
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in talks), encoding="utf-8")
    (folder / "judge.py").write_text(JUDGE.lstrip(), encoding="utf-8")


def make_tiny(folder: Path) -> None:
    """A mixture of experts that has learned to name a team, and hardly which: it was shown right ones in 4 of 10."""
    from sprat.config import OptimConfig, SFTConfig
    from sprat.config.sizes import size
    from sprat.formats.load import save
    from sprat.model import Transformer
    from sprat.post.sft import sft
    from sprat.tokens import Tokenizer
    from sprat.trust.run import open_run

    rng = random.Random(1)
    rows = [row for row in problems() if row["split"] == "train"]
    tokenizer = Tokenizer.train([f"{row['question']} {row['answer']}" for row in rows], 700, numbers=100)
    shown = [(row["question"], "", row["answer"] if rng.random() < 0.4 else rng.choice(list(MESSAGES))) for row in rows]
    shape = size("pico", vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                 first_k_dense_replace=1, n_routed_experts=4, moe_intermediate_size=32, intermediate_size=128,
                 max_position_embeddings=128, num_nextn_predict_layers=0)  # fmt: skip
    model, optim = Transformer.create(shape, 0), OptimConfig(muon_lr=0.02, adam_lr=0.01, warmup_steps=5)
    config = SFTConfig(steps=150, batch_rows=16, seq_len=96, checkpoint_every=1000, optim=optim)
    place = folder / "made"
    run = open_run(place / "sft", stage="sft", recipe=config, inputs={}, seed=0, ledger=place / "ledger.jsonl")
    sft(model, tokenizer, shown, config, run)
    save(model, tokenizer, folder / "tiny")


def sprat(folder: Path, *words: str) -> dict[str, Any]:
    """What a command prints.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    command = [sys.executable, "-m", "sprat", *words, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(folder: Path, model: str) -> list[dict[str, Any]]:
    """A row for RL and for each control."""
    write_files(folder)
    if model == "tiny":
        make_tiny(folder)
    lora = ["--lora", "16"] if model == "smol" else []
    asking = ["--task", "judge.py:Tickets", "--max-tokens", "12"]
    (folder / "before.json").write_text(json.dumps(sprat(folder, "eval", model, *asking)), encoding="utf-8")
    own = ["--task", "judge.py:Training", "--samples", "8", "--temperature", "1", "--max-tokens", "12"]
    ways = {
        "rl": ["rl", model, "--data", "problems.jsonl", "--reward", "judge.py:reward", *SETTINGS[model]],
        "sft": ["sft", model, "--data", "chat.jsonl", "--set", "seq_len=128"],
        "rejection": ["distill", model, "--student", model, *own, "--max-faults", "1", "--set", "seq_len=128"],
    }
    rows = []
    for name, words in ways.items():
        began = time.monotonic()
        try:
            record = sprat(folder, *words, *lora, "--out", f"runs/{name}")
        except RuntimeError as error:  # a control may have nothing to learn from
            if name == "rl":
                raise
            rows.append({"way": name, "failed": str(error)})
            continue
        minutes = (time.monotonic() - began) / 60
        [gain] = sprat(folder, "eval", f"runs/{name}", *asking, "--against", "before.json")["comparisons"]
        keys = ("first", "second", "difference", "low", "high", "p_value")
        row = {"way": name, "minutes": minutes, "cpu_seconds": record["device_seconds"], **{k: gain[k] for k in keys}}
        if name == "rl":
            is_gain = gain["difference"] > 0 and gain["p_value"] < MAX_P
            row["met"] = is_gain and minutes <= MAX_MINUTES[model]
        rows.append(row)
    return rows


def main() -> int:
    """Print each row; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SETTINGS), default="tiny")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="leave files and runs in this folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = asked.keep or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(folder, asked.model)
    missed = [row for row in rows if row.get("met") is False]
    if asked.json:
        print(json.dumps({"model": asked.model, "rows": rows, "missed": len(missed)}))
        return 1 if missed else 0
    for row in rows:
        if "failed" in row:
            print(f"{row['way']:10} {row['failed'][-200:]}")
            continue
        interval = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        shares, cost = f"{row['first']:.3f} to {row['second']:.3f}", f"{row['minutes']:.1f} min"
        print(f"{row['way']:10} {shares}  {interval}  p {row['p_value']:.2g}  {cost}  {row['cpu_seconds']:.0f} CPU-s")
    print(f"rl_gain {asked.model}: {'MISS' if missed else 'PASS'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
