"""Held-out text: each pre-trained model beside the best baseline, as plots and as a table."""

from __future__ import annotations

import re
from typing import Any

from sprat.report import tables
from sprat.report.figures import BLUE, GREY, ORANGE, fold, room, svg
from sprat.report.runs import Road, Stage
from sprat.report.tables import text
from sprat.trust.facts import HeldOutText

_NAMES = {"gzip": "gzip -9", "xz": "xz -9", "ppm": "PPM", "trigram": "byte 3-gram"}


def plots(road: Road) -> list[str]:
    """A panel for each domain: bits per byte of the models, of the best baseline and of gzip -9."""
    models, domains = _models(road), _domains(road)
    panels = [_panel(f"bpb-{number}", domain, models, held) for number, (domain, held) in enumerate(domains.items())]
    return [panel for panel in panels if panel]


def _panel(name: str, domain: str, models: list[Stage], held: HeldOutText) -> str:
    """One panel of ``plots``."""
    found = [(fold(stage.title), _of_model(stage, domain)) for stage in models]
    colours = [BLUE, ORANGE, *[BLUE] * len(models)]
    bars = [(label, value, colour) for (label, value), colour in zip(found, colours, strict=False) if value is not None]
    names = [one for one in dict.fromkeys((held.best, "gzip")) if one in held.baselines]
    bars += [(fold(_shown(one)), held.baselines[one], GREY) for one in names]
    bars.reverse()  # the first bar is drawn lowest

    def draw(axes: Any) -> None:
        labels, values, shades = zip(*bars, strict=True)
        drawn = axes.barh(range(len(bars)), values, color=shades, height=0.62)
        axes.set_yticks(range(len(bars)), labels)
        axes.bar_label(drawn, fmt="%.2f", padding=3)
        axes.set_xlim(0, max(values) * 1.15)
        axes.grid(False, axis="y")
        axes.set_xlabel("bits per byte (less is better)")

    return svg(name, f"Held-out {domain}", draw, height=2.2, left=room(label for label, _, _ in bars)) if bars else ""


def table(road: Road) -> str:
    """Bits per byte of each domain: the models, good where below every baseline, the best one, gzip -9, the others."""
    models, domains = _models(road), _domains(road)
    rows = []
    for domain, held in domains.items():
        best = held.baselines.get(held.best)
        cells = [_cell(_of_model(stage, domain), best) for stage in models]
        cells.append("–" if best is None else f"<b>{best:.3f}</b><small>{text(_shown(held.best))}</small>")
        cells.append(f"{held.baselines['gzip']:.3f}" if "gzip" in held.baselines else "–")
        rest = sorted(set(held.baselines) - {held.best, "gzip"}, key=_order)
        others = ", ".join(f"{text(_shown(name))} {held.baselines[name]:.2f}" for name in rest)
        rows.append([text(domain), *cells, f"@wrap|<small>{others or '–'}</small>"])
    head = ["held-out text, bits per byte", *(text(stage.title) for stage in models)]
    return tables.table([*head, "best baseline", "gzip -9", "the others"], rows) if rows else ""


def _cell(model: float | None, best: float | None) -> str:
    """A model's bits per byte, coloured by whether the best baseline needs more."""
    if model is None:
        return "–"
    mark = "" if best is None else "@good|" if model < best else "@bad|"
    return f"{mark}{model:.3f}"


def _models(road: Road) -> list[Stage]:
    """The pre-trained model and its controls, as far as they were measured on text."""
    stages = [stage for stage in road.main if stage.family == "pretrain"]
    stages += [control for stage in stages for control in road.controls(stage)]
    return [stage for stage in stages if stage.facts.get("bits_per_byte")]


def _domains(road: Road) -> dict[str, HeldOutText]:
    """The domains that the first model was measured on, with their baselines."""
    measured: list[dict[str, Any]] = [stage.facts["bits_per_byte"] for stage in _models(road)[:1]]
    data: dict[str, Any] = next((s.facts["baselines"] for s in road.main if s.facts.get("baselines")), {})
    return {name: HeldOutText.of({**data.get(name, {}), **row}) for rows in measured for name, row in rows.items()}


def _of_model(stage: Stage, domain: str) -> float | None:
    """Bits per byte of the stage's model, None where it was not measured on this domain."""
    return HeldOutText.of(stage.facts["bits_per_byte"].get(domain, {})).model


def _shown(name: str) -> str:
    """A baseline's name for readers.

    >>> _shown("ngram6"), _shown("xz")
    ('byte 6-gram', 'xz -9')
    """
    order = re.fullmatch(r"ngram(\d+)", name)
    return f"byte {order[1]}-gram" if order else _NAMES.get(name, name)


def _order(name: str) -> tuple[int, str]:
    """Compressors before n-grams."""
    return (name.startswith("ngram"), name)
