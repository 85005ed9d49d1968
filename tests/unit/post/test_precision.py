"""Where and how precisely a fine-tuning computes: less memory and cut batches change nothing, bfloat16 little."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.errors import MachineError
from sprat.post.finetune import finetune
from sprat.train import machine
from sprat.trust.verify import verify

SETTINGS: dict[str, Any] = {"steps": 3, "batch_rows": 4, "seq_len": 32, "optim": {"adam_lr": 0.01, "warmup_steps": 0}}
SETTINGS |= {"eval": {"samples": 0}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Answers of one to eight tokens, so that a mean of means would not be the mean over tokens."""
    path = tmp_path / "examples.jsonl"
    rows = [{"prompt": str(n), "completion": "7 " * (1 + n % 8)} for n in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": str(number), "chosen": "7", "rejected": "3"} for number in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(base: Path, data: Path, out: Path, config_class: type[FinetuneConfig] = FinetuneConfig, **changes: Any):  # type: ignore[no-untyped-def]
    run = finetune(base, data, out / "run", config_class.model_validate(SETTINGS | changes))
    return load_file(run.artifact / "model.safetensors"), run


@pytest.mark.parametrize("lora", [None, {"rank": 4, "dora": True}])
@pytest.mark.parametrize("config_class", [FinetuneConfig, DPOConfig])
def test_activation_checkpointing_gives_the_same_bits(
    config_class: type[FinetuneConfig], lora: dict[str, Any] | None, base: Path, data: Path, pairs: Path, tmp_path: Path
) -> None:
    examples = pairs if config_class is DPOConfig else data
    plain, _ = trained(base, examples, tmp_path / "a", config_class, lora=lora)
    spared, _ = trained(base, examples, tmp_path / "b", config_class, lora=lora, activation_checkpointing=True)
    assert all(plain[name].equal(spared[name]) for name in plain)


def test_less_is_kept_between_the_layers(base: Path) -> None:
    from sprat.formats.load import load

    model = load(base)[0].train()
    sizes = []
    for model.activation_checkpointing in (False, True):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: (kept.append(x.nbytes), x)[1], lambda x: x):
            model(torch.ones(4, 64, dtype=torch.long))
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 2


def test_micro_batches_add_up_to_the_mean_over_tokens(base: Path, data: Path, tmp_path: Path) -> None:
    """Answers differ in length, so the mean of the means of micro-batches would be another number."""
    alike = {"eval_every": 1, "dtype": "float32"}
    (whole, run), (cut, other) = (
        trained(base, data, tmp_path / str(count), micro_batches=count, **alike) for count in (1, 4)
    )
    logs = [[json.loads(line) for line in (each.folder / "metrics.jsonl").open()] for each in (run, other)]
    for a, b in zip(*logs, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-4)
    assert all(torch.allclose(whole[name], cut[name], atol=2e-4) for name in whole)


@pytest.mark.parametrize("config_class", [FinetuneConfig, DPOConfig])
def test_bfloat16_is_near_and_weights_stay_float32(
    config_class: type[FinetuneConfig], base: Path, data: Path, pairs: Path, tmp_path: Path
) -> None:
    examples = pairs if config_class is DPOConfig else data
    exact, run = trained(base, examples, tmp_path / "a", config_class, steps=12, dtype="float32")
    near, other = trained(base, examples, tmp_path / "b", config_class, steps=12, dtype="bfloat16")
    assert all(value.dtype == torch.float32 for value in near.values())
    assert any(not exact[name].equal(near[name]) for name in exact)
    losses = [each.facts["validation_after"]["loss"] for each in (run, other)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[1] < run.facts["validation_before"]["loss"]


def test_a_processor_without_bfloat16_is_named(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx2 avx512f\n")
    assert not machine.has_bfloat16(tmp_path / "cpuinfo") and not machine.has_bfloat16(tmp_path / "nowhere")
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx512_bf16\n")
    assert machine.has_bfloat16(tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "has_bfloat16", lambda: False)
    trained(base, data, tmp_path / "a", steps=1, dtype="bfloat16")
    assert "bfloat16 is slower than float32 here" in caplog.text


@pytest.mark.parametrize(("has_it", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_run_says_what_it_was_computed_in(
    has_it: bool, expected: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_bfloat16", lambda: has_it)
    automatic, run = trained(base, data, tmp_path / "a", steps=2)
    named, _ = trained(base, data, tmp_path / "b", steps=2, dtype=expected)
    assert all(named[name].equal(automatic[name]) for name in named)
    assert tomllib.loads((run.folder / "recipe.toml").read_text())["dtype"] == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="torch sees no CUDA device"):
        trained(base, data, tmp_path / "a", device="cuda")
    assert not (tmp_path / "a").exists()


def test_without_tensorboard_it_is_one_sentence(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = FinetuneConfig.model_validate(SETTINGS)
    with pytest.raises(MachineError, match=r"not installed.*sprat\[tensorboard\]"):
        finetune(base, data, tmp_path / "a" / "run", config, tensorboard=True)
    assert not (tmp_path / "a").exists()


def test_tensorboard_shows_the_log(base: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finetune(base, data, tmp_path / "a" / "run", FinetuneConfig.model_validate(SETTINGS), tensorboard=True)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        seen = {event.step: event.value for event in events.Scalars(tag)}
        assert seen == pytest.approx({row["step"]: row[name] for row in rows if name in row}, rel=1e-6)
    assert all(finding.ok for finding in verify(tmp_path / "a"))
