"""What is left out of the data is said before it is trained on, and what does not fit a row ends no training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.config.pretrain import load_pretrain_config
from sprat.errors import DataError
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.post.finetune import finetune
from sprat.tokens import Tokenizer
from sprat.train.pretrain import pretrain


def config(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"steps": 1, "seq_len": 40, "eval": {"samples": 0}} | changes)


@pytest.fixture
def base(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save(model, tokenizer, tmp_path / "base")
    return tmp_path / "base"


def write(path: Path, rows: list[dict[str, Any]], more: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
    return path


def test_bad_records_long_examples_and_columns_that_are_not_read_are_said(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": str(n), "completion": "7", "context": "all of it"} for n in range(20)]
    rows += [{"prompt": "90", "completion": "7" * 60, "context": ""}]
    data = write(tmp_path / "chat.jsonl", rows, '{oops\n{"prompt": "91", "completion": " "}\n')
    with caplog.at_level(logging.WARNING):
        finetune(base, data, tmp_path / "runs" / "mine", config(seed=3))
    said = " ".join(caplog.messages)
    assert "not JSON (chat.jsonl:22:2)" in said and "an empty turn (chat.jsonl:23)" in said
    assert f"columns of {data} that are not read (see --map): context" in said
    assert "longer than a row of 41 tokens, left out (chat.jsonl:21)" in said


def test_text_that_is_left_out_is_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(6):
        (text / f"{number}.txt").write_text(f"the number of this text is {number}\n" * 3)
    (text / "latin.txt").write_bytes(b"caf\xe9 of another encoding\n")
    (text / "page.html").write_text("<p>")
    data = write(tmp_path / "chat.jsonl", [{"prompt": str(n), "completion": "7"} for n in range(20)])
    for name in ("replayed", "trained"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            if name == "replayed":
                finetune(base, data, tmp_path / "runs" / name, config(), replay=text)
            else:
                settings = load_pretrain_config(overrides=["steps=1", "seq_len=32", "batch_rows=2"])
                pretrain(base, text, tmp_path / "runs" / name, settings)
        said = " ".join(caplog.messages)
        assert "latin.txt" in said and "page.html" in said, name


@pytest.mark.parametrize("is_pair", [False, True])
def test_validation_is_chosen_of_what_fits_a_row(base: Path, tmp_path: Path, is_pair: bool) -> None:
    def row(number: int) -> dict[str, Any]:
        answer = "7" * 90 if number % 2 else "7"
        prompt = {"prompt": str(number)}
        return prompt | ({"chosen": answer, "rejected": "8"} if is_pair else {"completion": answer})

    data = write(tmp_path / "data.jsonl", [row(number) for number in range(12)])
    for seed in range(8):
        settings = config(seed=seed)
        if is_pair:
            settings = DPOConfig.model_validate({"steps": 1, "seq_len": 40, "eval": {"samples": 0}, "seed": seed})
        run = finetune(base, data, tmp_path / "runs" / str(seed), settings)
        assert run.facts["validation"]["shown"] >= 1 and run.facts["examples"]["shown"] >= 1
        assert run.facts["validation"]["shown"] + run.facts["examples"]["shown"] == 6, seed
    alone = write(tmp_path / "alone.jsonl", [row(0), row(1), row(3), row(5)])
    run = finetune(base, alone, tmp_path / "runs" / "alone", settings)
    assert run.facts["examples"]["shown"] == 1 and "validation" not in run.facts
    with pytest.raises(DataError, match="a row holds 41"):
        finetune(base, write(tmp_path / "none.jsonl", [row(1), row(3)]), tmp_path / "runs" / "none", settings)
