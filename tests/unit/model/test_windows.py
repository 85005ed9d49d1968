"""What users get: layers with a sliding window see that many tokens and no more, however the tokens are given."""

from __future__ import annotations

import pytest
import torch

from sprat.config.model import ModelConfig
from sprat.engine.backends.native import NativeBackend
from sprat.engine.backends.torch import TorchBackend
from sprat.kernels import native, unavailable_reason
from sprat.model import KVCache, Transformer
from sprat.quant import quantize_model
from tests.unit.kernels.test_step import batch_of, tokens_of, truth

NEAR = {"rtol": 0, "atol": 1e-4}  # torch rounds by the number of rows
needs_kernels = pytest.mark.skipif(native() is None, reason=unavailable_reason())


def model_of(window: int | None, layers: int = 1, **changes: object) -> Transformer:
    """Keys as important as they are in a trained model: scores far apart."""
    table = {
        "architecture": "mistral", "vocab_size": 203, "hidden_size": 48, "intermediate_size": 40,
        "num_hidden_layers": layers, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16,
        "sliding_window": window, "initializer_range": 0.3,
    }  # fmt: skip
    return Transformer(ModelConfig.model_validate({**table, **changes}), seed=3).eval()


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 7])
def test_a_token_sees_what_a_text_that_short_would_show(window: int) -> None:
    """One layer, rotary positions: the last token of a text equals that of its last ``window`` tokens alone."""
    model, tokens = model_of(window), tokens_of(20)
    whole = truth(model, tokens)
    for last in range(20):
        short = tokens[max(0, last + 1 - window) : last + 1]
        assert torch.allclose(whole[last], truth(model_of(None), short)[-1], **NEAR), last


@torch.no_grad()
def test_two_windows_reach_as_far_as_both_together() -> None:
    model, tokens = model_of(4, layers=2), tokens_of(20)
    changed = [(token + 1) % 203 for token in tokens[:5]] + tokens[5:]  # seen up to place 4 + 3 + 3
    apart = (truth(model, tokens) - truth(model, changed)).abs().amax(1) > 1e-6
    assert apart.tolist() == [True] * 11 + [False] * 9


@torch.no_grad()
def test_only_the_layers_that_slide_do() -> None:
    types = ["full_attention", "sliding_attention"]
    model = model_of(4, layers=2, architecture="qwen3", layer_types=types)
    assert [model.config.window(layer) for layer in range(2)] == [None, 4]
    tokens = tokens_of(20)
    changed = [(tokens[0] + 1) % 203, *tokens[1:]]
    assert (truth(model, tokens) - truth(model, changed)).abs().amax(1).min() > 1e-6


@torch.no_grad()
def test_packed_rows_cached_steps_and_padded_prompts_equal_single_texts() -> None:
    model = model_of(5, layers=2)
    texts = [tokens_of(9, 1), tokens_of(14, 2)]
    alone = [truth(model, text) for text in texts]
    row, segments = torch.tensor([texts[0] + texts[1]]), torch.tensor([[1] * 9 + [2] * 14])
    packed = model(row, segments_BT=segments)[0]
    assert torch.allclose(packed, torch.cat(alone), **NEAR)
    cache = KVCache.create(model.config, 2, 40)
    rows = torch.zeros(2, 14, dtype=torch.long)
    rows[0, :9], rows[1] = torch.tensor(texts[0]), torch.tensor(texts[1])
    valid = torch.arange(14) < torch.tensor([[9], [14]])
    logits = model(rows, cache=cache, valid_BT=valid)
    assert torch.allclose(logits[0, :9], alone[0], **NEAR) and torch.allclose(logits[1], alone[1], **NEAR)
    more = tokens_of(6, 3)
    stepped = torch.cat([model(torch.tensor([[one], [one]]), cache=cache) for one in more], 1)
    for index, text in enumerate(texts):
        assert torch.allclose(stepped[index], truth(model, text + more)[-6:], **NEAR)


@torch.no_grad()
@needs_kernels
@pytest.mark.parametrize("window", [1, 37, 600])
def test_every_back_end_computes_the_model_s_logits(window: int) -> None:
    model, tokens = model_of(window, layers=2), tokens_of(1250)
    expected = truth(model, tokens)
    for kv_format, limit in (("f32", 2e-5), ("f16", 2e-3), ("i8", 0.1), (None, 2e-5)):
        backend = TorchBackend(model) if kv_format is None else NativeBackend(model, threads=2, kv_format=kv_format)
        backend.reserve(20)
        parts, at = [], 0
        for count in (1100, 1, 29, 120):
            parts.append(backend.run(batch_of((tokens[at : at + count], at), tables=[list(range(20))])))
            at += count
        error = (torch.cat(parts) - expected).norm() / expected.norm()
        assert error < limit, (kv_format, float(error))


@needs_kernels
@pytest.mark.parametrize("kv_format", ["f32", "i8"])
def test_a_row_s_bits_depend_on_nothing_but_its_own_window(kv_format: str) -> None:
    """Rows whose windows begin in different spans share a tile; threads share the spans; one token comes alone."""
    model, tokens = quantize_model(model_of(600, layers=2)), tokens_of(1700)
    backend = NativeBackend(model, threads=3, kv_format=kv_format)
    backend.reserve(60)
    whole = backend.run(
        batch_of((tokens, 0), (tokens[:700], 0), tables=[list(range(27)), [*range(27, 38), *[-1] * 16]])
    )
    parts, at = [], 0
    for count in (1109, 1, 3, 87, 500):
        parts.append(backend.run(batch_of((tokens[at : at + count], at), tables=[list(range(59, 32, -1))])))
        at += count
    assert torch.equal(torch.cat(parts), whole[:1700])


@needs_kernels
def test_threads_that_share_the_keys_of_a_window_change_no_bit() -> None:
    model, tokens = quantize_model(model_of(3000)), tokens_of(3710)
    alone, many = (NativeBackend(model, threads=threads, kv_format="i8") for threads in (1, 3))
    for backend in (alone, many):
        backend.reserve(58)
    tables, at = [list(range(58))], 0
    for count in (3580, 1, 3, 1, 40, 1):  # a window begins in another span from 3583 on
        batch = batch_of((tokens[at : at + count], at), tables=tables, wanted=[count - 1])
        assert torch.equal(alone.run(batch), many.run(batch)), f"{count} tokens from {at} on"
        at += count
