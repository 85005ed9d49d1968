"""The page of a run of RL: what was gained, what it was paid for, what spoke against it, what it cost; live too."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sprat.cli.main import app
from sprat.config.rl import RLRunConfig
from sprat.report import write_report
from sprat.trust import Run, open_run
from sprat.trust.stage_facts import Sample, write_samples
from sprat.trust.verify import verify

from .test_hostile import BAD
from .test_report import Page

STEPS = 20
ALARM = {
    "step": 12, "signal": "several candidates", "sentence": "step 12: 9.0% of the answers show 'several candidates'",
    "question": "What is 2 + 2?", "expected": "4", "answer": "3, 4 or 5",
}  # fmt: skip
DRILL = {
    "hacks": 640, "problems": 12, "right_paid": 12, "warning": "", "accepted": True,
    "failure": "the grader pays 1 for the wrong answer '1 2 3 4'",
    "paid": [{"family": "all values listed", "why": "one of many", "question": "Q?", "answer": "1 2 3 4", "paid": 1.0,
              "right_paid": 1.0}],
}  # fmt: skip
CHANGE = {"difference": 0.5, "low": 0.38, "high": 0.61, "p_value": 1e-6, "better": 50, "worse": 2, "count": 100}


def opened(folder: Path, **facts: Any) -> Run:
    config = RLRunConfig.model_validate({"steps": STEPS, "lora": {"rank": 8}, "dynamic_sampling": 2})
    inputs = {"model": "0" * 64, "data": "1" * 64, "reward": "2" * 64}
    run = open_run(folder, stage="rl", recipe=config, inputs=inputs, seed=0, ledger=folder.parent / "ledger.jsonl")
    run.add_facts(steps=STEPS, **facts)
    run.start_progress(STEPS, 0)
    run.log(0, eval_reward=0.25, eval_accuracy=0.25, eval_response_length=30.0)
    for step in range(1, STEPS + 1):
        row: dict[str, float] = {
            "reward": 0.2 + step / 40, "reward_error": 0.05, "accuracy": 0.2 + step / 40,
            "response_length": 30.0 + step, "entropy": 1.0 / step, "clip_fraction": 0.01,
            "kl_start": step / 100, "live_groups": 0.5, "grad_norm": 1.0,
            "sampled_groups": 16.0, "staleness": 0.0, "mismatch_mean": 1e-6, "reward_faults": 1.0, "timeouts": 0.0,
            "abstained": 0.0, "cut_share": 0.0, "hack_evidence": step / 12, "hack_alarms": float(step >= 12),
            "hack/several candidates": step / 12, "tokens": step * 1000, "petaflops": step * 1e-6, "format": 0.0,
        }  # fmt: skip
        if step % 10 == 0:
            row |= {"eval_reward": 0.25 + step / 40, "eval_accuracy": 0.25 + step / 40, "eval_p_value": 1e-6}
        run.log(step, **row)
    return run


def finished(run: Run, answer: str = "four") -> Path:
    samples = [Sample(step, "What is 2 + 2?", f"{answer} {step}", "4", reward=step / STEPS) for step in (0, 10, STEPS)]
    write_samples(run.artifact, samples)
    run.finish(flops=1e12, tokens=20_000)
    return run.folder


def words_of(text: str) -> str:
    page = Page(text)  # refuses a script
    assert page.open == [] and all(link.startswith("#") for link in page.links) and len(page.ids) == len(set(page.ids))
    assert not re.search(r"(?:src|href)=\"(?!#)|url\((?!#)|@import", text), "nothing comes from elsewhere"
    return " ".join(" ".join(page.words).split())


def test_the_page_says_what_was_gained_what_spoke_against_it_and_what_it_cost(tmp_path: Path) -> None:
    trips = [{"wire": "kl", "step": 9, "sentence": "the policy is far", "is_end": False, "back_to": 8}]
    facts: dict[str, Any] = {"alarms": [ALARM], "fire_drill": DRILL, "trips": trips, "last_step": STEPS}
    facts |= {"held_out": {"change": CHANGE}, "eval_tasks": {"accuracy": 100}}
    folder = finished(opened(tmp_path / "mine", **facts))
    text = write_report(folder).read_text(encoding="utf-8")
    words = words_of(text)
    for said in (
        "Reinforcement learning: 20 steps",
        "Problems that were never trained are paid from 0.250 to 0.750 (+0.500, ",
        "95 % interval +0.380 to +0.610, p = 1e-06)",
        "Held-out reward 0.75 0.25 before training",
        "Held-out problems right 75.0 % 25.0 % before training",
        "20 k tokens sampled",
        "trip wire, step 9: the policy is far; back to step 8",
        "hack monitor, step 12: 9.0% of the answers show 'several candidates'",
        "its verifier pays known hacks, which was accepted: the grader pays 1",
        "all values listed",
        "640 known hacks of 12 problems were tried",
        "160 of 320 (50.0 %)",  # half of sixteen in each of twenty steps
        "20 answers, 0 of them out of time",
        "back to step 8",
        "right is: 4",
        "before training paid 0 four 0",
        "step 20 paid 1 four 20",
        "dynamic_sampling 2 0",
    ):
        assert said in words, said
    titles = re.findall(r'aria-label="([^"]*)"', text)
    for title in ("Reward", "Right answers", "Tokens of an answer", "Entropy of the policy", "KL from the start",
                  "clip left out", "Gap of trainer and sampler", "Hack monitor", "Questions asked in a step",
                  "verifier failed"):  # fmt: skip
        assert [each for each in titles if title in each], title
    assert not [each for each in titles if "Age of" in each], "answers of the trainer's own weights have no panel"
    assert "several candidates" in text and "http-equiv" not in text
    assert all(finding.ok for finding in verify(tmp_path))
    assert write_report(folder).read_text(encoding="utf-8") == text


def test_a_run_that_goes_on_has_a_page_that_is_read_again_with_the_cost_so_far(tmp_path: Path) -> None:
    run = opened(tmp_path / "mine")
    text = write_report(run.folder).read_text(encoding="utf-8")
    words = words_of(text)
    assert '<meta http-equiv="refresh"' in text and "not finished: step 20 of 20" in words
    assert "Cost so far < ¥0.0001 " in words and "20 k tokens sampled" in words and "0.750 after step 20" in words


def test_what_may_be_chance_is_said_to(tmp_path: Path) -> None:
    run = opened(tmp_path / "mine")
    run.log(STEPS + 1, eval_reward=0.26, eval_p_value=0.4)
    assert "(+0.010, p = 0.4). That may be chance." in words_of(write_report(run.folder).read_text(encoding="utf-8"))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    bad = BAD.replace("\ud800", "")
    hack = {**DRILL["paid"][0], "answer": bad, "family": bad}  # type: ignore[index]
    facts: dict[str, Any] = {"alarms": [{name: bad if name != "step" else 3 for name in ALARM}]}
    facts |= {"fire_drill": {**DRILL, "failure": bad, "warning": bad, "paid": [hack]}}
    run = opened(tmp_path / "mine", **facts)
    run.log(STEPS + 1, **{f"hack/{bad}": 0.5, "hack_evidence": 0.5})
    text = write_report(finished(run, bad)).read_text(encoding="utf-8")
    assert "<img" not in text and "\x00" not in text and words_of(text)


def test_watched_the_page_is_written_until_the_run_is_finished(tmp_path: Path) -> None:
    run = opened(tmp_path / "mine")
    entries, written = [entries_of(tmp_path)], list[float]()

    def go_on() -> None:
        deadline = time.monotonic() + 60
        while len(written) < 3 and time.monotonic() < deadline:
            page = run.folder / "report.html"
            if page.is_file() and page.stat().st_mtime not in written:
                written.append(page.stat().st_mtime)
            time.sleep(0.02)
        entries.append(entries_of(tmp_path))
        finished(run)

    thread = threading.Thread(target=go_on)
    thread.start()
    done = CliRunner().invoke(app, ["report", str(run.folder), "--watch", "0.1"])
    thread.join()
    assert done.exit_code == 0 and "http-equiv" not in (run.folder / "report.html").read_text()
    assert len(written) == 3 and entries[0] == entries[1], "pages in between are not entered"
    assert any("report.html" in line for line in entries_of(tmp_path))
    assert all(finding.ok for finding in verify(tmp_path))


def entries_of(folder: Path) -> list[str]:
    return (folder / "ledger.jsonl").read_text().splitlines()


@pytest.mark.parametrize("change", [{"alarms": [7]}, {"fire_drill": [1]}, {"trips": {"a": 1}}])
def test_what_no_stage_writes_is_one_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    done = CliRunner().invoke(app, ["report", str(opened(tmp_path / "mine", **change).folder)])
    assert done.exit_code == 8 and "what no stage writes" in done.stderr
