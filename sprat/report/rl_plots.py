"""The curves of a run of RL: what it was paid, what held-out problems say, how the policy moved, what looks hacked.

One panel for each question that a reader has; a panel is there where something was logged for it. Steps at which a trip
wire or the hack monitor spoke are marked in every panel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sprat.eval.score import wilson_interval
from sprat.report import run_plots
from sprat.report.run_plots import series
from sprat.report.runs import StageRun
from sprat.report.svg import BLUE, COLORS, GRAY, GREEN, ORANGE, RED, percent_axis, svg

_Z95 = 1.96
_LOG_FROM = 30  # times the least value
_MAX_SIGNS = 4  # of the hack monitor's, in its panel
Line = tuple[str, str, str]  # column, label, color


@dataclass(frozen=True)
class Panel:
    """A panel: its title, its lines, and how its axis is to be read.

    Attributes:
        is_share: from 0 to 1, as per cent.
        is_log: over several powers of ten.
        from_zero: the axis begins at 0.
        moves: left out where every value is 0.
    """

    title: str
    lines: tuple[Line, ...]
    is_share: bool = False
    is_log: bool = False
    from_zero: bool = True
    moves: bool = False


_TRAINED, _HELD_OUT = "training", "held out"
PANELS = (
    Panel(
        "Reward",
        (("reward", _TRAINED, BLUE), ("eval_reward", _HELD_OUT, ORANGE), ("second_reward", "second judge", GREEN)),
        from_zero=False,
    ),
    Panel("Right answers", (("accuracy", _TRAINED, BLUE), ("eval_accuracy", _HELD_OUT, ORANGE)), is_share=True),
    Panel("Tokens of an answer", (("response_length", _TRAINED, BLUE), ("eval_response_length", _HELD_OUT, ORANGE))),
    Panel(
        "Questions that taught something",
        (("live_groups", "of those asked", BLUE),),
        is_share=True,
    ),
    Panel("Questions asked in a step", (("sampled_groups", "asked", BLUE),)),
    Panel("Entropy of the policy (nats a token)", (("entropy", "", BLUE),)),
    Panel("KL from the start (nats a token)", (("kl_start", "", BLUE),)),
    Panel("Tokens that the clip left out", (("clip_fraction", "", BLUE),), is_share=True),
    Panel(
        "Gap of trainer and sampler (nats a token)",
        (
            ("logprob_gap_max", "largest", GRAY),
            ("logprob_gap_p99", "99th percentile", ORANGE),
            ("logprob_gap_mean", "mean", BLUE),
            ("mismatch_mean", "mean, first minibatch", GREEN),
        ),
        is_log=True,
    ),
    Panel("Experts that the trainer would choose otherwise", (("route_flips", "", BLUE),), is_share=True),
    Panel("Age of the sampling weights (steps)", (("staleness", "", BLUE),), moves=True),
    Panel(
        "Answers cut at the limit, or not paid",
        (
            ("cut_share", "cut at the limit", ORANGE),
            ("abstained", "not paid", BLUE),
            ("eval_cut_share", "cut, held out", GRAY),
        ),
        is_share=True,
        moves=True,
    ),
    Panel(
        "Answers on which the verifier failed",
        (("reward_faults", "all", RED), ("timeouts", "out of time", ORANGE)),
        moves=True,
    ),
    Panel("Answers that think", (("think_share", _TRAINED, BLUE),), is_share=True, moves=True),
    Panel("Norm of the gradient", (("grad_norm", "", BLUE),)),
)
_OTHERS = {  # that no panel has, or that have one of their own
    "format", "mismatch", "kl", "hack_evidence", "hack_alarms", "reward_error", "second_reward_error", "eval_gain",
    "eval_p_value", "eval_loss_p_value", "eval_second_reward", "kl_reference", "routes_replayed", "tokens", "petaflops",
}  # fmt: skip


def is_rl(run: StageRun) -> bool:
    """Whether the run is one of RL on a user's questions, so that this page is for it."""
    return str(run.record.get("stage")) == "rl" and any(
        "reward_error" in row or "eval_reward" in row for row in run.metrics
    )


def curves(run: StageRun) -> list[str]:
    """All panels that have something to show, in the order of ``PANELS``; then what else was logged."""
    figures = [figure for number, panel in enumerate(PANELS) if (figure := _draw(run, panel, f"rl-{number}"))]
    if hacks := _hacks(run):
        figures.insert(min(4, len(figures)), hacks)
    shown = {column for panel in PANELS for column, *_ in panel.lines} | _OTHERS
    tasks = {name for row in run.metrics for name in row if name.startswith("accuracy/")}
    shown |= tasks if len(tasks) < 2 else set()
    return figures + run_plots.curves(run, shown=lambda name: name not in shown and not name.startswith("hack/"))


def marks(run: StageRun) -> list[tuple[int, str]]:
    """Steps at which something was said, and what spoke."""
    trips = [(int(trip["step"]), "trip wire") for trip in run.facts.get("trips") or () if not trip.get("is_end")]
    return trips + [(int(alarm["step"]), "alarm") for alarm in run.facts.get("alarms") or ()]


def _draw(run: StageRun, panel: Panel, prefix: str) -> str:
    """One panel; nothing where there is no curve to draw."""
    found = [(column, label, color, *series(run, column)) for column, label, color in panel.lines]
    found = [line for line in found if line[3]]
    is_still = panel.moves and not any(value for *_, values in found for value in values)
    if not any(len(line[3]) > 1 for line in found) or is_still:
        return ""

    def draw(axes: Any) -> None:
        for column, label, color, steps, values in found:
            is_evaluation = column.startswith("eval_")
            style: dict[str, Any] = {"marker": "o"} if is_evaluation or len(steps) == 1 else {}
            axes.plot(steps, values, color=color, label=label or None, zorder=3 if is_evaluation else 2, **style)
            _intervals(axes, run, column, color, steps, values)
        _mark(axes, run)
        _scale(axes, panel, [value for *_, values in found for value in values])
        if any(label for _, label, *_ in found) and len(found) > 1:
            axes.legend()

    return svg(prefix, panel.title, draw)


def _intervals(
    axes: Any, run: StageRun, column: str, color: str, steps: Sequence[int], values: Sequence[float]
) -> None:
    """95 % intervals: of a step's mean reward by its standard error over questions, of held-out shares Wilson's."""
    if column in ("reward", "second_reward"):
        rows = [row for row in run.metrics if isinstance(row.get(column), int | float)]
        errors = [_Z95 * float(row.get(f"{column}_error") or 0) for row in rows]
        lows, highs = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, lows, highs, color=color, alpha=0.15, linewidth=0)
    count = int((run.facts.get("eval_tasks") or {}).get("accuracy") or 0)
    if column == "eval_accuracy" and count:
        ends = [wilson_interval(value * count, count) for value in values]
        axes.vlines(steps, *zip(*ends, strict=True), color=color, linewidth=1, alpha=0.7)


def _mark(axes: Any, run: StageRun) -> None:
    """A line at each step at which something was said."""
    for step, _ in marks(run):
        axes.axvline(step, color=RED, linewidth=1, linestyle=":", zorder=1)


def _scale(axes: Any, panel: Panel, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if panel.is_share:
        axes.set_ylim(0, min(1.03, max(0.05, 1.12 * max(values))))
        percent_axis(axes.yaxis)
    elif panel.is_log and min(values) > 0 and max(values) > _LOG_FROM * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.from_zero:
        axes.set_ylim(0, 1.12 * max(values) or 1)
    if panel.is_log:  # and in either case small
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}".replace("e-0", "e-")))


def _hacks(run: StageRun) -> str:
    """The evidence of the hack monitor: the signs with most of it, and where it makes an alarm."""
    steps, highest = series(run, "hack_evidence")
    if len(steps) < 2:
        return ""
    names = {name for row in run.metrics for name in row if name.startswith("hack/")}
    peaks = {name: max(series(run, name)[1], default=0.0) for name in names}
    chosen = sorted(sorted(peaks), key=lambda name: -peaks[name])[:_MAX_SIGNS]

    def draw(axes: Any) -> None:
        axes.axhline(1, color=RED, linewidth=1, linestyle="--", label="alarm")
        by_step: Callable[[str], dict[int, float]] = lambda name: dict(zip(*series(run, name), strict=True))  # noqa: E731
        for name, color in zip(chosen, COLORS, strict=False):
            known = by_step(name)
            values = [known.get(step, 0.0) for step in steps]
            axes.plot(
                steps, values, color=color, label=name.removeprefix("hack/").replace("wrong, paid and ", "paid, ")
            )
        if not chosen:
            axes.plot(steps, highest, color=BLUE, label="evidence")
        _mark(axes, run)
        _scale(axes, Panel("", ()), [1.4, *highest])
        axes.legend(loc="upper left")

    return svg("rl-hacks", "Hack monitor: evidence, as a share of an alarm", draw)
