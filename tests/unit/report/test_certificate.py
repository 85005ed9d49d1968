"""The certificate's page stands alone and says what the facts say."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from sprat.report.certificate import render, write_page
from tests.unit.eval.test_certificate import example


def test_the_page_needs_nothing_else_and_shows_names_as_text(tmp_path: Path) -> None:
    page = write_page(example(), tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|<img|src=|https?://(?!www\.w3\.org)", page)
    assert "runs/&lt;small&gt;" in page and "<small>}" not in page and "book &lt;1&gt;" in page
    assert page.count("<svg") == 2  # losses, and flips by layer
    parser = HTMLParser()
    parser.feed(page)
    parser.close()


def test_it_says_which_capability_fails_and_what_is_missing() -> None:
    page = render(example())
    assert "Fails</b> the bar of 2.0\u00a0%: task sums, task hard" in page
    assert "no Chinese text: offline" in page and "4.0×" in page and "1.50×" in page
    assert "+2.50\u00a0%" in page and "\u22125.00\u00a0% to +10.00\u00a0%" in page
    assert "Holds</b>" in render(replace(example(), tasks=())) and "No bar was set" in render(
        replace(example(), max_loss=None)
    )


def test_the_same_facts_give_the_same_bytes_and_few_facts_a_page() -> None:
    assert render(example()) == render(example())
    bare = replace(example(), tasks=(), texts=(), routing=(), continuations=None, speeds=())
    assert "<svg" not in render(bare) and "On disk" in render(bare)
