"""``sprat run``, ``sprat chat``, ``sprat serve`` and ``sprat eval`` on a tiny model in a folder."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sprat
from sprat.cli.inference import chat_defaults
from sprat.cli.main import app
from sprat.config.model import LoRAConfig
from sprat.formats.peft import save_peft
from sprat.model.lora import adapters, add_lora

ROOT = Path(__file__).resolve().parents[3]


def test_run_answers_with_thinking_and_usage(model_folder: Path) -> None:
    done = CliRunner().invoke(
        app, ["run", str(model_folder), "3 + 4", "1 + 1", "--think", "--max-tokens", "12", "--json"]
    )
    assert done.exit_code == 0, done.stderr
    outputs = json.loads(done.stdout)["outputs"]
    assert [row["question"] for row in outputs] == ["3 + 4", "1 + 1"]
    assert all(row["reasoning"] and row["usage"]["completion_tokens"] <= 12 for row in outputs)


def test_run_reads_questions_from_a_pipe_and_repeats_itself(model_folder: Path) -> None:
    options = ["run", str(model_folder), "--temperature", "1", "--seed", "3", "--max-tokens", "8"]
    first, second = (CliRunner().invoke(app, options, input="3 + 4\n\n1 + 1\n") for _ in range(2))
    assert first.exit_code == 0 and first.stdout == second.stdout and first.stdout.count("\n") >= 2
    assert "? 1 + 1" in first.stderr


def test_who_names_no_limit_gets_what_a_short_context_holds(model_folder: Path) -> None:
    context = json.loads((model_folder / "config.json").read_text())["max_position_embeddings"]
    question = "3 + 4 " * 480
    done = CliRunner().invoke(app, ["run", str(model_folder), question, "--json"])
    assert done.exit_code == 0, done.stderr
    usage = json.loads(done.stdout)["outputs"][0]["usage"]
    assert context - 256 < usage["prompt_tokens"] < usage["prompt_tokens"] + usage["completion_tokens"] <= context
    refused = CliRunner().invoke(app, ["run", str(model_folder), question, "--max-tokens", "256"])
    assert refused.exit_code == 6 and "exceed the context" in refused.stderr + refused.stdout


def test_run_without_a_question_says_so(model_folder: Path) -> None:
    done = CliRunner().invoke(app, ["run", str(model_folder)], input="")
    assert done.exit_code == 3 and "no question" in done.stderr


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["run", str(tmp_path / "nothing"), "hello"])
    assert done.exit_code == 4 and done.stderr.count("\n") == 1 and "nothing" in done.stderr


def test_chat_keeps_the_talk_and_prices_it(model_folder: Path) -> None:
    said = "3 + 4\n/direct\nand 5?\n/dance\n/new\n/quit\nnever asked\n"
    done = CliRunner().invoke(app, ["chat", str(model_folder), "--max-tokens", "6", "--json"], input=said)
    assert done.exit_code == 0, done.stderr
    talk = json.loads(done.stdout)
    assert [turn["question"] for turn in talk["turns"]] == ["3 + 4", "and 5?"]
    assert talk["turns"][1]["usage"]["prompt_tokens"] > talk["turns"][0]["usage"]["prompt_tokens"]
    assert talk["cost_nano_yuan"] == sum(turn["cost_nano_yuan"] for turn in talk["turns"]) > 0
    assert "no such command: /dance" in done.stderr and "¥" in done.stderr


def test_chat_of_a_model_taught_single_questions_sends_no_history(model_folder: Path) -> None:
    options = ["chat", str(model_folder), "--turns", "0", "--max-tokens", "6", "--json"]
    turns = json.loads(CliRunner().invoke(app, options, input="3 + 4\n3 + 4\n").stdout)["turns"]
    assert turns[0]["usage"]["prompt_tokens"] == turns[1]["usage"]["prompt_tokens"]


def test_an_adapter_answers_and_a_wrong_one_is_one_sentence(model_folder: Path, tmp_path: Path) -> None:
    model, _ = sprat.load(model_folder)
    add_lora(model, LoRAConfig(rank=2, targets=("o_proj", "kv_b_proj")), 1)
    for low_rank in adapters(model).values():
        torch.nn.init.normal_(low_rank.lora_B)
    save_peft(model, tmp_path / "adapter")
    ask = ["3 + 4", "--max-tokens", "8", "--no-think"]
    plain = CliRunner().invoke(app, ["run", str(model_folder), *ask])
    adapted = CliRunner().invoke(app, ["run", str(model_folder), *ask, "--adapter", str(tmp_path / "adapter")])
    assert adapted.exit_code == plain.exit_code == 0 and adapted.stdout != plain.stdout, adapted.stderr
    talk = CliRunner().invoke(
        app,
        ["chat", str(model_folder), *ask[1:], "--adapter", str(tmp_path / "adapter"), "--json"],
        input="3 + 4\n",
    )
    assert json.loads(talk.stdout)["turns"][0]["answer"] == adapted.stdout.removesuffix("\n")
    for command, option, fault in (
        ("run", str(tmp_path), "adapter_config.json"),
        ("serve", str(tmp_path), "NAME=FOLDER"),
        ("serve", "a=", "NAME=FOLDER"),
    ):
        wrong = CliRunner().invoke(app, [command, str(model_folder), "--adapter", option, *ask[: command == "run"]])
        assert wrong.exit_code and wrong.stderr.count("\n") == 1 and fault in wrong.stderr
    twice = CliRunner().invoke(app, ["serve", str(model_folder), "--adapter", "a=b", "--adapter", "a=c"])
    assert twice.exit_code and "two adapters are called 'a'" in twice.stderr


def test_a_roads_own_model_offers_its_questions(tmp_path: Path) -> None:
    rows = [
        {"task": t, "trained": t != "long", "samples": [{"question": f"{t}?"}]} for t in ("sums", "gcd", "long", "sums")
    ]
    (tmp_path / "run.json").write_text(json.dumps({"facts": {"scores": rows}}))
    assert chat_defaults(tmp_path) == (["sums?", "gcd?"], 0)
    assert chat_defaults(tmp_path, turns=3)[1] == 3 and chat_defaults(tmp_path / "elsewhere") == ([], None)


def test_serve_says_that_the_port_is_taken(model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", str(model_folder), "--port", str(port)])
    assert done.exit_code == 7 and "in use" in done.stderr and str(port) in done.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serve_answers_until_it_is_stopped(model_folder: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "sprat", "serve", str(model_folder), "--port", "0", "--name", "pico"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = re.search(r"http://\S+", server.stderr.readline())
        assert address is not None
        with urllib.request.urlopen(f"{address[0]}/v1/models", timeout=30) as answer:
            assert json.load(answer)["data"][0]["id"] == "pico"
        server.send_signal(stop)
        assert server.wait(timeout=30) == 0


def test_eval_scores_held_out_problems_with_an_interval(model_folder: Path) -> None:
    options = ["eval", str(model_folder), "--task", "sums", "--count", "20", "--set", "eval.max_tokens=4", "--json"]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.stderr
    (score,) = json.loads(done.stdout)["scores"]
    assert score["task"] == "sums" and score["count"] == 20 and 0 <= score["low"] <= score["accuracy"] <= score["high"]


def test_each_task_that_is_named_is_scored_and_none_twice(model_folder: Path) -> None:
    named = [word for task in ("sums", "sums_of_3", "sums") for word in ("--task", task)]
    options = ["eval", str(model_folder), "--recipe", "tiny", "--count", "3", "--set", "eval.max_tokens=2", "--json"]
    done = CliRunner().invoke(app, [*options, *named])
    assert done.exit_code == 0, done.stderr
    assert [score["task"] for score in json.loads(done.stdout)["scores"]] == ["sums", "sums_of_3"]


@pytest.mark.parametrize(
    "words", ["data --text A --text B", "quickstart --text A --text=B", "quantize M --calibrate A --calibrate B"]
)
def test_a_second_text_is_refused_not_taken_for_the_first(words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*words.split(), "--out", str(tmp_path / "road")])
    assert done.exit_code == 2 and "is given twice" in done.stderr and "into one folder" in done.stderr
    assert not (tmp_path / "road").exists()


@pytest.mark.parametrize(("options", "counts"), [([], [7, 12]), (["--count", "5"], [5, 5])])
def test_the_recipes_number_of_problems_holds_unless_a_count_is_given(
    model_folder: Path, tmp_path: Path, options: list[str], counts: list[int]
) -> None:
    few, more = (f'[[data.tasks]]\nname = "sums"\ntitle = "{title}"\n' for title in ("few", "more"))
    text = f"[data]\ntest_problems = 12\n{few}test_problems = 7\n{more}[eval]\nmax_tokens = 2\n"
    (tmp_path / "mine.toml").write_text(text)
    done = CliRunner().invoke(
        app, ["eval", str(model_folder), "--recipe", str(tmp_path / "mine.toml"), "--json", *options]
    )
    assert done.exit_code == 0, done.stderr
    assert [score["count"] for score in json.loads(done.stdout)["scores"]] == counts


def test_eval_of_an_unknown_task_names_the_known(model_folder: Path) -> None:
    done = CliRunner().invoke(app, ["eval", str(model_folder), "--task", "poems"])
    assert done.exit_code == 3 and "poems" in done.stderr and "sums" in done.stderr


@pytest.mark.parametrize("name", ["quickstart", "data", "train", "sft", "rl", "distill", "quantize"])
def test_a_wrong_key_names_the_nearest_and_writes_nothing(name: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [name, "--out", str(tmp_path / "road"), "--set", "data.vocab_sise=512"])
    assert done.exit_code == 2 and "perhaps you mean 'vocab_size'" in done.stderr
    assert not (tmp_path / "road").exists()


def test_a_missing_recipe_is_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["quickstart", "--out", str(tmp_path / "road"), "--recipe", "nowhere.toml"])
    assert done.exit_code == 2 and "nowhere.toml" in done.stderr and not (tmp_path / "road").exists()


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999"])
def test_a_seed_that_no_generator_takes_is_refused_by_every_verb(seed: str, model_folder: Path, tmp_path: Path) -> None:
    road = ["quickstart", "--recipe", "tiny", "--out", str(tmp_path / "road"), "--no-serve"]
    for words in (["run", str(model_folder), "1 + 1"], ["chat", str(model_folder)], road):
        done = CliRunner().invoke(app, [*words, "--seed", seed])
        assert done.exit_code == 2 and "--seed" in done.stderr, words
    done = CliRunner().invoke(app, [*road, "--set", f"seed={seed}"])
    assert done.exit_code == 2 and "seed" in done.stderr and not (tmp_path / "road").exists()


@pytest.mark.parametrize(("option", "most"), [("--temperature", 100), ("--max-tokens", 2**31 - 1)])
@pytest.mark.parametrize("verb", ["run", "chat"])
def test_the_help_says_the_limits_that_hold(model_folder: Path, verb: str, option: str, most: int) -> None:
    help_text = re.sub(r"\s+", "", CliRunner().invoke(app, [verb, "--help"]).stdout)
    assert f"<=x<={most}" in help_text
    refused = CliRunner().invoke(app, [verb, str(model_folder), option, str(most + 1)], input="cat\n")
    assert refused.exit_code == 2 and option in refused.stderr and f"{most}" in refused.stderr
    taken = [verb, str(model_folder), "--temperature", "100", "--max-tokens", "2"]
    assert CliRunner().invoke(app, taken, input="cat\n").exit_code == 0
