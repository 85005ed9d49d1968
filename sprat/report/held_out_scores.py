"""What the models of a road are worth on the questions that no stage trained on: a line for each, against the first.

The scores are those of stages that use ``eval`` with ``data``; problem by problem they stand in the runs' artefacts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sprat.errors import TrustError
from sprat.eval.comparison import paired_interval, sign_test_p_value
from sprat.files.json import read_json
from sprat.report.tables import escape, format_percent, format_points, table
from sprat.trust import run_record
from sprat.trust.ledger import find_ledger

_FILE = "held_out.jsonl"  # of an artefact: a line for each evaluation, with what each problem was paid


@dataclass(frozen=True)
class HeldOutScore:
    """One model on the held-out questions.

    Attributes:
        name: of the stage that asked it; ``model`` is what it asked.
        count: problems that were judged.
        reward: mean; ``accuracy`` the share of full marks, with its 95 % interval ``low`` to ``high`` (Wilson).
        tokens: mean length of an answer.
        gain: of the accuracy over the first score on the same problems, with its 95 % interval (Newcombe, paired), and
            ``p_value`` (exact, paired); None of the first one itself.
    """

    name: str
    model: str
    count: int
    reward: float
    accuracy: float
    low: float
    high: float
    tokens: float
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    p_value: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        line = f"{self.model}: reward {self.reward:.3f}, {self.accuracy:.1%} of {self.count} right"
        if self.gain is None:
            return f"{line} ({self.low:.1%} to {self.high:.1%})"
        interval = f"{100 * (self.gain_low or 0):+.1f} to {100 * (self.gain_high or 0):+.1f}"
        return f"{line}, {100 * self.gain:+.1f} points ({interval}, p = {self.p_value:.2g})"


def held_out_scores(folder: str | Path) -> list[HeldOutScore]:
    """The scores of the runs under ``folder``, in the order in which they were made, models from elsewhere first.

    Each is compared with the first that was asked the same problems.

    Raises:
        TrustError: a run's files cannot be read.
    """
    scores, first = list[HeldOutScore](), dict[tuple[str, ...], Mapping[str, float]]()
    for path, record in _scored_runs(Path(folder)):
        found = record["facts"]["held_out_score"]
        try:
            right = _right(path / "artefact" / _FILE)
            score = HeldOutScore(
                name=path.relative_to(folder).as_posix(),
                model=_model(record),
                tokens=float(found["response_length"]),
                **{key: float(found[key]) for key in ("reward", "accuracy", "low", "high")},
                count=int(found["count"]),
            )
        except (OSError, LookupError, TypeError, ValueError) as error:
            what = f"its held-out scores cannot be read ({type(error).__name__}: {error})"
            raise TrustError(what, where=str(path), todo="see verify; then run that stage again") from None
        before = first.setdefault(tuple(sorted(right)), right)
        scores.append(score if before is right else _compared(score, before, right))
    return scores


def held_out_table(folder: str | Path) -> str:
    """The same as HTML; empty where there are none."""
    rows = []
    for score in held_out_scores(folder):
        gain = "–"
        if score.gain is not None:
            low, high = format_points(score.gain_low or 0), format_points(score.gain_high or 0)
            gain = f"{format_points(score.gain)} <small>{low} to {high}, p = {score.p_value:.2g}</small>"
        interval = f"<small>{format_percent(score.low)} to {format_percent(score.high)}</small>"
        rows.append(
            [
                escape(score.name),
                escape(score.model),
                f"{score.reward:.3f}",
                f"{format_percent(score.accuracy)} {interval}",
                gain,
                f"{score.tokens:.0f}",
                f"{score.count:,}",
            ]
        )
    head = ["stage", "model", "reward", "right", "points over the first", "tokens", "questions"]
    return table(head, rows) if rows else ""


def _scored_runs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The runs of ``folder`` that have a score, with their records; see ``held_out_scores`` for their order."""
    ledger = find_ledger(folder)
    entries = [] if ledger is None else ledger.entries()
    place = {str(entry["body"].get("run")): number for number, entry in enumerate(entries)}
    runs = [(path, read_json(path / "run.json") or {}) for path in run_record.find_runs(folder)]
    scored = [(path, record) for path, record in runs if (record.get("facts") or {}).get("held_out_score")]

    def order(run: tuple[Path, dict[str, Any]]) -> tuple[bool, int]:
        path, record = run
        is_made_here = "path" in (record.get("inputs") or {}).get("model", {})
        return is_made_here, place.get(path.relative_to(folder).as_posix(), len(place))

    return sorted(scored, key=order)


def _right(path: Path) -> dict[str, float]:
    """Of each problem that was judged the share of right answers."""
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    return {each["key"]: each["correct"] / each["samples"] for each in row["problems"] if each["samples"]}


def _model(record: Mapping[str, Any]) -> str:
    """The model's run, or the last part of a path elsewhere."""
    item = record["inputs"]["model"]
    return str(item.get("path") or item.get("outside") or "model")


def _compared(score: HeldOutScore, before: Mapping[str, float], right: Mapping[str, float]) -> HeldOutScore:
    pairs = [(before[key], right[key]) for key in sorted(right)]
    low, high = paired_interval([a for a, _ in pairs], [b for _, b in pairs])
    better, worse = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
    gain = sum(b - a for a, b in pairs) / len(pairs)
    fields = {"gain": gain, "gain_low": low, "gain_high": high, "p_value": sign_test_p_value(better, worse)}
    return HeldOutScore(**{**score.to_dict(), **fields})
