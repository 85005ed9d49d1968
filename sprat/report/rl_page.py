"""What the page of a run says of RL: the gate, the held-out gain, the verifier's faults, the trips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sprat.report.runs import StageRun, printable
from sprat.report.tables import escape, format_percent, table


def reinforcement(run: StageRun) -> str:
    """Two tables, or nothing for a run of another kind."""
    facts = run.facts
    rows = [*_gate(facts.get("gate") or {}), *_gain(facts.get("held_out") or {}), *_faults(run)]
    trips = [
        [f"step {int(trip['step']):,}", "@wrap|" + escape(printable(str(trip["sentence"]))), _what_then(trip)]
        for trip in facts.get("trips") or ()
    ]
    text = table(["", ""], [[name, f"@wrap|{value}"] for name, value in rows]) if rows else ""
    return text + (table(["trip wire", "", "then"], trips) if trips else "")


def _gate(gate: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not gate:
        return []
    asked = f"{int(gate['problems'])} problems, eight answers each"
    rows = [
        ("before training: a right answer among eight", f"{format_percent(gate['pass_at_8'])} of {asked}"),
        ("before training: answers paid differently", format_percent(gate["spread"])),
    ]
    if gate.get("agreement") is not None:
        rows.append(("the verifier asked twice about one answer agrees", f"{float(gate['agreement']):.2f} (1: always)"))
    if gate.get("thinking") is not None:
        both = f"{format_percent(gate['thinking'])} made to think, {format_percent(gate['direct'])} at once"
        rows.append(("before training: right", both))
    return rows


def _gain(held_out: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if change := held_out.get("change"):
        interval = f"95 % interval {change['low']:+.3f} to {change['high']:+.3f}"
        test = f"p = {change['p_value']:.2g} (sign test)"
        counts = f"{int(change['better'])} problems better, {int(change['worse'])} worse, of {int(change['count'])}"
        rows.append(("held-out reward", f"{change['difference']:+.3f}; {interval}; {test}; {counts}"))
    if right := held_out.get("comparison"):
        interval = f"95 % interval {100 * right['low']:+.1f} to {100 * right['high']:+.1f}"
        test = f"p = {right['p_value']:.2g} ({escape(str(right['test']))})"
        rows.append(("held-out problems right", f"{100 * right['difference']:+.1f} points; {interval}; {test}"))
    return rows


def _faults(run: StageRun) -> list[tuple[str, str]]:
    counts = {
        name: sum(int(row.get(name) or 0) for row in run.metrics)
        for name in ("reward_faults", "timeouts")
        if any(name in row for row in run.metrics)
    }
    if not counts.get("reward_faults"):
        return []
    text = f"{counts['reward_faults']:,} answers, {counts.get('timeouts', 0):,} of them out of time; none was paid"
    return [("the verifier failed on", text)]


def _what_then(trip: Mapping[str, Any]) -> str:
    return f"back to step {int(trip['back_to']):,}" if "back_to" in trip else "ended"
