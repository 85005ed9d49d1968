"""A version of the weights is taken to the bit, or refused with nothing changed."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sprat.config.model import LoRAConfig
from sprat.errors import CheckpointError, SpratError, TrustError
from sprat.model import Transformer
from sprat.model.lora import add_lora
from sprat.post.rl.merged_copy import plain_copy, write_merged
from sprat.post.rl.weights import OtherModelError, TrainedWeights, prune_weights, read_chunk, versions, weights_file


def moved(model: Transformer, seed: int = 1) -> Transformer:
    """A copy whose trained weights are others."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return other


def adapted(model: Transformer) -> Transformer:
    other = copy.deepcopy(model)
    add_lora(other, LoRAConfig(rank=2), 0)
    return other


def same(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_all_weights_come_over_to_the_bit(model: Transformer, tmp_path: Path) -> None:
    trainer = moved(model)
    digest = TrainedWeights(trainer).save(tmp_path, 3)
    assert digest == TrainedWeights(trainer).digest() != TrainedWeights(model).digest()
    worker = copy.deepcopy(model)
    TrainedWeights(worker).load(weights_file(tmp_path, 3), digest)
    assert same(worker, trainer) and versions(tmp_path) == [3]


def test_of_adapters_nothing_else_goes_over_and_the_base_is_compared(model: Transformer, tmp_path: Path) -> None:
    base = adapted(model)
    trainer = moved(base)
    digest = TrainedWeights(trainer).save(tmp_path, 1)
    names = set(load_file(weights_file(tmp_path, 1)))
    assert names == {name for name in trainer.state_dict() if "lora_" in name or "correction_bias" in name}
    worker, plain = adapted(model), plain_copy(model)
    TrainedWeights(worker).load(weights_file(tmp_path, 1), digest)
    assert same(worker, trainer)
    write_merged(worker, plain)
    name, linear = next((n, m) for n, m in worker.named_modules() if n.endswith("o_proj"))
    assert torch.equal(plain.get_submodule(name).weight, linear.dense_weight())  # type: ignore[operator]
    other = adapted(moved(model))  # the same adapters over another base would be another policy
    before = copy.deepcopy(other)
    with pytest.raises(TrustError, match="was published"):
        TrainedWeights(other).load(weights_file(tmp_path, 1), digest)
    assert same(other, before)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_flipped_bit_anywhere_is_refused(model: Transformer, tmp_path: Path, share: float) -> None:
    digest = TrainedWeights(moved(model)).save(tmp_path, 1)
    file, worker = weights_file(tmp_path, 1), copy.deepcopy(model)
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 4
    file.write_bytes(content)
    with pytest.raises((TrustError, CheckpointError)):
        TrainedWeights(worker).load(file, digest)
    assert same(worker, model)


def test_a_torn_file_another_version_and_another_model_are_refused(model: Transformer, tmp_path: Path) -> None:
    weights, worker = TrainedWeights(moved(model)), copy.deepcopy(model)
    digest = weights.save(tmp_path, 1)
    TrainedWeights(moved(model, 2)).save(tmp_path, 2)
    with pytest.raises(TrustError, match="and .* was published.*the trainer writes them again"):
        TrainedWeights(worker).load(weights_file(tmp_path, 2), digest)
    with pytest.raises(OtherModelError, match="weights of another model"):
        TrainedWeights(adapted(model)).load(weights_file(tmp_path, 1), digest)
    content = weights_file(tmp_path, 1).read_bytes()
    weights_file(tmp_path, 1).write_bytes(content[:-7])
    with pytest.raises(CheckpointError):
        TrainedWeights(worker).load(weights_file(tmp_path, 1), digest)
    with pytest.raises(CheckpointError):
        TrainedWeights(worker).load(weights_file(tmp_path, 9), digest)
    assert same(worker, model)


def test_the_last_staleness_and_two_stay(model: Transformer, tmp_path: Path) -> None:
    weights = TrainedWeights(model)
    for version in range(8):
        weights.save(tmp_path, version)
        prune_weights(tmp_path, version, staleness=2)
    assert versions(tmp_path) == [4, 5, 6, 7]
    (tmp_path / "notes.txt").touch()
    assert versions(tmp_path) == [4, 5, 6, 7] and versions(tmp_path / "none") == []


def test_over_the_wire_it_comes_in_pieces(model: Transformer, tmp_path: Path) -> None:
    TrainedWeights(model).save(tmp_path, 5)
    whole, data = weights_file(tmp_path, 5).read_bytes(), b""
    while len(data) < read_chunk(tmp_path, 5, 0)[1]:
        piece, size = read_chunk(tmp_path, 5, len(data), 1000)
        assert size == len(whole) and 0 < len(piece) <= 1000
        data += piece
    assert data == whole
    with pytest.raises(SpratError, match="version 6 of the weights cannot be read"):
        read_chunk(tmp_path, 6, 0)


def test_a_full_disk_leaves_nothing_half_written(model: Transformer, tmp_path: Path) -> None:
    weights = TrainedWeights(model)
    weights.save(tmp_path / "w", 1)
    shutil.rmtree(tmp_path / "w")
    (tmp_path / "w").write_text("in the way")
    with pytest.raises((SpratError, OSError)):
        weights.save(tmp_path / "w", 2)
    assert (tmp_path / "w").read_text() == "in the way"
