"""What the page of a run says of RL: the gain, in one sentence; the verifier, the drill, the gate; trips and alarms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sprat.eval.score import SIGNIFICANCE_LEVEL
from sprat.report.run_plots import series
from sprat.report.runs import StageRun, printable
from sprat.report.tables import escape, format_duration, format_number, format_percent, format_yuan, table

_LEAST_NANO = 100_000  # that a card shows
_LAST_STEPS = 5  # over which a card takes the mean


def reinforcement(run: StageRun) -> str:
    """Tables of what was found, or nothing for a run of another kind."""
    facts = run.facts
    rows = [*_drill(facts.get("fire_drill") or {}), *_gate(facts.get("gate") or {})]
    rows += [*_gain(facts.get("held_out") or {}), *_groups(run), *_faults(run)]
    trips = [
        [f"step {int(trip['step']):,}", "@wrap|" + escape(printable(str(trip["sentence"]))), _what_then(trip)]
        for trip in facts.get("trips") or ()
    ]
    text = table(["", ""], [[name, f"@wrap|{value}"] for name, value in rows]) if rows else ""
    alarms = [
        [
            f"step {int(alarm['step']):,}",
            escape(printable(str(alarm["signal"]))),
            *("@wrap|" + escape(printable(str(alarm[name]))) for name in ("question", "expected", "answer")),
        ]
        for alarm in facts.get("alarms") or ()
    ]
    text += table(["trip wire", "", "then"], trips) if trips else ""
    text += table(["hack monitor", "sign", "question", "expected", "paid"], alarms) if alarms else ""
    return text + _paid_hacks(facts.get("fire_drill") or {})


def verdict(run: StageRun) -> str:
    """What came of it so far in one paragraph, and what spoke against it."""
    found = _change(run)
    text = f'<p class="verdict {found[0]}">{found[1]}</p>' if found else ""
    warnings = [
        f"trip wire, step {int(trip['step']):,}: {trip['sentence']}; {_what_then(trip)}"
        for trip in run.facts.get("trips") or ()
    ]
    warnings += [f"hack monitor, {alarm['sentence']}" for alarm in run.facts.get("alarms") or ()]
    if (drill := run.facts.get("fire_drill") or {}).get("accepted"):
        warnings.append(f"its verifier pays known hacks, which was accepted: {drill['failure']}")
    return text + "".join(f'<p class="verdict bad">{escape(printable(str(each)))}</p>' for each in warnings)


def _change(run: StageRun) -> tuple[str, str] | None:
    """How held-out problems are paid now and were paid before: which color, and the sentence."""
    steps, values = series(run, "eval_reward")
    if len(values) < 2:
        return None
    gain, p_value = values[-1] - values[0], (series(run, "eval_p_value")[1] or [1.0])[-1]
    change = (run.facts.get("held_out") or {}).get("change")
    interval = f", 95 % interval {change['low']:+.3f} to {change['high']:+.3f}" if change else ""
    sure = p_value < SIGNIFICANCE_LEVEL
    color = ("good" if gain > 0 else "bad") if sure else "quiet"
    moved = f'from {values[0]:.3f} to <b class="{color}">{values[-1]:.3f}</b>'
    note = "" if sure else " That may be chance."
    where = "" if "finished" in run.record else f" after step {steps[-1]:,}"
    return (
        color,
        f"Problems that were never trained are paid {moved}{where} ({gain:+.3f}{interval}, p = {p_value:.2g}).{note}",
    )


def cards(run: StageRun) -> str:
    """The numbers of now: held out, in training, and what it cost so far."""
    parts = []
    for name, title in (("reward", "Held-out reward"), ("accuracy", "Held-out problems right")):
        values = series(run, f"eval_{name}")[1]
        if values:
            parts.append(_card(title, _value(name, values[-1]), f"{_value(name, values[0])} before training"))
    for name, title in (("reward", "Reward in training"), ("response_length", "Tokens of an answer")):
        values = series(run, name)[1]
        if values:
            first, last = (sum(part) / len(part) for part in (values[:_LAST_STEPS], values[-_LAST_STEPS:]))
            note = f"last {min(_LAST_STEPS, len(values))} steps; {_value(name, first)} in the first"
            parts.append(_card(title, _value(name, last), note))
    record = run.record
    seconds, nano = float(record.get("device_seconds") or 0), int(record.get("nano_yuan") or 0)
    spent = f"{format_duration(seconds)} CPU, {format_number(float(record.get('tokens') or 0))} tokens sampled"
    price = format_yuan(nano) if nano >= _LEAST_NANO else f"&lt;&nbsp;{format_yuan(_LEAST_NANO)}"
    parts.append(_card("Cost" if "finished" in record else "Cost so far", price, spent))
    return f'<div class="road">{"".join(parts)}</div>'


def _card(title: str, big: str, small: str) -> str:
    inner = f'<div class="name">{title}</div><div class="big">{big}</div><small>{small}</small>'
    return f'<div class="card">{inner}</div>'


def _value(name: str, value: float) -> str:
    return format_percent(value) if name == "accuracy" else f"{value:.3g}"


def _drill(drill: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not drill:
        return []
    tried = f"{int(drill['hacks']):,} known hacks of {int(drill['problems'])} problems were tried"
    what = "it was accepted that some are paid, see below" if drill.get("accepted") else "none was paid"
    warning = f"; {drill['warning']}" if drill.get("warning") else ""
    return [("before training: fire drill", escape(f"{tried}; {what}{warning}"))]


def _paid_hacks(drill: Mapping[str, Any]) -> str:
    """What a verifier pays that was accepted all the same."""
    rows = [
        [
            escape(printable(str(hack["family"]))),
            *("@wrap|" + escape(printable(str(hack[name]))) for name in ("question", "answer", "why")),
            f"{float(hack['paid']):g}",
        ]
        for hack in drill.get("paid") or ()
    ]
    return table(["paid hack", "question", "answer", "why it is wrong", "paid"], rows) if rows else ""


def _groups(run: StageRun) -> list[tuple[str, str]]:
    """How many questions taught something; the ledger has a line for each of the others, which says why."""
    rows = [row for row in run.metrics if isinstance(row.get("live_groups"), int | float)]
    per_step = int(run.recipe.get("prompts_per_step") or 0)
    asked = sum(int(row.get("sampled_groups") or per_step) for row in rows)
    if not asked:
        return []
    live = sum(round(float(row["live_groups"]) * int(row.get("sampled_groups") or per_step)) for row in rows)
    text = f"{live:,} of {asked:,} ({format_percent(live / asked)}); rollouts.sqlite says why not of each other"
    return [("questions that taught something", text)]


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
    return f"back to step {int(trip['back_to']):,}, with a lower rate" if "back_to" in trip else "the run ended"
