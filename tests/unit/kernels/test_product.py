"""Each kernel beside its reference: random shapes, ragged groups, every kind of weight, one row to many."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.engine.backends.weights import HugePages, float_weights, pack_weights
from sprat.kernels import native, reference, unavailable_reason
from sprat.quant.int4 import dequantize_tensor, quantize_tensor
from sprat.quant.layers import QuantizedWeight

pytestmark = pytest.mark.skipif(native() is None, reason=unavailable_reason())
ISAS = ("avx512", "avx2", "neon", "portable")


def weights(weight: torch.Tensor, bits: int, group: int, bias: torch.Tensor | None) -> tuple[object, torch.Tensor]:
    """The matrix as the kernels take it, and the floats that it stands for."""
    if bits > 8:
        kinds = {32: torch.float32, 16: torch.bfloat16, 17: torch.float16}
        return float_weights(weight.to(kinds[bits]), bias), weight.to(kinds[bits]).float()
    codes = quantize_tensor(weight, bits=bits, group=group)
    return pack_weights(QuantizedWeight(codes, materialize=False), HugePages(), bias)[0], dequantize_tensor(codes)


def product(matrix: object, rows: torch.Tensor, outputs: int, threads: int = 1) -> torch.Tensor:
    out = np.full((len(rows), outputs), np.nan, np.float32)
    native().product(matrix, rows.numpy(), out, threads)
    return torch.from_numpy(out)


@settings(max_examples=20 if os.environ.get("SPRAT_ISA") else 80, deadline=None)  # fewer in a process beside
@given(
    bits=st.sampled_from([4, 8, 16, 17, 32]),
    group=st.sampled_from([32, 64, 128, 0]),
    rows=st.integers(1, 64),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 90),
    biased=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_products_equal_their_reference(
    bits: int, group: int, rows: int, inputs: int, outputs: int, biased: bool, threads: int, seed: int
) -> None:
    make = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=make)
    x = torch.randn(rows, inputs, generator=make) * 3
    bias = torch.randn(outputs, generator=make) if biased else None
    matrix, dense = weights(weight, bits, group, bias)
    expected = reference.product(x, dense, quantized=bits <= 8, bias_O=bias)
    got = product(matrix, x, outputs, threads)
    # Both round the same floats to the same codes; the sums differ by float32's rounding of their terms only.
    terms = x.abs() @ dense.abs().T + (0 if bias is None else bias.abs())
    assert ((got - expected).abs() <= 4e-6 * terms + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_a_row_is_the_same_alone_and_in_company(bits: int) -> None:
    make = torch.Generator().manual_seed(bits)
    matrix, _ = weights(torch.randn(70, 130, generator=make), bits, 32, None)
    x = torch.randn(64, 130, generator=make)
    alone = torch.cat([product(matrix, row[None], 70) for row in x])
    for count in (2, 5, 12, 13, 31, 64):
        assert torch.equal(product(matrix, x[:count].contiguous(), 70, threads=2), alone[:count])


def test_zero_rows_and_huge_ones() -> None:
    matrix, dense = weights(torch.randn(40, 64), 4, 32, None)
    x = torch.zeros(3, 64)
    x[1] = 1e30
    x[2, 5] = -1e-30
    got = product(matrix, x, 40)
    assert torch.equal(got[0], torch.zeros(40)) and bool(torch.isfinite(got).all())
    assert torch.allclose(got[2], -1e-30 * dense[:, 5], rtol=1e-2)


@pytest.mark.parametrize("bits,group", [(4, 32), (8, 64), (8, 0)])
@pytest.mark.parametrize("outlier", [40.0, -1e4])
def test_an_outlier_does_not_crush_its_neighbours(bits: int, group: int, outlier: float) -> None:
    """Against float64 sums of the same weights: half a step of 127 of the next largest, not of the outlier."""
    make = torch.Generator().manual_seed(5)
    matrix, dense = weights(torch.randn(37, 160, generator=make), bits, group, None)
    x = torch.rand(13, 160, generator=make) * 2 - 1
    for row in range(13):  # several rows with the same channel, others with their own
        x[row, 70 if row < 9 else 3 + 31 * row % 160] = outlier
    exact = x.double() @ dense.double().T
    steps = dense.abs().double().sum(1) * 0.5 / 127  # no input but the outliers is above 1
    assert ((product(matrix, x, 37) - exact).abs() <= steps + 1e-6 * exact.abs()).all()


def test_two_equal_outliers_keep_their_scale() -> None:
    """The larger one cannot leave: the other would not fit what is left."""
    matrix, dense = weights(torch.randn(20, 32), 4, 32, None)
    x = torch.zeros(1, 32)
    x[0, 4], x[0, 20] = 50.0, -50.0
    assert torch.allclose(product(matrix, x, 20), x @ dense.T, rtol=1e-4, atol=1e-3)


def test_arrays_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="another size"):
        native().Weights(0, 4, 8, 32, torch.zeros(4, 7), None, None, None)
    with pytest.raises(ValueError, match="no known shape"):
        native().Weights(9, 4, 8, 32, torch.zeros(4, 8), None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa not in native().isa])
def test_every_instruction_set_that_runs_here(isa: str) -> None:
    """The same properties in a process that loads other kernels; skipped where they were not built or do not run."""
    if os.environ.get("SPRAT_ISA"):
        pytest.skip("this is such a process")
    env = os.environ | {"SPRAT_ISA": isa}
    probe = subprocess.run(
        [sys.executable, "-c", "import sprat.kernels as k; k.native()"], env=env, capture_output=True
    )
    if probe.returncode:
        pytest.skip(f"no {isa} kernels here")
    tests = ["tests/unit/kernels/test_product.py", "tests/unit/kernels/test_step.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    if isa == "portable":  # slow; what shares out work, reads memory and looks for the likeliest is the same code
        same = ("share_the_keys", "who_computes_what", "40-True", "(depends_on_nothing and f16)")
        command += ["-k", " and ".join(f"not {name}" for name in same)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
