"""Another format takes the place of the matrices that it names, and the model computes what that format stands for."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprat.model import Experts, KVCache, Linear, Transformer
from sprat.model.layers import LinearBase, replace_linears


class LowRank(nn.Module):
    """A frozen linear and a product of two small matrices beside it (LoRA, arXiv 2106.09685, section 4.1)."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.up, self.down = (torch.full(shape, 0.05) for shape in ((base.out_features, 2), (2, base.in_features)))

    def dense_weight(self) -> Tensor:
        """The sum, [out, in]."""
        return self.base.weight + self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


@torch.no_grad()
def test_adapters_in_all_linears_compute_what_their_sums_do(model: Transformer) -> None:
    """The sums are made by hand, in the weights themselves; forward, MTP, and absorbed from a cache."""
    adapted, merged = copy.deepcopy(model), copy.deepcopy(model)
    replace_linears(adapted, lambda name, linear: LowRank(linear) if isinstance(linear, Linear) else None)
    count = 0
    for module in merged.modules():
        if isinstance(module, Linear):
            module.weight += 0.05 * 0.05 * 2
            count += 1
    assert sum(isinstance(module, LowRank) for module in adapted.modules()) == count > 10
    tokens = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
    assert (merged(tokens) - model(tokens)).abs().max() > 1e-2
    assert (adapted(tokens) - merged(tokens)).abs().max() < 1e-4
    cache = KVCache.create(model.config, 2, 9)
    steps = [adapted(tokens[:, start : start + 3], cache=cache) for start in range(0, 9, 3)]
    assert (torch.cat(steps, 1) - merged(tokens)).abs().max() < 1e-4
    if model.mtp:
        ours, theirs = (each.mtp_hidden(each.hidden(tokens), tokens).x_BTD for each in (adapted, merged))
        assert (ours - theirs).abs().max() < 1e-4


def test_every_matrix_is_offered_but_the_routers_and_what_is_left_stays(model: Transformer) -> None:
    offered: dict[str, LinearBase] = {}
    before = dict(model.named_modules())
    replace_linears(model, lambda name, linear: offered.setdefault(name, linear) and None)  # type: ignore[func-returns-value]
    wide = {name for name, weight in model.named_parameters() if weight.dim() > 1 and not name.endswith("gate.weight")}
    assert {f"{name}.{leaf}" for name, linear in offered.items() for leaf in linear.weight_names} == wide
    assert dict(model.named_modules()) == before
    only = "layers.1.self_attn.o_proj"
    replace_linears(model, lambda name, linear: nn.Identity() if name == only else None)
    assert {name for name, module in model.named_modules() if module is not before[name]} == {only}
    assert any(isinstance(linear, Experts) for linear in offered.values()) == model.config.is_mla
