"""The page of one run, finished or not: what it is made from, what it learned, what came of it, and what that cost.

It asks nothing but the run's folder, so it can be made again while the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sprat.config.base import Config
from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.config.model import LoRAConfig
from sprat.config.recipe import DistillConfig, RFTConfig, RLConfig, SFTConfig, TrainConfig
from sprat.config.rl import RLRunConfig
from sprat.eval.score import wilson_interval
from sprat.report import plots, rl_page, rl_plots, run_plots, tables
from sprat.report.document import document, panels, section
from sprat.report.runs import PipelineRuns, StageRun, printable, read_run
from sprat.report.tables import escape, format_duration, format_percent, format_yuan, table
from sprat.trust.run_record import read_progress
from sprat.trust.stage_facts import Sample, read_samples

_TITLES = {
    "sft": "Supervised fine-tuning",
    "dpo": "Preference optimization (DPO)",
    "distill": "Distillation",
    "pretrain": "Pre-training",
    "rl": "Reinforcement learning",
}
_CONFIGS: tuple[type[Config], ...] = (
    FinetuneConfig, DPOConfig, SFTConfig, RFTConfig, RLConfig, RLRunConfig, DistillConfig, TrainConfig,
)  # fmt: skip
_COUNTS = {
    "shown": "learned from",
    "too_long": "longer than a row, left out or cut",
    "unfit": "left out: no place in the chat format",
    "tokens": "tokens",
    "learned": "tokens that carry loss",
}
_MAX_PROMPTS = 8
_REFRESH_SECONDS = 10  # of the page of a run that goes on


def render_run(folder: Path) -> str:
    """The whole page of the run in ``folder``.

    Raises:
        TrustError: a file of it cannot be read.
        KeyError, TypeError, ValueError: one holds what no stage writes.
    """
    run = read_run(folder)
    is_done = "finished" in run.record
    samples = read_samples(folder / ("artefact" if is_done else "checkpoints"))
    one, is_rl = PipelineRuns([run], [run]), rl_plots.is_rl(run)
    parts = [
        _head(run, read_progress(folder)),
        section("While it learned", _curves_lead(run), panels((rl_plots if is_rl else run_plots).curves(run))),
        section(
            "Before and after", "On what was kept from training; tasks with 95 % intervals (Wilson).", _scores(run)
        ),
        section("Verifier", "", rl_page.reinforcement(run)),
        section("Accuracy", "Held-out problems, with 95 % intervals.", tables.accuracy(one) + tables.thinking(one)),
        section("Accuracy by length", "", panels(plots.accuracy_by_length(one))),
        section("Experts", "", panels(plots.expert_loads(one))),
        section("Answers", "Greedy, to the same questions each time; not chosen by result.", _samples(run, samples)),
        section("Data", "", _data(run)),
        section("Settings", "Those that are not the defaults.", _settings(run.recipe)),
        section("Model", "", tables.sizes(one)),
        section("Cost", _cost_lead(run), tables.cost(one)),
        section(
            "Where it comes from",
            "Recomputed by <code>sprat verify</code>; the whole digest shows on hover.",
            _inputs(run) + (tables.provenance(one) if is_done else "") + tables.sources(one),
        ),
        _foot(run),
    ]
    return document(f"Sprat: {run.name}", parts, refresh_seconds=0 if is_done else _REFRESH_SECONDS)


def _head(run: StageRun, progress: tuple[int, int]) -> str:
    """What it is, and a card for each score."""
    record, facts = run.record, run.facts
    seconds, nano = float(record.get("device_seconds") or 0), int(record.get("nano_yuan") or 0)
    if "finished" in record:
        state = f"finished {escape(str(record['finished'])[:16].replace('T', ' '))} UTC"
        spent = f"{format_duration(seconds)} of one CPU core, {format_yuan(nano)}"
    else:
        state = f"not finished: step {progress[0]:,} of {progress[1]:,}"
        spent = f"{format_duration(seconds)} of one CPU core so far, {format_yuan(nano)}"
    steps = facts.get("last_step") or facts.get("steps")
    parts = [f"{int(steps):,} steps" if steps else "", spent, state]
    best = facts.get("best") or {}
    note = f"The model is that of step {int(best['step']):,}, the best by {escape(best['metric'])}." if best else ""
    if facts.get("last_step", 0) < facts.get("steps", 0) and "finished" in record and not rl_plots.is_rl(run):
        note += f" Training ended before step {int(facts['steps']):,}: no evaluation got better."
    cards = f'<div class="road">{"".join(_card(run, name) for name in _score_names(run))}</div>'
    if rl_plots.is_rl(run):
        cards = rl_page.verdict(run) + rl_page.cards(run)
    title = _TITLES.get(str(record.get("stage")), str(record.get("stage")))
    return (
        f'<h1>{escape(run.name)}</h1><p class="lead">{escape(title)}: {", ".join(part for part in parts if part)}.</p>'
        f"{f'<p>{note.strip()}</p>' if note else ''}{cards}"
    )


def _score_names(run: StageRun) -> list[str]:
    return list(run.facts.get("validation_after") or run.facts.get("validation_before") or {})


def _card(run: StageRun, name: str) -> str:
    """One score: what it is now, and what it was."""
    before, after = ((run.facts.get(f"validation_{when}") or {}).get(name) for when in ("before", "after"))
    logged = run_plots.series(run, f"eval_{name}")[1]
    now = after if after is not None else logged[-1] if logged else before
    title = run_plots.score_title(name)
    small = "" if before is None else f"<small>{_score(run, name, before)} before training</small>"
    big = f'<div class="big">{_score(run, name, now)}</div>'
    return f'<div class="card"><div class="name">{escape(title)}</div>{big}{small}</div>'


def _score(run: StageRun, name: str, value: Any) -> str:
    """A score as text; shares as per cent."""
    if not isinstance(value, int | float):
        return "–"
    return format_percent(value) if run_plots.is_share(name) else f"{value:.3g}"


def _scores(run: StageRun) -> str:
    """Each score before, at each evaluation's best, and after."""
    rows = []
    for name in _score_names(run):
        cells = []
        for when in ("before", "after"):
            value = (run.facts.get(f"validation_{when}") or {}).get(name)
            count = (run.facts.get("eval_tasks") or {}).get(name.removeprefix("accuracy/"))
            interval = ""
            if count and isinstance(value, int | float):
                low, high = wilson_interval(value * int(count), int(count))
                interval = f"<small>{100 * low:.1f}–{100 * high:.1f} of {int(count)} problems</small>"
            cells.append(_score(run, name, value) + interval)
        rows.append([escape(run_plots.score_title(name)), *cells])
    return table(["", "before", "after"], rows) if rows else ""


def _curves_lead(run: StageRun) -> str:
    best = run.facts.get("best") or {}
    if rl_plots.is_rl(run):
        marked = " A dotted line marks a step at which a trip wire or the hack monitor spoke." * bool(
            rl_plots.marks(run)
        )
        return "A point is a step; shaded and upright: 95 % intervals, over the questions that were asked." + marked
    return f"The line marks step {int(best['step']):,}, whose model was kept." if best else ""


def _samples(run: StageRun, samples: list[Sample]) -> str:
    """The answers to each question before, in the middle and at the end (or best), side by side."""
    steps = sorted({sample.step for sample in samples})
    best = int((run.facts.get("best") or {}).get("step") or 0)
    shown = dict.fromkeys([*steps[:1], *steps[len(steps) // 2 : len(steps) // 2 + 1], *steps[-1:]])
    chosen = sorted({*shown, *({best} & set(steps))})
    blocks = []
    for prompt, expected in list(dict.fromkeys((sample.prompt, sample.expected) for sample in samples))[:_MAX_PROMPTS]:
        says = "right is" if rl_plots.is_rl(run) else "its example says"
        expects = "" if expected is None else f"<small>{says}: {escape(printable(expected))}</small>"
        own = {sample.step: sample for sample in samples if (sample.prompt, sample.expected) == (prompt, expected)}
        answers = "".join(_answer(own[step], best) for step in chosen if step in own)
        question = f'<p class="ask">{escape(printable(prompt))} {expects}</p>'
        blocks.append(f'<div class="sample">{question}<div class="two">{answers}</div></div>\n')
    return "".join(blocks)


def _answer(sample: Sample, best: int) -> str:
    title = "before training" if sample.step == 0 else f"step {sample.step:,}"
    mark = ' <span class="tag">kept</span>' if best and sample.step == best else ""
    cut = ' <span class="tag">cut at the limit</span>' if sample.finish_reason == "length" else ""
    cut += "" if sample.reward is None else f' <span class="tag">paid {sample.reward:g}</span>'
    thought = printable(sample.reasoning).strip()
    details = f"<details><summary>thinking</summary><pre>{escape(thought)}</pre></details>" if thought else ""
    answer = escape(printable(sample.answer).strip() or "(nothing)")
    return f'<div><h4>{title}{mark}{cut}</h4>{details}<p class="said">{answer}</p></div>'


def _data(run: StageRun) -> str:
    """How many examples are learned from and kept back, and which are left out, by reason."""
    facts = run.facts
    columns = [
        (title, facts[key]) for key, title in (("examples", "training"), ("validation", "kept back")) if facts.get(key)
    ]
    names = [name for name in _COUNTS if any(name in counts for _, counts in columns)]
    rows = [[_COUNTS[name], *(f"{int(counts.get(name, 0)):,}" for _, counts in columns)] for name in names]
    text = table(["examples", *(title for title, _ in columns)], rows) if rows else ""
    lost = [
        [escape(each["why"]), f"{int(each['count']):,}", escape(", ".join(each["names"]))]
        for each in facts.get("skipped") or ()
    ]
    for overlap in filter(None, (facts.get("overlap"), facts.get("replay", {}).get("overlap"))):
        asked = ", ".join(f"{name}: {count}" for name, count in overlap["tasks"].items())
        verb = {"drop": "left out", "keep": "learned all the same"}.get(str(overlap["how"]), str(overlap["how"]))
        why = f"ask what a task asks ({asked}), {verb}"
        lost.append([escape(why), f"{int(overlap['count']):,}", escape("; ".join(overlap["names"]))])
    return text + (
        table(["records left out", "", "the first"], [[f"@wrap|{a}", b, f"@wrap|{c}"] for a, b, c in lost])
        if lost
        else ""
    )


def _settings(recipe: Mapping[str, Any]) -> str:
    """The settings that are not the defaults of their kind; all of them where that is not known."""
    given = _flatten(recipe)
    defaults = next((d for d in (_flatten(c().model_dump(mode="json")) for c in _CONFIGS) if _same_kind(d, given)), {})
    if "lora" in defaults:
        adapters = LoRAConfig().model_dump(mode="json", exclude={"rank"})
        defaults |= _flatten({"lora": adapters})
    rows = [
        [
            f"<code>{escape(key)}</code>",
            escape(_plain(value)),
            escape(_plain(defaults[key])) if key in defaults else "–",
        ]
        for key, value in given.items()
        if key not in defaults or defaults[key] != value
    ]
    return table(["key", "value", "default"], rows) if rows else ""


def _same_kind(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether both are settings of one class; what is None by default may be a table in ``given``, or be left out."""
    tables_of_none = tuple(f"{key}." for key, value in defaults.items() if value is None)
    missing = [key for key, value in defaults.items() if key not in given and value is not None]
    return not missing and all(key in defaults or key.startswith(tables_of_none or ("\0",)) for key in given)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any) -> str:
    return (
        ", ".join(map(str, value)) if isinstance(value, list | tuple) else "none" if value in (None, "") else str(value)
    )


def _cost_lead(run: StageRun) -> str:
    speed = run.facts.get("tokens_per_second")
    rate = f"{float(speed):,.0f} tokens a second. " if isinstance(speed, int | float) and speed else ""
    return f"{rate}Energy and money are CPU time at the stated watts and price of a core, no measurement."


def _inputs(run: StageRun) -> str:
    """Each input with its digest."""
    rows = [
        [
            escape(name),
            escape(item.get("path") or item.get("outside") or "–"),
            tables.digest_cell(str(item.get("digest", ""))),
        ]
        for name, item in run.inputs.items()
    ]
    return table(["made from", "", "SHA-256"], rows) if rows else ""


def _foot(run: StageRun) -> str:
    """What computed it."""
    versions = run.record.get("versions") or {}
    machine = [
        f"{versions[key]} {unit}" for key, unit in (("cores", "cores"), ("threads", "threads")) if key in versions
    ]
    programs = [
        f"{name} {value}" for name, value in sorted(versions.items()) if name not in ("machine", "cores", "threads")
    ]
    text = ", ".join([str(versions.get("machine") or ""), *machine, *programs]).strip(", ")
    return f"<footer>{escape(text)}</footer>" if text else ""
