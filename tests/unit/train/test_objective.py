"""The loss counts what it says it counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sprat.config import TrainConfig
from sprat.data.loader import Batch, MixedBatchSource
from sprat.model import Transformer
from sprat.train.objective import next_token_loss


def test_loss_is_cross_entropy_of_the_models_own_logits(
    model: Transformer, source: MixedBatchSource, recipe: TrainConfig
) -> None:
    batch = source.batch(0)
    loss = next_token_loss(model, batch, recipe.replace(mtp_weight=0.0, balance_weight=0.0))
    logits = model(batch.tokens_BT, segments_BT=batch.segments_BT)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten())
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.metrics == {"loss": pytest.approx(expected.item(), rel=1e-5)}


def test_loads_count_every_choice_of_a_token_once(
    model: Transformer, source: MixedBatchSource, recipe: TrainConfig
) -> None:
    """Padding has no vote; in MTP a pair is one token's, and a pair across a border is nobody's."""
    batch, chosen = source.batch(0), model.config.num_experts_per_tok
    loss = next_token_loss(model, batch, recipe)
    assert len(loss.expert_loads) == len(model.moe_layers())
    rows = batch.segments_BT.tolist()
    tokens = sum(segment > 0 for row in rows for segment in row)
    pairs = sum(a == b > 0 for row in rows for a, b in zip(row, row[1:], strict=False))
    assert pairs < tokens < batch.tokens_BT.numel()
    assert [int(load.sum()) for load in loss.expert_loads] == [tokens * chosen] * (len(loss.expert_loads) - 1) + [
        pairs * chosen
    ]


def test_mtp_learns_the_token_after_the_next(model: Transformer, recipe: TrainConfig) -> None:
    """On rows that only MTP can see through, its loss falls and its weight is felt in the total."""
    tokens = torch.arange(33).remainder(7).expand(2, 33)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 32, dtype=torch.long))
    with_mtp = next_token_loss(model, batch, recipe.replace(mtp_weight=0.5, balance_weight=0.0))
    without = next_token_loss(model, batch, recipe.replace(mtp_weight=0.0, balance_weight=0.0))
    difference = with_mtp.total.item() - without.total.item()
    assert difference == pytest.approx(0.5 * with_mtp.metrics["mtp_loss"], rel=1e-4)
    hidden = model.mtp_hidden(model.hidden(batch.tokens_BT), batch.tokens_BT)
    logits = model.head(hidden.x_BTD)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())
    assert with_mtp.metrics["mtp_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_mtp_does_not_look_across_documents(model: Transformer, recipe: TrainConfig) -> None:
    segments = torch.tensor([[1] * 4 + [2] * 4])
    tokens = torch.arange(8).unsqueeze(0)
    targets = torch.tensor([[1, 2, 3, -100, 5, 6, 7, -100]])
    mine = next_token_loss(model, Batch(tokens, targets, segments), recipe).metrics["mtp_loss"]
    assert torch.isfinite(torch.tensor(mine))
    hidden = model.hidden(tokens, segments_BT=segments)
    out = model.mtp_hidden(hidden, tokens, segments_BT=segments)
    wanted = torch.tensor([2, 3, -100, -100, 6, 7, -100])
    expected = F.cross_entropy(model.head(out.x_BTD)[0], wanted)
    assert mine == pytest.approx(expected.item(), rel=1e-5)


def test_balance_term_is_one_for_an_even_router(
    model: Transformer, source: MixedBatchSource, recipe: TrainConfig
) -> None:
    base = recipe.replace(mtp_weight=0.0, balance_weight=0.0)
    plain = next_token_loss(model, source.batch(0), base).total.item()
    weighted = next_token_loss(model, source.batch(0), base.replace(balance_weight=1.0)).total.item()
    assert 0.95 < weighted - plain < 2.5
