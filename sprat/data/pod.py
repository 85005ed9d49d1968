"""Prose out of Perl's manual pages: Plain Old Documentation (perlpodspec), without Perl.

A page is a row of paragraphs between empty lines. One that begins with ``=`` is a command, one that begins with a
space is verbatim (code, tables), any other is prose with formatting codes: ``B<bold>``, ``C<< $a <=> $b >>``,
``L<text|page>``, ``E<lt>``. Kept are headings, items and prose, each paragraph on one line, with the codes taken off.
"""

from __future__ import annotations

import html
import re

_HIDDEN = {"X", "Z"}  # index entries, and nothing at all
_OPENING = re.compile(r"([A-Z])(<<+\s|<)")


def prose(page: str) -> str:
    """The headings, items and paragraphs of ``page``, an empty line between two of them."""
    parts: list[str] = []
    inside, foreign = False, ""
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", page.replace("\r\n", "\n")):
        text = paragraph.strip("\n")
        command, _, rest = text.partition(" ") if text.startswith("=") else ("", "", text)
        command = command.split("\n")[0]
        if foreign or not inside:
            if command == "=end" and rest.strip() == foreign:
                foreign = ""
            elif not foreign and re.fullmatch(r"=[a-z]+\d?", command) and command != "=cut":
                inside = True
        if not inside or foreign or (not command and text[:1] in (" ", "\t")):
            continue
        if command == "=cut":
            inside = False
        elif command == "=begin":
            foreign = rest.strip()
        elif not command or command.startswith(("=head", "=item")):
            line = " ".join(plain(rest).split())
            if line and (not command or any(character.isalnum() for character in line)):
                parts.append(line)
    return "\n\n".join(parts) + "\n" if parts else ""


def plain(text: str) -> str:
    """``text`` without its formatting codes."""
    return _plain(text, 0, "")[0]


def _plain(text: str, at: int, closing: str) -> tuple[str, int]:
    """What stands from ``at`` on, up to ``closing``, and where that ends."""
    found: list[str] = []
    mark = re.compile(f"{re.escape(closing)}|{_OPENING.pattern}" if closing else _OPENING.pattern)
    while next_mark := mark.search(text, at):
        found.append(text[at : next_mark.start()])
        code, bracket = next_mark.groups()
        if code is None:
            return "".join(found), next_mark.end()
        inner, at = _plain(text, next_mark.end(), " " + ">" * (len(bracket) - 1) if len(bracket) > 1 else ">")
        found.append(_shown(code, inner))
    return "".join(found) + text[at:], len(text)


def _shown(code: str, inner: str) -> str:
    """What a reader sees of a formatting code."""
    if code in _HIDDEN:
        return ""
    if code == "L":
        return _link(inner)
    if code == "E":
        return {"sol": "/", "verbar": "|"}.get(inner) or html.unescape(f"&{inner};")
    return inner


def _link(inner: str) -> str:
    """The words of a link: its own, an address, or what it points to (perlpodspec, "About L<...> Codes")."""
    words, bar, _ = inner.partition("|")
    if bar or re.match(r"\w+:[^:\s]", inner):
        return words
    page, _, section = inner.partition("/")
    section = section.strip('"')
    return f'"{section}"' + (f" in {page}" if page else "") if section else page
