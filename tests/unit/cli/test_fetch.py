"""Models from elsewhere at the command line: a GGUF file answers and talks, a torn one is one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sprat.cli.main import app
from sprat.config.model import ModelConfig
from sprat.model import Transformer
from tests.gguf_files import write
from tests.smol import smol


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained Qwen2 in four bits."""
    config = ModelConfig(
        architecture="qwen2", vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write(Transformer.create(config, 1), path, kind=lambda _: "Q4_0")


def test_a_gguf_file_answers_and_talks(file: Path) -> None:
    done = CliRunner().invoke(app, ["run", str(file), "abc", "--max-tokens", "4", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["outputs"][0]["usage"]["completion_tokens"] <= 4
    done = CliRunner().invoke(app, ["chat", str(file), "--max-tokens", "4", "--json"], input="abc\nxyz\n/quit\n")
    assert done.exit_code == 0, done.stderr
    first, second = json.loads(done.stdout)["turns"]
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]


def test_a_torn_file_is_one_sentence(file: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(file.read_bytes()[:-9000])
    done = CliRunner().invoke(app, ["run", str(torn), "abc"])
    assert done.exit_code == 4 and done.stderr.count("\n") == 1 and "torn.gguf" in done.stderr


def test_fetch_says_where_the_model_lies() -> None:
    place = smol()
    done = CliRunner().invoke(app, ["fetch", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["path"] == str(place)
    done = CliRunner().invoke(app, ["fetch", "whale"])
    assert done.exit_code == 9 and "whale" in done.stderr and "smol" in done.stderr


def test_fetch_of_what_is_there_takes_no_torch() -> None:
    smol()
    code = (
        "import sys; from typer.testing import CliRunner; from sprat.cli.main import app; "
        "print(CliRunner().invoke(app, ['fetch']).exit_code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "0 False\n", done.stderr


@pytest.mark.slow
def test_smol_talks() -> None:
    smol()
    done = CliRunner().invoke(app, ["chat", "smol", "--max-tokens", "16"], input="Say hello to my cat.\n")
    words = done.stdout.split()
    assert done.exit_code == 0 and len(words) > 3 and all(word.isprintable() for word in words)
