"""Matplotlib figures as inline SVG that take the page's own ink, so they suit a light and a dark page.

Text stays text (searchable, small). Axes and labels are drawn in a marker colour that is replaced by
``currentColor``. Ids are salted and prefixed, so the same runs give the same bytes and two figures do
not clash. The size attributes are dropped: a figure is as wide as its place.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

INK = "#010203"  # becomes currentColor
BLUE, ORANGE, GREEN, RED, PURPLE, GRAY = "#3b82c4", "#d9822b", "#2f9e77", "#c8505a", "#8b6bbf", "#8a8f98"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, RED, GRAY)

_RC_PARAMS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sprat",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def svg(
    name: str,
    title: str,
    draw: Callable[[Any], None],
    *,
    width: float = 4.4,
    height: float = 2.9,
    left: float = 0.5,
    right: float = 0.1,
) -> str:
    """An inline ``<svg>`` of one panel.

    Args:
        name: prefix of its ids, unique in the page.
        title: above the panel, and what a screen reader says.
        draw: called with the matplotlib axes.
        width, height, left, right: the panel and the room beside its axes, in inches at which text is 9 pt.
            (Matplotlib could find the room by itself, but that doubles the time.)
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC_PARAMS):
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(left / width, 0.48 / height, 1 - right / width, 1 - 0.28 / height)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.set_title(title)
        draw(axes)
        stream = io.StringIO()
        FigureCanvasSVG(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return _inline_svg(stream.getvalue(), name, title)


def _inline_svg(text: str, name: str, title: str) -> str:
    """The ``<svg>`` element alone, in the page's ink, font and id space."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    return text.replace(INK, "currentColor").strip()


def wrap_label(label: str) -> str:
    """``label`` over as many lines as keep it narrow."""
    return textwrap.fill(label, 22, max_lines=3)


def label_width(labels: Iterable[str]) -> float:
    """Inches that the longest line of ``labels`` takes beside the axes."""
    return 0.2 + 0.072 * max((len(line) for label in labels for line in label.splitlines()), default=0)


def percent_axis(axis: Any) -> None:
    """Ticks of a share as per cent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def color_map_to(color: str) -> Any:
    """A colour map from transparent to ``color``, for heat maps on any page."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    red, green, blue = to_rgb(color)
    return LinearSegmentedColormap.from_list("tint", [(red, green, blue, 0.04), (red, green, blue, 1.0)])
