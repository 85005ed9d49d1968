"""The teacher runs once over what its students learn; what it said is kept whole, small, and is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sprat.config.model import ModelConfig
from sprat.config.teach import LogitsCacheConfig, LogitsConfig, TeachConfig
from sprat.data.loader import gather_rows
from sprat.data.pack import PackedDataset, pack
from sprat.errors import ConfigError, MachineError
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.post import collect, teach, teacher_logits
from sprat.post.teacher_logits import TeacherLogits, cache_bytes, cache_logits, check_same_tokenizer, logits_loss
from sprat.tokens import Message, Tokenizer, render
from sprat.train import losses
from sprat.trust.verify import verify
from tests.lucky import lucky_tokenizer

CONFIG = LogitsCacheConfig(top_k=8)


@pytest.fixture
def teacher(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save(model, tokenizer, tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def rows(tokenizer: Tokenizer) -> PackedDataset:
    """Ten packed rows; the first token of each sequence carries no loss."""
    sequences = [(ids := tokenizer.encode(f"{n} train {n * 7}"), [0] + [1] * (len(ids) - 1)) for n in range(90)]
    packed = pack(sequences, 48)
    return PackedDataset(packed.tokens[:10], packed.segments[:10], packed.loss_mask[:10])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_logits, "SHARD_ROWS", 4)


def test_what_is_kept_is_what_the_teacher_says(
    teacher: Path, model: Transformer, tokenizer: Tokenizer, rows: PackedDataset, tmp_path: Path
) -> None:
    sizes: list[int] = []
    run = cache_logits(teacher, tokenizer, rows, tmp_path / "runs" / "a-logits", CONFIG, on_size=sizes.append)
    files = sorted(run.artifact.iterdir())
    assert [path.name for path in files] == [f"shard-0000{n}.safetensors" for n in range(3)]
    assert sum(path.stat().st_size for path in files) == pytest.approx(sizes[0], rel=0.25)
    cache = TeacherLogits(run.artifact, rows)
    batch = gather_rows(rows, [9, 0, 5])  # in another order than they were kept
    ids, buckets = cache(batch, model.config.vocab_size)
    logits = model(batch.tokens_BT, segments_BT=batch.segments_BT)[batch.targets_BT != -100]
    expected = logits[:, : tokenizer.vocab_size].log_softmax(1)
    top = expected.topk(8)
    assert torch.equal(ids.sort().values, top.indices.sort().values)
    torch.testing.assert_close(buckets[:, :8].exp(), expected.gather(1, ids).exp(), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(buckets[:, 8].exp(), 1 - top.values.exp().sum(1), rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(buckets.exp().sum(1), torch.ones(len(buckets)))
    assert cache_logits(teacher, tokenizer, rows, tmp_path / "runs" / "a-logits", CONFIG).done
    assert all(finding.ok for finding in verify(tmp_path / "runs"))


def test_an_interrupted_cache_goes_on_and_has_the_same_bytes(
    teacher: Path, tokenizer: Tokenizer, rows: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cache_logits(teacher, tokenizer, rows, tmp_path / "runs" / "a", CONFIG)
    computed, original = [0], teacher_logits._distributions

    def interrupted(*words: Any) -> Any:
        computed[0] += 1
        if computed[0] == 7:
            raise KeyboardInterrupt
        return original(*words)

    monkeypatch.setattr(teacher_logits, "_distributions", interrupted)
    folder = tmp_path / "runs" / "b"
    with pytest.raises(KeyboardInterrupt):
        cache_logits(teacher, tokenizer, rows, folder, CONFIG)
    assert not (folder / "run.json").exists() and not any((folder / "artefact").iterdir())
    again = cache_logits(teacher, tokenizer, rows, folder, CONFIG)
    assert computed[0] == 7 + 6  # the four rows of the first shard are not computed again
    assert again.record["artefact_digest"] == whole.record["artefact_digest"]


def test_the_loss_of_a_student_that_is_its_teacher_is_nothing_and_shares_add_up(
    teacher: Path, model: Transformer, shape: ModelConfig, tokenizer: Tokenizer, rows: PackedDataset, tmp_path: Path
) -> None:
    run = cache_logits(teacher, tokenizer, rows, tmp_path / "runs" / "a", CONFIG.replace(dtype="float32"))
    loss_fn = logits_loss(TeacherLogits(run.artifact, rows), LogitsConfig(top_k=8, weight=0.5))
    settings, batch = TeachConfig(balance_weight=0.0), gather_rows(rows, range(6))
    same = loss_fn(model, batch, settings)
    plain = losses.next_token_loss(model, batch, settings)
    padding = len(model.head.dense_weight()) - tokenizer.vocab_size  # words of nobody's, which the teacher leaves out
    assert same.metrics["divergence"] == pytest.approx(0, abs=1e-5 if not padding else 0.05)
    assert same.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)
    other = Transformer.create(shape, 5)
    parts = [loss_fn(other, batch[start : start + 2], settings, batch) for start in (0, 2, 4)]
    assert sum(part.total.item() for part in parts) == pytest.approx(loss_fn(other, batch, settings).total.item())
    assert loss_fn(other, batch, settings).metrics["divergence"] > 0.01


def test_other_tokenizers_and_full_disks_are_one_sentence(
    teacher: Path, tokenizer: Tokenizer, rows: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_same_tokenizer(tokenizer, lucky_tokenizer())
    other = Tokenizer.train(["other words of another kind\n"] * 4, tokenizer.vocab_size, numbers=10)
    with pytest.raises(ConfigError, match="to the teacher and|ids, the student's"):
        cache_logits(teacher, other, rows, tmp_path / "runs" / "a", CONFIG)
    monkeypatch.setattr(teacher_logits.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(MachineError, match="GB are free"):
        cache_logits(teacher, tokenizer, rows, tmp_path / "runs" / "a", CONFIG)
    assert not (tmp_path / "runs").exists()
    assert cache_bytes(rows, LogitsCacheConfig(top_k=10**6), 300) == rows.num_targets * (300 * 6 + 4) + 80


def test_a_student_learns_more_of_a_distribution_than_of_its_samples(
    guesser: Transformer, tokenizer: Tokenizer, model: Transformer, tmp_path: Path
) -> None:
    """The teacher guesses a digit; at equal steps the student with logits is nearer to its distribution."""
    save(guesser, tokenizer, tmp_path / "teacher")
    save(model, tokenizer, tmp_path / "student")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n} train"}) + "\n" for n in range(24)))
    table = {
        "epochs": 8,
        "seq_len": 32,
        "optim": {"adam_lr": 0.01},
        "traces": {"max_tokens": 16, "temperature": 1.0, "thinking": False},
    }
    config = TeachConfig.model_validate(table)
    out, name = tmp_path / "runs" / "plain", str(tmp_path / "teacher")
    traces = collect.collect_traces(name, teach.traces_folder(out), config.traces, data=data)
    student = str(tmp_path / "student")
    plain = teach.distill(name, student, out, config, traces)
    pulled_config = config.replace(logits={"weight": 1.0, "top_k": 20})
    pulled = teach.distill(name, student, tmp_path / "runs" / "pulled", pulled_config, traces)
    with pytest.raises(ConfigError, match="does not say its distributions"):
        teach.distill("http://127.0.0.1:9/v1", student, tmp_path / "runs" / "x", pulled_config, traces)
    asked = [render(tokenizer, [Message("user", f"{n} train")], thinking=False) for n in (30, 55, 77)]

    def distance(run: Any) -> float:
        """KL(teacher || student) of the answer's first token, in nats."""
        learned, total = load(run.folder)[0], 0.0
        for ids in asked:
            expected, said = (each(torch.tensor([ids]))[0, -1].log_softmax(-1) for each in (guesser, learned))
            total += (expected.exp() * (expected - said)).sum().item() / len(asked)
        return total

    assert (tmp_path / "runs" / "pulled-logits" / "run.json").is_file()
    assert (
        pulled.identity["inputs"]["logits"]["path"] == "pulled-logits" and plain.facts["steps"] == pulled.facts["steps"]
    )
    assert all(finding.ok for finding in verify(tmp_path / "runs"))
    assert distance(pulled) < 0.7 * distance(plain), (distance(pulled), distance(plain))
