"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one more block that looks one token further.

Module ``k`` joins the hidden state of depth ``k - 1`` at position ``i`` with the embedding of token ``i + k``,
maps the pair back to the hidden width, runs one decoder block of its own, and predicts token ``i + k + 1`` with
the main model's embedding and head. In training it densifies the signal; in serving it drafts tokens. The pair
is ordered embedding first, as in the published weights (the paper's equation 21 writes it the other way round).
"""

# B batch, T time, D hidden

from __future__ import annotations

import torch
from torch import Tensor, nn

from sprat.config.model import ModelConfig
from sprat.model.forward_context import ForwardContext
from sprat.model.layers import Linear, RMSNorm
from sprat.model.moe import Routing


class MTP(nn.Module):
    """One prediction module around ``block``; ``shared_norm`` stands before the main model's head."""

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = block
        self.shared_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_BTD: Tensor, embedded_BTD: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Routing | None]:
        """(Normed hidden of the depth before, embedding of the next tokens) -> [B, T, D], ready for the head.

        Beside it what the block's router decided, if it has one.
        """
        pair = torch.cat((self.enorm(embedded_BTD), self.hnorm(hidden_BTD)), -1)
        out_BTD, routing = self.block(self.eh_proj(pair), context)
        return self.shared_norm(out_BTD), routing
