"""Perl's manual: prose out of Plain Old Documentation (perlpodspec), without Perl.

A page is a row of paragraphs between empty lines. One that begins with ``=`` is a command, one that begins with a
space is verbatim (code, tables), any other is prose with formatting codes: ``B<bold>``, ``C<< $a <=> $b >>``,
``L<text|page>``, ``E<lt>``. Kept are headings, items and prose, each paragraph on one line, with the codes taken off.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

from sprat.data.document import Document
from sprat.data.sources.debian import DebianPackage
from sprat.errors import DataError

LICENCE = "Artistic or GPL-1+"
EXCLUDED_PAGES = {"perltoc", "perlhist", "perlcn", "perljp", "perlko", "perltw"}  # lists, and what is not in English
MIN_SECTION_CHARS = 200  # characters; no more is a name, or a list of other pages
_HIDDEN = {"X", "Z"}  # index entries, and nothing at all
_OPENING = re.compile(r"([A-Z])(<<+\s|<)")


def read_pages(folder: Path) -> Iterator[Document]:
    """The tutorials, questions and answers, and reference of perl-doc; one document a section.

    Raises:
        DataError: there are no pages below ``folder``.
    """
    pages = sorted(folder.rglob("usr/share/perl/*/pod/*.pod"))
    if not pages:
        raise DataError("the package has no texts", where="usr/share/perl", todo="report this version")
    for page in pages:
        if "delta" in page.stem or page.stem in EXCLUDED_PAGES:
            continue
        source = f"perl/{page.stem}"
        sections = page.read_text(encoding="utf-8", errors="replace").split("\n=head1 ")
        for number, section in enumerate(sections):
            text = pod_to_text(f"=head1 {section}" if number else section)
            if len(text) > MIN_SECTION_CHARS:
                yield Document(f"{source}#{number}", text, source, LICENCE, "prose")


def pod_to_text(page: str) -> str:
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
            line = " ".join(_strip_codes(rest)[0].split())
            if line and (not command or any(character.isalnum() for character in line)):
                parts.append(line)
    return "\n\n".join(parts) + "\n" if parts else ""


def _strip_codes(text: str, at: int = 0, closing: str = "") -> tuple[str, int]:
    """``text`` without its formatting codes, from ``at`` up to ``closing``, and where that ends."""
    pieces: list[str] = []
    mark = re.compile(f"{re.escape(closing)}|{_OPENING.pattern}" if closing else _OPENING.pattern)
    while next_mark := mark.search(text, at):
        pieces.append(text[at : next_mark.start()])
        code, bracket = next_mark.groups()
        if code is None:
            return "".join(pieces), next_mark.end()
        inner, at = _strip_codes(text, next_mark.end(), " " + ">" * (len(bracket) - 1) if len(bracket) > 1 else ">")
        pieces.append(_render_code(code, inner))
    return "".join(pieces) + text[at:], len(text)


def _render_code(code: str, inner: str) -> str:
    """What a reader sees of a formatting code."""
    if code in _HIDDEN:
        return ""
    if code == "L":
        return _link_text(inner)
    if code == "E":
        return {"sol": "/", "verbar": "|"}.get(inner) or html.unescape(f"&{inner};")
    return inner


def _link_text(inner: str) -> str:
    """The words of a link: its own, an address, or what it points to (perlpodspec, "About L<...> Codes")."""
    words, bar, _ = inner.partition("|")
    if bar or re.match(r"\w+:[^:\s]", inner):
        return words
    page, _, section = inner.partition("/")
    section = section.strip('"')
    return f'"{section}"' + (f" in {page}" if page else "") if section else page


PACKAGE = DebianPackage(
    name="perl-doc",
    sha256="f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8",
    licence=LICENCE,
    parse=read_pages,
)
