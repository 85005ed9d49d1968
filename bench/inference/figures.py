"""Everything that is measured, as functions from workers to figures; ``bars`` says what they mean."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.inference import models
from bench.inference.harness import Reading, Series, Turn, Worker, best, rounds
from bench.inference.hf_worker import COMPILED, MODES

SHORT, LONG, CACHED, WARM = 8, 512, 480, 4  # tokens of a short and a long prompt; of the shared part; untimed steps
CONCURRENT = (1, 4, 16, 64)
DEEP = 4096  # tokens of context for "4 k"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How thorough a run is.

    Attributes:
        rounds: interleaved rounds.
        steps: decode steps that are timed, by batch.
        contexts: stored tokens at which decoding is timed.
        windows: windows of 512 tokens for the quality figures.
        modes: of transformers, to choose the best from.
        tries: of each setting when the best is sought.
        lean: leaves out what no bar asks for: our back end alone, transformers on one core, llama.cpp in long contexts.
    """

    rounds: int
    steps: dict[int, int]
    contexts: tuple[int, ...]
    windows: int
    modes: tuple[str, ...]
    tries: int
    lean: bool


FULL = Plan(7, {1: 64, 4: 32, 16: 16}, (SHORT, 1024, 2048, DEEP), 40, (*MODES, COMPILED), 2, lean=False)
QUICK = Plan(3, {1: 32, 16: 6}, (SHORT, DEEP), 4, ("sdpa", "int8"), 1, lean=True)


class Text:
    """Prompts out of real text. A prompt that is ``unseen`` shares no first block with any other of its kind."""

    def __init__(self, folder: Path) -> None:
        self.windows = np.load(folder / "tokens.npy").tolist()
        self._number = itertools.count()

    def short(self, count: int) -> list[list[int]]:
        """``count`` different prompts of ``SHORT`` tokens."""
        return [window[:SHORT] for window in self.windows[:count]]

    def long(self, length: int) -> list[int]:
        """One prompt of ``length`` tokens, always the same."""
        return list(itertools.chain(*self.windows))[:length]

    def unseen(self) -> list[int]:
        """A prompt of ``LONG`` tokens that no cache can hold."""
        number = next(self._number)
        return [300 + number // 200, 300 + number % 200, *self.windows[number % len(self.windows)][2:LONG]]


def speed(folder: Path, on: list[int], plan: Plan, say: Say) -> tuple[dict[str, Series], dict[str, Any]]:
    """Decoding by batch and reading 512 tokens, all engines interleaved on the cores ``on``.

    Returns:
        figure ("decode 1", …, "prefill 512") -> series by engine: ``sprat`` (through the engine), ``back end`` (ours
        alone), ``llama``, and for one row ``transformers``; and what was chosen for each opponent.
    """
    where = f"{folder.name}, {len(on)} cores: "
    with Worker("sprat", on, folder / "sprat") as sprat, Worker("llama", on, folder / "Q4_0.gguf") as llama:
        chosen: dict[str, Any] = {"sprat": sprat.ask("facts")["backend"]}
        turns = _pair(sprat, llama, folder, plan, chosen, lambda text: say(where + text))
        with contextlib.ExitStack() as stack:
            if not plan.lean or len(on) > 1:
                hf = stack.enter_context(Worker("hf", on, folder / "hf"))
                one, few = Text(folder).short(1), max(8, plan.steps[1] // 4)
                say(f"{where}choosing transformers' mode")
                chosen["transformers"] = mode = best(
                    plan.modes, lambda mode: hf.time("decode", mode=mode, prompts=one, steps=few, warm=WARM), plan.tries
                )
                turns["decode 1"]["transformers"] = _turn(hf, "decode", mode=mode, prompts=one, steps=few, warm=WARM)
            for engines in turns.values():
                for turn in engines.values():
                    turn(0)  # every engine has warm caches before the first round
            return rounds(plan.rounds, turns, lambda text: say(where + text)), chosen


def _pair(
    sprat: Worker, llama: Worker, folder: Path, plan: Plan, chosen: dict[str, Any], say: Say
) -> dict[str, dict[str, Turn]]:
    """The turns of Sprat and llama.cpp by figure; ``chosen`` is told llama.cpp's settings."""
    text, threads = Text(folder), len(llama.on)
    turns: dict[str, dict[str, Turn]] = {}
    for batch, steps in plan.steps.items():
        name, prompts = f"decode {batch}", text.short(batch)
        say(f"choosing llama.cpp's settings: {name}")
        theirs = partial(llama.time, "decode", prompts=prompts, steps=steps, warm=WARM)
        chosen[name] = setting = llama_setting(theirs, threads, batch, plan.tries)
        turns[name] = {
            "sprat": _turn(sprat, "decode", prompts=prompts, steps=steps),
            "llama": _turn(llama, "decode", setting=setting, prompts=prompts, steps=steps, warm=WARM),
        }
        if not plan.lean:
            turns[name]["back end"] = _turn(sprat, "raw_decode", prompts=prompts, steps=steps)
    prompt, name = text.long(LONG), f"prefill {LONG}"
    say(f"choosing llama.cpp's settings: {name}")
    chosen[name] = setting = llama_setting(partial(llama.time, "prefill", prompt=prompt), threads, 1, plan.tries)
    turns[name] = {
        "sprat": lambda number: sprat.time("prefill", prompt=text.unseen()),
        "llama": _turn(llama, "prefill", setting=setting, prompt=prompt),
    }
    if not plan.lean:
        turns[name]["back end"] = _turn(sprat, "raw_prefill", prompt=prompt)
    return turns


def llama_setting(measure: Callable[..., Reading], threads: int, batch: int, tries: int) -> list[Any]:
    """llama.cpp's best setting for one figure: flash attention, repacking, shared cache, and then threads."""
    unified = (False, True) if batch > 1 else (False,)
    settings = [list(choice) for choice in itertools.product((False, True), (False, True), unified, (threads,))]
    winner = best(settings, lambda setting: measure(setting=setting), tries)
    others: list[list[Any]] = [[*winner[:3], count] for count in range(1, threads)]
    return list(best([winner, *others], lambda setting: measure(setting=setting), tries)) if others else list(winner)


def depth(folder: Path, on: list[int], plan: Plan, say: Say) -> dict[str, Series]:
    """Decoding one row at each of the plan's contexts ("context 4096"), against llama.cpp unless the plan is lean.

    Sprat keeps memory in bytes here, its format for long contexts.
    """
    text, steps = Text(folder), plan.steps[1] // 2
    with Worker("sprat", on, folder / "sprat", "i8") as sprat, Worker("llama", on, folder / "Q4_0.gguf") as llama:
        turns: dict[str, dict[str, Turn]] = {}
        for context in plan.contexts:
            prompts, name = [text.long(context)], f"context {context}"
            turns[name] = {"sprat": _turn(sprat, "decode", prompts=prompts, steps=steps)}
            if not plan.lean:
                say(f"choosing llama.cpp's settings: {name}")
                theirs = partial(llama.time, "decode", prompts=prompts, steps=steps, warm=WARM)
                setting = llama_setting(theirs, len(on), 1, 1)
                turns[name]["llama"] = _turn(llama, "decode", setting=setting, prompts=prompts, steps=steps, warm=WARM)
        return rounds(max(3, plan.rounds // 2), turns, say)


def serving(folder: Path, on: list[int], plan: Plan, say: Say) -> dict[str, Series]:
    """First token cold and with ``CACHED`` of ``LONG`` tokens cached; tokens/s of so many requests at once."""
    text = Text(folder)
    with Worker("sprat", on, folder / "sprat") as sprat:
        seen: list[list[int]] = []

        def cold(number: int) -> Reading:
            seen.append(text.unseen())
            return sprat.time("prefill", prompt=seen[-1])

        def cached(number: int) -> Reading:
            return sprat.time("prefill", prompt=[*seen[-1][:CACHED], *text.unseen()[CACHED:]])

        turns: dict[str, dict[str, Turn]] = {
            "first token, cold": {"sprat": cold},
            "first token, cached": {"sprat": cached},
        }
        tokens = plan.steps[1] // 2
        for count in CONCURRENT:
            turns[f"load {count}"] = {"sprat": _turn(sprat, "load", prompts=text.short(count), tokens=tokens)}
        for engines in turns.values():
            engines["sprat"](0)
        return rounds(plan.rounds, turns, say)


def quality(folder: Path, on: list[int], plan: Plan, say: Say) -> dict[str, dict[str, float]]:
    """KL to the float32 model (transformers') by engine and class, in nats a token, and beside it how often the
    likeliest token is the same and by how much the loss on the text rises, on the same windows for all."""
    windows = Text(folder).windows[: plan.windows]
    engines = {"sprat INT4": ("sprat", folder / "sprat"), "sprat INT4 GPTQ": ("sprat", folder / "fitted")}
    engines |= {f"llama.cpp {name}": ("llama", folder / f"{name}.gguf") for name in models.CLASSES[folder.name]}
    totals: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place, Worker("hf", on, folder / "hf") as hf:
        reference = str(Path(place) / "reference.npy")
        workers = {label: Worker(name, on, path) for label, (name, path) in engines.items()}
        try:
            for number, window in enumerate(windows):
                say(f"quality: window {number + 1} of {len(windows)}")
                hf.ask("reference", target=reference, tokens=window)
                for label, worker in workers.items():
                    more = {"setting": [True, True, False, len(on)]} if worker.name == "llama" else {}
                    found = worker.ask("divergence", reference=reference, tokens=window, **more)
                    held = totals.setdefault(label, dict.fromkeys(found, 0.0))
                    totals[label] = {key: held[key] + value for key, value in found.items()}
        finally:
            for worker in workers.values():
                worker.close()
    return {label: _per_token(total) for label, total in totals.items()}


def memory(folder: Path, on: list[int], plan: Plan) -> dict[str, float]:
    """Bytes of a process that loads the model and answers a full batch: its peak, and what it should need."""
    text = Text(folder)
    with Worker("sprat", on, folder / "sprat", "consume") as sprat:
        facts = sprat.ask("facts")
        sprat.ask("load", prompts=text.short(16), tokens=plan.steps[1])
        sprat.ask("prefill", prompt=text.long(LONG))
        room = sprat.ask("room")
        peak = sprat.ask("memory")["peak"]
    return {"peak": peak, "weights": room["weights"], "cache": room["cache"], "imported": facts["imported"]}


def outside(series: Series) -> float | None:
    """Share of a step's time that was spent outside the back end, median over the rounds; None if nobody counted."""
    shares = [
        float(reading.figures["outside"] / reading.figures["seconds"])
        for reading in (series.readings["sprat"][i] for i in series.kept("sprat"))
        if "outside" in reading.figures
    ]
    return statistics.median(shares) if shares else None


def _turn(worker: Worker, do: str, **command: Any) -> Turn:
    """One reading of the same command, whatever the round."""
    return lambda number: worker.time(do, **command)


def _per_token(total: dict[str, float]) -> dict[str, float]:
    """Means of the sums that ``quality.compare`` gives."""
    count = total["positions"]
    rise = (total["loss"] - total["reference_loss"]) / count
    return {"positions": count, "kl": total["kl"] / count, "same": total["same"] / count, "loss_rise": rise}
