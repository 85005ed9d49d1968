"""What users get: the published DeepSeek shapes, to the parameter, without the memory."""

from __future__ import annotations

import pytest
import torch

from sprat.config.sizes import size, size_names
from sprat.model import KVCache, count_parameters, flops_per_token


@pytest.mark.parametrize(
    ("name", "total", "active"), [("v3", 671.0e9, 37), ("v2", 235.7e9, 21), ("v2-lite", 15.7e9, 2)]
)
def test_published_sizes_are_counted_from_the_code_that_runs(name: str, total: float, active: int) -> None:
    counts = count_parameters(size(name))
    assert counts.total == pytest.approx(total, rel=0.005)
    assert round(counts.active / 1e9) == active


def test_v3_prediction_module_adds_what_deepseek_publishes() -> None:
    shared = 2 * 129280 * 7168  # the published 14 B count its copies of embedding and head
    assert count_parameters(size("v3")).mtp + shared == pytest.approx(14e9, rel=0.05)


@pytest.mark.parametrize("name", [name for name in size_names() if not name.startswith("v")])
def test_a_dense_twin_costs_what_its_sparse_sibling_costs(name: str) -> None:
    sparse, dense = flops_per_token(size(name), 128), flops_per_token(size(name, dense=True), 128)
    assert dense == pytest.approx(sparse, rel=0.02)
    twin = count_parameters(size(name, dense=True))
    assert twin.active + size(name).vocab_size * size(name).hidden_size == twin.total


def test_v3_remembers_a_token_in_70272_bytes() -> None:
    cache = KVCache.create(size("v3"), batch=2, capacity=3, dtype=torch.bfloat16, device="meta")
    assert cache.nbytes == 2 * 3 * 70272
