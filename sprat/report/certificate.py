# size: one page, a function for each of its sections
"""A certificate as one self-contained page: the verdict, each capability with its interval, and the rest."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from sprat.eval.certificate import Certificate, RouterFlips, Speed, TaskLoss, TextLoss
from sprat.eval.intervals import Estimate
from sprat.files import atomic
from sprat.report.svg import BLUE, GRAY, GREEN, RED, label_width, percent_axis, svg, wrap_label
from sprat.report.tables import escape, format_number, format_percent, table

PAGE = "certificate.html"
_DISCLAIMERS = (
    "Not a promise about what was not asked: a capability that has no row here may be gone.",
    "Not a bar on the mean: every capability is held against it by itself, by the upper end of its interval. "
    "With many capabilities, a bar that is just kept by each is likely broken somewhere.",
    "Not proof where the original is guessing: what it never could, it cannot lose.",
    "Not all uncertainty: the intervals (95 %) are of the sampled documents, problems and rounds.",
)


def write_page(certificate: Certificate, folder: str | Path) -> Path:
    """Write ``certificate.html`` into ``folder``; its path. It needs no other file and no network.

    Raises:
        MachineError: the disk is full or closed to us.
    """
    path = Path(folder) / PAGE
    atomic.write_text(path, render(certificate))
    return path


def render(certificate: Certificate) -> str:
    """The whole page."""
    style = resources.files("sprat.report").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(part for part in (_head(certificate), *_sections(certificate), _foot(certificate)) if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Sprat: certificate of {escape(certificate.model.path)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _head(certificate: Certificate) -> str:
    """Title, verdict, and a card each for size, speed, and the capability that lost most."""
    model, original = certificate.model, certificate.original
    if certificate.max_loss is None:
        verdict = "No bar was set."
    elif certificate.failed:
        names = escape(", ".join(certificate.failed))
        verdict = f'<b class="bad">Fails</b> the bar of {format_percent(certificate.max_loss)}: {names}.'
    else:
        number = f"{format_percent(certificate.max_loss)} in each of {len(certificate.capabilities)} capabilities"
        verdict = f'<b class="good">Holds</b> the bar of {number}.'
    cards = [
        _card(
            "On disk",
            f"{original.bytes / max(1, model.bytes):.1f}×",
            f"{_megabytes(original.bytes)} to {_megabytes(model.bytes)}",
        )
    ]
    cards += [
        _card(speed.what.capitalize(), f"{speed.ratio.value:.2f}×", f"{speed.after:,.0f} tokens/s")
        for speed in certificate.speeds
    ]
    losses = [(loss.high, name) for name, loss in certificate.capabilities.items() if loss is not None]
    if losses:
        high, name = max(losses)
        cards.append(_card("Largest bound", _signed(high), escape(name)))
    return (
        f"<h1>What {escape(model.path)} lost</h1>"
        f'<p class="lead">Against {escape(original.path)}; {escape(certificate.finished[:10])}. {verdict}</p>'
        f'<div class="road">{"".join(cards)}</div>'
    )


def _card(name: str, figure: str, below: str) -> str:
    return (
        f'<div class="card"><div class="name">{name}</div><div class="big">{figure}</div><small>{below}</small></div>\n'
    )


def _sections(certificate: Certificate) -> list[str]:
    """All sections that have content."""
    bar = "" if certificate.max_loss is None else " The line is the bar."
    return [
        _section(
            "Loss of each capability",
            "Relative: the share of right answers that is gone, or of bits per byte that came on top; with 95 % "
            f"intervals. Left of 0 the squeezed model is better.{bar}",
            _panel(_losses(certificate)) + _verdicts(certificate),
        ),
        _section(
            "Tasks",
            "Greedy answers of both to the same problems. The p-value is McNemar's, exact.",
            _tasks(certificate.tasks),
        ),
        _section(
            "Text, token by token",
            "How far the two distributions of the next token are apart: KL(original || squeezed) in nats.",
            _texts(certificate.texts),
        ),
        _section(
            "Choices of experts",
            "Share of tokens for which a router chose another set of experts, and of chosen experts that were swapped.",
            _panel(_flips_plot(certificate.routing)) + _flips(certificate.routing),
        ),
        _section(
            "Long continuations",
            "Greedy, of openings without a chat template. A loop is a piece of up to 64 tokens that stands three times "
            "in a row, over 32 tokens or more beyond the first.",
            _continuations(certificate),
        ),
        _section(
            "Speed",
            f"Both in turn on {escape(certificate.machine.processor)}, {certificate.machine.threads} threads; medians, "
            "and the median ratio of a round with the interval of its order statistics.",
            _speeds(certificate.speeds),
        ),
    ]


def _section(title: str, lead: str, content: str) -> str:
    return f'<section><h2>{title}</h2><p class="note">{lead}</p>\n{content}</section>' if content else ""


def _panel(panel: str) -> str:
    return f'<div class="panels"><figure>{panel}</figure></div>' if panel else ""


def _losses(certificate: Certificate) -> str:
    """A row for each capability: its loss and interval."""
    rows = [(name, loss) for name, loss in certificate.capabilities.items() if loss is not None]
    if not rows:
        return ""
    rows.reverse()  # the first is drawn lowest
    bar = certificate.max_loss

    def draw(axes: Any) -> None:
        for place, (_, loss) in enumerate(rows):
            color = BLUE if bar is None else GREEN if certificate.holds(loss) else RED
            axes.hlines(place, max(loss.low, -1.0), min(loss.high, 2.0), color=color, linewidth=2)
            axes.plot([loss.value], [place], "o", color=color, markersize=6)
        axes.axvline(0, color=GRAY, linewidth=0.8)
        if bar is not None:
            axes.axvline(bar, color=RED, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), [wrap_label(name) for name, _ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(False, axis="y")
        axes.set_xlabel("relative loss (left is better)")
        percent_axis(axes.xaxis)
        axes.xaxis.get_major_formatter().decimals = None

    left = label_width(wrap_label(name) for name, _ in rows)
    return svg("losses", "Loss and 95 % interval", draw, width=5.6, height=1.2 + 0.42 * len(rows), left=left)


def _verdicts(certificate: Certificate) -> str:
    """The same as a table."""
    rows = []
    for name, loss in certificate.capabilities.items():
        holds = certificate.holds(loss)
        mark = {True: "@good|holds", False: "@bad|fails", None: "–"}[holds]
        cells = ["–", "the original is never right", "–"]
        if loss is not None:
            cells = [f"<b>{_signed(loss.value)}</b>", f"{_signed(loss.low)} to {_signed(loss.high)}", f"{loss.count:,}"]
        rows.append([escape(name), *cells, mark])
    return table(["capability", "loss", "95 % interval", "samples", "bar"], rows) if rows else ""


def _tasks(tasks: tuple[TaskLoss, ...]) -> str:
    rows = []
    for task in tasks:
        both = task.answers
        points = f"{100 * both.difference:+.1f}<small>{100 * both.low:+.1f} to {100 * both.high:+.1f}</small>"
        rows.append(
            [
                escape(task.name),
                f"{both.count:,}",
                format_percent(both.first),
                format_percent(both.second),
                points.replace("-", "\u2212"),
                f"{both.first_better:,}",
                f"{both.second_better:,}",
                f"{both.p_value:.2g}",
            ]
        )
    head = ["task", "problems", "before", "after", "points", "lost", "won", "p"]
    return table(head, rows) if rows else ""


def _texts(texts: tuple[TextLoss, ...]) -> str:
    rows = [
        [
            escape(text.name) + f"<small>{text.tokens:,} tokens, {text.difference.count} {text.unit}s</small>",
            f"{text.bits_before:.4f}",
            f"{text.bits_after:.4f}",
            _with_interval(text.difference, ".4f"),
            _with_interval(text.kl_mean),
            _with_interval(text.kl_median),
            _with_interval(text.kl_p99),
            f"{text.kl_max:.3g}",
            _with_share(text.same_top),
        ]
        for text in texts
    ]
    head = [
        "text",
        "bits per byte before",
        "after",
        "difference",
        "KL mean",
        "median",
        "99th percentile",
        "largest",
        "same likeliest token",
    ]
    return table(head, rows) if rows else ""


def _flips(routing: tuple[RouterFlips, ...]) -> str:
    rows = [[escape(flips.text), _with_share(flips.sets), _with_share(flips.slots)] for flips in routing]
    return table(["text", "sets that changed", "experts that changed"], rows) if rows else ""


def _flips_plot(routing: tuple[RouterFlips, ...]) -> str:
    """Share of sets that changed, by layer."""
    if not routing or len(routing[0].layers) < 2:
        return ""

    def draw(axes: Any) -> None:
        for flips, color in zip(routing, (BLUE, GREEN, RED, GRAY), strict=False):
            layers = [each.layer for each in flips.layers]
            axes.plot(layers, [each.sets.value for each in flips.layers], "o-", color=color, label=flips.text)
            axes.vlines(
                layers, *zip(*((each.sets.low, each.sets.high) for each in flips.layers), strict=True), color=color
            )
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        percent_axis(axes.yaxis)
        axes.legend()

    return svg("flips", "Expert sets that changed, by layer", draw, width=5.6)


def _continuations(certificate: Certificate) -> str:
    continuations = certificate.continuations
    if continuations is None:
        return ""
    first = continuations.first_divergence
    place = "–" if first is None else f"token {first.value:.0f}<small>{first.low:.0f} to {first.high:.0f}</small>"

    def finished(counts: dict[str, int]) -> str:
        return ", ".join(f"{escape(reason)} {count}" for reason, count in sorted(counts.items()))

    rows = [
        ["openings that part", f"{continuations.diverged} of {continuations.prompts}", ""],
        ["first token that differs, median", place, ""],
        ["", "<b>before</b>", "<b>after</b>"],
        ["end up in a loop", _with_share(continuations.loops_before), _with_share(continuations.loops_after)],
        ["tokens, mean", f"{continuations.tokens_before:.0f}", f"{continuations.tokens_after:.0f}"],
        ["ended by", finished(continuations.finish_before), finished(continuations.finish_after)],
    ]
    return table(["", "", ""], rows)


def _speeds(speeds: tuple[Speed, ...]) -> str:
    rows = [
        [
            escape(speed.what),
            f"{speed.before:,.0f}",
            f"{speed.after:,.0f}",
            _with_interval(speed.ratio, ".2f"),
            str(speed.ratio.count),
        ]
        for speed in speeds
    ]
    return table(["work", "before, tokens/s", "after", "ratio", "rounds"], rows) if rows else ""


def _foot(certificate: Certificate) -> str:
    """What is missing, what this is not, and what was measured."""
    missing = "".join(f"<li>{escape(each)}</li>" for each in certificate.missing)
    items = missing + "".join(f"<li>{escape(item)}</li>" for item in _DISCLAIMERS)
    models = ", ".join(
        f'{escape(each.path)} <code title="{each.digest}">{each.digest[:16]}</code>'
        for each in (certificate.original, certificate.model)
    )
    settings = ", ".join(f"{escape(name)} {escape(value)}" for name, value in certificate.settings.items())
    return f"<section><h2>What this is not</h2><ul>{items}</ul></section><footer>{models}; {settings}.</footer>"


def _signed(share: float) -> str:
    return f"{100 * share:+.2f}\u00a0%".replace("-", "\u2212")


def _with_interval(each: Estimate, kind: str = ".3g") -> str:
    return f"{each.value:{kind}}<small>{each.low:{kind}} to {each.high:{kind}}</small>".replace("-", "\u2212")


def _with_share(each: Estimate) -> str:
    return f"{format_percent(each.value)}<small>{format_percent(each.low)} to {format_percent(each.high)}</small>"


def _megabytes(count: int) -> str:
    return format_number(float(count), "B")
