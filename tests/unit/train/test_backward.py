"""However a batch is cut, its gradient is that of the published loss over the whole of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sprat.config import TrainConfig
from sprat.config.model import ModelConfig
from sprat.data.loader import Batch
from sprat.model import Routing, Transformer
from sprat.train.backward import backward
from sprat.train.losses import next_token_loss
from sprat.train.parallel import ThreadDataParallel

TIME = 24
LENGTHS = ((24,), (3, 3, 2, 3), (9, 1), (2,))  # documents of each row; the rest is padding


@pytest.fixture
def batch() -> Batch:
    """Rows that differ in targets, in pairs for each depth, and in tokens; the third carries no loss at all."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 128, (4, TIME), generator=generator)
    segments = torch.zeros_like(tokens)
    targets = torch.full_like(tokens, -100)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths, 1):
            segments[row, start : start + length] = number
            if row != 2:
                targets[row, start : start + length - 1] = tokens[row, start + 1 : start + length]
            start += length
    return Batch(tokens * (segments > 0), targets, segments)


def balance(routing: Routing, segments: Tensor) -> Tensor:
    """DeepSeek-V3, eq. 17-20, sequence by sequence over its tokens; mean over sequences."""
    experts, chosen = routing.scores_NE.shape[1], routing.index_NK.shape[1]
    total = torch.zeros(())
    for row in range(len(segments)):
        places = [row * TIME + place for place in range(TIME) if segments[row, place] > 0]
        scores, index = routing.scores_NE[places], routing.index_NK[places]
        share_E = (scores / scores.sum(1, keepdim=True)).mean(0)
        frequency_E = torch.stack([(index == expert).sum() for expert in range(experts)]) * experts
        total = total + (frequency_E / (chosen * len(places)) * share_E).sum()
    return total / len(segments)


def published(model: Transformer, batch: Batch, config: TrainConfig) -> Tensor:
    """The loss of a whole batch by plain operators."""
    hidden = model.hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    total = F.cross_entropy(model.head(hidden.x_BTD).flatten(0, 1), batch.targets_BT.flatten())
    balances = [balance(each, batch.segments_BT) for each in hidden.routing]
    total = total + config.balance_weight * torch.stack(balances).mean()
    for depth in range(1, len(model.mtp) + 1):
        hidden = model.mtp_hidden(hidden, batch.tokens_BT, segments_BT=batch.segments_BT, depth=depth)
        wanted = torch.full((4, TIME - depth), -100)
        for row, place in torch.cartesian_prod(torch.arange(4), torch.arange(TIME - depth)).tolist():
            if batch.segments_BT[row, place] == batch.segments_BT[row, place + depth]:
                wanted[row, place] = batch.targets_BT[row, place + depth]
        mean = F.cross_entropy(model.head(hidden.x_BTD).flatten(0, 1), wanted.flatten())
        total = total + config.mtp_weight / len(model.mtp) * mean
    return total


@pytest.mark.parametrize(("micro_batches", "threads"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_the_cut_does_not_matter_to_any_term(
    shape: ModelConfig, batch: Batch, recipe: TrainConfig, micro_batches: int, threads: int
) -> None:
    model = Transformer.create(shape.replace(num_nextn_predict_layers=2), 0)
    config = recipe.replace(micro_batches=micro_batches, mtp_weight=1.0, balance_weight=1.0)
    parameters = list(model.parameters())
    expected = published(model, batch, config)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    with ThreadDataParallel(threads) as workers:
        metrics, loads = backward(model, batch, config, next_token_loss, parameters, workers)
    for parameter, theirs in zip(parameters, wanted, strict=True):
        assert theirs is not None and parameter.grad is not None
        assert (parameter.grad - theirs).norm() <= 1e-5 * theirs.norm() + 1e-8
    once = next_token_loss(model, batch, config)
    assert once.total.item() == pytest.approx(expected.item(), rel=1e-5)
    plain = F.cross_entropy(
        model(batch.tokens_BT, segments_BT=batch.segments_BT).flatten(0, 1), batch.targets_BT.flatten()
    )
    assert metrics["loss"] == pytest.approx(plain.item(), rel=1e-5)
    tokens = sum(map(sum, LENGTHS))
    pairs = [sum(max(0, length - depth) for row in LENGTHS for length in row) for depth in (1, 2)]
    places = [tokens] * (len(loads) - 2) + pairs
    assert [int(load.sum()) for load in loads] == [each * shape.num_experts_per_tok for each in places]


def test_a_step_without_a_target_is_no_error(model: Transformer, batch: Batch, recipe: TrainConfig) -> None:
    silent = Batch(batch.tokens_BT, torch.full_like(batch.targets_BT, -100), batch.segments_BT)
    loss = next_token_loss(model, silent, recipe.replace(balance_weight=0.0))
    assert loss.total.item() == 0.0 and loss.metrics == {"loss": 0.0, "mtp_loss": 0.0}
