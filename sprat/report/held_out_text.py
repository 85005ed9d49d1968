"""Held-out text: each pre-trained model beside the best baseline, as plots and as a table."""

from __future__ import annotations

import re
from typing import Any

from sprat.eval.score import HeldOutScores
from sprat.report import tables
from sprat.report.runs import PipelineRuns, StageRun
from sprat.report.svg import BLUE, GRAY, ORANGE, label_width, svg, wrap_label
from sprat.report.tables import escape

_NAMES = {"gzip": "gzip -9", "xz": "xz -9", "ppm": "PPM", "trigram": "byte 3-gram"}


def plots(runs: PipelineRuns) -> list[str]:
    """A panel for each domain: bits per byte of the models, of the best baseline and of gzip -9."""
    models, domains = _measured_stages(runs), _domains(runs).items()
    panels = [_panel(f"bpb-{number}", domain, models, scores) for number, (domain, scores) in enumerate(domains)]
    return [panel for panel in panels if panel]


def _panel(name: str, domain: str, models: list[StageRun], scores: HeldOutScores) -> str:
    """One panel of ``plots``."""
    colors = [BLUE, ORANGE, *[BLUE] * len(models)]
    values = [(wrap_label(s.title), _model_bits(s, domain), color) for s, color in zip(models, colors, strict=False)]
    bars = [(label, value, color) for label, value, color in values if value is not None]
    names = [baseline for baseline in dict.fromkeys((scores.best_baseline, "gzip")) if baseline in scores.baselines]
    bars += [(wrap_label(_baseline_name(baseline)), scores.baselines[baseline], GRAY) for baseline in names]
    if not bars:
        return ""
    bars.reverse()  # the first bar is drawn lowest

    def draw(axes: Any) -> None:
        labels, values, shades = zip(*bars, strict=True)
        drawn_bars = axes.barh(range(len(bars)), values, color=shades, height=0.62)
        axes.set_yticks(range(len(bars)), labels)
        axes.bar_label(drawn_bars, fmt="%.2f", padding=3)
        axes.set_xlim(0, max(values) * 1.15)
        axes.grid(False, axis="y")
        axes.set_xlabel("bits per byte (less is better)")

    return svg(name, f"Held-out {domain}", draw, height=2.2, left=label_width(label for label, _, _ in bars))


def table(runs: PipelineRuns) -> str:
    """Bits per byte of each domain: the models, good where below every baseline, the best one, gzip -9, the others."""
    models, domains = _measured_stages(runs), _domains(runs)
    rows = []
    for domain, scores in domains.items():
        best = scores.baselines.get(scores.best_baseline)
        cells = [_cell(_model_bits(stage, domain), best) for stage in models]
        name = escape(_baseline_name(scores.best_baseline))
        cells.append("–" if best is None else f"<b>{best:.3f}</b><small>{name}</small>")
        cells.append(f"{scores.baselines['gzip']:.3f}" if "gzip" in scores.baselines else "–")
        other_baselines = sorted(set(scores.baselines) - {scores.best_baseline, "gzip"}, key=_sort_key)
        others = ", ".join(f"{escape(_baseline_name(name))} {scores.baselines[name]:.2f}" for name in other_baselines)
        rows.append([escape(domain), *cells, f"@wrap|<small>{others or '–'}</small>"])
    head = ["held-out text, bits per byte", *(escape(stage.title) for stage in models)]
    return tables.table([*head, "best baseline", "gzip -9", "the others"], rows) if rows else ""


def _cell(model: float | None, best: float | None) -> str:
    """A model's bits per byte, coloured by whether the best baseline needs more."""
    if model is None:
        return "–"
    mark = "" if best is None else "@good|" if model < best else "@bad|"
    return f"{mark}{model:.3f}"


def _measured_stages(runs: PipelineRuns) -> list[StageRun]:
    """The pre-trained model and its controls, as far as they were measured on text."""
    return [stage for stage in runs.with_controls("pretrain") if stage.facts.get("bits_per_byte")]


def _domains(runs: PipelineRuns) -> dict[str, HeldOutScores]:
    """The domains that the first model was measured on, with their baselines."""
    rows: dict[str, Any] = next((stage.facts["bits_per_byte"] for stage in _measured_stages(runs)), {})
    data: dict[str, Any] = next((s.facts["baselines"] for s in runs.main if s.facts.get("baselines")), {})
    return {name: HeldOutScores.from_dict({**data.get(name, {}), **row}) for name, row in rows.items()}


def _model_bits(stage: StageRun, domain: str) -> float | None:
    """Bits per byte of the stage's model, None where it was not measured on this domain."""
    return HeldOutScores.from_dict(stage.facts["bits_per_byte"].get(domain, {})).model


def _baseline_name(name: str) -> str:
    """A baseline's name for readers.

    >>> _baseline_name("ngram6"), _baseline_name("xz")
    ('byte 6-gram', 'xz -9')
    """
    order = re.fullmatch(r"ngram(\d+)", name)
    return f"byte {order[1]}-gram" if order else _NAMES.get(name, name)


def _sort_key(name: str) -> tuple[int, str]:
    """Compressors before n-grams."""
    return (name.startswith("ngram"), name)
