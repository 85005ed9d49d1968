"""A tiny untrained model in a folder, and a tiny finished run of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import sprat
from sprat.config import MoneyConfig
from sprat.config.sizes import size
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from sprat.trust.run import open_run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a pico model that was never trained."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    tokenizer = Tokenizer.train(["State the sum of 3 + 4 + 5 = 12.", "one two three"], 600)
    special = {
        "bos_token_id": tokenizer.special_ids.bos,
        "eos_token_id": tokenizer.special_ids.eos,
        "pad_token_id": tokenizer.special_ids.pad,
    }
    config = size("pico", vocab_size=tokenizer.vocab_size, **special)
    sprat.save(Transformer.create(config, seed=1), tokenizer, folder)
    return folder


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """The folder of one finished run on a road of its own."""
    run = open_run(
        tmp_path / "road" / "data",
        stage="data",
        recipe=MoneyConfig(),
        inputs={},
        seed=0,
        ledger=tmp_path / "road" / "ledger.jsonl",
    )
    (run.artifact / "text.txt").write_text("the sprat is a small fish", encoding="utf-8")
    run.add_facts(title="Data", scores=[])
    run.finish(tokens=7)
    return run.folder
