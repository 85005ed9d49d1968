"""Trip wires: what says that a run goes wrong while its reward still rises.

RL finds whatever raises the reward. Where that is no longer what was meant, other numbers tell: the policy stops
exploring (entropy), runs far from its start (KL), talks ever longer or into the limit; a second judge that pays nothing
and is never seen by the policy thinks less of what is paid more; problems that are never trained are answered worse;
the trainer computes another policy than the one that samples.
Every number is a column of the run's log, so that wires need no state: after a kill they are strung again from the
rows, and trip at the same step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sprat.config.rl import TripWiresConfig

_MIN_CUT_RISE = 0.25  # share of answers by which those at the limit must have become more
_GAPS = {  # column of the log, limit, how it is called
    "logprob_gap_mean": ("max_logprob_gap_mean", "on average"),
    "logprob_gap_p99": ("max_logprob_gap_p99", "at the 99th percentile"),
    "logprob_gap_max": ("max_logprob_gap", "at the furthest token"),
}
_SOLVED = 0.99  # accuracy from which answers that are all paid alike are no fault

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Trip:
    """A wire that tripped: which, at which step, and the sentence; ``is_end`` where there is nothing left to learn."""

    wire: str
    step: int
    sentence: str
    is_end: bool = False


class TripWires:
    """See the module's text.

    Args:
        reward: what the verifier is called.
    """

    def __init__(self, config: TripWiresConfig, reward: str) -> None:
        self._config, self._reward = config, reward
        self._rows: list[Row] = []  # of steps
        self._held_out_rewards: list[float] = []  # of all evaluations, also of the one before the first step

    def replay(self, rows: Iterable[Row]) -> None:
        """Start again from the ``rows`` of the log, whatever was seen before."""
        self._rows, self._held_out_rewards = [], []
        for row in rows:
            self._keep(row)

    def _keep(self, row: Row) -> None:
        if "eval_reward" in row:
            self._held_out_rewards.append(float(row["eval_reward"]))
        if "reward" in row:  # else it is of the evaluation before the first step alone
            self._rows.append(row)

    def add(self, row: Row) -> Trip | None:
        """See the row of a step; the first wire that trips."""
        self._keep(row)
        if self._config.action == "off":
            return None
        wires = (self._no_spread, self._entropy, self._kl, self._length, self._cut, self._judges, self._held_out)
        for wire in (*wires, self._logprob_gap, self._route_flips):
            if (sentence := wire()) is not None:
                is_end = wire == self._no_spread and self._is_solved()
                return Trip(wire.__name__.removeprefix("_"), int(row["step"]), sentence, is_end)
        return None

    def _window(self, name: str, *, first: bool = False, end: int | None = None) -> list[float]:
        """The values of ``name`` in the last rows, or the first ones that have it; none where they are too few."""
        values = [float(row[name]) for row in self._rows[:end] if isinstance(row.get(name), int | float)]
        window = self._config.window
        if len(values) < window:
            return []
        return values[:window] if first else values[-window:]

    def _is_solved(self) -> bool:
        rows = self._rows[-self._config.no_spread :]
        return statistics.fmean(float(row.get("accuracy") or 0.0) for row in rows) >= _SOLVED

    def _no_spread(self) -> str | None:
        count = self._config.no_spread
        rows = self._rows[-count:]
        if not count or len(rows) < count or any(row.get("live_groups") for row in rows):
            return None
        what = f"in the last {count} steps reward {self._reward} paid all answers of each question alike"
        if self._is_solved():
            return f"{what}: they are right, there is nothing left to learn"
        return f"{what} ({float(rows[-1].get('reward') or 0):g} on average): nothing can be learned from it"

    def _entropy(self) -> str | None:
        values, floor = self._window("entropy"), self._config.min_entropy
        if not floor or not values or statistics.fmean(values) >= floor:
            return None
        mean = f"{statistics.fmean(values):.2g} nats a token"
        return f"the policy has stopped exploring: its entropy is {mean}, trip_wires.min_entropy is {floor:g}"

    def _kl(self) -> str | None:
        values, limit = self._window("kl_start"), self._config.max_kl
        if not limit or not values or statistics.fmean(values) <= limit:
            return None
        far = f"{statistics.fmean(values):.2g} nats a token"
        return f"the policy is {far} from its start (KL), trip_wires.max_kl is {limit:g}"

    def _length(self) -> str | None:
        now, start = self._window("response_length"), self._window("response_length", first=True)
        limit = self._config.max_length_growth
        if not limit or not now or statistics.fmean(now) <= limit * statistics.fmean(start):
            return None
        lengths = f"{statistics.fmean(now):.0f} tokens long, at the start they were {statistics.fmean(start):.0f}"
        return f"answers are {lengths}; trip_wires.max_length_growth is {limit:g}"

    def _cut(self) -> str | None:
        now, start = self._window("cut_share"), self._window("cut_share", first=True)
        limit = self._config.max_cut_share
        if not limit or not now:
            return None
        share, before = statistics.fmean(now), statistics.fmean(start)
        if share <= max(limit, before + _MIN_CUT_RISE):
            return None
        return f"{share:.0%} of the answers end at max_tokens, at the start {before:.0%} did"

    def _logprob_gap(self) -> str | None:
        for name, (key, which) in _GAPS.items():
            values, limit = self._window(name), getattr(self._config, key)
            if limit and values and not statistics.fmean(values) <= limit:
                apart = f"{statistics.fmean(values):.2g} nats apart {which}: what is trained is not what sampled"
                return f"trainer and sampler are {apart}; trip_wires.{key} is {limit:g}"
        return None

    def _route_flips(self) -> str | None:
        values, limit = self._window("route_flips"), self._config.max_route_flips
        if not limit or not values or statistics.fmean(values) <= limit:
            return None
        share = f"{statistics.fmean(values):.0%} of the sampler's experts"
        return f"the trainer would choose others than {share}; trip_wires.max_route_flips is {limit:g}"

    def _judges(self) -> str | None:
        """Reward significantly up, the second judge's significantly down, since it thought best of the answers."""
        window, limit = self._config.window, self._config.min_z
        rows = [row for row in self._rows if isinstance(row.get("second_reward"), int | float)]
        if not limit or len(rows) < 2 * window:
            return None
        now = rows[-window:]
        starts = range(len(rows) - 2 * window + 1)
        best = max(starts, key=lambda at: _mean(rows[at : at + window], "second_reward"))
        then = rows[best : best + window]
        if _z(then, now, "reward") < limit or _z(then, now, "second_reward") > -limit:
            return None
        rise = f"{_mean(then, 'reward'):.3g} to {_mean(now, 'reward'):.3g}"
        fall = f"{_mean(then, 'second_reward'):.3g} to {_mean(now, 'second_reward'):.3g}"
        return (
            f"reward {self._reward} rose from {rise} while the second judge's fell from {fall}: it pays for the wrong"
        )

    def _held_out(self) -> str | None:
        row = self._rows[-1]
        p_value, limit = row.get("eval_loss_p_value"), self._config.held_out_p
        if not limit or not isinstance(p_value, int | float) or p_value >= limit:
            return None
        now, best = row["eval_reward"], max(self._held_out_rewards)
        return (
            f"held-out problems are answered worse than before (reward {now:.3g}, it was {best:.3g}; p = {p_value:.2g})"
        )


def _mean(rows: list[Row], name: str) -> float:
    return statistics.fmean(float(row[name]) for row in rows)


def _z(first: list[Row], second: list[Row], name: str) -> float:
    """By how many standard errors ``name`` differs between two windows; its own error stands beside it."""
    errors = [float(row.get(f"{name}_error") or 0.0) for row in (*first, *second)]
    error = math.sqrt(math.fsum(each**2 for each in errors)) / len(first)
    difference = _mean(second, name) - _mean(first, name)
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0
