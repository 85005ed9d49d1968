"""A checkpoint is whole or absent."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sprat.config import OptimConfig
from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError, MachineError
from sprat.model import Transformer
from sprat.train import checkpoint, optim


def _moved(model: Transformer) -> optim.Optimizer:
    optimizer = optim.build(model, OptimConfig())
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    model.moe_layers()[0].gate.e_score_correction_bias.add_(0.25)
    return optimizer


def test_everything_comes_back_to_the_bit(model: Transformer, shape: ModelConfig, tmp_path: Path) -> None:
    optimizer = _moved(model)
    checkpoint.save(tmp_path, 7, model, optimizer, {"sum": 0.1 + 0.2})
    other = Transformer.create(shape, 1)
    fresh = optim.build(other, OptimConfig())
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 7 and found.extra == {"sum": 0.1 + 0.2}
    checkpoint.restore(found, other, fresh)
    for mine, theirs in ((model.state_dict(), other.state_dict()), (optimizer.state_dict(), fresh.state_dict())):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_is_frozen_is_not_written_and_is_compared(model: Transformer, shape: ModelConfig, tmp_path: Path) -> None:
    model.layers.requires_grad_(False)
    optimizer = optim.build(model, OptimConfig())
    checkpoint.save(tmp_path, 7, model, optimizer, {})
    found = checkpoint.latest(tmp_path)
    assert found is not None
    stored = load_file(found.folder / "model.safetensors")
    assert set(stored) == {
        n for n in model.state_dict() if not n.startswith("layers.") or n.endswith("correction_bias")
    }
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm.weight.add_(1)
    checkpoint.restore(found, other, optim.build(other, OptimConfig()))
    assert torch.equal(other.norm.weight, model.norm.weight)
    with torch.no_grad():
        other.layers[0].input_layernorm.weight[3] += 1e-6
        other.norm.weight.add_(1)
    with pytest.raises(CheckpointError, match="other frozen weights"):
        checkpoint.restore(found, other, optim.build(other, OptimConfig()))
    assert not torch.equal(other.norm.weight, model.norm.weight)
    other.requires_grad_(True)
    with pytest.raises(CheckpointError, match="another"):
        checkpoint.restore(found, other, optim.build(other, OptimConfig()))


class _Reversed(nn.Module):
    """The same parameters by the same names, registered in the opposite order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in reversed(list(model.named_children())):
            if isinstance(child, nn.Linear):
                self.add_module(name, nn.Linear(child.in_features, child.out_features))
            else:
                self.add_module(name, _Reversed(child))


def test_a_checkpoint_survives_another_order_of_parameters(tmp_path: Path) -> None:
    """Matrices of one shape are not mistaken for one another: both go on to the same bits."""
    here = nn.ModuleDict({name: nn.ModuleDict({"q": nn.Linear(6, 4), "o": nn.Linear(4, 6)}) for name in "abc"})
    there = _Reversed(here)
    names = [name for name, _ in here.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in there.named_parameters()) != names
    one, other = optim.build(here, OptimConfig()), optim.build(there, OptimConfig())
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        if step == 2:
            checkpoint.save(tmp_path, step, here, one, {})
            found = checkpoint.latest(tmp_path)
            assert found is not None
            checkpoint.restore(found, there, other)
        theirs = dict(there.named_parameters())
        for name, parameter in here.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            theirs[name].grad = parameter.grad.clone()
        one.step()
        other.step()
    assert all(torch.equal(value, theirs[name]) for name, value in here.named_parameters())


def test_a_checkpoint_with_momenta_in_stacks_by_shape_is_read(
    model: Transformer, shape: ModelConfig, tmp_path: Path
) -> None:
    """As they were written before they went by name: matrices of one shape in the model's order, tall ones turned."""
    optimizer = _moved(model)
    folder = checkpoint.save(tmp_path, 1, model, optimizer, {})
    state = load_file(folder / "optimiser.safetensors")
    stacks = defaultdict[str, list[torch.Tensor]](list)
    for name in optimizer.muon_names:
        momentum = state.pop(f"muon.momentum.{name}")
        assert momentum.shape == dict(model.named_parameters())[name].shape
        rows, columns = momentum.shape[-2:]
        upright = momentum if rows <= columns else momentum.transpose(-1, -2)
        stacks[f"muon.{min(rows, columns)}x{max(rows, columns)}"] += upright.reshape(-1, *upright.shape[-2:])
    state |= {name: torch.stack(matrices) for name, matrices in stacks.items()}
    save_file(state, folder / "optimiser.safetensors")
    description = json.loads((folder / "state.json").read_text())
    content = (folder / "optimiser.safetensors").read_bytes()
    description["files"]["optimiser.safetensors"] = hashlib.sha256(content).hexdigest()
    (folder / "state.json").write_text(json.dumps(description))
    found, other = checkpoint.latest(tmp_path), Transformer.create(shape, 1)
    assert found is not None
    fresh = optim.build(other, OptimConfig())
    checkpoint.restore(found, other, fresh)
    theirs = fresh.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in optimizer.state_dict().items())


def test_a_tied_head_stays_tied(shape: ModelConfig, tmp_path: Path) -> None:
    model = Transformer.create(shape.replace(tie_word_embeddings=True), 0)
    checkpoint.save(tmp_path, 1, model, _moved(model), {})
    other = Transformer.create(model.config, 1)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    checkpoint.restore(found, other, optim.build(other, OptimConfig()))
    assert other.head.weight is other.embed_tokens.weight
    assert torch.equal(other.head.weight, model.head.weight)


def test_only_the_last_two_are_kept(model: Transformer, tmp_path: Path) -> None:
    optimizer = _moved(model)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, model, optimizer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def _cut(folder: Path) -> None:
    file = folder / "optimiser.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def _no_state(folder: Path) -> None:
    (folder / "state.json").unlink()


def _half_state(folder: Path) -> None:
    (folder / "state.json").write_text('{"format": 1, "step"')


@pytest.mark.parametrize("tear", [_cut, _flip, _no_state, _half_state])
def test_a_torn_checkpoint_is_passed_over(model: Transformer, tmp_path: Path, tear: Callable[[Path], None]) -> None:
    optimizer = _moved(model)
    checkpoint.save(tmp_path, 1, model, optimizer, {})
    tear(checkpoint.save(tmp_path, 2, model, optimizer, {}))
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1


def test_what_a_killed_save_left_is_swept_away(model: Transformer, tmp_path: Path) -> None:
    left = tmp_path / ".step-00000001.tmp-99"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 2, model, _moved(model), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_checkpoint_of_another_model_is_refused(model: Transformer, shape: ModelConfig, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, model, _moved(model), {})
    other = Transformer.create(shape.replace(vocab_size=64), 0)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.restore(found, other, optim.build(other, OptimConfig()))


def test_too_little_room_is_said_before_anything_is_written(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = _moved(model)
    checkpoint.save(tmp_path, 1, model, optimizer, {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(MachineError, match="the disk is full"):
        checkpoint.save(tmp_path, 2, model, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
