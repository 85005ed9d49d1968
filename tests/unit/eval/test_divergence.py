"""What two models say of a text: against direct sums in float64, and by models broken on purpose."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from sprat.engine.backends import select_backend
from sprat.errors import DataError
from sprat.eval.divergence import Window, compare_logits, compare_on_text, compare_routing, cut_windows, routers_agree
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.eval.conftest import TEXT

TEXTS = [TEXT[start : start + 60].decode() for start in range(0, 600, 40)]


@pytest.fixture(scope="session")
def trained(trained_model: Transformer) -> Transformer:
    """A model that knows the text."""
    return trained_model


@pytest.fixture(scope="session")
def windows(tokenizer: Tokenizer) -> list[Window]:
    """Windows of 24 tokens."""
    return cut_windows(tokenizer, TEXTS, documents=15, window=24)[0]


def test_kl_is_the_sum_over_the_vocabulary() -> None:
    generator = torch.Generator().manual_seed(1)
    before, after = (torch.randn(70, 50, generator=generator) * 3 for _ in range(2))
    targets = torch.randint(50, (70,), generator=generator)
    found = compare_logits(before, after, targets)
    for row in range(70):
        p, q = ([math.exp(x) for x in table[row].double().tolist()] for table in (before, after))
        p, q = [x / math.fsum(p) for x in p], [x / math.fsum(q) for x in q]
        kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found.kl_T[row] == pytest.approx(kl, rel=1e-9)
        assert found.before_T[row] == pytest.approx(-math.log(p[int(targets[row])]), rel=1e-9)
        assert found.after_T[row] == pytest.approx(-math.log(q[int(targets[row])]), rel=1e-9)
        assert found.same_top_T[row] == (np.argmax(p) == np.argmax(q))
    with pytest.raises(DataError, match="not finite"):
        compare_logits(before, after * math.nan, targets)


def test_the_backends_logits_are_the_models(trained: Transformer, windows: list[Window]) -> None:
    backend = select_backend(trained)
    lost = compare_on_text(backend, backend, "text", windows, "document")
    nats = 0.0
    for window in windows:
        with torch.no_grad():
            logits = trained(torch.tensor([window.ids[:-1]]))[0].double().log_softmax(-1)
        nats -= float(logits.gather(1, torch.tensor(window.ids[1:])[:, None]).sum())
    size = sum(window.bytes for window in windows)
    assert lost.bits_before == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert (lost.bytes, lost.tokens) == (size, sum(len(window.ids) - 1 for window in windows))


def test_a_model_against_itself_lost_exactly_nothing(trained: Transformer, windows: list[Window]) -> None:
    twin = copy.deepcopy(trained)
    lost = compare_on_text(select_backend(trained), select_backend(twin), "text", windows, "document")
    for estimate in (lost.loss, lost.difference, lost.kl_mean, lost.kl_median, lost.kl_p99):
        assert estimate.value == estimate.low == estimate.high == 0
    assert lost.kl_max == 0 and lost.same_top.value == 1 and lost.bits_before == lost.bits_after
    flips = compare_routing(trained, twin, "text", windows)
    assert flips.sets.value == flips.slots.value == 0


def test_two_swapped_experts_are_seen(trained: Transformer, windows: list[Window]) -> None:
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        for name, weight in broken.named_parameters():
            if ".experts.w_" in name:
                weight.copy_(weight[[1, 0, *range(2, len(weight))]])
    lost = compare_on_text(select_backend(trained), select_backend(broken), "text", windows, "document")
    assert lost.loss.low > 0.02 and lost.kl_mean.low > 0


def test_router_flips_are_counted_by_token_and_by_expert(trained: Transformer, windows: list[Window]) -> None:
    """A router of one layer whose rows are turned by one place chooses the next expert for each it chose before."""
    turned = copy.deepcopy(trained)
    with torch.no_grad():
        gate = turned.moe_layers()[0].gate
        gate.weight.copy_(gate.weight.roll(1, 0))
        gate.e_score_correction_bias.copy_(gate.e_score_correction_bias.roll(1, 0))
    assert routers_agree(trained, turned)
    flips = compare_routing(trained, turned, "text", windows)
    experts, sets, slots, tokens = trained.config.n_routed_experts, 0, 0, 0
    for window in windows:
        for row in trained.hidden(torch.tensor([window.ids[:-1]])).routing[0].index_NK.tolist():
            kept = set(row) & {(expert + 1) % experts for expert in row}
            sets, slots, tokens = sets + (len(kept) < len(row)), slots + len(row) - len(kept), tokens + 1
    assert flips.sets.value == pytest.approx(sets / tokens)
    assert flips.slots.value == pytest.approx(slots / tokens / trained.config.num_experts_per_tok)
    assert [each.layer for each in flips.layers] == [0]


def test_windows_hold_whole_pieces_of_text_and_short_texts_give_several(tokenizer: Tokenizer) -> None:
    text = "七 sprat 鱼 " * 30
    windows, unit = cut_windows(tokenizer, [text], documents=4, window=16)
    assert unit == "window" and len(windows) == 4 and all(len(window.ids) <= 17 for window in windows)
    rest = text
    for window in windows:
        piece = rest.encode()[: window.bytes].decode()
        prefix = [tokenizer.special_ids.bos] if tokenizer.special_ids.bos >= 0 else []
        assert list(window.ids) == prefix + tokenizer.encode(piece)
        rest = rest[len(piece) :]
    assert cut_windows(tokenizer, [text] * 30, documents=25, window=16)[1] == "document"
    with pytest.raises(DataError, match="too little text"):
        cut_windows(tokenizer, ["7"], documents=4, window=16)
