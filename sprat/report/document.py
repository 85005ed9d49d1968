"""What every page of ours is: one file with our style sheet, in sections, without script and without anything from
elsewhere; the same runs give the same bytes."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources


def document(title: str, parts: Iterable[str], *, refresh_seconds: int = 0) -> str:
    """A whole page of ``parts``, HTML already, of which empty ones are left out; ``title`` is plain text.

    Args:
        refresh_seconds: after which a browser reads the file again, of a page that is written again; 0: never.
    """
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    style = resources.files("sprat.report").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{refresh}<title>{html.escape(title)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def section(title: str, lead: str, content: str) -> str:
    """A section, or nothing when it has no content; all three are HTML."""
    note = f'<p class="note">{lead}</p>\n' if lead else ""
    return f"<section><h2>{title}</h2>{note}{content}</section>" if content else ""


def panels(figures: Sequence[str]) -> str:
    """Inline SVGs side by side, as many as there is room for."""
    return f'<div class="panels">{"".join(f"<figure>{svg}</figure>" for svg in figures)}</div>' if figures else ""
