"""Preference pairs: the published losses, their gradient, and a policy that comes to prefer what was chosen."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from sprat.config import Config, LoopConfig
from sprat.config.finetune import DPOConfig
from sprat.data.example import PreferencePair
from sprat.data.loader import MixedBatchSource, gather_rows
from sprat.data.record import Where
from sprat.errors import DataError
from sprat.model import Transformer
from sprat.post import dpo
from sprat.post.examples import EncodedExamples, encode_examples
from sprat.tokens import Message, Tokenizer
from sprat.train import loop
from sprat.trust.run import Run

Open = Callable[[str, Config], Run]
CONFIG = DPOConfig.model_validate({"steps": 30, "seq_len": 48, "beta": 0.3, "optim": {"adam_lr": 0.003}})
WHERE = Where("pairs.jsonl", 1)


def encoded(tokenizer: Tokenizer, seq_len: int = CONFIG.seq_len) -> EncodedExamples:
    pairs = [
        PreferencePair((Message("user", "1 2"),), (Message("assistant", good),), (Message("assistant", bad),), WHERE)
        for good, bad in [("7", "3"), ("77", "3 3 3"), ("7 7", "1")]
    ]
    return encode_examples(tokenizer, pairs, CONFIG.replace(seq_len=seq_len))


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("sigmoid", lambda c, r, m, n, beta: math.log1p(math.exp(-beta * (c - r)))),
        ("sigmoid_norm", lambda c, r, m, n, beta: math.log1p(math.exp(-beta * (c / m - r / n)))),
        ("ipo", lambda c, r, m, n, beta: (c / m - r / n - 0.5 / beta) ** 2),
    ],
)
def test_the_losses_are_those_of_the_papers(name: str, formula: Callable[..., float], beta: float) -> None:
    rows = [(0.3, -2.5, 3.0, 7.0), (-4.0, 5.0, 11.0, 1.0), (0.0, 0.0, 2.0, 2.0)]
    ratios = dpo.LogRatios(*torch.tensor(rows, dtype=torch.float64).T)
    found = dpo.LOSSES[name](ratios, beta)
    assert found.tolist() == pytest.approx([formula(*row, beta) for row in rows], rel=1e-12)


@pytest.mark.parametrize("name", list(dpo.LOSSES))
def test_loss_and_gradient_are_those_of_whole_logits(name: str, model: Transformer, tokenizer: Tokenizer) -> None:
    """By plain autograd over [B, T, V] logits, one answer at a time, unpacked and with a reference of its own."""
    config = CONFIG.replace(loss=name)
    reference = Transformer.create(model.config, 5)
    sequences, packed = encoded(tokenizer).sequences, encoded(tokenizer).rows
    data = list(zip(sequences[::2], sequences[1::2], strict=True))
    batch = gather_rows(packed, range(3))

    def logprob(of: Transformer, ids: list[int], mask: list[int]) -> torch.Tensor:
        logits = of(torch.tensor([ids]))[0, :-1].log_softmax(-1)
        picked = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return (picked * torch.tensor(mask[1:])).sum()

    model.train()
    expected = torch.zeros(())
    for good, bad in data:
        with torch.no_grad():
            refs = [logprob(reference, *answer) for answer in (good, bad)]
        c, r = (logprob(model, *answer) - ref for answer, ref in zip((good, bad), refs, strict=True))
        m, n = sum(good[1]), sum(bad[1])
        margin = c - r if name == "sigmoid" else c / m - r / n
        each = (margin - 1 / (2 * config.beta)) ** 2 if name == "ipo" else -torch.sigmoid(config.beta * margin).log()
        expected = expected + each / len(data)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(expected, parameters, allow_unused=True)
    loss_fn = dpo.preference_loss(config, dpo.reference_logprobs(reference, packed))
    parts = [loss_fn(model, batch[a:b], LoopConfig(), batch) for a, b in ((0, 2), (2, 3))]  # shares add up
    assert sum(part.metrics["loss"] for part in parts) == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(sum(part.total for part in parts), parameters, allow_unused=True)
    scale = max(float(g.abs().max()) for g in gradient if g is not None)
    for ours, theirs in zip(found, gradient, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


def test_the_policy_comes_to_prefer_what_was_chosen(model: Transformer, tokenizer: Tokenizer, open_stage: Open) -> None:
    packed = encoded(tokenizer).rows
    reference = dpo.reference_logprobs(model, packed)
    run = open_stage("dpo", CONFIG)
    loss_fn = dpo.preference_loss(CONFIG, reference)
    source = MixedBatchSource([(packed, 1.0)], 3, 0)
    result = loop.train(model, source, CONFIG.replace(batch_rows=3), run, loss_fn=loss_fn)
    before, after = math.log(2), result.loss  # nobody has gained anything before the first step
    assert after < 0.5 * before
    margins = dpo.preference_loss(CONFIG, reference)(model, gather_rows(packed, range(3)), CONFIG).metrics
    assert margins["reward_accuracy"] == pytest.approx(1.0) and margins["reward_margin"] > 1


def test_a_pair_that_fits_no_row_is_left_out(tokenizer: Tokenizer) -> None:
    assert encoded(tokenizer, 20).counts["too_long"] == 2  # bos user 1 _ 2 assistant think /think 7 eos, twice
    with pytest.raises(DataError, match="the shortest of 3 examples has 20 tokens, a row holds 17"):
        encoded(tokenizer, 16)
