"""The report shows every stage's gain, control and cost from run folders alone, in one file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sprat.config import TrainConfig
from sprat.errors import CheckpointError
from sprat.eval.score import two_proportion_p_value
from sprat.report import write_report
from sprat.report.runs import read_runs
from sprat.report.tables import cost, gains, table
from sprat.report.tables import escape as text_of
from sprat.trust import open_run
from sprat.trust.run_record import Input
from sprat.trust.verify import verify


class Page(HTMLParser):
    """What a browser would find: tags in balance, ids, text, and anything that points elsewhere."""

    VOID = ("meta", "br", "path", "use", "rect", "image", "stop")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [found[name] or "" for name in ("href", "xlink:href", "src") if name in found]
        assert tag not in ("script", "link", "iframe")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def text(pipeline: Path) -> str:
    """The page of the whole pipeline."""
    return write_report(pipeline).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    """The page, parsed."""
    return Page(text)


def test_the_page_needs_no_other_file_and_no_network(page: Page, text: str) -> None:
    assert page.open == []
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import|@font-face", text)
    assert len(text) < 1_000_000


def test_figures_do_not_clash_and_every_reference_is_inside_the_page(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_every_section_is_there(text: str) -> None:
    found = re.findall(r"<h2>(.*?)</h2>", text)
    assert found == [
        "Accuracy after each stage",
        "Gains and their controls",
        "Thinking on and off",
        "Learning curves",
        "Reinforcement learning",
        "Accuracy by length",
        "Thinking before and after RL",
        "Real text",
        "Experts",
        "Quality, size and speed",
        "Cost",
        "Where it comes from",
        "What this is not",
    ]
    assert text.count("<svg") == 15


def test_each_stage_stands_with_its_interval_its_control_and_its_significance(pipeline: Path, text: str) -> None:
    rl = next(stage for stage in read_runs(pipeline).main if stage.kind == "rl").by_task()["sums"]
    assert f"<b>{100 * rl.accuracy:.1f}\u00a0%</b><small>{100 * rl.low:.1f}–{100 * rl.high:.1f}</small>" in text
    assert "SFT on labels<small>control</small>" in text
    assert "significant gain" in text
    row = next(row for row in text.split("<tr>") if "INT4 student</b>" in row)
    assert "0.4000" in row and "not significant" in row, "the stage's own p-value is shown"


def test_teacher_student_and_int4_stand_beside_each_other_in_size_and_speed(text: str) -> None:
    row = next(row for row in text.split("<tr>") if row.startswith("<td>INT4 student</td>") and "120 kB" in row)
    assert "16,700" in row and "30 k" in row
    assert "pareto-size_bytes-" in text and "pareto-tokens_per_second-" in text


def test_each_source_stands_with_its_digest_and_with_what_is_left_out_of_it(text: str) -> None:
    content = "A text of the user's own.\n" * 400
    digest = hashlib.sha256(json.dumps(["a.md", content]).encode()).hexdigest()
    row = next(row for row in text.split("<tr>") if row.startswith("<td>mine</td>"))
    assert f'<code title="{digest}">{digest[:16]}</code>' in row
    assert "1 files of other kinds" in row and "b.html" in row
    assert "1 parts of documents beyond data.text_bytes=2000 (a.md, " in row


def test_lengths_of_a_task_that_was_never_trained_are_marked_so(pipeline: Path) -> None:
    scores = next(stage for stage in read_runs(pipeline).main if stage.kind == "rl").by_task()
    assert (scores["sums"].trained, scores["sums"].untrained_lengths) == (True, frozenset())
    assert (scores["chain_sum"].trained, scores["chain_sum"].untrained_lengths) == (False, frozenset(range(3, 8)))


def test_accuracy_is_that_which_the_interval_bounds(tmp_path: Path) -> None:
    run = open_run(
        tmp_path / "sft", stage="sft", recipe=TrainConfig(), inputs={}, seed=0, ledger=tmp_path / "ledger.jsonl"
    )
    run.add_facts(scores=[{"task": "sums", "label": "greedy", "count": 200, "correct": 50, "mean": 0.7}])
    run.finish()
    ((score,),) = [stage.scores for stage in read_runs(tmp_path).stages]
    assert score.accuracy == 0.25
    assert (score.low, score.high) == (
        pytest.approx(0.1950, abs=1e-4),
        pytest.approx(0.3143, abs=1e-4),
    )  # Wilson, by hand


def small(tmp_path: Path) -> Path:
    """Cold start and RL with scores that can be reckoned by hand; RL lost on one task, and never trained another."""
    ledger, inputs = tmp_path / "ledger.jsonl", dict[str, Input]()
    for name, correct in (("sft", (50, 70, 10)), ("rl", (70, 50, 12))):
        run = open_run(tmp_path / name, stage=name, recipe=TrainConfig(), inputs=inputs, seed=0, ledger=ledger)
        (run.artifact / "model.safetensors").write_bytes(name.encode())
        inputs = {"model": tmp_path / name}
        tasks = zip(("up", "down", "never"), correct, (True, True, False), strict=True)
        run.add_facts(
            scores=[{"task": t, "label": "greedy", "count": 100, "correct": c, "trained": k} for t, c, k in tasks]
        )
        run.finish(flops={"sft": 1e6, "rl": 2e6}[name])
    return tmp_path


def test_gains_losses_and_their_significance_are_those_of_the_pooled_z_test(tmp_path: Path) -> None:
    pipeline = read_runs(small(tmp_path))
    before, after = (stage.by_task() for stage in pipeline.scored)
    # by hand: z = 0.2 / sqrt(0.6 * 0.4 * 2/100) = 2.8868 and 0.02 / sqrt(0.11 * 0.89 * 2/100) = 0.4520
    assert two_proportion_p_value(before["up"], after["up"]) == pytest.approx(0.003892, abs=1e-6)
    assert two_proportion_p_value(before["never"], after["never"]) == pytest.approx(0.65128, abs=1e-5)
    words = {
        row.split("<td>")[2][:-5]: re.findall(r"significant \w+|not significant", row)[-1]
        for row in gains(pipeline).split("<tr>")[2:]
    }
    assert words == {"up": "significant gain", "down": "significant loss", "never": "not significant"}


def test_a_name_cannot_choose_the_class_of_its_cell() -> None:
    assert "<td>&#64;bad|&lt;i&gt;</td>" in table(["task"], [[text_of("@bad|<i>")]])


def test_the_mean_is_over_trained_tasks_and_costs_are_summed(tmp_path: Path) -> None:
    pipeline = read_runs(small(tmp_path))
    assert [stage.mean_accuracy() for stage in pipeline.scored] == [pytest.approx(0.6), pytest.approx(0.6)]
    assert "<b>3 M</b>" in cost(pipeline).split("<b>all</b>")[1]


def test_stages_stand_in_the_order_of_the_road_with_controls_beside_them(pipeline: Path) -> None:
    names = [stage.name for stage in read_runs(pipeline).stages]
    assert names == [
        "data", "pretrain", "pretrain-dense", "sft", "rl-seed0", "rl-seed1", "rl-seed2", "sft-labels", "distill",
        "student-scratch", "quantize",
    ]  # fmt: skip
    assert [stage.name for stage in read_runs(pipeline).main] == [
        "data",
        "pretrain",
        "sft",
        "rl-seed0",
        "distill",
        "quantize",
    ]


def test_what_a_model_wrote_cannot_become_part_of_the_page(text: str) -> None:
    assert "&lt;b&gt;Think&lt;/b&gt; &amp; answer." in text
    assert "<b>Think" not in text


def test_the_same_runs_give_the_same_page_and_stay_verifiable(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline / "sft", tmp_path / "sft")
    pages = [write_report(tmp_path / "sft").read_bytes() for _ in range(2)]
    assert pages[0] == pages[1] and pages[0].count(b"<svg") == 3
    assert all(finding.ok for finding in verify(pipeline))


def test_a_road_that_has_just_begun_has_a_report_without_the_missing_parts(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline / "data", tmp_path / "data")
    run = open_run(
        tmp_path / "mystery", stage="mystery", recipe=TrainConfig(), inputs={}, seed=0, ledger=tmp_path / "ledger.jsonl"
    )
    run.log(1, loss=float("nan"))
    run.finish()
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Cost", "Where it comes from", "What this is not"]
    assert "unspecified" in text and "mystery" in text
    assert "<h2>Cost" in write_report(tmp_path / "mystery").read_text(encoding="utf-8")


def test_a_folder_without_runs_is_one_sentence(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="run `sprat quickstart --out .*` first"):
            write_report(folder)
