"""Serving's bound and a day's cost are the published ones."""

from __future__ import annotations

import pytest

from sprat.errors import ConfigError
from sprat.plan.families import load_shape
from sprat.plan.prices import gpu_price
from sprat.plan.serving import Traffic, day_of_serving, decode_bound

D6 = Traffic(prompt=608e9, cached=342e9, output=168e9)  # deepseek-ai/open-infra-index, day 6: 24 hours


def test_the_decode_bound_is_the_published_one() -> None:
    """arXiv 2505.09343, section 2.3.2, which computes with 7,000 for a hidden size of 7,168."""
    bound = decode_bound(load_shape("v3"), bytes_per_second=50e9, width=7000)
    assert bound.layer_step * 1e6 == pytest.approx(120.96, abs=0.005)
    assert bound.token * 1e3 == pytest.approx(14.76, abs=0.005)
    assert decode_bound(load_shape("v3"), bytes_per_second=50e9).layer_step == pytest.approx(bound.layer_step * 1.024)


def test_a_day_of_deepseek_costs_what_was_published() -> None:
    """Day 6: $87,072 at $2 an hour; nodes of one phase do 73.7 K tokens a second in, or 14.8 K out."""
    day = day_of_serving(D6, gpu_price("H800"), prefill_rate=73.7e3, decode_rate=14.8e3)
    assert float(day.cost) == pytest.approx(87072, rel=0.005)
    assert D6.hit_rate == pytest.approx(0.563, abs=0.001)


def test_cached_tokens_are_not_computed_again() -> None:
    """At the published mix 56.25 % are cached: without a cache, the same prompts take 1 / 0.4375 of the nodes."""
    rates = {"prefill_rate": 73.7e3, "decode_rate": 14.8e3, "measured_hit_rate": 342 / 608}
    cached, none, all_ = (
        day_of_serving(Traffic(608e9, hits, 168e9), gpu_price("H800"), **rates) for hits in (342e9, 0, 608e9)
    )
    assert none.prefill_nodes / cached.prefill_nodes == pytest.approx(608 / 266)
    assert (all_.prefill_nodes, all_.prompt_cost_per_million) == (0, 0)
    assert cached.decode_nodes == none.decode_nodes


def test_a_million_tokens_cost_their_share_of_the_day() -> None:
    """14.8 K tokens a second are 53.28 M an hour; a node of 8 costs $16."""
    day = day_of_serving(D6, gpu_price("H800"), prefill_rate=73.7e3, decode_rate=14.8e3)
    assert float(day.output_cost_per_million) == pytest.approx(16 / 53.28)
    whole = float(day.prompt_cost_per_million) * 608e3 + float(day.output_cost_per_million) * 168e3
    assert whole == pytest.approx(float(day.cost))
    yuan = gpu_price("H800").replace(usd=None, cny="14")
    assert float(
        day_of_serving(D6, yuan, prefill_rate=73.7e3, decode_rate=14.8e3, currency="cny").cost
    ) == pytest.approx(7 * float(day.cost))


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_hit_rate_that_cannot_be_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="measured_hit_rate"):
        day_of_serving(D6, gpu_price("H800"), prefill_rate=1, decode_rate=1, measured_hit_rate=share)


def test_a_dense_model_has_no_such_bound() -> None:
    with pytest.raises(ConfigError, match="no experts"):
        decode_bound(load_shape("LLAMA3_8B"), bytes_per_second=50e9)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_rates_that_cannot_be_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="prefill_rate"):
        day_of_serving(D6, gpu_price("H800"), prefill_rate=rate, decode_rate=1.0)


def test_more_cached_than_asked_is_refused() -> None:
    with pytest.raises(ConfigError, match="traffic"):
        day_of_serving(Traffic(1, 2, 3), gpu_price("H800"), prefill_rate=1, decode_rate=1)
