"""What users get: positions are turned as the papers say, wherever the numbers lie in memory."""

from __future__ import annotations

import math

import pytest
import torch

from sprat.model import KVCache, Transformer
from sprat.model.rope import apply_rotary_emb, inverse_frequencies

from .conftest import tiny, tiny_dense


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("first", [0, 3, 4])
def test_pairs_turn_by_their_angles_in_rows_of_any_width(interleave: bool, first: int) -> None:
    rows = torch.randn(1, 2, 3, 4 + first, generator=torch.Generator().manual_seed(1))
    angles = torch.tensor([[[0.3, 1.1], [0.6, 2.2]]])
    rotated = apply_rotary_emb(rows[..., first:], torch.polar(torch.ones_like(angles), angles), interleave)
    for place in range(2):
        for pair, angle in enumerate(angles[0, place].tolist()):
            a, b = (2 * pair, 2 * pair + 1) if interleave else (pair, pair + 2)
            x, y = rows[0, place, :, first + a], rows[0, place, :, first + b]
            cos, sin = math.cos(angle), math.sin(angle)
            assert torch.allclose(rotated[0, place, :, a], x * cos - y * sin, atol=1e-6)
            assert torch.allclose(rotated[0, place, :, b], x * sin + y * cos, atol=1e-6)


@torch.no_grad()
def test_a_latent_model_of_odd_widths_decodes_what_it_reads() -> None:
    model = Transformer.create(tiny(kv_lora_rank=3, qk_nope_head_dim=5, v_head_dim=3, q_lora_rank=None), 1)
    tokens = torch.randint(37, (1, 9), generator=torch.Generator().manual_seed(2))
    cache = KVCache.create(model.config, 1, 9)
    stepped = torch.cat([model(tokens[:, at : at + 1], cache=cache) for at in range(9)], 1)
    assert (stepped - model(tokens)).abs().max() < 1e-4


def test_frequencies_by_the_formulas() -> None:
    """RoFormer, section 3.4.2; YaRN, section 3: what turns less than once in the context is divided by the factor."""
    plain, one = inverse_frequencies(tiny_dense(head_dim=8, rope_theta=100.0))
    assert torch.allclose(plain, torch.tensor([1.0, 100**-0.25, 0.1, 100**-0.75])) and one == 1
    even, one = inverse_frequencies(
        tiny_dense(head_dim=8, rope_theta=100.0, rope_scaling={"rope_type": "linear", "factor": 4})
    )
    assert torch.allclose(even, plain / 4) and one == 1
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20}
    stretched, sharper = inverse_frequencies(tiny_dense(head_dim=8, rope_theta=100.0, rope_scaling=yarn))
    assert stretched[0] == plain[0], "3 turns in 20 tokens, but none is faster"
    assert torch.allclose(stretched[3], plain[3] / 4) and sharper == pytest.approx(1 + 0.1 * math.log(4))
    llama = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama["original_max_position_embeddings"] = 20  # waves of 6, 20, 63 and 199 tokens
    stretched, one = inverse_frequencies(tiny_dense(head_dim=8, rope_theta=100.0, rope_scaling=llama))
    part = (20 * plain[0] / (2 * math.pi) - 1) / 3  # of the way from long to short (Llama 3.1's published code)
    assert torch.allclose(stretched[0], plain[0] * (part + (1 - part) / 8)) and one == 1
    assert torch.allclose(stretched[2:], plain[2:] / 8)
