"""A head in another format (quantised, low-rank) is asked for its dense weight, and for nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprat.config import DistillConfig, OptimConfig, RLConfig
from sprat.config.model import ModelConfig
from sprat.data.loader import Batch
from sprat.data.pack import pack
from sprat.eval.bits_per_byte import bits_per_byte
from sprat.model import Linear, Transformer
from sprat.model.layers import replace_linears
from sprat.post.distill import distillation_loss
from sprat.post.rl import update
from sprat.post.rl.rewards import Response
from sprat.post.rl.rollout import Rollout
from sprat.train import next_token_loss, optim

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]


class LowRank(nn.Module):
    """A frozen matrix and a product of two small ones that learns: what the seam of ``Linear`` lets stand there."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_buffer("frozen", base.weight.detach().clone())
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator))

    def dense_weight(self) -> Tensor:
        """The sum, [out, in]."""
        frozen: Tensor = self.frozen  # type: ignore[assignment]
        return frozen + self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        return F.linear(x, self.dense_weight())


@pytest.fixture
def swapped(shape: ModelConfig) -> Transformer:
    """A model with such a head."""
    model = Transformer.create(shape.replace(num_nextn_predict_layers=1), 0)
    replace_linears(model, lambda name, linear: LowRank(linear) if name == "head" else None)  # type: ignore[arg-type]
    return model


def test_all_losses_and_measures_see_it(swapped: Transformer) -> None:
    packed = pack([(TEXT, None)], len(TEXT) - 1)
    tokens = torch.tensor([TEXT])
    nats = F.cross_entropy(swapped(tokens[:, :-1])[0], tokens[0, 1:])
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(1, 15, dtype=torch.long))
    assert bits_per_byte(swapped, packed, 15) == pytest.approx(nats.item() / torch.tensor(2.0).log().item(), rel=1e-5)
    for loss_fn in (next_token_loss, distillation_loss(copy.deepcopy(swapped), DistillConfig(mode="both"))):
        loss = loss_fn(swapped, batch, DistillConfig())
        assert loss.metrics["loss"] == pytest.approx(nats.item(), rel=1e-5)
        pulls = torch.autograd.grad(loss.total, list(swapped.head.parameters()))
        assert all(pull.any() for pull in pulls)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_rl_learns_through_it(swapped: Transformer, cap: float | None) -> None:
    with torch.no_grad():
        logprobs = swapped(torch.tensor([TEXT]))[0].log_softmax(-1)
    said = [float(logprobs[place - 1, TEXT[place]]) for place in range(4, len(TEXT))]
    rollouts = [Rollout("t", TEXT[:4], TEXT[4:], said, Response("", "", True), 1.0, 1.0, 0)]
    optimizer = optim.build(swapped, OptimConfig())
    before = [value.detach().clone() for value in swapped.head.parameters()]
    reference = copy.deepcopy(swapped)
    config = RLConfig(kl_weight=0.1, minibatch=1, importance_cap=cap)
    found: dict[str, Any] = update.update_policy(swapped, optimizer, rollouts, torch.ones(1), config, 1, reference)
    assert found["mismatch"] < 1e-5
    assert all((value != old).any() for value, old in zip(swapped.head.parameters(), before, strict=True))
