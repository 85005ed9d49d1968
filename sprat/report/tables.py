"""The report's tables: accuracy, gains, seeds, cost and provenance, as HTML."""

from __future__ import annotations

import html
from typing import Any

from sprat.eval.score import SIGNIFICANCE_LEVEL, StageScore, two_proportion_p_value
from sprat.report.runs import PipelineRuns, StageRun
from sprat.trust.stage_facts import TextSource

_MODE_TITLES = {  # ways of asking, as the page heads them
    "greedy": "left to itself",
    "sampled": "drawn at temperature 1",
    "thinking": "made to think",
    "direct": "made to answer at once",
}


def escape(value: Any) -> str:
    """``value`` as HTML text; an at sign too is escaped, since it marks a class in ``table``."""
    return html.escape(str(value)).replace("@", "&#64;")


def format_percent(share: float) -> str:
    """A share as per cent with one decimal; it does not break over lines.

    >>> format_percent(0.9781)
    '97.8\\xa0%'
    """
    return f"{100 * share:.1f}\u00a0%"


def format_points(change: float) -> str:
    """A change of a share in points, signed.

    >>> format_points(-0.021)
    '−2.1'
    """
    return f"{100 * change:+.1f}".replace("-", "\u2212")


def format_number(value: float, unit: str = "") -> str:
    """A large number with a prefix of thousands and a unit.

    >>> format_number(1234567.0), format_number(12.0, "J"), format_number(120e3, "B")
    ('1.23 M', '12 J', '120 kB')
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    return f"{value:.3g} E{unit}"


def format_duration(seconds: float) -> str:
    """Seconds as minutes where that reads better.

    >>> format_duration(8.25), format_duration(125)
    ('8.2 s', '2 min 5 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes} min {remainder} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_yuan(nano: int) -> str:
    """Nano-yuan as yuan with three significant digits.

    >>> format_yuan(1_234_567), format_yuan(2_500_000_000)
    ('¥0.00123', '¥2.50')
    """
    value = nano / 1e9
    if not nano or value >= 1:
        return f"¥{value:.2f}"
    return "¥" + f"{float(f'{value:.3g}'):.9f}".rstrip("0")


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table that scrolls sideways on a small screen; cells are HTML already, an attribute may lead as ``@class|``."""

    def cell(tag: str, content: str) -> str:
        if content.startswith("@"):
            names, _, content = content[1:].partition("|")
            return f'<{tag} class="{names}">{content}</{tag}>'
        return f"<{tag}>{content}</{tag}>"

    top = "".join(cell("th", item) for item in head)
    body = "".join(f"<tr>{''.join(cell('td', item) for item in row)}</tr>\n" for row in rows)
    content = f"<thead><tr>{top}</tr></thead><tbody>\n{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{content}</table></div>'


def accuracy(runs: PipelineRuns) -> str:
    """Accuracy on each task after each stage, controls beside their stage."""
    columns = [column for stage in runs.scored for column in (stage, *runs.controls(stage)) if column.scores]
    if not columns:
        return ""
    head = ["task"]
    for stage in columns:
        cost = stage.facts.get("training_cpu_seconds")
        notes = ["control"] * bool(stage.control_of) + ([f"{float(cost):.0f} s of training"] if cost else [])
        mark = f"<small>{', '.join(notes) or '&nbsp;'}</small>"
        head.append(f"@{'control' if stage.control_of else 'stage'}|{escape(stage.title)}{mark}")
    rows = []
    for task, trained in runs.tasks().items():
        tag = "" if trained else ' <span class="tag">never trained</span>'
        rows.append([escape(task) + tag, *(_accuracy_cell(stage, stage.by_task().get(task)) for stage in columns)])
    means = [stage.mean_accuracy() for stage in columns]
    if len(rows) > 1:
        cells = ["–" if mean is None else f"<b>{format_percent(mean)}</b>" for mean in means]
        marks = ["control" if stage.control_of else "" for stage in columns]
        cells = [f"@{mark}|{cell}" if mark else cell for mark, cell in zip(marks, cells, strict=True)]
        rows.append(["mean of trained tasks", *cells])
    return table(head, rows, "accuracy")


def _accuracy_cell(stage: StageRun, score: StageScore | None) -> str:
    """One accuracy with its interval, tinted by height."""
    if score is None:
        return "–"
    names = f"heat{round(score.accuracy * 10)}" + (" control" if stage.control_of else "")
    interval = f"{100 * score.low:.1f}–{100 * score.high:.1f}"
    return f"@{names}|<b>{format_percent(score.accuracy)}</b><small>{interval}</small>"


def gains(runs: PipelineRuns) -> str:
    """What each stage changed on each task, whether that is significant, and what its control reached."""
    rows = []
    for before, stage in zip(runs.scored, runs.scored[1:], strict=False):
        significance = {str(row["task"]): row for row in stage.facts.get("significance") or []}
        scores_before = before.by_task()
        is_first_row = True
        for task, after in stage.by_task().items():
            row = significance.get(task)
            if row is None and task not in scores_before:
                continue
            start = float(row["before"]) if row else scores_before[task].accuracy
            end = float(row["after"]) if row else after.accuracy
            p = float(row["p"]) if row else two_proportion_p_value(scores_before[task], after)
            name = f"<b>{escape(stage.title)}</b>" if is_first_row else ""
            cells = [format_percent(start), format_percent(end), *_gain_cells(start, end, p)]
            rows.append([name, escape(task), *cells, _control_cell(runs, stage, task)])
            is_first_row = False
    return table(["stage", "task", "before", "after", "gain", "p", "verdict", "control reached"], rows) if rows else ""


def _gain_cells(start: float, end: float, p: float) -> list[str]:
    """Gain in points, p and a word."""
    word = "@good|significant gain" if end > start else "@bad|significant loss"
    if p >= SIGNIFICANCE_LEVEL:
        word = "@quiet|not significant"
    return [format_points(end - start), "&lt; 0.0001" if p < 1e-4 else f"{p:.4f}", word]


def _control_cell(runs: PipelineRuns, stage: StageRun, task: str) -> str:
    """What the controls of ``stage`` reached on ``task``."""
    scores = [(escape(control.title), control.by_task().get(task)) for control in runs.controls(stage)]
    cells = [f"{format_percent(score.accuracy)} <small>{title}</small>" for title, score in scores if score]
    return f"@beside|{'<br>'.join(cells) or '–'}"


def seeds(runs: PipelineRuns) -> str:
    """RL from the same start with several seeds: greedy accuracy on each task, and the spread."""
    stages = [stage for stage in runs.seed_runs("rl") if stage.scores]
    if len(stages) < 2:
        return ""
    rows = []
    for task in runs.tasks():
        scores = [stage.by_task().get(task) for stage in stages]
        means = [score.accuracy for score in scores if score]
        if means:
            cells = ["–" if score is None else format_percent(score.accuracy) for score in scores]
            rows.append([escape(task), *cells, f"{format_percent(min(means))} to {format_percent(max(means))}"])
    return table(["task", *(escape(f"seed {stage.record.get('seed')}") for stage in stages), "spread"], rows)


def thinking(runs: PipelineRuns) -> str:
    """Each scored stage made to think, made to answer at once, and left to itself."""
    rows = []
    modes = [mode for mode in _MODE_TITLES if _has_mode(runs, mode)]
    if len(modes) < 2:
        return ""
    for stage in runs.scored:
        cells = []
        for mode in modes:
            scores = [s for s in stage.scores if s.mode == mode and s.trained]
            if not scores:
                cells.append("–")
                continue
            lengths = [s.mean_tokens for s in scores if s.mean_tokens]
            size = f"<small>{sum(lengths) / len(lengths):.0f} tokens</small>" if lengths else ""
            cells.append(f"<b>{format_percent(sum(s.accuracy for s in scores) / len(scores))}</b>{size}")
        rows.append([escape(stage.title), *cells])
    return table(["mean over tasks", *(_MODE_TITLES[mode] for mode in modes)], rows)


def _has_mode(runs: PipelineRuns, mode: str) -> bool:
    return any(score.mode == mode for stage in runs.scored for score in stage.scores)


def cost(runs: PipelineRuns) -> str:
    """FLOPs, tokens, time, energy and money of each run, and their sum."""
    rows = []
    names = ("flops", "tokens", "device_seconds", "wall_seconds", "energy_joules_estimated", "nano_yuan")
    total = dict.fromkeys(names, 0.0)
    total_seconds = max(sum(float(stage.record.get("device_seconds") or 0) for stage in runs.stages), 1e-9)
    for stage in runs.stages:
        spent = {name: float(stage.record.get(name) or 0) for name in names}
        total = {name: total[name] + spent[name] for name in names}
        mark = ' <span class="tag">control</span>' if stage.control_of else ""
        share = 100 * spent["device_seconds"] / total_seconds
        bar = f'<span class="bar"><i style="width:{share:.1f}%"></i></span>'
        rows.append([escape(stage.title) + mark, *_cost_cells(spent), bar])
    if len(rows) > 1:
        rows.append(["<b>all</b>", *(f"<b>{item}</b>" for item in _cost_cells(total)), ""])
    head = ["stage", "FLOPs", "tokens", "CPU time", "wall time", "energy (est.)", "cost", "share of CPU time"]
    return table(head, rows, "cost")


def _cost_cells(spent: dict[str, float]) -> list[str]:
    return [
        format_number(spent["flops"]) if spent["flops"] else "–",
        format_number(spent["tokens"]) if spent["tokens"] else "–",
        format_duration(spent["device_seconds"]),
        format_duration(spent["wall_seconds"]),
        format_number(spent["energy_joules_estimated"], "J"),
        format_yuan(int(spent["nano_yuan"])),
    ]


def sizes(runs: PipelineRuns) -> str:
    """Parameters, bytes, speed and quality of each model that is measured."""
    rows = []
    for stage in runs.compared_stages:
        quality, counts = stage.mean_accuracy(), stage.facts.get("parameters") or {}
        size, speed = runs.model_fact(stage, "size_bytes"), runs.model_fact(stage, "tokens_per_second")
        if not size and not counts:
            continue
        cells = [format_number(float(counts[key])) if counts.get(key) else "–" for key in ("total", "active")]
        cells += [format_number(size, "B") if size else "–", f"{speed:,.0f}" if speed else "–"]
        rows.append([escape(stage.title), *cells, "–" if quality is None else format_percent(quality)])
    return table(["model", "parameters", "active", "on disk", "tokens/s", "mean accuracy"], rows) if rows else ""


def provenance(runs: PipelineRuns) -> str:
    """The digest of each artefact and recipe, and what each run was made from."""
    rows = []
    for stage in runs.stages:
        inputs = [item.get("path") or item.get("outside") or name for name, item in stage.inputs.items()]
        inputs_text = ", ".join(map(escape, inputs))
        digests = [digest_cell(str(stage.record.get(name, ""))) for name in ("artefact_digest", "recipe_digest")]
        rows.append([escape(stage.name), *digests, escape(stage.record.get("seed", "")), inputs_text or "–"])
    return table(["run", "artefact (SHA-256)", "recipe (SHA-256)", "seed", "made from"], rows)


def sources(runs: PipelineRuns) -> str:
    """Name, licence, size, what is left out, and digest of each text source."""
    text_sources = [TextSource.from_dict(row) for stage in runs.stages for row in stage.facts.get("sources") or []]
    rows = [
        [
            escape(source.name),
            escape(source.licence),
            format_number(float(source.bytes), "B"),
            "<br>".join(escape(item) for item in (source.fault, *source.left_out) if item) or "–",
            digest_cell(source.digest),
        ]
        for source in text_sources
    ]
    return table(["source", "licence", "size", "left out", "SHA-256"], rows) if rows else ""


def digest_cell(value: str) -> str:
    """The first 16 digits; the whole on hover."""
    return f'<code title="{escape(value)}">{escape(value[:16])}</code>' if value else "–"
