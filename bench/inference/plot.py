"""One picture: tokens/s against batch, against context, against cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.inference.bars import MODELS, Speeds
from bench.inference.harness import Series

COLOURS = {"sprat": "#0b6e99", "llama": "#c4661f", "transformers": "#7a7a7a"}
NAMES = {"sprat": "Sprat", "llama": "llama.cpp, best setting", "transformers": "transformers, best mode"}
STYLES = {"dense": "-", "moe": "--"}


def draw(speeds: Speeds, depths: dict[str, dict[str, Series]], where: Path, caption: str) -> None:
    """Write the picture to ``where`` (.svg or .png): three panels, solid lines dense, dashed MLA+MoE."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (batch, context, threads) = pyplot.subplots(1, 3, figsize=(12.5, 4.2), constrained_layout=True)
    most = max(count for _, count in speeds)
    for model, style in STYLES.items():
        at_most = speeds.get((model, most), {})
        _lines(batch, _by_number(at_most, "decode "), model, style)
        _lines(context, _by_number(depths.get(model, {}), "context "), model, style)
        by_cores = {count: held["decode 1"] for (name, count), held in sorted(speeds.items()) if name == model}
        _lines(threads, by_cores, model, style)
    for panel, what in ((batch, "requests at once"), (context, "tokens of context"), (threads, "cores, batch 1")):
        panel.set_xlabel(what)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
    batch.set_xscale("log", base=2)
    for panel, ticks in ((batch, _ticks(batch)), (threads, _ticks(threads))):
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    batch.set_ylabel("tokens/s")
    figure.legend(*batch.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(caption, fontsize=9)
    where.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(where, dpi=130, metadata={"Date": None} if where.suffix == ".svg" else None)
    pyplot.close(figure)


def _by_number(found: dict[str, Series], stem: str) -> dict[int, Series]:
    """The series whose names are ``stem`` and a number."""
    return {int(name.removeprefix(stem)): series for name, series in found.items() if name.startswith(stem)}


def _lines(panel: Any, series: dict[int, Series], model: str, style: str) -> None:
    """A line for each engine over the numbers at which it was measured."""
    for engine, colour in COLOURS.items():
        points = [(x, held.rate(engine)) for x, held in sorted(series.items()) if engine in held.readings]
        if points:
            xs, ys = zip(*points, strict=True)
            panel.plot(xs, ys, style, color=colour, marker="o", markersize=4, label=f"{NAMES[engine]}, {MODELS[model]}")


def _ticks(panel: Any) -> list[float]:
    """The x values of all points of a panel."""
    return sorted({float(x) for line in panel.get_lines() for x in line.get_xdata()})
