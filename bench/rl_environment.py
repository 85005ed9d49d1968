"""What RL gains in an environment where a tool is needed, by the command of a user; and what it gains without the tool.

The question is which code an item of a catalog has. The catalog is drawn anew for each episode, so that nobody can know
it: ``look_up`` tells it, and the answer is to repeat it. The tiny model, which is made here, has learned that, and was
then shown calls in 3 of 10 demonstrations and guesses in the others. Held-out catalogs are asked before and after, four
episodes each, drawn as in training (the likeliest first token is the call's from the start: 16 guesses share the rest).

Control: the same model, questions and reward, but the tool knows nothing. Whatever is learned there is learned without
the tool.

Bar: the held-out gain is significant (exact paired test, p < 0.05), in at most five minutes; with the tool that knows
nothing it is not above what guessing gives.

    python -m bench.rl_environment [--quick] [--json] [--keep FOLDER]
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

import torch
from torch.nn import functional as F

from sprat.config import OptimConfig
from sprat.config.sizes import size
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.post.rl.batch import forward_responses
from sprat.post.rl.environment_turns import TurnFormat
from sprat.post.rl.rewards import Response
from sprat.post.rl.rollout import Rollout
from sprat.tasks.environment import Action, Call
from sprat.tasks.environment_forms import Episode, Row
from sprat.tokens import Tokenizer
from sprat.train import optim

MAX_MINUTES, MAX_P = 5.0, 0.05
SHOWN_CALLS = 0.3  # of the demonstrations
ITEMS = (
    "kettle", "lamp", "chair", "headset", "blender", "shelf", "router", "backpack", "tent", "drill", "monitor",
    "grinder", "table", "mirror", "clock", "carpet",
)  # fmt: skip
CODES = (
    "amber", "birch", "cedar", "delta", "ember", "frost", "grove", "haven", "iris", "jade", "karma", "lotus", "maple",
    "north", "ocean", "pearl",
)  # fmt: skip
ENVIRONMENT = f'''
"""Which code has an item? The catalog is drawn anew each time; the tool tells it."""
import random

ITEMS, CODES = {ITEMS!r}, {CODES!r}


class Catalog:
    knows = True

    def __init__(self):
        self.tools = [self.look_up]

    def look_up(self, item: str) -> str:
        """The code of an item."""

    def reset(self, seed):
        draw = random.Random(seed)
        self.codes = {{item: draw.choice(CODES) for item in ITEMS}}
        self.item = draw.choice(ITEMS)
        question = f'Which code has "{{self.item}}"?'
        return question, {{"answer": self.codes[self.item], "canonical": f"{{seed}} {{self.item}}"}}

    def step(self, action):
        if action.tool_calls:
            arguments = [call.arguments if isinstance(call.arguments, dict) else {{}} for call in action.tool_calls]
            codes = self.codes if self.knows else {{}}
            return [codes.get(str(each.get("item")), "unknown") for each in arguments], 0.0, False
        return "", float(action.strip() == self.codes[self.item]), True


class Nothing(Catalog):
    knows = False
'''
SETTINGS = [
    "--set", "steps=30", "--set", "lr=2e-4", "--set", "decay_fraction=0.7", "--set", "max_tokens=40",
    "--set", "environment.max_turns=4",
    "--set", "gate=false",  # it asks whether thinking helps, and this model was never shown any
    "--set", "held_out.every=0", "--set", "held_out.problems=100", "--set", "held_out.samples=4",
]  # fmt: skip
QUICK = ["--set", "steps=16", "--set", "held_out.problems=40"]


def demonstrations(environment: Any, turns: TurnFormat, count: int, rng: random.Random, calls: float) -> list[Rollout]:
    """Episodes that are shown to the model: some call the tool and repeat what it says, the others guess."""
    shown = []
    for _ in range(count):
        seed = rng.randrange(1 << 30)
        episode = Episode(environment, "bench")
        reply = episode.reset(None, seed)
        prompt, item, code = turns.prompt_ids(None, reply, None), reply["canonical"].split()[-1], reply["answer"]
        ids, spans = list[int](), list[tuple[int, int]]()
        if rng.random() < calls:
            call = turns.tool_format.write([("look_up", json.dumps({"item": item}))])
            said = _say(turns.tokenizer, ids, spans, call)
            rows: list[Row] = episode.step(Action(said, [Call("look_up", {"item": item}, "call_0")]))["messages"]
            ids += turns.next_ids(turns.read(ids, reply["tools"], None, finished=True), rows, None)
        else:
            code = rng.choice(CODES)
        _say(turns.tokenizer, ids, spans, code)
        response = Response("", code, True)
        zeros = [0.0] * len(ids)
        shown.append(Rollout("bench", prompt, ids, zeros, response, 1.0, 1.0, 0, trained=spans))
    return shown


def _say(tokenizer: Tokenizer, ids: list[int], spans: list[tuple[int, int]], text: str) -> str:
    """A turn of the model: no think, ``text``, and the end token."""
    closed = tokenizer.chat_format.no_thinking_prompt.removeprefix(tokenizer.chat_format.generation_prompt)
    own = [*tokenizer.encode_parts([(closed, True), (text, False)]), tokenizer.special_ids.eos]
    spans.append((len(ids), len(own)))
    ids += own
    return text


def make_tiny(folder: Path, steps: int = 500) -> None:
    """A mixture of experts that has learned to call the tool and to repeat what it says, and then to guess instead."""
    namespace: dict[str, Any] = {}
    (folder / "catalog.py").write_text(ENVIRONMENT.lstrip(), encoding="utf-8")
    sys.path.insert(0, str(folder))
    namespace = vars(__import__("catalog"))
    sys.path.remove(str(folder))
    plain = TurnFormat(Tokenizer.train([" ".join((*ITEMS, *CODES))] * 4, 512, numbers=10))
    reply = Episode(namespace["Catalog"], "bench").reset(None, 1)
    text = plain.tokenizer.decode(plain.prompt_ids(None, reply, None))
    calls = [plain.tool_format.write([("look_up", json.dumps({"item": item}))]) for item in ITEMS]
    words = [f"{item} {code}\\n{code}\\n{item}" for item in ITEMS for code in CODES]
    tokenizer = Tokenizer.train([text, *calls, *words] * 4, 900, numbers=10)
    shape = size("pico", vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                 first_k_dense_replace=1, n_routed_experts=4, moe_intermediate_size=32, intermediate_size=128,
                 max_position_embeddings=512, num_nextn_predict_layers=0)  # fmt: skip
    torch.manual_seed(0)
    model, turns, rng = Transformer.create(shape, 0), TurnFormat(tokenizer), random.Random(1)
    optimizer = optim.build(model, OptimConfig(muon_lr=0.02, adam_lr=0.01, warmup_steps=5))
    for step in range(steps):
        calls = SHOWN_CALLS if step >= 0.85 * steps else 1.0
        rows = demonstrations(namespace["Catalog"], turns, 16, rng, calls)
        tokens = forward_responses(model, rows, torch.ones(len(rows)))
        loss = F.cross_entropy(tokens.x_ND @ model.head.dense_weight().T, tokens.targets_N)
        loss.backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step(lr_factor=min(1.0, (steps - step) / (0.4 * steps)))
        optimizer.zero_grad()
    save(model, tokenizer, folder / "tiny")


def train(folder: Path, name: str, is_quick: bool) -> dict[str, Any]:
    """One run of ``sprat rl``, as a row.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    words = ["rl", "tiny", "--environment", f"catalog.py:{name}", "--out", f"runs/{name}", *SETTINGS]
    words += QUICK if is_quick else []
    began = time.monotonic()
    command = [sys.executable, "-m", "sprat", *words, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    record = json.loads(done.stdout)
    found = record["facts"]["held_out"]["comparison"]
    keys = ("first", "second", "difference", "low", "high", "p_value")
    minutes = (time.monotonic() - began) / 60
    row = {"way": name, "minutes": minutes, "cpu_seconds": record["device_seconds"], **{k: found[k] for k in keys}}
    if name == "Catalog":
        row["met"] = found["difference"] > 0 and found["p_value"] < MAX_P and minutes <= MAX_MINUTES
    else:
        row["met"] = found["second"] < 3 / len(CODES)
    return row


def main() -> int:
    """Print each row; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, and fewer held-out questions")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="leave files and runs in this folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = asked.keep or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        make_tiny(folder)
        rows = [train(folder, name, asked.quick) for name in ("Catalog", "Nothing")]
    missed = [row for row in rows if not row["met"]]
    if asked.json:
        print(json.dumps({"rows": rows, "missed": len(missed)}))
        return 1 if missed else 0
    for row in rows:
        interval = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        shares, cost = f"{row['first']:.3f} to {row['second']:.3f}", f"{row['minutes']:.1f} min"
        print(f"{row['way']:10} {shares}  {interval}  p {row['p_value']:.2g}  {cost}  {row['cpu_seconds']:.0f} CPU-s")
    print(f"rl_environment: {'MISS' if missed else 'PASS'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
