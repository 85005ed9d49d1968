"""What failures cost a long run: how often to save, and which share of the time is progress.

A fleet of ``chips`` fails every ``M`` = MTBF of a chip / chips. A run saves after every ``t`` seconds of work, which
takes ``C``; a failure loses what was done since, and ``R`` until the run goes on. Young's interval is sqrt(2 C M)
(1974); Daly's next order and the expected time of a run are closed forms where failures come at random (Daly
2006, Future Generation Computer Systems 22(3), equations 20 and 37):

    time / work = M e^(R / M) (e^((t + C) / M) - 1) / t

Left out: failures that come in bursts, and chips that are slow without failing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sprat.errors import ConfigError

# Llama 3's pre-training (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 H100.
CHIP_HOURS = 54 * 24 * 16384 / 419


@dataclass(frozen=True)
class Goodput:
    """Seconds, and shares of the whole time."""

    fleet_mtbf: float  # seconds between failures of the fleet
    interval: float  # of work between two saves
    share: float  # of the time that is progress
    saving: float  # of the time that saving takes
    lost: float  # of the time that failures take: work done again and waiting


def young(save: float, mtbf: float) -> float:
    """Young's interval in seconds.

    >>> round(young(60, 3 * 3600))
    1138
    """
    return math.sqrt(2 * save * mtbf)


def daly(save: float, mtbf: float) -> float:
    """Daly's interval in seconds, which holds for slow saves too."""
    if save >= 2 * mtbf:
        return mtbf
    ratio = save / (2 * mtbf)
    return young(save, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def goodput(
    chips: int, *, save_seconds: float, restart_seconds: float, chip_hours: float = CHIP_HOURS, interval: float = 0.0
) -> Goodput:
    """The share of time that is progress on ``chips``.

    Args:
        save_seconds: for which a save stops training; what a save does in the background is not counted.
        restart_seconds: from a failure to the first step after it.
        chip_hours: mean hours between failures of one chip, all causes.
        interval: seconds of work between saves; 0: Daly's.

    Raises:
        ConfigError: a number is negative, or nothing would ever be saved.
    """
    numbers = {"chips": chips, "chip_hours": chip_hours, "save_seconds": save_seconds}
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} is {value}", where="goodput", todo="give a number above 0")
    for name, value in {"restart_seconds": restart_seconds, "interval": interval}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name} is {value}", where="goodput", todo="give seconds, 0 or more")
    mtbf = chip_hours * 3600 / chips
    work = interval or daly(save_seconds, mtbf)
    exponent = (work + save_seconds) / mtbf
    if exponent + restart_seconds / mtbf > 500:
        what = f"a failure every {mtbf:.0f} s and {work + save_seconds:.0f} s from save to save: hardly one is reached"
        raise ConfigError(what, where="goodput", todo="save more often, or use fewer chips")
    share = work / (mtbf * math.exp(restart_seconds / mtbf) * math.expm1(exponent))
    saving = share * save_seconds / work
    return Goodput(mtbf, work, share, saving, max(0.0, 1 - share - saving))
