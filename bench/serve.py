"""The server's bars: what it bears, what its gateway costs, and how fast it is beside others.

    python -m bench.serve [--quick] [--json] [--only BAR …]

Each bar starts a server of its own in another process and asks it over loopback sockets, all bounded in number and in
time. `leave`, `half-open`, `stress`, `schemas` and `tenants` have a tiny random model; the others have
SmolLM2 in INT4 (`bench.inference.models`). `versus` builds llama.cpp's server, `tools` installs aiperf and guidellm
(`bench.oracles`).
Exit 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from bench.inference import cores, models
from bench.serving import load_tools, overload, speed, standing
from bench.serving.rows import FULL, QUICK, Plan, Row, Say

Bar = Callable[[Path, Plan, Say], list[Row]]
TINY: dict[str, Bar] = {
    "leave": standing.leave,
    "half-open": standing.half_open,
    "stress": overload.stress,
    "schemas": standing.schemas,
    "tenants": standing.tenants,
}
REAL: dict[str, Bar] = {
    "overload": overload.overload,
    "health": overload.health,
    "gateway": speed.gateway,
    "versus": speed.versus,
    "tools": load_tools.load_tools,
}


def measure(names: list[str], plan: Plan, say: Say) -> list[Row]:
    """All rows of the bars ``names``; a bar that cannot be measured has one row that is missed."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        tiny = standing.tiny_model(Path(place) / "tiny") if TINY.keys() & set(names) else Path(place)
        real = models.prepare("dense") if REAL.keys() & set(names) else Path(place)
        for name in names:
            say(f"{name} …")
            folder = tiny if name in TINY else real if name == "versus" else real / "sprat"
            try:
                rows += {**TINY, **REAL}[name](folder, plan, say)
            except (RuntimeError, OSError, KeyError, subprocess.SubprocessError, AssertionError) as error:
                say("".join(traceback.format_exception(error, limit=-4)))
                rows.append(Row(name, f"failed: {type(error).__name__}: {error}"[:200], 1, 0))
    return rows


def main() -> int:
    """Print each figure with its limit; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer clients, shorter loads, one round: five minutes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[*TINY, *REAL], help="these bars alone")
    asked = parser.parse_args()
    names = asked.only or [*TINY, *REAL]
    rows = measure(names, QUICK if asked.quick else FULL, lambda text: print(text, file=sys.stderr, flush=True))
    missed = [row for row in rows if not row.met]
    if asked.json:
        facts = {"machine": cores.machine(), "quick": asked.quick, "rows": [row.data() for row in rows]}
        print(json.dumps({**facts, "missed": len(missed)}))
        return 1 if missed else 0
    for row in rows:
        print(row)
    print(f"serve: {'MISS' if missed else 'PASS'}: {len(rows) - len(missed)} of {len(rows)} figures hold")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
