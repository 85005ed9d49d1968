"""The page: sections in the order of the road, each there only when a run has something for it.

No script, no font, no picture from elsewhere; the same runs give the same bytes.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from sprat.errors import TrustError
from sprat.report import heldout, plots, samples, tables
from sprat.report.runs import FAMILIES, Road, p_value, read
from sprat.report.tables import LEVEL, duration, number, percent, points, text, yuan
from sprat.trust import atomic
from sprat.trust.ledger import of

_MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_NOT = (
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


def write(road_folder: str | Path) -> Path:
    """Write ``report.html`` into the folder of a road (or of one run), from its finished runs alone.

    The ledger of the road is told the page's digest, so that ``verify`` sees an edited one.

    Returns:
        The path of the page, which needs no other file and no network.

    Raises:
        CheckpointError: there is no finished run.
        TrustError: one cannot be read, or the ledger's end is damaged.
        MachineError: the disk is full or closed to us.
    """
    folder = Path(road_folder)
    path = folder / "report.html"
    try:
        content = page(read(folder))
    except _MALFORMED as error:
        what = f"a run holds what no stage writes ({type(error).__name__}: {error})"
        raise TrustError(what, where=str(folder), todo="see verify; then run that stage again") from error
    atomic.write_text(path, content)
    ledger = of(folder)
    if ledger is not None:
        ledger.enter(path)
    return path


def page(road: Road) -> str:
    """The whole page of ``road``."""
    style = resources.files("sprat.report").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(part for part in (_head(road), *_sections(road), _foot(road)) if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Sprat: report of the road</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _head(road: Road) -> str:
    """Title, sums and a card for each scored stage."""
    spent = [stage.record for stage in road.stages]
    seconds = sum(float(item.get("device_seconds") or 0) for item in spent)
    joules = sum(float(item.get("energy_joules_estimated") or 0) for item in spent)
    money = sum(int(item.get("nano_yuan") or 0) for item in spent)
    finished = max(str(item.get("finished") or "") for item in spent)[:10]
    runs, energy = f"{len(road.stages)} runs", f"{number(joules, 'J')} (estimated)"
    lead = f"{runs}, {duration(seconds)} of one CPU core, {yuan(money)}, {energy}"
    cards = "".join(_card(road, place) for place in range(len(road.scored)))
    return (
        f'<h1>The road, and what each stage gained</h1><p class="lead">{lead}; finished {text(finished)}.</p>'
        f'{_left_out(road)}<div class="road">{cards}</div>'
    )


def _left_out(road: Road) -> str:
    """A sentence on the runs that lie here but do not belong to the road."""
    names = [text(stage.name) for stage in road.left_out]
    words = ("have", "are") if len(names) > 1 else ("has", "is")
    told = f"{', '.join(names)} {words[0]} another recipe or start and {words[1]} not compared."
    return f'<p class="note">{told}</p>' if names else ""


def _card(road: Road, place: int) -> str:
    """One stage: mean accuracy, change since the stage before (coloured when significant), control, cost."""
    stage = road.scored[place]
    quality = stage.quality()
    if quality is None:
        return ""
    before = road.scored[place - 1] if place else None
    start = before.quality() if before else None
    gain = "&nbsp;"
    if before is not None and start is not None:
        scores = [[s for s in held.by_task().values() if s.trained] for held in (before, stage)]
        word = "quiet" if p_value(scores[0], scores[1]) >= LEVEL else "good" if quality > start else "bad"
        gain = f'<span class="{word}">{points(quality - start)} points</span>'
    seconds, nano = float(stage.record.get("device_seconds") or 0), int(stage.record.get("nano_yuan") or 0)
    spent = f"{duration(seconds)} CPU, {yuan(nano)}"
    held = [(control.title, control.quality()) for control in road.controls(stage)]
    controls = "".join(
        f"<small>control, {text(title)}: {percent(mean)}</small>" for title, mean in held if mean is not None
    )
    return (
        f'<div class="card"><div class="name">{text(stage.title)}</div><div class="big">{percent(quality)}</div>'
        f'<div class="meter"><i style="width:{100 * quality:.1f}%"></i></div><div class="gain">{gain}</div>'
        f"{controls}<small>{spent}</small></div>\n"
    )


def _sections(road: Road) -> list[str]:
    """All sections that have content."""
    counts = sorted({score.count for stage in road.scored for score in stage.scores})
    several = f"{counts[0]:,} to {counts[-1]:,}" if len(counts) > 1 else f"{counts[0]:,}" if counts else ""
    return [
        _section(
            "Accuracy after each stage",
            f"Greedy answers to {several} held-out problems for each task, with 95 % intervals.",
            tables.accuracy(road),
        ),
        _section(
            "Gains and their controls",
            f"Each stage against the one before it on the same problems; significant means p &lt; {LEVEL}, two-sided, "
            "over problems. What another seed gives only other roads show. Controls had the time of "
            "training that stands below their names.",
            tables.gains(road),
        ),
        _section(
            "Thinking on and off",
            "The same model left to itself, made to think, and made to answer at once.",
            tables.thinking(road),
        ),
        _section("Learning curves", "What training saw, step by step.", _panels(plots.loss(road))),
        _section(
            "Reinforcement learning",
            "GRPO with rule rewards, a line for each seed, all from the same start.",
            _panels(plots.rl(road)) + tables.seeds(road),
        ),
        _section(
            "Accuracy by length",
            "Greedy accuracy by the number of terms, with 95 % intervals; shaded lengths were never trained.",
            _panels(plots.lengths(road)),
        ),
        _section(
            "Thinking before and after RL",
            "The first held-out questions of each task, not chosen by hand or by result.",
            samples.before_after(road),
        ),
        _section(
            "Real text",
            "Documents that were held out of training. Fewer bits per byte mean better prediction. A model is compared "
            "with the best of the baselines, which learn from the same text; PPM goes on to learn from the test.",
            _panels(heldout.plots(road)) + heldout.table(road),
        ),
        _section(
            "Experts", "How often each expert was chosen, relative to an even load.", _panels(plots.experts(road))
        ),
        _section(
            "Quality, size and speed",
            "Joined points are those that no other model beats on both.",
            _panels(plots.pareto(road)) + tables.sizes(road),
        ),
        _section("Cost", _rates(road), tables.cost(road)),
        _section(
            "Where it comes from",
            "Recomputed by <code>sprat verify</code>; the whole digest shows on hover.",
            tables.provenance(road) + tables.sources(road),
        ),
    ]


def _section(title: str, lead: str, content: str) -> str:
    """A section, or nothing when it has no content."""
    return f'<section><h2>{title}</h2><p class="note">{lead}</p>\n{content}</section>' if content else ""


def _panels(found: list[str]) -> str:
    return f'<div class="panels">{"".join(f"<figure>{svg}</figure>" for svg in found)}</div>' if found else ""


def _rates(road: Road) -> str:
    """At which price and power the cost was computed."""
    rates = {
        (m.get("yuan_per_core_hour"), m.get("watts_per_core")) for s in road.stages if (m := s.record.get("money"))
    }
    told = " and ".join(f"¥{price:g} per core-hour and {watts:g} W per core" for price, watts in sorted(rates))
    return f"At {text(told)}, as stated in the recipe. CPU time counts every core, interrupted sessions included."


def _foot(road: Road) -> str:
    """What this is not, and what computed it."""
    versions = road.stages[-1].record.get("versions") or {}
    known = ", ".join(f"{text(name)} {text(version)}" for name, version in sorted(versions.items()))
    items = "".join(f"<li>{text(item)}</li>" for item in _NOT)
    strangers = sorted({stage.name for stage in road.stages if stage.family not in FAMILIES and not stage.control_of})
    more = f" Other runs: {text(', '.join(strangers))}." if strangers else ""
    return f"<section><h2>What this is not</h2><ul>{items}</ul></section><footer>{known}.{more}</footer>"
