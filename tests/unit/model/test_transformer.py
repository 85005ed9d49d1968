"""What users get: documents that cannot see each other, decoding equal to the forward pass, sound initial weights."""

from __future__ import annotations

import copy

import pytest
import torch

from sprat.errors import ConfigError, EngineError
from sprat.model import KVCache, Transformer
from sprat.model.mla import MLA

from .conftest import tiny


def tokens(rows: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(37, (rows, time), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_grad() -> object:
    with torch.no_grad():
        yield


def test_packed_documents_compute_as_if_alone(model: Transformer) -> None:
    first, second = tokens(1, 7, 1), tokens(1, 5, 2)
    segments = torch.tensor([[1] * 7 + [2] * 5])
    packed = model(torch.cat((first, second), 1), segments_BT=segments)
    alone = torch.cat((model(first), model(second)), 1)
    assert (packed - alone).abs().max() < 1e-5


def test_later_tokens_change_nothing_before_them(model: Transformer) -> None:
    """Up to rounding: later tokens go to other experts, and torch's products round by their number of rows."""
    some = tokens(2, 9)
    other = some.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 37
    change = (model(some) - model(other)).abs().amax((0, 2))
    assert change[:6].max() < 1e-5 and change[6:].min() > 1e-2


def test_given_positions_match_the_default_ones(model: Transformer) -> None:
    some = tokens(2, 9)
    given = model(some, positions_BT=torch.arange(9).expand(2, 9))
    shifted = model(some, positions_BT=torch.arange(9).expand(2, 9) + 5)
    assert (given - model(some)).abs().max() < 1e-5
    assert (shifted - model(some)).abs().max() < 1e-4  # only differences of positions count


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_cut_between_two_layers_computes_what_it_does_whole(model: Transformer, cached: bool) -> None:
    some, parts = tokens(2, 9), [copy.deepcopy(model), copy.deepcopy(model)]
    parts[0].layers, parts[1].layers = parts[0].layers[:1], parts[1].layers[1:]
    caches = [KVCache.create(model.config, 2, 9) if cached else None for _ in range(3)]
    x, routing = parts[0].embed_tokens(some), []
    for part, cache in zip(parts, caches, strict=False):
        x, of_part = part.run_layers(x, part.context(some, cache=cache))
        routing += of_part
    whole = model.hidden(some, cache=caches[2])
    assert torch.equal(parts[1].logits(parts[1].norm(x)), model.head(whole.x_BTD))
    assert [each.load_E.tolist() for each in routing] == [each.load_E.tolist() for each in whole.routing]
    assert all(cache.length_B.tolist() == [9, 9] for cache in caches if cache is not None)


@pytest.mark.parametrize("step", [1, 3, 12])
def test_cached_decoding_equals_the_full_forward_pass(model: Transformer, step: int) -> None:
    some = tokens(2, 17)
    cache = KVCache.create(model.config, 2, 17)
    parts = [model(some[:, :5], cache=cache)]
    for start in range(5, 17, step):
        parts.append(model(some[:, start : start + step], cache=cache))
    assert (torch.cat(parts, 1) - model(some)).abs().max() < 1e-4
    assert cache.length_B.tolist() == [17, 17]


def test_ragged_prompts_decode_as_if_alone(model: Transformer) -> None:
    prompts, lengths = tokens(3, 6), torch.tensor([6, 2, 4])
    cache = KVCache.create(model.config, 3, 9)
    valid = torch.arange(6) < lengths[:, None]
    model(prompts, cache=cache, valid_BT=valid)
    after = [model(tokens(3, 1, seed), cache=cache) for seed in (5, 6)]
    for row, length in enumerate(lengths.tolist()):
        joined = torch.cat((prompts[row, :length], tokens(3, 1, 5)[row], tokens(3, 1, 6)[row]))[None]
        expected = model(joined)[0, -2:]
        assert (torch.stack([part[row, 0] for part in after]) - expected).abs().max() < 1e-4


def test_a_right_padded_row_at_the_brim_keeps_what_it_holds(model: Transformer) -> None:
    cache = KVCache.create(model.config, 2, 4)
    model(tokens(2, 3), cache=cache)
    valid = torch.tensor([[True, False], [True, False]])
    model(tokens(2, 2, 3), cache=cache, valid_BT=valid)
    assert cache.length_B.tolist() == [4, 4]
    with pytest.raises(EngineError, match="do not fit"):
        model(tokens(2, 1), cache=cache)


def test_dropped_rows_leave_the_others_as_they_were(model: Transformer) -> None:
    some = tokens(3, 6)
    cache = KVCache.create(model.config, 3, 8)
    model(some, cache=cache)
    cache.reorder(torch.tensor([2, 0]))
    after = model(tokens(3, 1, 4)[:2], cache=cache)[:, 0]
    expected = model(torch.cat((some[[2, 0]], tokens(3, 1, 4)[:2]), 1))[:, -1]
    assert (after - expected).abs().max() < 1e-4


def test_a_cache_refuses_segments_and_other_batches(model: Transformer) -> None:
    cache = KVCache.create(model.config, 2, 8)
    with pytest.raises(EngineError, match="positions"):
        model(tokens(2, 3), cache=cache, segments_BT=torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(EngineError, match="rows"):
        model(tokens(3, 3), cache=cache)


@pytest.mark.parametrize("time", [1, 5])
def test_absorbed_attention_equals_the_naive_form(time: int) -> None:
    model = Transformer.create(tiny(), 3)
    outputs = []
    for absorb in (False, True):
        for module in model.modules():
            if isinstance(module, MLA):
                module.absorb = absorb
        cache = KVCache.create(model.config, 2, 20)
        prompt = model(tokens(2, 9), cache=cache)
        outputs.append(torch.cat((prompt, model(tokens(2, time, 1), cache=cache)), 1))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4


def test_the_same_seed_gives_the_same_model(model: Transformer) -> None:
    again, other = Transformer.create(model.config, 1), Transformer.create(model.config, 2)
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(model.head.weight, other.head.weight)


def test_a_tied_head_is_the_embedding() -> None:
    model = Transformer.create(tiny(tie_word_embeddings=True), 0)
    assert model.head.weight is model.embed_tokens.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_prediction_module_looks_one_token_further() -> None:
    model = Transformer.create(tiny(), 0)
    some = tokens(1, 8)
    other = some.clone()
    other[:, 5] = (other[:, 5] + 1) % 37
    drafts = [model.mtp_hidden(model.hidden(each), each).x_BTD for each in (some, other)]
    assert drafts[0].shape == (1, 7, 24)
    change = (drafts[0] - drafts[1]).abs().amax((0, 2))
    assert change[:4].max() < 1e-4 and change[4] > 1e-2  # place 4 has seen token 5
    with pytest.raises(ConfigError, match="depth 2"):
        model.mtp_hidden(model.hidden(some), some, depth=2)


def test_spread_is_that_of_gpt2_with_the_residual_stream_kept_even() -> None:
    """0.02 everywhere, and 0.02 / sqrt(2 * layers) for what writes into the stream; gains one, correction zero."""
    model = Transformer.create(tiny(hidden_size=64, moe_intermediate_size=32, initializer_range=0.02), 3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1:
            assert (tensor == ("norm" in name)).all(), name
        elif tensor.numel() > 2000:
            wanted = 0.02 / 4**0.5 if "o_proj" in name or "down" in name else 0.02
            assert tensor.std().item() == pytest.approx(wanted, rel=0.08), name
            assert abs(tensor.mean().item()) < 0.1 * wanted, name


def test_no_two_tensors_start_alike() -> None:
    model = Transformer.create(tiny(), 0)
    firsts = [tuple(tensor.flatten()[:4].tolist()) for tensor in model.parameters() if tensor.dim() > 1]
    assert len(set(firsts)) == len(firsts)
    first, second = model.moe_layers()[0].experts.w_up_EFD[:2]
    assert not torch.equal(first, second)
