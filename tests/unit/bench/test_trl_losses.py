"""Our side of the comparison with TRL: by closed forms here, by TRL's own code where it is installed."""

from __future__ import annotations

import subprocess
from typing import Any

import numpy as np
import pytest

from bench.oracles import ROOT, python_of
from bench.trl_losses import inputs, measure, ours


def softmax(logits: Any) -> Any:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def answers(given: dict[str, Any]) -> tuple[Any, Any, Any]:
    """log p of each learned token [S, L-1] (0 elsewhere), d log p / d logits [S, L-1, V], and which are learned."""
    targets, learned, p = given["ids"][:, 1:], given["mask"][:, 1:], softmax(given["logits"][:, :-1])
    onehot = np.eye(p.shape[-1])[targets]
    return np.log((p * onehot).sum(-1)) * learned, (onehot - p) * learned[..., None], learned


@pytest.mark.parametrize("parts", [1, 2])
def test_sft_is_the_mean_over_the_learned_tokens_of_a_step(parts: int) -> None:
    given = inputs(3)
    logprob, slope, learned = answers(given)
    found = ours({"loss": "sft", "parts": parts, "seed": 3})
    assert found["loss"] == pytest.approx(-logprob.sum() / learned.sum(), rel=1e-12)
    np.testing.assert_allclose(found["gradient"][:, :-1], -slope / learned.sum(), atol=1e-15)
    assert not found["gradient"][:, -1].any()


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "ipo"])
def test_dpo_and_its_gradient_are_the_closed_forms(name: str) -> None:
    given, beta = inputs(4), 0.2
    logprob, slope, learned = answers(given)
    reference, _, _ = answers({**given, "logits": given["reference"]})
    ratio, count = (logprob - reference).sum(1), learned.sum(1)
    pairs = len(ratio) // 2
    sign = np.repeat([1.0, -1.0], pairs)
    weight = sign if name == "sigmoid" else sign / count
    delta = (weight * ratio)[:pairs] + (weight * ratio)[pairs:]
    if name == "ipo":
        loss, by_delta = (delta - 0.5 / beta) ** 2, 2 * (delta - 0.5 / beta)
    else:
        loss, by_delta = np.log1p(np.exp(-beta * delta)), -beta / (1 + np.exp(beta * delta))
    found = ours({"loss": name, "beta": beta, "seed": 4})
    assert found["loss"] == pytest.approx(loss.mean(), rel=1e-12)
    expected = (np.tile(by_delta / pairs, 2) * weight)[:, None, None] * slope
    np.testing.assert_allclose(found["gradient"][:, :-1], expected, atol=1e-14)
    margin = ratio[:pairs] - ratio[pairs:]
    assert found["margin"] == pytest.approx(beta * margin.mean(), rel=1e-12)
    assert found["accuracy"] == pytest.approx((margin > 0).mean())


@pytest.mark.slow
def test_trl_gives_the_same_numbers() -> None:
    """Only where ``python -m bench.oracles`` has made TRL's environment; ``make test`` does not."""
    python = python_of("trl")
    if not python.is_file() or subprocess.run([python, "-c", "import trl"], capture_output=True, cwd=ROOT).returncode:
        pytest.skip("TRL is not installed (python -m bench.oracles trl)")
    rows = measure(python, quick=True)
    assert len(rows) == 16 and [row for row in rows if not row["met"]] == []
