"""What users get: whatever config a folder has, here is computed what transformers computes, natively too.

A share of ``python -m bench.random_configs``, with another seed; SPRAT_RANDOM_CONFIGS asks for more.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers")
COUNT = int(os.environ.get("SPRAT_RANDOM_CONFIGS", "15"))


def test_random_configs_agree_with_transformers_both_ways_and_with_the_engine() -> None:
    from bench.random_configs import run

    found = run(COUNT, seed=7)
    assert not found["faults"], found["faults"][0]
    assert sum(found["families"].values()) == COUNT


def test_the_bench_sees_a_model_that_is_another() -> None:
    from bench.random_configs import BAR, Disagreement, near

    one = torch.ones(3)
    assert near("the same", one, one) == 0
    for other in (one + 2 * BAR, one * float("nan")):
        with pytest.raises(Disagreement, match="apart"):
            near("another", one, other)
