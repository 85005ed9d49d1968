# size: one script, with the worker that runs in the other environment
"""Tokens per second of fine-tuning SmolLM2-135M-Instruct, against TRL's SFTTrainer on the same machine.

Both train on the same conversations, of mixed lengths and a mean of about 80 and of about 250 tokens, with the same
masks: adapters of rank 16 on all linears (theirs by PEFT), and all weights. Ours is ``sprat.post.finetune`` whole.
Theirs is the best of its ways to batch (best-fit packing, wrapped packing, no padding, padding with grouped lengths),
of float32, bfloat16 by autocast and bfloat16 weights, of attention by sdpa and eager, found by trial, one choice after
the other (``--quick`` tries none and takes the first of each). What counts are tokens that are no padding, from the end
of the first step on, which warms up. Rounds are interleaved, so that a busy neighbor hurts both alike; figures are
medians over rounds of the ratio of one round.

Bars: 1.3 times TRL with adapters, 1.15 times with all weights, for ``sprat sft`` as it ships: products in bfloat16
where the processor has them, else in float32 (``--float32`` shows that one beside it). That both train the same is
checked first: the losses of four steps over one batch, in float32. Bars: 1e-3 relative with all weights; 1e-2 with
adapters, which start at random. The share of the peak is of products alone, by what torch's largest float32 product
reaches here.

    python -m bench.finetune_speed [--quick] [--json] [--threads 2] [--rounds 5] [--data short] [--float32]
"""

# N tokens

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.oracles import ROOT, make_trl

BARS = {"lora": 1.3, "full": 1.15}
SAME = {"lora": 1e-2, "full": 1e-3}
COUNT, MEANS = 300, {"short": 80, "long": 250}
SEQ, RANK, ALPHA, RATE = 512, 16, 32, 1e-4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = (
    "the a river boat stone market seven green carries under slowly because number answer question morning light table"
    " paper winter engine little train north always never people bread water house"
)
# Of theirs: (how, rows); dtypes; attention. The first of each was the fastest of a few trials with AVX512-BF16.
BATCHING = [("group", 4), ("group", 8), ("group", 2), ("bfd", 1), ("bfd", 2), ("wrapped", 2), ("free", 4)]
DTYPES, ATTENTION = ["autocast", "float32", "bfloat16"], ["sdpa", "eager"]


def conversations(mean: int, count: int = COUNT, seed: int = 0) -> list[dict[str, Any]]:
    """Questions and answers of random words, of about ``mean`` tokens together, chat format included."""
    draw, words_of, listed = random.Random(f"{mean}/{seed}"), TEXT.split(), []
    for _ in range(count):
        words = max(12, min(SEQ - 40, int(draw.lognormvariate(0, 0.6) / 1.2 * mean)) - 30)
        asked = max(4, int(words * draw.uniform(0.2, 0.6)))
        lengths = {"user": asked, "assistant": max(4, words - asked)}
        turns = [{"role": who, "content": " ".join(draw.choices(words_of, k=n))} for who, n in lengths.items()]
        listed.append({"messages": turns})
    return listed


def prepare(folder: Path) -> None:
    """Leave in ``folder`` the model as a Hugging Face folder, conversations for us, and ids and labels for TRL."""
    from sprat.config.finetune import FinetuneConfig
    from sprat.data.conversations import read_examples
    from sprat.formats.load import load, locate, save
    from sprat.post.examples import encode_examples

    model, tokenizer = load(locate("smol"), dequantize=True)
    save(model, tokenizer, folder / "smol")
    for name, mean in MEANS.items():
        every = conversations(mean)
        for suffix, listed in (("", every), ("-few", every[:8])):
            path = folder / f"{name}{suffix}.jsonl"
            path.write_text("".join(f"{json.dumps(each)}\n" for each in listed), encoding="utf-8")
            encoded = encode_examples(
                tokenizer, read_examples(path, column_map={}, on_bad="refuse").examples, FinetuneConfig(seq_len=SEQ)
            )
            rows = [
                {
                    "input_ids": ids,
                    "labels": [token if learned else -100 for token, learned in zip(ids, mask, strict=True)],
                }
                for ids, mask in encoded.sequences
            ]
            path.with_suffix(".json").write_text(json.dumps(rows), encoding="utf-8")


Measure = Callable[[str, int], dict[str, Any]]  # (name of the data, steps) -> tokens, seconds, losses


def ours(folder: Path, mode: str, dtype: str) -> Measure:
    """``finetune`` in this process; a step begins when its batch is asked for."""
    from sprat.config.finetune import FinetuneConfig
    from sprat.data import loader
    from sprat.post.finetune import finetune

    times, tokens, batch_of = [], [], loader.MixedBatchSource.batch

    def batch(self: Any, step: int, *rank: int) -> Any:
        times.append((time.perf_counter(), time.process_time()))
        drawn = batch_of(self, step, *rank)
        tokens.append((int((drawn.segments_BT > 0).sum()), int((drawn.targets_BT >= 0).sum())))
        return drawn

    loader.MixedBatchSource.batch = batch  # type: ignore[method-assign]

    def measure(data: str, steps: int) -> dict[str, Any]:
        times.clear()
        tokens.clear()
        settings = {
            "steps": steps, "seq_len": SEQ, "log_every": 1, "eval_every": 10**6, "checkpoint_every": 10**6,
            "dtype": dtype, "examples": {"validation": 0.0},
            "lora": {"rank": RANK, "alpha": ALPHA} if mode == "lora" else None,
            "optim": {"adam_lr": RATE, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "grad_clip": 1},
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            config = FinetuneConfig.model_validate(settings)
            run = finetune(folder / "smol", folder / f"{data}.jsonl", Path(place) / "run", config)
            rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        counted = tokens[1:-1]
        return {
            "tokens": sum(n for n, _ in counted), "learned": sum(n for _, n in counted),
            "losses": [row["loss"] for row in rows],
            "seconds": times[-1][0] - times[1][0], "cpu": times[-1][1] - times[1][1],
        }  # fmt: skip

    return measure


def theirs(folder: Path, mode: str, how: str, rows: int, dtype: str, attention: str) -> Measure:
    """``SFTTrainer.train`` in TRL's environment."""
    import datasets
    import torch
    import transformers
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    times, tokens = [], []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

    class Counting(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **named: Any) -> Any:
            tokens.append(int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()))
            return super().compute_loss(model, inputs, *given, **named)

    def measure(data: str, steps: int) -> dict[str, Any]:
        times.clear()
        tokens.clear()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(
            folder / "smol",
            dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32,
            attn_implementation=attention,
        )
        packing, free = how in ("bfd", "wrapped"), how in ("bfd", "free")
        adapters = LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM"
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            arguments = SFTConfig(
                output_dir=place, use_cpu=True, bf16=dtype == "autocast", per_device_train_batch_size=rows,
                max_steps=steps, packing=packing, packing_strategy=how if packing else "bfd", padding_free=free,
                max_length=None if how == "free" else SEQ, gradient_checkpointing=False, learning_rate=RATE,
                lr_scheduler_type="constant", optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0,
                train_sampling_strategy="group_by_length" if how == "group" else "random", report_to=[],
                save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, seed=0,
            )  # fmt: skip
            trainer = Counting(
                model=model, args=arguments, callbacks=[Clock()], peft_config=adapters if mode == "lora" else None,
                train_dataset=datasets.Dataset.from_list(json.loads((folder / f"{data}.json").read_text())),
                processing_class=AutoTokenizer.from_pretrained(folder / "smol"),
            )  # fmt: skip
            trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        seconds, cpu = (end - start for start, end in zip(times[0], times[-1], strict=True))
        return {"tokens": sum(tokens[1:]), "seconds": seconds, "cpu": cpu, "losses": losses}

    return measure


def worker(side: str, folder: Path, threads: int, settings: list[Any]) -> None:
    """Answer one JSON list [data, steps] a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(threads)
    measure = (ours if side == "ours" else theirs)(folder, *settings)
    for line in sys.stdin:
        print(json.dumps(measure(*json.loads(line))), file=answers, flush=True)


class Side:
    """A worker process."""

    def __init__(
        self,
        python: Path,
        side: str,
        folder: Path,
        threads: int,
        settings: list[Any],
        module: str = "bench.finetune_speed",
    ) -> None:
        command = [str(python), "-m", module, "--threads", str(threads)]
        command += ["--worker", side, str(folder), json.dumps(settings)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.settings, self._errors = settings, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors,
        )  # fmt: skip

    def ask(self, *request: Any) -> dict[str, Any]:
        """What the worker answers to ``request``.

        Raises:
            RuntimeError: the worker died; with its last words.
        """
        assert self._process.stdin and self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            self._errors.seek(0)
            raise RuntimeError(f"{self.settings}: {self._errors.read()[-1500:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def speed(found: dict[str, Any]) -> float:
    """Tokens a second."""
    return float(found["tokens"] / found["seconds"])


def best_of_theirs(make: Callable[[list[Any]], Side], data: str, mode: str, steps: int, quick: bool) -> list[Any]:
    """The settings with which theirs is fastest, one choice after the other; ``quick``: the first of each."""
    speeds: dict[tuple[Any, ...], float] = {}

    def trial(*settings: Any) -> float:
        if settings not in speeds:
            side = make([mode, *settings])
            try:
                speeds[settings] = speed(side.ask(data, steps))
            except RuntimeError as error:  # a way that does not work here, or not in this memory
                print(f"left out: {error}"[-400:], file=sys.stderr)
                speeds[settings] = 0.0
            side.close()
            print(f"trial: {data} {mode} {settings}: {speeds[settings]:.0f} tok/s", file=sys.stderr, flush=True)
        return speeds[settings]

    if quick:
        return [mode, *BATCHING[0], DTYPES[0], ATTENTION[0]]
    how, rows = max(BATCHING, key=lambda each: trial(*each, DTYPES[0], ATTENTION[0]))
    dtype = max(DTYPES, key=lambda each: trial(how, rows, each, ATTENTION[0]))
    attention = max(ATTENTION, key=lambda each: trial(how, rows, dtype, each))
    return [mode, how, rows, dtype, attention]


def peak(threads: int) -> float:
    """Floating-point operations a second of a large float32 product."""
    import torch

    torch.set_num_threads(threads)
    left, right, seconds = torch.randn(2048, 2048), torch.randn(2048, 2048), list[float]()
    for _ in range(5):
        began = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds)


def product_flops(mode: str, found: dict[str, Any]) -> float:
    """Of the products that our steps need: three for each matrix, two where it is frozen."""
    body, head = 106_168_320, 28_311_552  # parameters of SmolLM2-135M
    return float((6 if mode == "full" else 4) * (body * found["tokens"] + head * found["learned"]))


def check_same(make: Callable[[str, list[Any]], Side], mode: str) -> dict[str, Any]:
    """The largest difference of losses over four steps on one batch, relative."""
    listed = []
    for side, settings in (("ours", [mode, "float32"]), ("theirs", [mode, "none", 8, "float32", "sdpa"])):
        process = make(side, settings)
        listed.append(process.ask("short-few", 4)["losses"])
        process.close()
    figure = max(abs(a - b) / b for a, b in zip(*listed, strict=True))
    row = {"data": "short-few", "mode": mode, "what": "losses", "figure": figure, "bar": SAME[mode]}
    return row | {"met": figure <= SAME[mode], "losses": listed}


def measure(
    folder: Path, python: Path, threads: int, rounds: int, quick: bool, datas: list[str], both: bool
) -> list[dict[str, Any]]:
    """All rows: figures, bars, verdicts; each is said on stderr when it is there."""

    def make(side: str, settings: list[Any]) -> Side:
        return Side(Path(sys.executable) if side == "ours" else python, side, folder, threads, settings)

    rows, steps, flops = [], 3 if quick else 4, peak(threads)
    for mode in BARS:
        if mode == "full" or not quick:
            rows.append(check_same(make, mode))
        for data in ("short",) if quick else datas:
            chosen = best_of_theirs(lambda settings: make("theirs", settings), data, mode, 3, quick)
            dtypes = ("auto", "float32") if both else ("auto",)
            sides = {dtype: make("ours", [mode, dtype]) for dtype in dtypes} | {"theirs": make("theirs", chosen)}
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
            for number in range(rounds):
                for name in list(sides) if number % 2 else list(sides)[::-1]:
                    found[name].append(sides[name].ask(data, steps))
            for side in sides.values():
                side.close()
            for name in dtypes:
                pairs = list(zip(found[name], found["theirs"], strict=True))
                figure = statistics.median(speed(mine) / speed(other) for mine, other in pairs)
                bar = BARS[mode] if name == "auto" else None
                shares = [product_flops(mode, mine) / mine["seconds"] / flops for mine in found[name]]
                rows.append({
                    "data": data, "mode": mode, "what": name, "figure": figure, "bar": bar,
                    "met": not bar or figure >= bar,
                    "ours": statistics.median(map(speed, found[name])), "settings": chosen,
                    "theirs": statistics.median(map(speed, found["theirs"])), "peak_share": statistics.median(shares),
                    "cpu_seconds_per_1000_tokens": [
                        statistics.median(1000 * each["cpu"] / each["tokens"] for each in found[key])
                        for key in (name, "theirs")
                    ],
                })  # fmt: skip
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Print each ratio; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a round of short conversations, theirs untried")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=0, help="interleaved rounds (default 5, quick 1)")
    parser.add_argument("--data", choices=MEANS, help="of these lengths alone")
    parser.add_argument("--float32", action="store_true", help="show ours in float32 as well")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "FOLDER", "SETTINGS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        side, folder, settings = asked.worker
        worker(side, Path(folder), asked.threads, json.loads(settings))
        return 0
    python = make_trl()
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        rounds, datas = asked.rounds or (1 if asked.quick else 5), [asked.data] if asked.data else list(MEANS)
        rows = measure(Path(place), python, asked.threads, rounds, asked.quick, datas, asked.float32)
    missed = [row for row in rows if not row["met"]]
    if asked.json:
        print(json.dumps({"threads": asked.threads, "rows": rows, "missed": len(missed)}))
        return 1 if missed else 0
    for row in rows:
        verdict = "shown" if row["bar"] is None else f"bar {row['bar']}: {'met' if row['met'] else 'MISSED'}"
        if row["what"] == "losses":
            print(f"{row['mode']:5} losses of four steps differ by {row['figure']:.1e}  {verdict}")
            continue
        cpu = " and ".join(f"{each:.2f}" for each in row["cpu_seconds_per_1000_tokens"])
        print(
            f"{row['mode']:5} {row['data']:6} {row['what']:9} {row['figure']:.2f} x  {verdict}  ({row['ours']:.0f} and "
            f"{row['theirs']:.0f} tok/s, {cpu} CPU-s per 1,000; {100 * row['peak_share']:.0f} % of the float32 peak; "
            f"TRL: {' '.join(map(str, row['settings'][1:]))})"
        )
    barred = [row for row in rows if row["bar"] and row["what"] != "losses"]
    worst = min(barred, key=lambda row: float(row["figure"]) / float(row["bar"]))
    print(f"finetune_speed: {'MISS' if missed else 'PASS'}: tightest {worst['figure']:.2f} x TRL, {worst['mode']} on "
          f"{worst['data']} conversations (bar {worst['bar']} x), {asked.threads} threads")  # fmt: skip
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
