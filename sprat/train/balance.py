"""Expert balance without an auxiliary loss: the router's bias moves, once a step.

Each expert's bias is added to its score when experts are chosen, and only then; the weight with which a
chosen expert speaks does not see it. After a step the bias of an expert that got less than the mean load
rises by ``speed`` and that of an expert that got more falls (Wang et al., arXiv 2408.15664, algorithm 1;
DeepSeek-V3, arXiv 2412.19437, section 2.1.2). No gradient is bent to keep experts busy.

The loads are those of the whole step, all micro-batches together: a bias that moved in between would make
the same batch route differently depending on how it was cut.
"""

# E experts

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sprat.model import Transformer


def update_bias(model: Transformer, expert_loads: Sequence[Tensor], speed: float) -> None:
    """Move the bias of every router that has one; call it once, after the optimizer's step.

    Args:
        model: its ``moe_layers()`` are in the order of ``expert_loads``.
        expert_loads: for each MoE layer that ran, load_E: how many tokens chose each expert in the whole step.
            Layers at the end that did not run (MTP modules without a loss) are left as they are, and so is the bias
            of a frozen router: under adapters the base does not move.
        speed: by how much a bias moves; 0 leaves it.
    """
    if speed == 0:
        return
    with torch.no_grad():
        for layer, load_E in zip(model.moe_layers(), expert_loads, strict=False):
            if layer.gate.has_bias and layer.gate.weight.requires_grad:
                load_E = load_E.to(layer.gate.e_score_correction_bias.dtype)
                layer.gate.e_score_correction_bias.add_((load_E.mean() - load_E).sign_(), alpha=speed)


def max_violation(expert_loads: Sequence[Tensor]) -> float:
    """MaxVio, the worst layer's: how far the busiest expert lies above the mean load, as a fraction of it.

    0 is perfect balance; E - 1 is one expert taking everything (arXiv 2408.15664, section 4.1). 0 for no layers.
    """
    ratios = [float(load_E.max() * len(load_E)) / max(1.0, float(load_E.sum())) for load_E in expert_loads]
    return max(ratios, default=1.0) - 1.0
