"""The report's table of who reads what counts tokens, not the padding behind them."""

from __future__ import annotations

from sprat.config.sizes import size
from sprat.data.pack import pack
from sprat.model import Transformer
from sprat.pipeline.training import _expert_loads


def test_padding_is_nobodys_text() -> None:
    model = Transformer.create(size("pico", vocab_size=64), 0)
    lengths = [20, 18, 17, 9]  # rows of 33 hold one of the first three each, and 32 places are inputs
    packed = pack([(list(range(length)), None) for length in lengths], 32)
    places = packed.num_rows * 32
    tokens = sum(min(length, 32) for length in lengths)
    assert tokens < 0.75 * places
    for load in _expert_loads(model, packed):
        assert sum(load) == tokens * model.config.num_experts_per_tok
