"""What users get: no token dropped, DeepSeek's routing rules, and a balance loss that is the paper's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sprat.model import Experts, MoE, Routing, Transformer, balance_loss
from sprat.model.moe import combine, dispatch

from .conftest import tiny

VARIANTS = {
    "v3 grouped": {},
    "v3 ungrouped": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "v2 greedy": {"architecture": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy"},
    "v2 grouped": {"architecture": "deepseek_v2", "scoring_func": "softmax", "topk_method": "group_limited_greedy"},
    "no shared expert": {"n_shared_experts": 0},
}


def layer(**changes: object) -> MoE:
    return Transformer.create(tiny(**changes), 4).moe_layers()[0]


def by_hand(moe: MoE, x_ND: Tensor, routing: Routing) -> Tensor:
    """Each token through each of its experts, one at a time."""
    experts, rows = moe.experts, []
    for x_D, index_K, weight_K in zip(x_ND, routing.index_NK, routing.weight_NK, strict=True):
        total = torch.zeros_like(x_D) if moe.shared_experts is None else moe.shared_experts(x_D)
        for expert, weight in zip(index_K.tolist(), weight_K, strict=True):
            gate, up = experts.w_gate_EFD[expert] @ x_D, experts.w_up_EFD[expert] @ x_D
            total = total + weight * (experts.w_down_EDF[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("rows", [1, 40, 150])  # one token, stock operators, blocks in cache
@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_is_dropped_and_gradients_are_those_of_single_tokens(name: str, rows: int) -> None:
    moe = layer(**VARIANTS[name])
    x_BTD = torch.randn(1, rows, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out, routing = moe(x_BTD)
    expected = by_hand(moe, x_BTD[0], routing)
    assert (out[0] - expected).abs().max() < 1e-5
    assert int(routing.load_E.sum()) == rows * 2
    inputs = [x_BTD, *moe.parameters()]
    pull = torch.randn(rows, 24, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(out[0], inputs, pull, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, pull, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine is not None and other is not None
        assert (mine - other).abs().max() < 1e-4


def test_experts_in_two_places_give_what_they_give_in_one() -> None:
    """Pairs travel to where their expert lives, between dispatch and combine, and their results come back."""
    moe = layer(n_shared_experts=0)
    x_ND = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    routing = moe.gate(x_ND)
    halves = [Experts(4, 24, 8), Experts(4, 24, 8)]
    for half, first in zip(halves, (0, 4), strict=True):
        half.load_state_dict({name: weight[first : first + 4] for name, weight in moe.experts.state_dict().items()})
    x_MD, token_M, weight_M = dispatch(x_ND, routing)
    rows = routing.rows_E.split(4)
    sent = x_MD.split([int(each.sum()) for each in rows])
    back = torch.cat([half(part, count) for half, part, count in zip(halves, sent, rows, strict=True)])
    out_ND = combine(back, token_M, weight_M, x_ND)
    assert (out_ND - by_hand(moe, x_ND, routing)).abs().max() < 1e-5
    assert torch.equal(token_M[: int(routing.rows_E[0])], (routing.index_NK == 0).any(1).nonzero().flatten())


def test_the_correction_bias_moves_the_choice_and_never_the_weight() -> None:
    moe = layer(n_group=1, topk_group=1)
    x_BTD = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(1))
    moe.gate.e_score_correction_bias[3] = 10.0
    routing = moe(x_BTD)[1]
    assert (routing.index_NK == 3).any(1).all()
    chosen = routing.scores_NE.gather(1, routing.index_NK)
    expected = 1.5 * chosen / chosen.sum(1, keepdim=True)
    assert (routing.weight_NK - expected).abs().max() < 1e-6


def test_groups_limit_where_a_token_may_go() -> None:
    moe = layer(n_group=4, topk_group=1)
    routing = moe(torch.randn(1, 50, 24, generator=torch.Generator().manual_seed(1)))[1]
    groups = routing.index_NK // 2
    assert (groups == groups[:, :1]).all()
    best = routing.scores_NE.unflatten(1, (4, 2)).sum(-1).argmax(-1)
    assert torch.equal(groups[:, 0], best)


def test_v2_s_greedy_goes_wherever_the_best_experts_are() -> None:
    """MoEGate of DeepSeek-V2's published code: the best scores of all experts, whatever the groups."""
    moe = layer(architecture="deepseek_v2", scoring_func="softmax", topk_method="greedy", n_group=4, topk_group=1)
    routing = moe(torch.randn(1, 50, 24, generator=torch.Generator().manual_seed(1)))[1]
    assert torch.equal(routing.index_NK.sort(1).values, routing.scores_NE.topk(2).indices.sort(1).values)


def test_balance_loss_is_the_papers_formula() -> None:
    moe = layer()
    x_BTD = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(7) < torch.tensor([[7], [4]])
    routing = moe(x_BTD)[1]
    scores, index = routing.scores_NE.view(2, 7, 8), routing.index_NK.view(2, 7, 2)
    for mask, lengths in ((None, (7, 7)), (valid.flatten(), (7, 4))):
        total = 0.0
        for row, length in enumerate(lengths):
            for expert in range(8):
                chosen = sum(int(expert in index[row, t].tolist()) for t in range(length))
                share = sum((scores[row, t, expert] / scores[row, t].sum()).item() for t in range(length)) / length
                total += 8 / (2 * length) * chosen * share
        assert balance_loss(dataclasses.replace(routing, valid_N=mask), 2).item() == pytest.approx(total / 2, rel=1e-5)


def test_balance_loss_is_one_when_even_and_more_when_not() -> None:
    even = torch.full((8, 4), 0.5)
    index = torch.arange(8)[:, None] % 4
    routing = Routing(even, index, torch.ones(8, 1), *[torch.full((4,), 2)] * 2)
    assert float(balance_loss(routing, 1)) == pytest.approx(1.0)
    skew = torch.tensor([[0.9, 0.1, 0.1, 0.1]]).expand(8, 4)
    assert float(balance_loss(Routing(skew, index * 0, torch.ones(8, 1), *[torch.tensor([8, 0, 0, 0])] * 2), 1)) > 2
