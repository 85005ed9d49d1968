"""Every form of attention is the softmax of the keys that a query may see, query by query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sprat.model import KVCache, Transformer
from sprat.model.attention import attend
from sprat.model.forward_context import ForwardContext

from .conftest import tiny_dense

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 3]])
WINDOW = 3


def passes() -> dict[str, tuple[ForwardContext, Tensor]]:
    """Name -> (a pass of six tokens in two rows, which keys each of them may see [B, T, S])."""
    model = Transformer.create(tiny_dense(sliding_window=WINDOW, layer_types=("full_attention",) * 2), 0)
    tokens, earlier = torch.zeros(2, 6, dtype=torch.long), torch.ones(6, 6).tril().bool().expand(2, 6, 6)
    cache = KVCache.create(model.config, 2, 12)
    lengths = torch.tensor([[True] * 4, [True, True, False, False]])
    model(tokens[:, :4], cache=cache, valid_BT=lengths)
    place = torch.tensor([4, 2])[:, None, None] + torch.arange(6)[:, None]
    return {
        "plain": (model.context(tokens), earlier),
        "packed": (model.context(tokens, segments_BT=SEGMENTS), earlier & (SEGMENTS[:, :, None] == SEGMENTS[:, None])),
        "cached": (model.context(tokens, cache=cache), torch.arange(10) <= place),
    }


@torch.no_grad()
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("heads", ["own", "grouped", "shared"])
@pytest.mark.parametrize("name", ["plain", "packed", "cached"])
def test_each_query_gets_the_softmax_of_what_it_sees(name: str, heads: str, sliding: bool) -> None:
    context, seen_BTS = passes()[name]
    if sliding:
        first = 0 if name != "cached" else torch.tensor([4, 2])[:, None, None]
        back_BTS = first + torch.arange(6)[:, None] - torch.arange(seen_BTS.shape[2])
        seen_BTS = seen_BTS & (back_BTS < WINDOW)
    generator, count = torch.Generator().manual_seed(1), seen_BTS.shape[2]
    groups = {"own": (4,), "grouped": (2,), "shared": ()}[heads]
    q_BTHd = torch.randn(2, 6, 4, 8, generator=generator)
    keys, values = (torch.randn(2, count, *groups, width, generator=generator) for width in (8, 5))
    out_BTHv = attend(q_BTHd, keys, values, context, 0.7, sliding=sliding)
    assert out_BTHv.shape == (2, 6, 4, 5)
    for row in range(2):
        for time in range(6):
            seen = seen_BTS[row, time].nonzero().flatten()
            for head in range(4):
                of_head = (head * groups[0] // 4,) if groups else ()
                k_Sd, v_Sv = (each[(row, seen, *of_head)].double() for each in (keys, values))
                expected = (k_Sd @ q_BTHd[row, time, head].double() * 0.7).softmax(0) @ v_Sv
                assert (out_BTHv[row, time, head] - expected).abs().max() < 1e-5, (row, time, head)
