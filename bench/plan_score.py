"""How far the planner's step times are off: published tables and figures against its predictions.

Rows are those of ``shared/plan_rows.csv`` (NVIDIA's Megatron-Bridge, releases 25.09 and 25.11; tokens a second of one GPU
for a model, a chip, a precision and a layout). One factor for each chip and precision is fitted on 25.09, and 25.11 is
predicted: the model was designed on 25.09 and on ``shared/figures.toml`` alone, and nothing was changed after a look at
25.11 (``docs/plan.md`` counts the looks). ``--blind`` prints totals and no row of the release that is predicted.
Beside that stand figures of papers, each with its error.

Bars: mean absolute error at most 15 %, rank correlation at least 0.9, 90 % of rows inside the printed 90 % interval.

    python -m bench.plan_score [--blind] [--json] [--plot FILE] [--rows FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from sprat.plan.calibration import Prediction, Row, Score, fit, predict, read_rows, score

BARS = {"mape": 0.15, "rank_correlation": 0.9, "inside": 0.9}
FITTED, PREDICTED = "25.09", "25.11"


def main() -> int:
    """Print the table; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blind", action="store_true", help="totals of the predicted release, none of its rows")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, help="write predicted against published as an SVG file")
    parser.add_argument("--rows", type=Path, default=Path("sprat/plan/published_rows.csv"))
    arguments = parser.parse_args()
    rows = read_rows(arguments.rows)
    old, new = ([row for row in rows if row.release == release] for release in (FITTED, PREDICTED))
    calibration = fit(old)
    seen, unseen = [predict(calibration, row) for row in old], [predict(calibration, row) for row in new]
    results = {"fitted": score(seen), "predicted": score(unseen)}
    if arguments.json:
        print(json.dumps({name: asdict(one) for name, one in results.items()}))
    else:
        if not arguments.blind:
            show_rows(seen + unseen)
        for name, release in (("fitted", FITTED), ("predicted", PREDICTED)):
            show_score(f"{name} {release}", results[name])
    missed = [name for name in BARS if not holds(name, results["predicted"])]
    return 1 if missed else 0


def holds(name: str, result: Score) -> bool:
    """Whether bar ``name`` is held."""
    value = getattr(result, name)
    return bool(value <= BARS[name] if name == "mape" else value >= BARS[name])


def show_rows(predictions: list[Prediction]) -> None:
    """One line for each row."""
    for one in predictions:
        row: Row = one.row
        print(
            f"{row.release} {row.model:20} {row.system:6} {row.precision:7} {row.plan.world_size:5} GPUs  "
            f"published {row.tokens_per_second:8,.0f}  predicted {one.predicted:8,.0f} ({one.low:,.0f} to {one.high:,.0f}) "
            f"{100 * one.error:+6.1f} %{'' if one.inside else '  outside'}"
        )


def show_score(name: str, result: Score) -> None:
    """The totals."""
    print(
        f"{name}: {result.rows} rows, mean absolute error {100 * result.mape:.1f} % (bar 15), rank correlation "
        f"{result.rank_correlation:.3f} (bar 0.9), inside the 90 % interval {100 * result.inside:.0f} % (bar 90), "
        f"upper over lower end {result.width:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
