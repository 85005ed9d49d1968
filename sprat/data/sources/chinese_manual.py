"""Manual pages in Chinese, out of Debian's manpages-zh: their prose, without the macros of roff.

Most pages are half English (names, examples, what nobody translated yet), so a paragraph is kept where most of its
letters are Chinese. Kept paragraphs stand on one line each.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from sprat.data.document import Document
from sprat.data.sources.debian import DebianPackage
from sprat.errors import DataError

LICENCE = "GFDL-1.2+, GPL-2.0-or-later and others"
MIN_PAGE_CHARS = 400  # characters of kept prose; less is a name and a line
MIN_PARAGRAPH_CHARS = 12
_CHINESE = re.compile("[\u4e00-\u9fff]")
_LETTER = re.compile(r"[^\W\d_]")
_FONT = re.compile(r"\\f(?:\[[^\]]*\]|\([A-Z]{2}|[A-Z0-9])|\\s[-+]?\d|\\[&,/|^]")
_INLINE = re.compile(r"\.\s*(?:B|I|SM|BR|IR|BI|IB|RB|RI)\s+(.*)")  # words in another font, amid a sentence
_SPECIAL = {r"\-": "-", r"\e": "\\", r"\ ": " ", r"\~": " ", r"\(aq": "'", r"\(bu": "•", r"\(lq": "“", r"\(rq": "”"}


def read_pages(folder: Path) -> Iterator[Document]:
    """The pages in simplified Chinese of manpages-zh, one document each.

    Raises:
        DataError: there are no pages below ``folder``.
    """
    pages = sorted(folder.rglob("usr/share/man/zh_CN/man*/*.gz"))
    if not pages:
        raise DataError("the package has no texts", where="usr/share/man/zh_CN", todo="report this version")
    for page in pages:
        text = roff_to_text(gzip.decompress(page.read_bytes()).decode("utf-8", "replace"))
        if len(text) >= MIN_PAGE_CHARS:
            source = f"manpages-zh/{page.stem}"
            yield Document(source, text, source, LICENCE, "chinese")


def roff_to_text(page: str) -> str:
    r"""The Chinese paragraphs of a page of roff (groff_man(7)), an empty line between two of them.

    >>> roff_to_text(".TH LS 1\n.PP\n列出指定“文件”的信息，默认为\n\\fB当前\\fP目录。\n.PP\nNot translated yet.\n")
    '列出指定“文件”的信息，默认为当前目录。\n'
    """
    paragraphs, lines = list[str](), list[str]()
    for line in [*page.split("\n"), "."]:
        if inline := _INLINE.match(line):
            line = f" {inline[1].replace(chr(34), '')} "
        if line.startswith((".", "'")) or not line.strip():
            paragraphs.append(" ".join("".join(lines).split()))
            lines = []
        else:
            for code, character in _SPECIAL.items():
                line = line.replace(code, character)
            lines.append(_FONT.sub("", line).rstrip())
    chinese = [paragraph for paragraph in paragraphs if _is_chinese(paragraph)]
    return "\n\n".join(chinese) + "\n" if chinese else ""


def _is_chinese(paragraph: str) -> bool:
    """Whether a paragraph says something, and most of its letters are Chinese."""
    letters = len(_LETTER.findall(paragraph))
    return len(paragraph) >= MIN_PARAGRAPH_CHARS and 2 * len(_CHINESE.findall(paragraph)) > letters


PACKAGE = DebianPackage(
    name="manpages-zh",
    sha256="81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1",
    licence=LICENCE,
    parse=read_pages,
)
