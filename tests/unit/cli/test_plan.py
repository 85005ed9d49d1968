"""``sprat plan``: the page's commands run, the figures are those of the papers, bad input is one sentence."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sprat.cli.main import app
from sprat.cli.plan import _number
from sprat.cli.plan_search import parse_fleet
from sprat.plan.search import Found

LLAMA = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
PAGE = Path(__file__).resolve().parents[3] / "docs" / "plan.md"


def plan(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["plan", *words])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def v3() -> dict[str, Any]:
    code, out, _ = plan("v3", "--json")
    assert code == 0
    result: dict[str, Any] = json.loads(out)
    return result


def test_the_page_s_commands_run() -> None:
    blocks = re.findall(r"<!-- run -->\n```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for line in "".join(blocks).splitlines():
        code, _, err = plan(*shlex.split(line)[2:])
        assert code == 0, err


def test_the_page_s_python_runs(root: Path) -> None:
    """342 M x 1 + 266 M x 4 + 168 M x 16 yuan a million: 4,094."""
    [code] = re.findall(r"<!-- run -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "4094 list deepseek-r1 since 2025-01-20\n"


def test_v3_has_the_published_counts_and_fits(v3: dict[str, Any]) -> None:
    """DeepSeek-V3, arXiv 2412.19437 and 2505.09343: 671 B, 37 B, 70,272 bytes, 250 GFLOP; 2,048 H800 of 80 GB."""
    figures = {name: each["value"] for name, each in v3["figures"].items()}
    assert round(figures["parameters"] / 1e9) == 671 and round(figures["active parameters"] / 1e9) == 37
    assert figures["KV cache"] == 70272 and round(figures["FLOPs, causal"] / 1e9) == 250
    assert v3["world_size"] == 2048 and v3["memory"]["fits"]


def test_an_estimate_has_an_interval_and_arithmetic_has_none(v3: dict[str, Any]) -> None:
    """The published step of 19.926 s and bill of $5.328 M for pre-training (2,664 K hours) lie inside."""
    figures = v3["figures"]
    assert figures["parameters"]["low"] is None
    assert figures["step"]["low"] < 19.926 < figures["step"]["high"]
    assert figures["bill"]["low"] < 5.328e6 < figures["bill"]["high"]
    assert all(each["formula"] and each["source"] for each in figures.values())
    assert any("people" in each for each in v3["leaves_out"])


def test_explain_shows_formulas_and_sources() -> None:
    code, out, _ = plan("nano", "--explain", "--tokens", "1e9")
    words = " ".join(out.split())
    assert code == 0 and "GPU-hours x 2" in words and "1910.02054" in words


def test_what_does_not_fit_says_by_how_much() -> None:
    code, out, _ = plan("LLAMA3_8B", "--json")
    assert code == 2
    result = json.loads(out)
    assert not result["memory"]["fits"] and any("GiB more than the 79.6" in note for note in result["notes"])


def test_a_chip_without_a_price_has_no_bill() -> None:
    code, out, _ = plan("nano", "--json", "--chip", "A100", "--set", "precision=bf16")
    result = json.loads(out)
    assert code == 0 and "bill" not in result["figures"] and any("no bill" in note for note in result["notes"])


def test_a_plan_and_a_price_book_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("data_shard = 4\nglobal_batch = 32\n")
    (tmp_path / "prices.toml").write_text('[[gpu]]\nchip = "H800"\nsince = 2026-01-01\nusd = "3"\nsource = "mine"\n')
    words = ["small", "--plan", str(tmp_path / "plan.toml"), "--prices", str(tmp_path / "prices.toml"), "--json"]
    code, out, _ = plan(*words, "--set", "data_replicate=2")
    result = json.loads(out)
    assert code == 0 and result["world_size"] == 8
    assert result["figures"]["bill"]["value"] == pytest.approx(3 * result["figures"]["GPU-hours"]["value"])


@pytest.mark.parametrize(
    "words, named",
    [
        (["gpt-5"], "no model is called"),
        (["a" * 5000], "File name too long"),
        (["v3", "--chip", "H9000"], "H9000"),
        (["v3", "--chip", "A100"], "use one of fp32, bf16."),  # what both the chip and a plan have
        (["v3", "--tokens", "-1"], "tokens"),
        (["v3", "--tokens", "nan"], "tokens"),
        (["v3", "--tokens", "1e-300"], "tokens"),
        (["v3", "--imbalance", "0"], "imbalance"),
        (["v3", "--set", "expert=60"], "expert 60 does not divide"),
        (["v3", "--set", "tensors=2"], "tensor"),
        (["v3", "--set", "tensor=3"], "tensor 3"),
        (["v3", "--plan", "nowhere.toml"], "nowhere.toml"),
        (["v3", "--prices", "nowhere.toml"], "price book"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(words: list[str], named: str) -> None:
    code, _, err = plan(*words)
    assert code == 2 and named in err and len(err.splitlines()) == 1


def test_a_folder_is_called_by_its_name_and_is_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3's 2,048 chips are not those of a small model in a folder of that name."""
    folder = tmp_path / "v3"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.chdir(folder)
    for words in ((str(folder),), (".",), ("config.json",)):
        code, out, err = plan(*words, "--tokens", "1e9")
        assert code == 0 and out.startswith("v3 on 1 x H800"), err


def test_a_folder_is_read_and_a_foreign_config_refused(tmp_path: Path) -> None:
    table = {**LLAMA, "quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert plan(str(tmp_path), "--tokens", "1e9")[0] == 0
    for content in ("{", "[]", json.dumps({**table, "model_type": "bert"}), json.dumps({**table, "hidden_size": 1e9})):
        (tmp_path / "config.json").write_text(content)
        code, _, err = plan(str(tmp_path))
        assert code == 2 and "config.json" in err


def test_names_and_sources_are_shown_as_they_are(tmp_path: Path) -> None:
    """Not read as rich's markup or emoji."""
    folder = tmp_path / "a [red] :fire: 日本"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    book, source = tmp_path / "prices.toml", "[the sheet] of :fire: [/b]"
    book.write_text(f'[[gpu]]\nchip = "H800"\nsince = 2026-01-01\nusd = "3"\nsource = "{source}"\n')
    for words in (("--explain",), ("--fleet", "1xH800")):
        code, out, err = plan(str(folder), "--prices", str(book), "--tokens", "1e9", *words)
        assert code == 0 and out.startswith(f"{folder.name} on 1 x H800"), err
        assert "[the" in out and "sheet]" in out and out.count(":fire:") > 1 and "[/b]" in out


def test_the_terms_of_a_step_add_up_to_it_and_say_where_they_come_from(v3: dict[str, Any]) -> None:
    terms = v3["step_terms"]
    assert sum(each["value"] for each in terms.values()) == pytest.approx(v3["figures"]["step"]["value"])
    assert {"products", "experts", "attention", "expert messages", "bubble"} <= set(terms)
    assert all(each["formula"] and each["source"] and each["low"] < each["high"] for each in terms.values())
    assert 0.9 < v3["figures"]["progress under failures"]["value"] < 1
    code, out, _ = plan("v3", "--explain")
    assert code == 0 and "A step on the mean rank" in out and "expert messages" in out


def test_a_fleet_gets_its_best_layouts_and_the_rest_a_reason() -> None:
    words = ("LLAMA3_8B", "--fleet", "8xH800", "--tokens", "1e12", "--set", "global_batch=64")
    code, out, _ = plan(*words, "--json")
    found = json.loads(out)
    assert code == 0
    seconds = [each["seconds"] for each in found["proposals"]]
    assert seconds == sorted(seconds) and all(each["memory_gib"] < 79.6 for each in found["proposals"])
    best = found["proposals"][0]
    assert best["cost"] == pytest.approx(best["days"] * 24 * 8 * 2)  # $2 an hour of an H800
    assert found["reasons"]["memory"] > 0 and all("GiB" in each["reason"] for each in found["near"])
    assert any("90 % interval" in note for note in found["notes"])
    code, out, _ = plan(*words, "--deadline", "1")
    assert code == 2 and "deadline" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--fleet", "H800"), "cannot read 'H800'"),
        (("--fleet", "8xH8000"), "unknown chip 'H8000'"),
        (("--fleet", "0xH800"), "cannot read '0xH800'"),
        (("--fleet", "8xMI300X", "--budget", "5"), "no price"),
        (("--deadline", "5"), "bound a search"),
        (("--fleet", "8xH800", "--tokens", "inf"), "tokens is inf"),
        (("--fleet", "37xH800,4xA100"), "sequences: a kind of chip does not fill whole pipeline ranks ("),
        (("--fleet", "8xH800", "--tokens", "1e30"), "tokens is 1e+30"),
        (("--fleet", "8xH800", "--imbalance", "0.5"), "imbalance is 0.5"),
        (("--fleet", "8xH800", "--imbalance", "1e9"), "imbalance is 1000000000.0"),
    ],
)
def test_fleets_that_cannot_be_are_refused(words: tuple[str, ...], says: str) -> None:
    code, _, err = plan("LLAMA3_8B", *words)
    assert code == 2 and says in err


def test_layouts_that_time_did_not_suffice_for_are_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Found((), (), {"memory": 2}, 7, 5)
    monkeypatch.setattr("sprat.plan.search.search", lambda goal: found)
    code, out, _ = plan("nano", "--fleet", "8xH800")
    assert code == 2 and "not looked at, since time was up: 5 layouts" in " ".join(out.split())


def test_degrees_that_a_search_does_not_hear_are_named() -> None:
    words = ("nano", "--fleet", "8xH800", "--set", "global_batch=64", "--set", "data_shard=8", "--set", "zero=0")
    code, out, _ = plan(*words, "--json")
    assert (
        code == 0
        and "not counted, since the search chooses by itself: data_shard=8, zero=0" in json.loads(out)["notes"]
    )


def test_a_kind_of_chip_that_is_written_twice_is_one_kind() -> None:
    """The fleet is what it is, however its order lists it: each kind and its sum."""
    fleet = parse_fleet("4xH800, 2xA100,4xh800")
    assert [(chip.name, count) for chip, count in fleet] == [("H800", 8), ("A100", 2)]


def test_a_bill_alone_has_all_its_digits() -> None:
    """R1: 1 x 0.14 + 2 x 0.55 + 3 x 2.19 dollars a million; V3: 2,788 K hours at $2 (arXiv 2412.19437, table 1)."""
    code, out, _ = plan("price", "--usage", "1,2,3", "--at", "2025-02-01", "--json")
    assert code == 0 and [bill["total"] for bill in json.loads(out)["bills"]] == ["0.00000781"]
    code, out, _ = plan("price", "--usage", "1_000_000,0,0")
    assert code == 0 and [line.split()[:3] for line in out.splitlines()] == [
        ["at", kind, "0.14"] for kind in ("least", "most")
    ]
    code, out, _ = plan("price", "--hours", "2788000")
    assert code == 0 and out.startswith("5,576,000 USD") and "people" in out


@pytest.mark.parametrize(
    "words, named",
    [
        ([], "--usage HIT,MISS,OUTPUT"),
        (["--usage", "1,2,3", "--hours", "1"], "--usage HIT,MISS,OUTPUT"),
        (["--usage", "1,2"], "three whole numbers"),
        (["--usage", "1,2,-3"], "three whole numbers"),
        (["--usage", "1,2,3", "--at", "tomorrow"], "tomorrow"),
        (["--usage", "1,2,3", "--at", "2025-02-01T12:00"], "timezone"),
        (["--usage", "1,2,3", "--at", "2020-01-01"], "give a date from 2025-01-20"),
        (["--usage", "1,2,3", "--currency", "eur"], "usd or cny"),
        (["--usage", "1,2,3", "--api", "gpt"], "deepseek-r1"),
        (["--hours", "-1"], "GPU-hours"),
        (["--hours", "1e-9999999"], "at most 50 digits"),
        (["--hours", "1", "--at", "2025-02-01T12:00"], "timezone"),
        (["--hours", "many"], "many"),
        (["--hours", "1", "--chip", "abacus"], "abacus"),
    ],
)
def test_a_bill_that_cannot_be_is_refused(words: list[str], named: str) -> None:
    code, _, err = plan("price", *words)
    assert code == 2 and named in err and len(err.splitlines()) == 1


def test_options_of_a_bill_are_for_a_bill() -> None:
    for words in (("--usage", "1,2,3"), ("--currency", "cny")):
        code, _, err = plan("v3", *words)
        assert code == 2 and f"{words[0]}: for a bill alone" in err and "sprat plan price" in err


@pytest.mark.parametrize("words", [("--deadline", "5"), ("--fleet", "8xH800"), ("--set", "tensor=2")])
def test_options_of_a_plan_are_for_a_plan(words: tuple[str, str]) -> None:
    code, _, err = plan("price", "--hours", "1", *words)
    assert code == 2 and f"{words[0]}: for a plan" in err


@pytest.mark.parametrize(
    "value, shown",
    [(9999.4, "9,999"), (9999.7, "10,000"), (0.33524, "0.3352"), (123456.7, "123,457"), (-9999.7, "-10,000")],
)
def test_a_number_is_shown_without_an_exponent(value: float, shown: str) -> None:
    assert _number(value, "h") == shown
