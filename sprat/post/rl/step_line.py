"""What a person at the terminal is told of each step of a run: one line of the numbers that matter, and the cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sprat.files.json import read_json

_Z95 = 1.96
_MINUTES_FROM = 300.0  # seconds
_GAPS = ("logprob_gap_mean", "mismatch_mean")  # the first that is there


def step_line(row: Mapping[str, Any], steps: int, seconds: float, spent: str = "") -> str:
    """One line of a step.

    Args:
        row: of the log.
        steps: of the run.
        seconds: that the step took.
        spent: what the run has cost so far, in words.

    >>> step_line({"step": 3, "reward": 0.5, "accuracy": 0.25, "entropy": 1.5, "live_groups": 0.75}, 60, 2.0)
    'step 3/60: reward 0.500, right 25%, taught 75%, entropy 1.50, 2.0 s'
    """

    def number(name: str) -> float | None:
        value = row.get(name)
        return float(value) if isinstance(value, int | float) else None

    parts = list[str]()

    def add(text: str, value: float | None, *, always: bool = True) -> None:
        if value is not None and (always or value):
            parts.append(text.format(value))

    error = number("reward_error")
    add("reward {:.3f}" + (f" ± {_Z95 * error:.3f}" if error else ""), number("reward"))
    add("right {:.0%}", number("accuracy"))
    add("second judge {:.3f}", number("second_reward"))
    add("taught {:.0%}", number("live_groups"))
    add("of {:.0f} questions", number("sampled_groups"))
    add("{:.0f} tokens", number("response_length"))
    add("cut {:.0%}", number("cut_share"), always=False)
    add("entropy {:.2f}", number("entropy"))
    add("KL {:.3f}", number("kl_start"))
    add("clipped {:.1%}", number("clip_fraction"))
    add("gap {:.1g}", next((value for name in _GAPS if (value := number(name)) is not None), None))
    add("flips {:.1%}", number("route_flips"), always=False)
    add("age {:.1f}", number("staleness"), always=False)
    add("faults {:.0f}", number("reward_faults"), always=False)
    add("abstained {:.0%}", number("abstained"), always=False)
    add("hacks {:.0%}", number("hack_evidence"))
    parts += [f"{seconds:.1f} s", *([spent] if spent else [])]
    return f"step {row['step']}/{steps}: {', '.join(parts)}"


def spent_so_far(folder: Path, tokens: float) -> str:
    """What the run in ``folder`` has cost until its last row; empty where nobody has written it down."""
    spent = read_json(folder / "spent.json") or {}
    if "nano_yuan" not in spent:
        return ""
    seconds, yuan = float(spent["device_seconds"]), float(spent["nano_yuan"]) / 1e9
    time = f"{seconds:.0f} s" if seconds < _MINUTES_FROM else f"{seconds / 60:.0f} min"
    price = f"{yuan:.2f}" if yuan >= 1 else f"{float(f'{yuan:.2g}'):.9f}".rstrip("0").rstrip(".")
    return f"so far {time} of CPU, {tokens / 1000:.1f}k tokens, ¥{price}"
