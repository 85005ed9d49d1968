"""A forward pass on a CPU is computed in float32."""

from __future__ import annotations

import torch

from sprat.model.forward_context import precision


def test_cpus_compute_in_float32() -> None:
    a = torch.ones(2, 2)
    with precision("cpu"):
        assert (a @ a).dtype == torch.float32
