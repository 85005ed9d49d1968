"""What stands beside config.json is read as transformers reads it, or named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sprat.engine import Sampling
from sprat.errors import DataError
from sprat.tokens import Message, Tokenizer, render
from tests.byte_fallback import byte_fallback


def folder_of(path: Path, **files: Any) -> Path:
    """A folder with a tokenizer and further files; ``__`` in a name stands for the dot."""
    (path / "tokenizer.json").write_text(byte_fallback(), encoding="utf-8")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def test_generation_config_gives_the_ends_and_the_settings(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    said = {"do_sample": True, "eos_token_id": [2, 262], "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0}
    said |= {"repetition_penalty": 1.05, "transformers_version": "4.51.0", "bos_token_id": 1, "pad_token_id": 0}
    folder = folder_of(tmp_path, tokenizer_config__json={"eos_token": "</s>"}, generation_config__json=said)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    ours = Tokenizer.load(folder)
    assert set(ours.eos_token_ids) == set(theirs.eos_token_id)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    assert dict(ours.generation_config.default_sampling) == {name: getattr(theirs, name) for name in names}
    ours.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").generation_config == ours.generation_config


def test_greedy_is_greedy(tmp_path: Path) -> None:
    said = {"do_sample": False, "temperature": 0.7, "eos_token_id": 2}
    folder = folder_of(tmp_path, tokenizer_config__json={"eos_token": "</s>"}, generation_config__json=said)
    assert Tokenizer.load(folder).generation_config.default_sampling == {"temperature": 0.0}


def test_what_is_not_understood_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = {
        "num_beams": 4,
        "no_repeat_ngram_size": 3,
        "typical_p": 1.0,
        "suppress_tokens": None,
        "_from_model_config": 1,
    }
    config = {"eos_token": "</s>", "added_tokens_decoder": {"900": {"content": "<|new|>", "special": True}}}
    folder = folder_of(tmp_path, tokenizer_config__json=config, generation_config__json=said)
    with caplog.at_level(logging.WARNING):
        Tokenizer.load(folder)
    assert "not followed: no_repeat_ngram_size, num_beams" in caplog.text and "<|new|>" in caplog.text


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"eos_token_id": "</s>"}, {"eos_token_id": [9999]}, [1]])
def test_a_value_that_is_none_is_refused(tmp_path: Path, wrong: Any) -> None:
    folder = folder_of(tmp_path, tokenizer_config__json={"eos_token": "</s>"}, generation_config__json=wrong)
    with pytest.raises(DataError):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.5}, {"temperature": float("nan")}, {"top_k": -2}, {"top_p": 0}, {"top_p": 1.5},
        {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": float("inf")},
    ],
)  # fmt: skip
def test_a_setting_that_no_request_could_have_is_refused_with_its_file(tmp_path: Path, wrong: Any) -> None:
    folder = folder_of(tmp_path, tokenizer_config__json={"eos_token": "</s>"}, generation_config__json=wrong)
    with pytest.raises(DataError, match=f"{next(iter(wrong))} cannot be .*generation_config.json"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "edge",
    [
        {"temperature": 0, "top_k": 0, "top_p": 1e-9, "min_p": 0, "repetition_penalty": 1e-9},
        {"temperature": 100, "top_k": 2**31 - 1, "top_p": 1, "min_p": 1, "repetition_penalty": 100.0},
    ],
)
def test_a_setting_that_the_folder_may_have_is_one_that_sampling_takes(tmp_path: Path, edge: dict[str, Any]) -> None:
    folder = folder_of(tmp_path, tokenizer_config__json={"eos_token": "</s>"}, generation_config__json=edge)
    sampling = Sampling(**Tokenizer.load(folder).generation_config.default_sampling)
    assert {name: getattr(sampling, name) for name in edge} == edge


def test_minus_one_keeps_all_tokens_as_in_vllm(tmp_path: Path) -> None:
    said = {"top_k": -1}
    folder = folder_of(tmp_path, tokenizer_config__json={"eos_token": "</s>"}, generation_config__json=said)
    assert Tokenizer.load(folder).generation_config.default_sampling == {"top_k": 0}


def test_special_tokens_of_older_folders_are_found(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, special_tokens_map__json={"eos_token": {"content": "</s>"}, "bos_token": "<s>"})
    assert Tokenizer.load(folder).special_ids.eos == 2


def test_a_token_that_is_special_by_its_name_alone_is_special(tmp_path: Path) -> None:
    table = json.loads(byte_fallback())
    table["added_tokens"] = []
    folder = folder_of(
        tmp_path, tokenizer__json=table, tokenizer_config__json={"eos_token": "</s>", "bos_token": "<s>"}
    )
    ours = Tokenizer.load(folder)
    assert ours.special_ids.eos == 2 and 2 not in ours.encode("a</s>") and ours.encode("<s>", parse_special=True) == [1]


def test_a_template_in_its_own_file_goes_first(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    turns = "{{% for m in messages %}}{}{{{{ m.content }}}}{{% endfor %}}".format
    config = {"eos_token": "</s>", "chat_template": turns("old "), "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = folder_of(tmp_path, tokenizer_config__json=config, chat_template__jinja=turns("new "))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False)
    ours = Tokenizer.load(folder)
    assert ours.decode(render(ours, [Message("user", "cat")])) == expected == "new cat"
