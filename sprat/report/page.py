"""The page of a road: sections in the order of the pipeline, each there only when a run has something for it.

No script, no font, no picture from elsewhere; the same runs give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from sprat.errors import DataError, TrustError
from sprat.eval.score import SIGNIFICANCE_LEVEL, pool_scores, two_proportion_p_value
from sprat.files import atomic
from sprat.report import completions, held_out_text, plots, tables
from sprat.report.document import document, panels, section
from sprat.report.held_out_scores import held_out_table
from sprat.report.run_page import render_run
from sprat.report.runs import STAGE_TITLES, PipelineRuns, is_run, read_runs
from sprat.report.tables import escape, format_duration, format_number, format_percent, format_points, format_yuan
from sprat.trust.ledger import find_ledger

_MALFORMED = (ArithmeticError, AttributeError, DataError, LookupError, RecursionError, TypeError, ValueError)
_DISCLAIMERS = (
    "Not a general assistant: a tiny model answers only what it was taught.",
    "Not proof that RL teaches arithmetic: here it elicits the thinking that pre-training put there; "
    "a control fine-tuned on labels, where one ran, stands beside it, also where it wins.",
    "Not measured energy or a bill: energy is CPU time at the stated watts of a core, money is CPU time at the "
    "stated price of a core-hour.",
    "Not all uncertainty: the intervals are of the sampled problems (95 %, Wilson), not of training; "
    "for that see the seeds.",
    "Not proof of computation: digests and ledger show that nothing was changed afterwards; to check the "
    "computing itself, run it again with the same seed.",
    "Not affiliated with DeepSeek; the architecture and the method are taken from its papers.",
)


def write_report(pipeline_folder: str | Path) -> Path:
    """Write ``report.html`` into the folder of a pipeline, from its finished runs alone, or into that of one run.

    The ledger of the pipeline is told the page's digest, so that ``verify`` sees an edited one; not that of a run
    that goes on.

    Returns:
        The path of the page, which needs no other file and no network.

    Raises:
        CheckpointError: there is no finished run, or the run has not begun.
        TrustError: one cannot be read, or the ledger's end is damaged.
        MachineError: the disk is full or closed to us.
    """
    folder = Path(pipeline_folder)
    path = folder / "report.html"
    try:
        content = render_run(folder) if is_run(folder) else render_page(read_runs(folder), held_out_table(folder))
    except _MALFORMED as error:
        what = f"a run holds what no stage writes ({type(error).__name__}: {error})"
        raise TrustError(what, where=str(folder), todo="see verify; then run that stage again") from error
    atomic.write_text(path, content)
    ledger = find_ledger(folder)
    if ledger is not None:
        ledger.add_file(path)
    return path


def render_page(runs: PipelineRuns, held_out: str = "") -> str:
    """The whole page of ``runs``; ``held_out`` is the table of ``held_out_scores``."""
    scores = section(
        "Questions that no stage trained on",
        "The same held-out questions after each stage, judged by the road's verifier, with 95 % intervals; gains are "
        "paired, question by question (exact test).",
        held_out,
    )
    return document("Sprat: report of the road", [_head(runs), scores, *_sections(runs), _foot(runs)])


def _head(runs: PipelineRuns) -> str:
    """Title, sums and a card for each scored stage."""
    spent = [stage.record for stage in runs.stages]
    seconds = sum(float(item.get("device_seconds") or 0) for item in spent)
    joules = sum(float(item.get("energy_joules_estimated") or 0) for item in spent)
    money = sum(int(item.get("nano_yuan") or 0) for item in spent)
    finished = max(str(item.get("finished") or "") for item in spent)[:10]
    runs_text, energy = f"{len(runs.stages)} runs", f"{format_number(joules, 'J')} (estimated)"
    lead = f"{runs_text}, {format_duration(seconds)} of one CPU core, {format_yuan(money)}, {energy}"
    cards = "".join(_card(runs, index) for index in range(len(runs.scored)))
    return (
        f'<h1>The road, and what each stage gained</h1><p class="lead">{lead}; finished {escape(finished)}.</p>'
        f'{_excluded_note(runs)}<div class="road">{cards}</div>'
    )


def _excluded_note(runs: PipelineRuns) -> str:
    """A sentence on the runs that lie here but do not belong to the pipeline."""
    names = [escape(stage.name) for stage in runs.excluded]
    verbs = ("have", "are") if len(names) > 1 else ("has", "is")
    sentence = f"{', '.join(names)} {verbs[0]} another recipe or start and {verbs[1]} not compared."
    return f'<p class="note">{sentence}</p>' if names else ""


def _card(runs: PipelineRuns, index: int) -> str:
    """One stage: mean accuracy, change since the stage before (coloured when significant), control, cost."""
    stage = runs.scored[index]
    quality = stage.mean_accuracy()
    if quality is None:
        return ""
    before = runs.scored[index - 1] if index else None
    start = before.mean_accuracy() if before else None
    gain = "&nbsp;"
    if before is not None and start is not None:
        scores = [pool_scores([s for s in run.by_task().values() if s.trained]) for run in (before, stage)]
        p = two_proportion_p_value(*scores)
        word = "quiet" if p >= SIGNIFICANCE_LEVEL else "good" if quality > start else "bad"
        gain = f'<span class="{word}">{format_points(quality - start)} points</span>'
    seconds, nano = float(stage.record.get("device_seconds") or 0), int(stage.record.get("nano_yuan") or 0)
    spent = f"{format_duration(seconds)} CPU, {format_yuan(nano)}"
    means = [(escape(control.title), control.mean_accuracy()) for control in runs.controls(stage)]
    lines = [f"<small>control, {title}: {format_percent(mean)}</small>" for title, mean in means if mean is not None]
    return (
        f'<div class="card"><div class="name">{escape(stage.title)}</div>'
        f'<div class="big">{format_percent(quality)}</div>'
        f'<div class="meter"><i style="width:{100 * quality:.1f}%"></i></div><div class="gain">{gain}</div>'
        f"{''.join(lines)}<small>{spent}</small></div>\n"
    )


def _sections(runs: PipelineRuns) -> list[str]:
    """All sections that have content."""
    counts = sorted({score.count for stage in runs.scored for score in stage.scores})
    several = f"{counts[0]:,} to {counts[-1]:,}" if len(counts) > 1 else f"{counts[0]:,}" if counts else ""
    return [
        section(
            "Accuracy after each stage",
            f"Greedy answers to {several} held-out problems for each task, with 95 % intervals.",
            tables.accuracy(runs),
        ),
        section(
            "Gains and their controls",
            "Each stage against the one before it on the same problems; significant means "
            f"p &lt; {SIGNIFICANCE_LEVEL}, two-sided, over problems. What another seed gives only other roads show. "
            "Controls had the time of training that stands below their names.",
            tables.gains(runs),
        ),
        section(
            "Thinking on and off",
            "The same model left to itself, made to think, and made to answer at once.",
            tables.thinking(runs),
        ),
        section("Learning curves", "What training saw, step by step.", panels(plots.loss_curves(runs))),
        section(
            "Reinforcement learning",
            "GRPO with rule rewards, a line for each seed, all from the same start.",
            panels(plots.rl_curves(runs)) + tables.seeds(runs),
        ),
        section(
            "Accuracy by length",
            "Greedy accuracy by the number of terms, with 95 % intervals; shaded lengths were never trained.",
            panels(plots.accuracy_by_length(runs)),
        ),
        section(
            "Thinking before and after RL",
            "The first held-out questions of each task, not chosen by hand or by result.",
            completions.before_after_rl(runs),
        ),
        section(
            "Real text",
            "Documents that were held out of training. Fewer bits per byte mean better prediction. A model is compared "
            "with the best of the baselines, which learn from the same text; PPM goes on to learn from the test.",
            panels(held_out_text.plots(runs)) + held_out_text.table(runs),
        ),
        section(
            "Experts", "How often each expert was chosen, relative to an even load.", panels(plots.expert_loads(runs))
        ),
        section(
            "Quality, size and speed",
            "Joined points are those that no other model beats on both.",
            panels(plots.pareto(runs)) + tables.sizes(runs),
        ),
        section("Cost", _rates(runs), tables.cost(runs)),
        section(
            "Where it comes from",
            "Recomputed by <code>sprat verify</code>; the whole digest shows on hover.",
            tables.provenance(runs) + tables.sources(runs),
        ),
    ]


def _rates(runs: PipelineRuns) -> str:
    """At which price and power the cost was computed."""
    stated = [stage.record["money"] for stage in runs.stages if stage.record.get("money")]
    rates = sorted({(money.get("yuan_per_core_hour"), money.get("watts_per_core")) for money in stated})
    text = escape(" and ".join(f"¥{price:g} per core-hour and {watts:g} W per core" for price, watts in rates))
    return f"At {text}, as stated in the recipe. CPU time counts every core, interrupted sessions included."


def _foot(runs: PipelineRuns) -> str:
    """What this is not, and what computed it."""
    versions = runs.stages[-1].record.get("versions") or {}
    version_text = ", ".join(f"{escape(name)} {escape(version)}" for name, version in sorted(versions.items()))
    items = "".join(f"<li>{escape(item)}</li>" for item in _DISCLAIMERS)
    others = sorted({run.name for run in runs.stages if run.kind not in STAGE_TITLES and not run.control_of})
    other_text = f" Other runs: {escape(', '.join(others))}." if others else ""
    return f"<section><h2>What this is not</h2><ul>{items}</ul></section><footer>{version_text}.{other_text}</footer>"
