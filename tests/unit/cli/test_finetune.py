"""A user's own model and data: fine-tune, merge, export, in one line each; what cannot be is one sentence."""

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
from sprat.config.model import ModelConfig
from sprat.model import Transformer
from sprat.tokens import Tokenizer

SMALL = ["--set", "seq_len=64", "--set", "epochs=2"]


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """Conversations, one of them broken."""
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"one {n}"}, {"role": "assistant", "content": "two"}]}
            for n in range(20)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"messages": []}\n')
    return path


def sprat_command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def told(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def logits(model: Path) -> torch.Tensor:
    weights, tokenizer = sprat.load(model)
    found: torch.Tensor = weights(torch.tensor([tokenizer.encode("one two three")]))
    return found


def test_adapters_of_a_users_model_are_trained_merged_and_taken_away(
    model_folder: Path, chat: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "mine"
    done = sprat_command("sft", model_folder, "--data", chat, "--lora", "4", "--out", run, *SMALL, "--json")
    record = told(done)
    assert record["facts"]["skipped"][0]["count"] == 1 and record["facts"]["skipped"][0]["names"] == ["chat.jsonl:21"]
    assert record["recipe"]["lora"]["rank"] == 4 and record["facts"]["examples"]["shown"] >= 10
    assert "in green what is learned" in done.stderr and "two<|eos|>]]" in done.stderr
    assert not torch.equal(logits(run), logits(model_folder))
    merged = tmp_path / "merged"
    told(sprat_command("merge", model_folder, run / "artefact" / "adapter", "--out", merged, "--json"))
    assert torch.allclose(logits(merged), logits(run), atol=1e-5)
    folder = tmp_path / "folder"
    told(sprat_command("export", run, "--hf", folder, "--json"))
    assert torch.equal(logits(folder), logits(run))
    assert told(sprat_command("verify", tmp_path / "runs", "--json"))


def test_a_users_questions_and_text_are_scored_and_two_models_compared(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"one {number}", "answer": "two"} for number in range(5)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", model_folder, "--task", "questions.jsonl", "--max-tokens", "4"]
    done = sprat_command(*words, "--json")
    assert told(done)["scores"][0]["task"] == "questions" and len(told(done)["scores"][0]["problems"]) == 5
    Path("before.json").write_text(done.stdout)
    again = sprat_command(*words, "--against", "before.json")
    assert again.exit_code == 0 and "+0.0%" in again.stdout and "p = 1" in again.stdout
    Path("text.txt").write_text("one two three " * 50)
    assert "bits per byte" in sprat_command("eval", model_folder, "--text", "text.txt").stdout
    for more, said in [
        (["--task", "sums"], "'sums' is a task of a recipe"),
        (["--text", "text.txt"], "two questions"),
        (["--samples", "2"], "temperature"),
        (["--against", "questions.jsonl"], "questions.jsonl"),
    ]:
        failed = sprat_command(*words, *more)
        assert failed.exit_code in (2, 3) and said in failed.stderr and "Traceback" not in failed.stderr


def test_a_users_columns_are_mapped(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "faq.csv"
    path.write_text("Frage,Antwort\none,two\nthree,four\n")
    words = ["sft", model_folder, "--data", path, "--out", tmp_path / "runs" / "mine", *SMALL, "--json"]
    failed = sprat_command(*words)
    assert failed.exit_code == 3 and "Frage" in failed.stderr
    record = told(sprat_command(*words, "--map", "prompt=Frage", "--map", "completion=Antwort"))
    assert record["facts"]["examples"]["shown"] + record["facts"]["validation"]["shown"] == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["sft", "--data", "chat.jsonl"], 2, "sprat sft smol --data FILE --out RUN"),
        (["sft", "MODEL", "--out", "x"], 2, "--data is missing"),
        (["sft", "MODEL", "--data", "CHAT"], 2, "--out is missing"),
        (["sft", "MODEL", "--data", "nowhere.jsonl", "--out", "x"], 3, "nowhere.jsonl"),
        (["sft", "MODEL", "--data", "CHAT", "--out", "x", "--set", "lr=1"], 2, "or 'optim.adam_lr'"),
        (["sft", "MODEL", "--data", "CHAT", "--out", "x", "--set", "lora.targets=[\"q\"]"], 2, "no linear 'q'"),
        (["sft", "nowhere", "--data", "CHAT", "--out", "x"], 4, "no such model folder"),
        (["dpo", "MODEL", "--data", "CHAT", "--out", "x", "--set", "seq_len=64"], 3, "pairs are for sprat dpo"),
        (["dpo", "--data", "CHAT", "--out", "x"], 2, "no model was named"),
        (["export", "MODEL"], 2, "--gguf FILE and --hf DIR"),
        (["export", "MODEL", "--hf", "FULL"], 2, "something is there already"),
        (["merge", "MODEL", "nowhere", "--out", "x"], 4, "nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence_and_nothing_is_made(
    words: list[str],
    code: int,
    said: str,
    model_folder: Path,
    chat: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, str | Path] = {"MODEL": model_folder, "CHAT": chat, "FULL": model_folder}
    done = sprat_command(*(names.get(word, word) for word in words))
    assert done.exit_code == code and said in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]


def _small_llama(folder: Path) -> None:
    """A random Llama with GPT-2's way to cut text, which llama.cpp knows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(["user assistant one two three"] * 9, trainer)
    raw.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer = Tokenizer(raw.to_str())
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig(architecture="llama", vocab_size=tokenizer.vocab_size, **shape)
    sprat.save(Transformer.create(config, seed=1), tokenizer, folder)


@pytest.mark.slow
def test_the_page_on_fine_tuning_is_true(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands as they stand there, with a smaller model of that name."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "finetune.md").read_text(encoding="utf-8")
    [block] = re.findall(r"<!-- run -->\n```bash\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    _small_llama(tmp_path / "smol")
    for line in block.splitlines():
        done = sprat_command(*shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.stderr)
    trained, taken = sprat.load("runs/mine")[0], sprat.load("mine.gguf", dequantize=True)[0]
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(trained(ids), taken(ids), atol=0.02)  # Q8_0
