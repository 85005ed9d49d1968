"""The curves of one run: what it logged at its steps, and what each evaluation found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sprat.eval.score import wilson_interval
from sprat.report.runs import StageRun
from sprat.report.svg import BLUE, GREEN, ORANGE, percent_axis, svg

_TITLES = {
    "loss": "Loss",
    "reward_accuracy": "Pairs whose chosen answer gained more",
    "reward_margin": "Margin of rewards",
    "reward": "Mean reward",
    "accuracy": "Right answers",
    "second_reward": "Reward of the second judge",
    "response_length": "Tokens of an answer",
    "cut_share": "Answers cut at the limit",
    "entropy": "Entropy of the policy (nats a token)",
    "kl_start": "KL from the start (nats a token)",
    "live_groups": "Questions whose answers were paid differently",
    "clip_fraction": "Tokens that the clip left out",
    "mismatch_mean": "Gap of trainer and sampler (nats a token)",
    "logprob_gap_p99": "Gap of trainer and sampler, 99th percentile (nats)",
    "logprob_gap_max": "Gap of trainer and sampler, largest (nats)",
    "route_flips": "Experts that the trainer would choose otherwise",
    "staleness": "Age of the sampling weights (steps)",
    "versions_per_answer": "Versions of the weights in an answer",
    "think_share": "Answers that think",
    "sample_tokens": "Tokens of a sample",
    "mtp_loss": "Loss of the token after next",
    "max_violation": "Load of the busiest expert above even",
    "grad_norm": "Norm of the gradient",
    "lr_factor": "Learning rate (share of its peak)",
}
_SHARES = {"reward_accuracy", "accuracy", "think_share", "cut_share", "live_groups", "clip_fraction", "route_flips"}
_OWN = {"step", "tokens", "petaflops", "reward_error", "second_reward_error", "gain", "p_value", "loss_p_value"}
_MAX_PANELS = 12
_ACCURACY = "accuracy/"


def score_title(name: str) -> str:
    """What a score is called on the page.

    >>> score_title("accuracy/exam"), score_title("loss")
    ('Accuracy: exam', 'Validation loss')
    """
    if name.startswith(_ACCURACY):
        return f"Accuracy: {name.removeprefix(_ACCURACY)}"
    return "Validation loss" if name == "loss" else _TITLES.get(name, name)


def is_share(name: str) -> bool:
    """Whether a score is a share, which reads as per cent."""
    return name in _SHARES or name.startswith(_ACCURACY)


def series(run: StageRun, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of what was logged as ``name``; rows without it are left out."""
    rows = [row for row in run.metrics if isinstance(row.get(name), int | float) and not isinstance(row[name], bool)]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


def curves(run: StageRun, shown: Callable[[str], bool] = lambda name: True) -> list[str]:
    """A panel for each number that has at least two points, training and validation in one; loss and tasks first.

    Args:
        shown: whether a column of the log is to have one.
    """
    columns = dict.fromkeys(name for row in run.metrics for name in row if name not in _OWN and shown(name))
    logged = dict.fromkeys(name.removeprefix("eval_") for name in columns)
    order = {name: number for number, name in enumerate(_TITLES)}
    names = sorted(
        logged, key=lambda name: (name != "loss", not name.startswith(_ACCURACY), order.get(name, len(order)))
    )
    figures: list[str] = []
    for name in names:
        if len(figures) < _MAX_PANELS and (figure := _panel(run, name, f"run-{len(figures)}")):
            figures.append(figure)
    return figures


def _panel(run: StageRun, name: str, prefix: str) -> str:
    """The panel of ``name``, or nothing where there is no curve to draw."""
    lines = [("training", BLUE, *series(run, name)), ("kept back", ORANGE, *series(run, f"eval_{name}"))]
    lines = [line for line in lines if len(line[2]) > 1]
    best = int((run.facts.get("best") or {}).get("step") or 0)
    count = int((run.facts.get("eval_tasks") or {}).get(name.removeprefix(_ACCURACY)) or 0)

    is_marked = bool(best) and any(color == ORANGE for _, color, *_ in lines)

    def draw(axes: Any) -> None:
        for label, color, steps, values in lines:
            is_evaluation = color == ORANGE
            axes.plot(steps, values, color=color, label=label, marker="o" if is_evaluation else None)
            if count and is_evaluation and name.startswith(_ACCURACY):
                lows, highs = zip(*(wilson_interval(value * count, count) for value in values), strict=True)
                axes.vlines(steps, lows, highs, color=color, linewidth=1, alpha=0.6)
        if is_marked:
            axes.axvline(best, color=GREEN, linewidth=1, linestyle="--", label="kept")
        axes.set_xlabel("step")
        if is_share(name):
            axes.set_ylim(-0.03, 1.05)
            percent_axis(axes.yaxis)
        elif name == "lr_factor":
            axes.set_ylim(0, 1.05)
        if len(lines) > 1 or is_marked:
            axes.legend()

    title = score_title(name) if name.startswith(_ACCURACY) else _TITLES.get(name, name)
    return svg(prefix, title, draw) if lines else ""
