"""Tokens per second on a CPU, against llama.cpp and transformers, on the same weights at the same bits.

Two models: SmolLM2-135M-Instruct, and a random DeepSeek-V3 shape of 294 M parameters, 46 M at work. llama.cpp is
compiled here with native flags (`bench.oracles`) and reads Q4_0 with a Q8_0 head made by its own quantiser; Sprat reads
INT4 in groups of 32 with an INT8 head made from the same float32 weights. llama.cpp runs through its C interface in its
best setting for each figure (flash attention, repacked weights, one cache or one for each sequence, threads),
transformers in its best mode; both are found by trial before the rounds. Each engine has a process of its own, bound
to the same cores; rounds are interleaved and ratios are taken within a round.

What a figure holds: Sprat's are through `sprat.Engine` with speculation off (scheduling, paging and sampling included);
llama.cpp's are bare `llama_decode` calls; all include the choice of the likeliest token. "back end" is Sprat without
its engine. A reading during which others took more than 4 % of the cores is marked and left out of the medians where
enough others remain; then the absolute figures hold, and if not, the report says so. Exit 1 where a bar is missed.

    python -m bench.cpu_inference [--quick] [--json] [--rounds N] [--plot docs/cpu_inference.svg]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.inference import bars, cores, figures, models, plot
from bench.inference.harness import Series, WorkerError
from bench.oracles import make_llama

PLOT = Path(__file__).resolve().parents[1] / "docs" / "cpu_inference.svg"


def measure(plan: figures.Plan, say: figures.Say) -> dict[str, Any]:
    """Everything, model by model and from one core to two; see ``report`` for what it holds."""
    make_llama()
    folders = {name: models.prepare(name) for name in bars.MODELS}
    counts = [count for count in (1, 2) if len(cores.choose(count)) == count]
    on = cores.choose(counts[-1])
    speeds: bars.Speeds = {}
    chosen: dict[str, Any] = {}
    for name, folder in folders.items():
        for count in reversed(counts):
            found = figures.speed(folder, cores.choose(count), plan, say)
            speeds[name, count], chosen[f"{name}, {count}"] = found
    deep = {name: figures.depth(folders[name], on, plan, say) for name in folders if name == "moe" or not plan.lean}
    limits = {
        f"{name}, {count}": _limit(speeds, name, count, folder) for name, folder in folders.items() for count in counts
    }
    rest: dict[str, Any] = {
        "share": limits[f"dense, {counts[-1]}"]["share"],
        "quality": figures.quality(folders["dense"], on, plan, say),
        "serving": figures.serving(folders["dense"], on, plan, say),
        "depth": deep["moe"],
        "memory": figures.memory(folders["dense"], on, plan),
    }
    return {"speeds": speeds, "chosen": chosen, "depths": deep, "limits": limits, "rest": rest, "counts": counts}


def _limit(speeds: bars.Speeds, model: str, count: int, folder: Path) -> dict[str, float]:
    """Bytes that one token of batch 1 reads, the measured read bandwidth, and the share of it that we use."""
    size = models.bytes_per_token(folder, figures.SHORT)
    bandwidth = cores.read_bandwidth(tuple(cores.choose(count)), size)
    rate = speeds[model, count]["decode 1"].rate("sprat")
    return {"bytes": size, "bandwidth": bandwidth, "limit": bandwidth / size, "share": rate * size / bandwidth}


def report(found: dict[str, Any], lines: list[bars.Verdict]) -> None:
    """Print figures, then bars and verdicts."""
    for (model, count), by_figure in found["speeds"].items():
        print(f"\n{bars.MODELS[model]}, {count} core{'s'[: count - 1]}, tokens/s (median)")
        for figure, series in by_figure.items():
            rates = "  ".join(f"{engine} {series.rate(engine):8,.0f}" for engine in series.readings)
            print(f"  {figure:12} {rates}   x llama.cpp {series.ratio('sprat', 'llama'):.2f}")
        limit = found["limits"][f"{model}, {count}"]
        print(f"  one token reads {limit['bytes'] / 1e6:.1f} MB; reads at most {limit['bandwidth'] / 1e9:.1f} GB/s, "
              f"so at most {limit['limit']:,.0f} tokens/s: {limit['share']:.0%} of it")  # fmt: skip
        print(f"  chosen: {_choices(found['chosen'][f'{model}, {count}'])}")
    for model, by_context in found["depths"].items():
        for context, series in by_context.items():
            rates = "  ".join(f"{engine} {series.rate(engine):8,.0f}" for engine in series.readings)
            print(f"{bars.MODELS[model]}, {context}: {rates}")
    for label, held in found["rest"]["quality"].items():
        print(f"{label:17} KL {held['kl']:.5f} nats, same likeliest token {held['same']:.2%}, "
              f"loss {held['loss_rise']:+.4f}, {held['positions']:,.0f} tokens")  # fmt: skip
    for name, series in found["rest"]["serving"].items():
        print(f"{name:20} {series.seconds('sprat') * 1e3:9,.1f} ms  {series.rate('sprat'):8,.0f} tokens/s")
    held = found["rest"]["memory"]
    above = (held["peak"] - held["imported"]) / (held["weights"] + held["cache"])
    print("peak memory {peak:.0f} MB; weights {weights:.0f}, cache {cache:.0f}, Python and torch before any model "
          "{imported:.0f}".format(**{key: value / 2**20 for key, value in held.items()}),
          f"(above those, {above:.2f} x weights and cache)\n")  # fmt: skip
    for line in lines:
        value = "-" if line.figure is None else f"{line.figure:.3f}"
        wish = "" if line.stretch is None else f" (stretch {line.stretch:.2f})"
        print(f"{line.what:78} {value:>7} {line.unit:1} {line.kind} {line.bar:.3g}{wish}: {line.word}")


def _choices(chosen: dict[str, Any]) -> str:
    """Settings in words."""
    words = []
    for name, choice in chosen.items():
        if isinstance(choice, list):
            flags = ["flash attention", "repacked", "one cache"]
            names = [flag for flag, is_on in zip(flags, choice, strict=False) if is_on]
            choice = " + ".join([*names, f"{choice[3]} threads"])
        words.append(f"{name}: {choice}")
    return "; ".join(words)


def as_json(found: dict[str, Any], lines: list[bars.Verdict]) -> dict[str, Any]:
    """The same as one JSON object, with every single reading."""

    def flat(held: dict[str, Series]) -> dict[str, Any]:
        return {
            name: {
                engine: [dataclasses.asdict(one) for one in readings] for engine, readings in series.readings.items()
            }
            for name, series in held.items()
        }

    rest = {**found["rest"], "serving": flat(found["rest"]["serving"])}
    del rest["depth"]
    return {
        "speeds": {f"{model}, {count}": flat(held) for (model, count), held in found["speeds"].items()},
        "depths": {model: flat(held) for model, held in found["depths"].items()},
        "verdicts": [{**dataclasses.asdict(line), "passed": line.passed, "word": line.word} for line in lines],
        "chosen": found["chosen"],
        "limits": found["limits"],
        **rest,
    }


def disturbance(found: dict[str, Any]) -> tuple[int, int]:
    """(readings during which others used the cores, all readings)."""
    groups = [*found["speeds"].values(), *found["depths"].values(), found["rest"]["serving"]]
    pairs = [series.lost for held in groups for series in held.values()]
    return sum(lost for lost, _ in pairs), sum(every for _, every in pairs)


def main() -> int:
    """Measure, print, draw; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description="inference on a CPU against llama.cpp and transformers")
    parser.add_argument("--quick", action="store_true", help="at most five minutes once models and llama.cpp are made")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=0, help="interleaved rounds (default 7, quick 3)")
    parser.add_argument("--plot", type=Path, default=PLOT, help="where the picture goes; none with --quick")
    given = parser.parse_args()
    plan = figures.QUICK if given.quick else figures.FULL
    if given.rounds:
        plan = dataclasses.replace(plan, rounds=given.rounds)
    start = time.monotonic()

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{time.monotonic() - start:6.0f} s  {text}", end="", file=sys.stderr, flush=True)

    try:
        found = measure(plan, say)
    except WorkerError as error:
        print(f"cpu_inference: {error}", file=sys.stderr)
        return 1
    lines = bars.verdicts(found["speeds"], found["rest"], found["counts"])
    passed, (lost, every) = all(line.passed for line in lines), disturbance(found)
    facts = {**cores.machine(), "date": datetime.date.today().isoformat(), "rounds": plan.rounds, "seed": models.SEED}
    facts |= {"disturbed": lost, "readings": every, "minutes": round((time.monotonic() - start) / 60, 1)}
    if not given.quick:
        caption = f"{facts['processor']}, {facts['date']}, medians of {plan.rounds} interleaved rounds"
        plot.draw(found["speeds"], found["depths"], given.plot, caption)
    if given.json:
        print(json.dumps({**facts, **as_json(found, lines), "passed": passed}))
        return 0 if passed else 1
    report(found, lines)
    tightest, missed = min(lines, key=lambda line: line.margin), sum(not line.passed for line in lines)
    busy = f"; COULD NOT GET ITS CORES in {lost} of {every} readings" if lost > every // 5 else ""
    print(f"cpu_inference: {'PASS' if passed else f'MISS, {missed} of {len(lines)} bars'}: tightest "
          f"{tightest.what} ({tightest.word}), {facts['processor']}, {plan.rounds} rounds{busy}")  # fmt: skip
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
