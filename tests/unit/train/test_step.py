"""A run of training beside the same run by torch's own optimizer, torch's clipping, and rates worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from sprat.config import OptimConfig, TrainConfig
from sprat.config.model import ModelConfig
from sprat.data.loader import MixedBatchSource
from sprat.model import Transformer
from sprat.train import next_token_loss, train
from sprat.train.losses import mtp_outputs
from sprat.trust import Run

LIMIT, RATE, DECAY, SPEED = 0.5, 0.01, 0.1, 0.002
FACTORS = [0.5, 1.0, 1.0, 1.0, 2 / 3, 1 / 3]  # two steps up, then full, then down over the last half of six
OPTIM = OptimConfig(
    name="adamw", adam_lr=RATE, weight_decay=DECAY, warmup_steps=2, decay_fraction=0.5, final_lr_fraction=0.0,
    grad_clip=LIMIT, schedule="wsd",
)  # fmt: skip


@torch.no_grad()
def wanted_bias(model: Transformer, source: MixedBatchSource, step: int) -> list[torch.Tensor]:
    """Where each router's bias must stand after the step: idle experts up, busy ones down (arXiv 2408.15664)."""
    batch = source.batch(step)
    hidden = model.hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
    routing = [(each, batch.segments_BT > 0) for each in hidden.routing]
    for ahead, _ in mtp_outputs(model, hidden, batch):
        inside_BT = (batch.segments_BT[:, 1:] == batch.segments_BT[:, :-1]) & (batch.segments_BT[:, 1:] > 0)
        routing += [(each, inside_BT) for each in ahead.routing]
    found = []
    for layer, (each, real_BT) in zip(model.moe_layers(), routing, strict=True):
        load = [int((each.index_NK[real_BT.flatten()] == expert).sum()) for expert in range(each.scores_NE.shape[1])]
        mean = sum(load) / len(load)
        signs = torch.tensor([float(one < mean) - float(one > mean) for one in load])
        found.append(layer.gate.e_score_correction_bias + SPEED * signs)
    return found


def test_training_is_what_its_recipe_says(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: Callable[[str], Run]
) -> None:
    config = recipe.replace(steps=6, log_every=1, checkpoint_every=99, optim=OPTIM, bias_update_speed=SPEED)
    ours, theirs = Transformer.create(shape, 0), Transformer.create(shape, 0)
    run = new_run("ours")
    train(ours, source, config, run)
    parameters = dict(theirs.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=OPTIM.betas)
    norms = []
    for step, factor in enumerate(FACTORS):
        bias = wanted_bias(theirs, source, step)
        optimizer.zero_grad()
        next_token_loss(theirs, source.batch(step), config).total.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), LIMIT)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        optimizer.step()
        for layer, moved in zip(theirs.moe_layers(), bias, strict=True):
            layer.gate.e_score_correction_bias.copy_(moved)
    assert min(norms) > LIMIT  # every step was clipped
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5, msg=name)
    assert all(layer.gate.e_score_correction_bias.any() for layer in ours.moe_layers())
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr_factor"] for row in rows] == pytest.approx(FACTORS)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)
