"""Take a model away in one line, and prove what was taken; the page's commands are run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from typer.testing import CliRunner

import sprat
from sprat.cli.main import app
from sprat.config import LoRAConfig
from sprat.config.model import ModelConfig
from sprat.formats.peft import save_peft
from sprat.model import Transformer
from sprat.model.lora import add_lora
from sprat.tokens import Tokenizer

PAGE = Path(__file__).resolve().parents[3] / "docs" / "finetune.md"


def sprat_command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def llama(seed: int) -> tuple[Transformer, Tokenizer]:
    """A random Llama of whole blocks, with GPT-2's way to cut text, which llama.cpp knows."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(["user assistant one two three"] * 9, trainer)
    raw.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer = Tokenizer(raw.to_str())
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    config = ModelConfig(architecture="llama", vocab_size=tokenizer.vocab_size, num_attention_heads=2, **shape)
    return Transformer.create(config, seed), tokenizer


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page's first commands leave: a base called smol, and runs/mine with its adapter; the folder of both."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = llama(1)
    sprat.save(model, tokenizer, tmp_path / "smol")
    sprat.save(llama(2)[0], tokenizer, tmp_path / "runs" / "mine" / "artefact")
    add_lora(model, LoRAConfig(rank=2))
    save_peft(model, tmp_path / "runs" / "mine" / "artefact" / "adapter")
    return tmp_path


def test_the_page_on_taking_away_is_true(trained: Path) -> None:
    [block] = re.findall(r"<!-- run: exports -->\n```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines():
        done = sprat_command(*shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.stdout, done.stderr)
    ids = torch.tensor([[1, 2, 3]])
    logits = {name: sprat.load(name, dequantize=True)[0](ids) for name in ("runs/mine", "mine-dense", "mine.gguf")}
    assert torch.equal(logits["mine-dense"], logits["runs/mine"])
    assert torch.allclose(logits["mine.gguf"], logits["runs/mine"], atol=0.02)  # Q8_0
    small, packed = (sprat.load(name, dequantize=True)[0] for name in ("small", "mine-int4"))
    assert all(torch.equal(value, packed.state_dict()[name]) for name, value in small.state_dict().items())


def test_a_changed_export_leaves_with_eight(trained: Path) -> None:
    assert sprat_command("export", "smol", "--hf", "out").exit_code == 0
    table = json.loads(Path("out/config.json").read_text())
    Path("out/config.json").write_text(json.dumps({**table, "rope_theta": 5}))
    done = sprat_command("verify-export", "out", "--against", "smol")
    assert done.exit_code == 8 and "BAD  config.json: key rope_theta differs" in done.stdout
    told = json.loads(sprat_command("verify-export", "out", "--json").stdout)
    assert told["ok"] is False and [each["subject"] for each in told["findings"] if not each["ok"]] == ["config.json"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["export", "smol"], 2, "--gguf FILE and --hf DIR"),
        (["export", "smol", "--gguf", "x.gguf", "--hf", "x"], 2, "--gguf FILE and --hf DIR"),
        (["export", "smol", "--gguf", "x.gguf", "--format", "fp8"], 2, "--kind"),
        (["export", "smol", "--hf", "x", "--pre", "gpt-2"], 2, "leave --pre out"),
        (["export", "smol", "--hf", "runs"], 2, "something is there already"),
        (["export", "smol", "--gguf", "smol/config.json"], 2, "something is there already"),
        (["export", "smol", "--hf", "x", "--format", "pack-quantized"], 4, "sprat quantize MODEL"),
        (["export", "nowhere", "--hf", "x"], 4, "no such model folder"),
        (["verify-export", "nowhere"], 4, "no such export"),
        (["verify-export", "smol"], 2, "--against MODEL"),
        (["verify-export", "smol", "--against", "nowhere"], 4, "no such model folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence_and_nothing_is_made(
    words: list[str], code: int, said: str, trained: Path
) -> None:
    done = sprat_command(*words)
    assert done.exit_code == code and said in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in trained.iterdir()) == ["runs", "smol"]
