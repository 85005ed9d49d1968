"""The report's plots, each a list of inline SVG panels; empty where the runs have nothing to show."""

from __future__ import annotations

from typing import Any

from sprat.eval.score import StageScore, wilson_interval
from sprat.report.runs import PipelineRuns, StageRun
from sprat.report.svg import BLUE, COLORS, GRAY, GREEN, color_map_to, label_width, percent_axis, svg, wrap_label

_RL = (
    ("Mean reward", "reward"),
    ("Accuracy of rollouts", "accuracy"),
    ("Answers that think", "think_share"),
    ("Response length (tokens)", "response_length"),
)
_SHARES = ("accuracy", "think_share")
_MAX_CELLS = 20_000


def _curve(stage: StageRun, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the metric ``name`` that the stage logged; rows without it are left out."""
    logged = [row for row in stage.metrics if isinstance(row.get(name), (int, float))]
    return [row["step"] for row in logged], [float(row[name]) for row in logged]


def _line_panel(name: str, title: str, runs: list[tuple[str, StageRun]], metric: str, share: bool = False) -> list[str]:
    """One panel with a line for each (label, stage) that has the metric, if any has."""
    curves = [(wrap_label(label), *_curve(stage, metric)) for label, stage in runs]
    curves = [curve for curve in curves if len(curve[1]) > 1]

    def draw(axes: Any) -> None:
        for (label, steps, values), color in zip(curves, COLORS * len(curves), strict=False):
            axes.plot(steps, values, color=color, label=label)
        axes.set_xlabel("step")
        if share:
            percent_axis(axes.yaxis)
        if len(curves) > 1:
            axes.legend()

    return [svg(name, title, draw)] if curves else []


def loss_curves(runs: PipelineRuns) -> list[str]:
    """Loss of pre-training beside its dense twin, then of the later supervised stages."""
    panels = []
    for kind, title in (("pretrain", "Pre-training"), ("sft", "Fine-tuning"), ("distill", "Distillation")):
        named = [(stage.title, stage) for stage in runs.with_controls(kind)]
        panels += _line_panel(f"loss-{kind}", f"{title}: training loss (nats per token)", named, "loss")
    return panels


def rl_curves(runs: PipelineRuns) -> list[str]:
    """Reward, accuracy, thinking and response length over RL steps, a line for each seed."""
    stages = [(f"seed {stage.record.get('seed')}", stage) for stage in runs.seed_runs("rl")]
    panels = []
    for number, (title, metric) in enumerate(_RL):
        panels += _line_panel(f"rl-{number}", title, stages, metric, share=metric in _SHARES)
    return panels


def accuracy_by_length(runs: PipelineRuns) -> list[str]:
    """Accuracy by the number of terms, a line for each stage; lengths never trained are shaded and hollow."""
    panels = []
    for number, task in enumerate(runs.tasks()):
        scores = [(wrap_label(stage.title), stage.by_task().get(task)) for stage in runs.scored]
        lines = [(title, score) for title, score in scores if score and len(score.by_length) > 1]
        if lines:
            panels.append(_by_length(f"length-{number}", task, lines))
    return panels


def _by_length(name: str, task: str, lines: list[tuple[str, StageScore]]) -> str:
    """One panel of ``accuracy_by_length``: a line for each title."""
    untrained = sorted(frozenset().union(*(score.untrained_lengths for _, score in lines)))

    def draw(axes: Any) -> None:
        for number, length in enumerate(untrained):
            label = "never trained" if number == 0 else None
            axes.axvspan(length - 0.5, length + 0.5, color=GRAY, alpha=0.16, linewidth=0, label=label)
        for number, (title, score) in enumerate(lines):
            color = COLORS[number % len(COLORS)]
            x = list(score.by_length)
            y = [correct / max(count, 1) for correct, count in score.by_length.values()]
            bounds = [wilson_interval(*pair) for pair in score.by_length.values()]
            axes.plot(x, y, color=color, label=title)
            lows, highs = zip(*bounds, strict=True)
            axes.vlines(x, lows, highs, color=color, linewidth=1, alpha=0.6)
            for length, value in zip(x, y, strict=True):
                axes.plot([length], [value], "o", color=color, fillstyle="none" if length in untrained else "full")
        axes.set_xticks(sorted({length for _, score in lines for length in score.by_length}))
        axes.set_xlabel("number of terms")
        axes.set_ylim(-0.03, 1.05)
        percent_axis(axes.yaxis)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    right = label_width(title for title, _ in lines) + 0.3
    return svg(name, f"{task}: greedy accuracy by length", draw, width=5.6, right=right)


def expert_loads(runs: PipelineRuns) -> list[str]:
    """Load of each expert by layer, and of each expert by domain, for the last stage that measured them."""
    measured = [stage for stage in runs.main if stage.facts.get("expert_load")]
    panels = []
    if measured:
        load = _shares(measured[-1].facts["expert_load"])
        names = [f"layer {number}" for number in range(1, len(load) + 1)]
        panels.append(_heat_map("load", f"Expert load, {measured[-1].title} (1 = even)", load, names))
    measured = [stage for stage in runs.main if stage.facts.get("expert_domain")]
    if measured:
        domains: dict[str, Any] = measured[-1].facts["expert_domain"]
        layers = [_layers(rows) for rows in domains.values()]
        for layer in range(min(map(len, layers))):
            table = _shares([rows[layer] for rows in layers])
            title = f"Experts by domain, layer {layer + 1} (1 = even)"
            panels.append(_heat_map(f"domain-{layer}", title, table, [wrap_label(domain) for domain in domains]))
    return [panel for panel in panels if panel]


def _layers(rows: Any) -> list[list[float]]:
    """Per-layer lists; a single flat list is one layer."""
    return rows if rows and isinstance(rows[0], list) else [rows]


def _shares(rows: list[list[float]]) -> list[list[float]]:
    """Each row divided by its mean."""
    return [[value * len(row) / (sum(row) or 1.0) for value in row] for row in rows]


def _heat_map(name: str, title: str, table: list[list[float]], rows: list[str]) -> str:
    """A heat map with one row per name."""
    if not table or len({len(row) for row in table}) != 1 or len(table) * len(table[0]) > _MAX_CELLS:
        return ""

    def draw(axes: Any) -> None:
        top = max(2.0, max(max(row) for row in table))
        mesh = axes.pcolormesh(table, cmap=color_map_to(BLUE), vmin=0, vmax=top, linewidth=0.4, edgecolors="#80808040")
        axes.set_yticks([number + 0.5 for number in range(len(rows))], rows)
        axes.set_xticks([0.5, len(table[0]) - 0.5], ["1", str(len(table[0]))])
        axes.set_xlabel("expert")
        axes.invert_yaxis()
        axes.grid(False)
        axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=12).ax.patch.set_alpha(0)

    return svg(name, title, draw, height=1.3 + 0.28 * min(len(rows), 16), left=label_width(rows), right=0.3)


def pareto(runs: PipelineRuns) -> list[str]:
    """Quality against size on disk and against speed: teacher, student, INT4 student, and their controls."""
    stages = [s for s in runs.with_controls("rl", "distill", "quantize") if s.mean_accuracy() is not None]
    panels = []
    for fact, what, scale in (("size_bytes", "size", 1e6), ("tokens_per_second", "speed", 1e3)):
        values = [(stage, runs.model_fact(stage, fact)) for stage in stages]
        points = [(stage, value / scale, stage.mean_accuracy() or 0.0) for stage, value in values if value]
        if len(points) > 1:
            panels.append(_scatter(f"pareto-{fact}", f"Quality and {what}", points, fact == "size_bytes"))
    return panels


def _scatter(name: str, title: str, points: list[tuple[StageRun, float, float]], less_is_better: bool) -> str:
    """One panel of ``pareto``: points that no other beats are filled and joined."""

    def beats(point: tuple[StageRun, float, float], other_point: tuple[StageRun, float, float]) -> bool:
        cheaper = point[1] <= other_point[1] if less_is_better else point[1] >= other_point[1]
        return cheaper and point[2] >= other_point[2] and point[1:] != other_point[1:]

    front = sorted((p for p in points if not any(beats(q, p) for q in points)), key=lambda p: p[1])

    def draw(axes: Any) -> None:
        axes.plot([p[1] for p in front], [p[2] for p in front], color=GREEN, linewidth=1, alpha=0.6, linestyle="--")
        for number, (stage, x, y) in enumerate(sorted(points, key=lambda p: p[1])):
            axes.plot([x], [y], "o", color=GREEN if any(stage is p[0] for p in front) else GRAY, markersize=7)
            up = bool(number % 2)
            place = {"textcoords": "offset points", "ha": "center", "va": "bottom" if up else "top"}
            axes.annotate(wrap_label(stage.title), (x, y), xytext=(0, 7 if up else -7), fontsize=8, **place)
        speed = "1,000 tokens a second (right is better)"
        axes.set_xlabel("size on disk (MB; left is better)" if less_is_better else speed)
        axes.set_ylabel("mean accuracy")
        axes.margins(x=0.2)
        heights = [p[2] for p in points]
        axes.set_ylim(min(min(heights) - 0.05, max(heights) - 0.2), max(heights) + 0.05)  # no drama over a point or two
        percent_axis(axes.yaxis)

    return svg(name, title, draw, left=0.65)
