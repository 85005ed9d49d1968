"""DeepSeekMoE (arXiv 2401.06066; DeepSeek-V3, arXiv 2412.19437, section 2.1.2): many small experts, few at work.

The trick. A feed-forward layer is cut into many narrow experts; each token uses the few that its router
scores highest, and one or more *shared* experts that see everything. Parameters grow, work per token does not.

Routing. V3 scores with a sigmoid and keeps experts equally busy without pulling on the loss: a bias
``e_score_correction_bias`` is added to the scores for the *choice* only, never for the weights, and the
trainer moves it once a step, up for idle experts and down for busy ones. A tiny sequence-wise balance loss
(``balance_loss``) guards single sequences. V2 scores with a softmax. Groups of experts (nodes, in a cluster) can be
limited: V3 (``noaux_tc``) ranks a group by its two best experts, V2's ``group_limited_greedy`` by its best; V2's
``greedy`` takes the best experts wherever they are, whatever ``n_group`` and ``topk_group`` say (``MoEGate`` of
the published modeling_deepseek.py; DeepseekV2TopkRouter of transformers). V2's ``norm_topk_prob`` is not read, as in
transformers; no published V2 sets it.

Computing. Token-expert pairs are sorted by expert, so that each expert's tokens lie side by side (``dispatch``), and
three grouped matrix products serve all experts (``Experts``). The results are added back weighted (``combine``). No
token is dropped and no slot is padded. Left out: expert parallelism (it belongs to ``parallel``).

Given routes. Where two experts are as good as equal the last bit of a sum decides, and a trainer that decides otherwise
than the sampler trains another policy. So the choice may be given: experts are those, and only their weights are the
router's own, from its own scores and with gradient ("rollout routing replay", Ma et al. 2025, arXiv 2510.11370).
``flipped_N`` says where it would have chosen otherwise.
"""

# B batch, T time, N = B * T tokens, D hidden, E experts, K chosen experts, F expert width, M = N * K pairs

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprat.config.model import ModelConfig
from sprat.kernels import ops
from sprat.model.layers import Linear, LinearBase, product_weight


@dataclass(frozen=True)
class Routing:
    """What one router decided for N places.

    Attributes:
        scores_NE: affinities (float32, with gradient), before the bias.
        index_NK: chosen experts.
        weight_NK: their weights (with gradient).
        rows_E: pairs that each expert computes, those of padding included (long).
        load_E: tokens that each expert received (long): the pairs without those of padding.
        valid_N: bool, False on padding; None where all places hold tokens.
        flipped_N: bool, True where the choice was given and the router's own would have been another; None where none
            was given.
    """

    scores_NE: Tensor
    index_NK: Tensor
    weight_NK: Tensor
    rows_E: Tensor
    load_E: Tensor
    valid_N: Tensor | None = None
    flipped_N: Tensor | None = None


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202): ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., D] -> [..., D]."""
        if type(self.gate_proj) is Linear and type(self.up_proj) is Linear:
            hidden = ops.swiglu(x, product_weight(self.gate_proj), product_weight(self.up_proj))
        else:
            hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(hidden)
        return out


class Gate(nn.Module):
    """The router. ``e_score_correction_bias`` [E] float32 exists for ``noaux_tc`` only; the trainer moves it."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.has_bias = config.topk_method == "noaux_tc"
        if self.has_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor, valid_N: Tensor | None = None, given_NK: Tensor | None = None) -> Routing:
        """Choose experts for ``x_ND``, in float32 whatever the model's dtype; ``valid_N`` is False on padding.

        ``given_NK`` (long) are the experts to take instead; a row of -1 leaves the choice to the router.
        """
        config = self.config
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid() if config.scoring_func == "sigmoid" else logits_NE.softmax(-1)
        with torch.no_grad():
            choice_NE = scores_NE + self.e_score_correction_bias if self.has_bias else scores_NE
            if config.limits_groups:
                choice_NE = self._limit_groups(choice_NE)
            index_NK = choice_NE.topk(config.num_experts_per_tok, -1, sorted=False).indices
            flipped_N = None
            if given_NK is not None:
                is_given_N1 = given_NK[:, :1] >= 0
                flipped_N = (index_NK.sort(-1).values != given_NK.sort(-1).values).any(-1) & is_given_N1[:, 0]
                index_NK = torch.where(is_given_N1, given_NK, index_NK)
            rows_E = load_E = torch.bincount(index_NK.flatten(), minlength=config.n_routed_experts)
            if valid_N is not None:
                load_E = rows_E - torch.bincount(index_NK[~valid_N].flatten(), minlength=config.n_routed_experts)
        weight_NK = scores_NE.gather(1, index_NK)
        if config.norm_topk_prob and config.architecture == "deepseek_v3":
            weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
        if config.routed_scaling_factor != 1.0:
            weight_NK = weight_NK * config.routed_scaling_factor
        return Routing(scores_NE, index_NK, weight_NK, rows_E, load_E, valid_N, flipped_N)

    def _limit_groups(self, choice_NE: Tensor) -> Tensor:
        """Put experts outside the ``topk_group`` best groups out of reach."""
        config = self.config
        grouped_NGe = choice_NE.unflatten(1, (config.n_group, -1))
        is_v3 = config.topk_method == "noaux_tc"
        rank_NG = grouped_NGe.topk(2, -1).values.sum(-1) if is_v3 else grouped_NGe.amax(-1)
        best_Ng = rank_NG.topk(config.topk_group, -1, sorted=False).indices
        masked_NG = torch.ones_like(rank_NG, dtype=torch.bool).scatter_(1, best_Ng, False)
        limited_NE: Tensor = grouped_NGe.masked_fill(masked_NG.unsqueeze(-1), float("-inf")).flatten(1)
        return limited_NE


class Experts(LinearBase):
    """The routed experts, stacked: SwiGLU with ``w_gate_EFD``, ``w_up_EFD`` [E, F, D] and ``w_down_EDF`` [E, D, F].

    A replacement (INT4, LoRA) offers the same three weights, or overrides ``forward``.
    """

    weight_names: ClassVar[tuple[str, ...]] = ("w_gate_EFD", "w_up_EFD", "w_down_EDF")

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.w_gate_EFD = nn.Parameter(torch.empty(experts, width, hidden))
        self.w_up_EFD = nn.Parameter(torch.empty(experts, width, hidden))
        self.w_down_EDF = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_MD: Tensor, rows_E: Tensor) -> Tensor:
        """``x_MD`` sorted by expert, ``rows_E[e]`` rows for expert ``e`` -> [M, D]."""
        ends_E = rows_E.cumsum(0).to(torch.int32)
        hidden_MF = ops.grouped_swiglu(x_MD, self.w_gate_EFD, self.w_up_EFD, ends_E)
        return ops.grouped_mm(hidden_MF, self.w_down_EDF, ends_E)


def dispatch(x_ND: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """Sort token-expert pairs by expert -> (their inputs [M, D], the token of each pair, its weight).

    ``x_ND`` may be any tensor with a row for each token; ``routing.rows_E`` says where an expert's pairs end.
    """
    order_M = routing.index_NK.flatten().argsort(stable=True)
    token_M = order_M.div(routing.index_NK.shape[1], rounding_mode="floor")
    return x_ND.index_select(0, token_M), token_M, routing.weight_NK.flatten().index_select(0, order_M)


def combine(y_MD: Tensor, token_M: Tensor, weight_M: Tensor, like_ND: Tensor) -> Tensor:
    """The weighted sum of what each token's experts gave, in shape and dtype of ``like_ND`` [N, D]."""
    weighted_MD = y_MD * weight_M.unsqueeze(1).to(like_ND.dtype)
    return torch.zeros_like(like_ND).index_add(0, token_M, weighted_MD)


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts: MLP | None = None
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(
        self, x_BTD: Tensor, valid_BT: Tensor | None = None, given_BTK: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """(output [B, T, D], what the router decided); ``valid_BT`` is False on padding, which is not counted.

        ``given_BTK``: see ``Gate.forward``.
        """
        x_ND = x_BTD.flatten(0, 1)
        given_NK = None if given_BTK is None else given_BTK.flatten(0, 1)
        routing: Routing = self.gate(x_ND, None if valid_BT is None else valid_BT.flatten(), given_NK)
        x_MD, token_M, weight_M = dispatch(x_ND, routing)
        out_ND = combine(self.experts(x_MD, routing.rows_E), token_M, weight_M, x_ND)
        if self.shared_experts is not None:
            out_ND = out_ND + self.shared_experts(x_ND)
        return out_ND.view_as(x_BTD), routing


def balance_loss(routing: Routing, batch: int) -> Tensor:
    """Sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, eq. 17-20), mean over ``batch`` sequences.

    ``f_i = E / (K T) * (tokens that chose expert i)``, ``P_i = mean of normalized scores``, ``sum_i f_i P_i``:
    1 when even, larger when not. Padding is left out. The caller multiplies by alpha.
    """
    experts, chosen = routing.scores_NE.shape[1], routing.index_NK.shape[1]
    prob_BTE = (routing.scores_NE / routing.scores_NE.sum(-1, keepdim=True)).unflatten(0, (batch, -1))
    count_BE = torch.zeros(batch, experts, device=prob_BTE.device)
    index_BX = routing.index_NK.view(batch, -1)
    if routing.valid_N is None:
        count_BE.scatter_add_(1, index_BX, torch.ones(1, 1, device=count_BE.device).expand(index_BX.shape))
        tokens_B1 = torch.full((batch, 1), float(prob_BTE.shape[1]), device=count_BE.device)
        mean_BE = prob_BTE.mean(1)
    else:
        valid_BT1 = routing.valid_N.to(prob_BTE.dtype).view(batch, -1, 1)
        count_BE.scatter_add_(1, index_BX, valid_BT1.expand(-1, -1, chosen).reshape(batch, -1))
        tokens_B1 = valid_BT1.sum(1).clamp(min=1)
        mean_BE = (prob_BTE * valid_BT1).sum(1) / tokens_B1
    frequency_BE = count_BE * (experts / chosen) / tokens_B1
    loss: Tensor = (frequency_BE * mean_BE).sum(-1).mean()
    return loss
