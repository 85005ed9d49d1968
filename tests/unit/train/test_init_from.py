"""A run starts from another's checkpoint: more steps go on exactly, another rate goes on from where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sprat.config import LoopConfig, OptimConfig, TrainConfig
from sprat.config.model import ModelConfig
from sprat.data.loader import Batch, MixedBatchSource
from sprat.errors import CheckpointError, TrainingError
from sprat.model import Transformer
from sprat.train import Loss, checkpoint, next_token_loss, optim, train
from sprat.trust import Run

NewRun = Callable[[str], Run]


@pytest.fixture
def short(recipe: TrainConfig) -> TrainConfig:
    """Ten steps, of which six are at the full rate or before it: the fall begins after step 6."""
    return recipe.replace(steps=10, log_every=1, optim=OptimConfig(warmup_steps=2, decay_fraction=0.5))


def _finish(run: Run) -> None:
    """What the road does at the end: the checkpoint at the full rate outlives the others."""
    checkpoint.copy_to_artefact(checkpoint.latest(run.checkpoints / checkpoint.STABLE), run.artifact)
    run.finish()


def _rows(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_more_steps_end_with_the_bits_of_a_run_that_was_longer_from_the_start(
    shape: ModelConfig, source: MixedBatchSource, short: TrainConfig, new_run: NewRun
) -> None:
    first, whole, more = new_run("first"), new_run("whole"), new_run("more")
    train(Transformer.create(shape, 0), source, short, first)
    _finish(first)
    assert not first.checkpoints.exists()
    straight, extended = Transformer.create(shape, 0), Transformer.create(shape, 9)
    expected = train(straight, source, short.replace(steps=14), whole)
    result = train(extended, source, short.replace(steps=14, init_from=str(first.folder)), more)
    theirs = straight.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in extended.state_dict().items())
    assert _rows(more) == _rows(whole)[6:] and _rows(more)[0]["step"] == 7
    assert result.loss == expected.loss
    # what the first run paid is not paid again
    assert (result.tokens, result.flops) == (expected.tokens * 8 // 14, pytest.approx(expected.flops * 8 / 14))


@pytest.mark.parametrize("at", [8, 11])
def test_an_extension_that_is_interrupted_goes_on_exactly(
    shape: ModelConfig, source: MixedBatchSource, short: TrainConfig, new_run: NewRun, at: int
) -> None:
    class Stops(MixedBatchSource):
        def batch(self, step: int) -> Batch:
            if step == at:
                raise InterruptedError
            return super().batch(step)

    first = new_run("first")
    train(Transformer.create(shape, 0), source, short, first)
    _finish(first)
    longer = short.replace(steps=14, init_from=str(first.folder))
    models = {name: Transformer.create(shape, 3) for name in ("straight", "broken", "again")}
    expected = train(models["straight"], source, longer, new_run("straight"))
    with pytest.raises(InterruptedError):
        train(models["broken"], Stops([(source.parts[0], 1.0)], 4, 0), longer, new_run("broken"))
    again = train(models["again"], source, longer, new_run("broken"))
    assert (again.tokens, again.flops, again.loss) == (expected.tokens, expected.flops, expected.loss)
    theirs = models["straight"].state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in models["again"].state_dict().items())


def test_after_divergence_a_lower_rate_goes_on_from_the_step_that_the_advice_names(
    shape: ModelConfig, source: MixedBatchSource, short: TrainConfig, new_run: NewRun
) -> None:
    calls: list[int] = []

    def breaks(model: Transformer, batch: Batch, config: LoopConfig, whole: Batch | None = None) -> Loss:
        calls.append(1)
        loss = next_token_loss(model, batch, config, whole)
        return (
            loss
            if len(calls) <= 7
            else Loss(loss.total * math.nan, {**loss.metrics, "loss": math.nan}, loss.expert_loads)
        )

    run = new_run("broken")
    with pytest.raises(TrainingError) as caught:
        train(Transformer.create(shape, 0), source, short, run, loss_fn=breaks)
    advised = caught.value.todo.rpartition("--init-from ")[2]
    assert advised == f"{run.folder}@6"
    gentle = short.replace(init_from=advised, optim=short.optim.replace(muon_lr=0.001, adam_lr=0.0003))
    model, other = Transformer.create(shape, 4), new_run("gentle")
    assert train(model, source, gentle, other).steps == 10
    assert [row["step"] for row in _rows(other)] == [7, 8, 9, 10]


def test_what_cannot_be_started_from_is_one_sentence(
    shape: ModelConfig, source: MixedBatchSource, short: TrainConfig, new_run: NewRun, tmp_path: Path
) -> None:
    first = new_run("first")
    train(Transformer.create(shape, 0), source, short, first)
    _finish(first)
    for init_from, steps, what in [
        (f"{tmp_path}/nowhere", 14, "no checkpoint to start from"),
        (f"{first.folder}@5", 14, r"there is \[6\]"),
        (str(first.folder), 6, "is of step 6, the recipe ends at step 6"),
    ]:
        config = short.replace(steps=steps, init_from=init_from)
        with pytest.raises(CheckpointError, match=what):
            train(Transformer.create(shape, 0), source, config, new_run("more"))
    other = Transformer.create(shape.replace(vocab_size=64), 0)
    with pytest.raises(CheckpointError, match="another model"):
        train(other, source, short.replace(steps=14, init_from=str(first.folder)), new_run("other"))


def test_the_newest_of_more_than_nine_that_were_set_aside_is_started_from(
    shape: ModelConfig, short: TrainConfig, tmp_path: Path
) -> None:
    model = Transformer.create(shape, 0)
    for number in (2, 9, 10):
        folder = tmp_path / f"learn.old-{number}" / "checkpoints"
        checkpoint.save(folder, number, model, optim.build(model, short.optim), {})
    assert checkpoint.find_start(str(tmp_path / "learn"), tmp_path / "learn").step == 10
