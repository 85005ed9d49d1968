"""The promises, and what became of them. A figure that was not measured is a missed bar, never a silent one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

from bench.inference import figures
from bench.inference.harness import Series

MODELS = {"dense": "dense 135M", "moe": "MLA+MoE 300M-A46M"}
# (cores, figure) -> model -> (bar, stretch), as ratios to llama.cpp's best setting
RATIOS: dict[tuple[int, str], dict[str, tuple[float, float]]] = {
    (2, "decode 1"): {"dense": (3.0, 4.0), "moe": (2.0, 3.0)},
    (2, "decode 16"): {"dense": (3.0, 5.0), "moe": (2.4, 4.0)},
    (2, "prefill 512"): {"dense": (1.8, 3.0), "moe": (1.9, 3.0)},
    (1, "decode 1"): {"dense": (1.8, 2.5), "moe": (1.8, 2.5)},
    (1, "decode 16"): {"dense": (2.4, 4.0), "moe": (2.4, 4.0)},
    (1, "prefill 512"): {"dense": (1.9, 3.0), "moe": (1.9, 3.0)},
}
TRANSFORMERS, SHARE, DEEP, CACHED, ROOM, OUTSIDE = (7.0, 12.0), (0.65, 0.85), 0.8, 1 / 8, 1.3, 0.05
NOISE = 0.02  # two medians this close are the same


@dataclass(frozen=True)
class Verdict:
    """One line: ``figure`` must be at least (or at most) ``bar``; ``stretch`` is the wish beyond it, if any."""

    what: str
    figure: float | None
    bar: float
    stretch: float | None = None
    kind: Literal["at least", "at most"] = "at least"
    unit: str = "x"

    @property
    def passed(self) -> bool:
        """Whether the bar is met."""
        return self._meets(self.bar)

    @property
    def word(self) -> str:
        """How it ended, and by how much where it was missed."""
        if self.figure is None:
            return "NOT MEASURED"
        if not self.passed:
            return f"MISSED by {abs(self.figure / self.bar - 1):.0%}"
        return "stretch reached" if self.stretch is not None and self._meets(self.stretch) else "passed"

    @property
    def margin(self) -> float:
        """Figure over bar, so that more is better; 0 if not measured."""
        if not self.figure:
            return 0.0 if self.figure is None else 9.9
        return self.figure / self.bar if self.kind == "at least" else self.bar / self.figure

    def _meets(self, bar: float) -> bool:
        if self.figure is None:
            return False
        return self.figure >= bar if self.kind == "at least" else self.figure <= bar


Speeds = dict[tuple[str, int], dict[str, Series]]  # (model, cores) -> figure -> series


def verdicts(speeds: Speeds, rest: dict[str, Any], cores: list[int]) -> list[Verdict]:
    """All lines, in the order of the promises.

    Args:
        speeds: what ``figures.speed`` gave.
        rest: ``share`` of the read-bandwidth limit (dense, most cores), ``quality``, ``serving``, ``depth`` (of the MLA
            model) and ``memory``, each as ``figures`` gives it or missing.
        cores: the counts of cores that this machine let us measure.
    """
    lines = []
    for (count, figure), by_model in RATIOS.items():
        for model, (bar, stretch) in by_model.items():
            series = speeds.get((model, count), {}).get(figure)
            ratio = series.ratio("sprat", "llama") if series else None
            what = f"{count} core{'s'[: count - 1]}, {figure}, {MODELS[model]}, INT4 against llama.cpp Q4_0"
            lines.append(Verdict(what, ratio, bar, stretch))
    most = max(cores)
    lines.append(Verdict("share of the read-bandwidth limit, dense batch 1", rest.get("share"), *SHARE, unit=""))
    for model, name in MODELS.items():
        series = speeds.get((model, most), {}).get("decode 1")
        ratio = series.ratio("sprat", "transformers") if series and "transformers" in series.readings else None
        lines.append(Verdict(f"batch 1, {name}, INT4 against transformers in float32", ratio, *TRANSFORMERS))
    lines.append(_quality(rest.get("quality")))
    lines += _serving(rest.get("serving"), rest.get("depth"))
    lines.append(_room(rest.get("memory")))
    shares = [speeds[model, most]["decode 1"] for model in MODELS if (model, most) in speeds]
    measured = [share for share in map(figures.outside, shares) if share is not None]
    worst = max(measured) if len(measured) == len(MODELS) else None
    lines.append(Verdict("time outside native steps, batch 1", worst, OUTSIDE, kind="at most", unit=""))
    return [*lines, _load(rest.get("serving"))]


def _quality(found: dict[str, dict[str, float]] | None) -> Verdict:
    """Our KL over llama.cpp's at the same bits; the stretch is its Q4_K."""
    what = "KL to the float32 model over Q4_0's"
    if found is None:
        return Verdict(what, None, 1.0, kind="at most")
    base = found["llama.cpp Q4_0"]["kl"]
    wish = found["llama.cpp Q4_K_M"]["kl"] / base
    return Verdict(what, found["sprat INT4"]["kl"] / base, 1.0, wish, kind="at most")


def _serving(found: dict[str, Series] | None, deep: dict[str, Series] | None) -> list[Verdict]:
    """First token from the cache, and decoding far into a context."""
    cached = slow = None
    if found is not None:
        cached = found["first token, cached"].seconds("sprat") / found["first token, cold"].seconds("sprat")
    if deep is not None:
        slow = deep[f"context {figures.DEEP}"].rate("sprat") / deep[f"context {figures.SHORT}"].rate("sprat")
    what = f"first token with {figures.CACHED} of {figures.LONG} tokens cached, over cold"
    return [
        Verdict(what, cached, CACHED, kind="at most"),
        Verdict("decode rate at 4 k of context over that at 0 k (MLA, memory in INT8)", slow, DEEP),
    ]


def _room(found: dict[str, float] | None) -> Verdict:
    """Peak resident memory over what must be there."""
    ratio = None if found is None else found["peak"] / (found["weights"] + found["cache"])
    return Verdict("peak resident memory over weights and cache", ratio, ROOM, kind="at most")


def _load(found: dict[str, Series] | None) -> Verdict:
    """The least gain in tokens/s from one number of concurrent requests to the next; below 1 is a fall."""
    what = (
        f"tokens/s from each of {', '.join(map(str, figures.CONCURRENT))} concurrent requests to the next, least gain"
    )
    if found is None:
        return Verdict(what, None, 1 - NOISE)
    rates = [found[f"load {count}"].rate("sprat") for count in figures.CONCURRENT]
    return Verdict(what, min(b / a for a, b in itertools.pairwise(rates)), 1 - NOISE)
