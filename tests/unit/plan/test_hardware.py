"""Chips do what their data sheets and public measurements say, and nothing beyond."""

from __future__ import annotations

import pytest

from sprat.errors import ConfigError
from sprat.plan.hardware import catalogue, chip

ASKED = ("A100", "H100", "H200", "H800", "B200", "GB200", "GB300", "L40S", "RTX 4090", "MI300X", "CPU")


def test_every_chip_has_a_source_and_a_generation() -> None:
    assert set(ASKED) <= set(catalogue())
    for each in catalogue().values():
        assert len(each.source) > 20
        assert set(each.efficiency.source) == {"products", "attention", "memory", "links"}
        assert all(len(source) > 20 for source in each.efficiency.source.values())
        for precision in each.peak.keys() & each.efficiency.gemm.keys():
            assert each.flops(precision) > 0


@pytest.mark.parametrize(
    ("name", "precision", "least", "most"),
    [
        ("A100", "bf16", 220, 265),  # cuBLAS: 250 to 260 of 312 TFLOP/s alone
        ("H100", "bf16", 600, 760),  # cuBLAS: 700 to 780 alone, less at the power limit
        ("H800", "fp8", 1100, 1550),  # DeepGEMM's README: up to 1,550
        ("B200", "bf16", 1200, 1750),
    ],
)
def test_a_large_product_reaches_what_was_measured(name: str, precision: str, least: float, most: float) -> None:
    size = 8192
    rate = 2 * size**3 / chip(name).gemm_seconds(size, size, size, precision) / 1e12
    assert least <= rate <= most


def test_no_product_beats_peak_or_bandwidth() -> None:
    for each in catalogue().values():
        for precision in each.peak.keys() & each.efficiency.gemm.keys():
            for m, n, k, groups in (
                (1, 4096, 4096, 1),
                (128, 1536, 4096, 32),
                (4096, 4096, 512, 1),
                (32768, 16384, 8192, 1),
            ):
                seconds = each.gemm_seconds(m, n, k, precision, groups=groups)
                assert seconds > 2 * groups * m * n * k / (each.peak[precision] * 1e12)
                assert seconds > groups * n * k * 0.5 / (each.bandwidth * 1e9)


def test_small_products_are_less_efficient_and_one_token_is_bound_by_memory() -> None:
    h100 = chip("H100")

    def rate(m: int, k: int = 8192) -> float:
        return 2 * m * 8192 * k / h100.gemm_seconds(m, 8192, k, "bf16")

    rates = [rate(m) for m in (1, 16, 128, 512, 2048, 8192)]
    assert rates == sorted(rates)
    assert rate(4096, 256) < 0.8 * rate(4096, 8192)
    # one token reads the whole matrix: 128 MiB at 3.35 TB/s is 40 us at best
    assert 40e-6 < h100.gemm_seconds(1, 8192, 8192, "bf16") < 80e-6


def test_rings_and_all_to_alls_take_their_bytes_over_the_slowest_link() -> None:
    h800 = chip("H800")
    # 1 GB all-gathered in a node: 7/8 of it over 160 GB/s effective (arXiv 2412.19437, section 3.2.2: NVLink 160 GB/s)
    assert h800.ring_seconds(1e9, 8) == pytest.approx(7 / 8 / 160, rel=0.05)
    # over 16 nodes each chip carries an eighth over its own InfiniBand, 50 GB/s at most
    assert h800.ring_seconds(1e9, 128) > 1e9 / 8 * 15 / 16 / 50e9
    # 64 experts' ranks on 8 nodes: 56 of 64 parts leave the node
    assert h800.all_to_all_seconds(1e8, 64) > 1e8 * 56 / 64 / 50e9
    # a token that goes to three other nodes once, where eight copies would be sent
    assert h800.all_to_all_seconds(8e8, 64, domains=3 / 8) < h800.all_to_all_seconds(8e8, 64)
    # all 64 inside one NVLink domain
    assert chip("GB200").all_to_all_seconds(1e8, 64) < h800.all_to_all_seconds(1e8, 64) / 5
    assert h800.ring_seconds(1e9, 1) == h800.all_to_all_seconds(1e9, 1) == 0


def test_attention_is_as_fast_as_published_kernels() -> None:
    # FlashAttention-3 (arXiv 2407.08608, figures 5 and 6): causal, head 128, 8k: about 600 forward, 450 to 550 backward
    flops = 1e15
    assert 450e12 < flops / chip("H100").attention_seconds(flops, 8192) < 680e12
    assert 380e12 < flops / chip("H100").attention_seconds(flops, 8192, backward=True) < 570e12


def test_unknown_chips_and_precisions_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="perhaps you mean H800"):
        chip("H8000")
    with pytest.raises(ConfigError, match="A100 does not multiply in .fp8"):
        chip("A100").flops("fp8")
    assert chip("rtx 4090").name == "RTX 4090"
