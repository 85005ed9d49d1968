"""A pipeline of a stranger: whatever its runs hold, the page is text of ours, or one sentence says what is wrong."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sprat.config import TrainConfig
from sprat.errors import TrustError
from sprat.report import write_report
from sprat.trust import open_run
from sprat.trust.verify import verify

from .test_report import Page

BAD = '"><script>alert(1)</script><img src=x onerror=alert(1)>@control|$\\frac{ --> \x00\ud800 '
KEPT = {"label", "control_of"}  # a word of ours that decides where a score is shown


def changed(value: Any, key: str = "") -> Any:
    """``value`` with every text in it, keys that are data too, made hostile; equal texts stay equal."""
    if isinstance(value, dict):
        data = key in ("bits_per_byte", "expert_domain", "baselines", "versions", "inputs")
        return {(BAD + name if data else name): changed(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [changed(item, key) for item in value]
    return BAD + value if isinstance(value, str) and key not in KEPT else value


def test_hostile_text_in_every_field_of_a_whole_road_stays_text(pipeline: Path, tmp_path: Path) -> None:
    copy = tmp_path / "road"
    shutil.copytree(pipeline, copy)
    for path in copy.glob("*/run.json"):
        written = json.loads(path.read_text())
        written = {name: written[name] if name == "stage" else changed(item, name) for name, item in written.items()}
        path.write_text(json.dumps({**written, "seed": BAD}))
    text = write_report(copy).read_text(encoding="utf-8")
    page = Page(text)  # refuses a script
    assert page.open == [] and "<img" not in text and "\x00" not in text
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg") == 15
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert any(not finding.ok for finding in verify(copy))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One run that fills every table and draws nothing."""
    run = open_run(
        tmp_path / "sft",
        stage="sft",
        recipe=TrainConfig(),
        inputs={"text": "0" * 64},
        seed=0,
        ledger=tmp_path / "ledger.jsonl",
    )
    left = {"why": "files", "count": 1, "bytes": 2, "names": ["x"]}
    row = {"task": "sums", "label": "greedy", "count": 9, "correct": 5, "low": 0.2, "high": 0.8, "mean_tokens": 3.0}
    run.add_facts(
        title="SFT",
        scores=[row, {**row, "label": "thinking"}],
        sources=[{"name": "a", "licence": "MIT", "documents": 1, "bytes": 9, "digest": "ab", "left_out": [left]}],
        significance=[{"task": "sums", "before": 0.1, "after": 0.5, "p": 0.01}],
        parameters={"total": 9, "active": 3},
        size_bytes=10,
        tokens_per_second=5.0,
        models={"int4": {"size_bytes": 1, "tokens_per_second": 2}},
    )
    run.finish()
    return tmp_path


def leaves(value: Any, put: Callable[[Any], None]) -> Iterator[Callable[[Any], None]]:
    """A setter for every value inside ``value``, containers included."""
    yield put
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield from leaves(item, lambda new, key=key: value.__setitem__(key, new))  # type: ignore[misc]


def test_a_value_of_any_kind_in_any_field_gives_a_page_or_one_sentence(small: Path) -> None:
    path = small / "sft" / "run.json"
    whole = path.read_text()
    kinds = itertools.cycle([BAD, 1e999, [[BAD]], BAD, None, {BAD: BAD}, BAD, -1])
    pages, count = 0, len(list(leaves(json.loads(whole), lambda new: None)))
    for number in range(1, count):
        written = json.loads(whole)
        list(leaves(written, lambda new: None))[number](next(kinds))
        path.write_text(json.dumps(written))
        try:
            page = Page(write_report(small).read_text(encoding="utf-8"))
        except TrustError as error:
            assert "see verify" in str(error)
        else:
            pages += 1
            assert page.open == []
    assert pages > 20 and count > 60
