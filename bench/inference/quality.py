"""How far a quantised model's next-token distribution is from the float32 model's, on the same windows of real text."""

from __future__ import annotations

from typing import Any

ROWS = 64  # positions at once; bounds memory


def compare(reference_TV: Any, logits_TV: Any, tokens: list[int]) -> dict[str, float]:
    """Figures of one window, summed over its positions.

    Args:
        reference_TV, logits_TV: float32 logits of the float32 and the quantised model.
        tokens: the window, of T ids.

    Returns:
        ``positions``; ``kl``, the sum of KL(float32 || quantised) in nats; ``same``, at how many positions the
        likeliest token is the same; ``loss`` and ``reference_loss``, the sums of the surprise at the token that
        follows, in nats.
    """
    import numpy as np

    total = {"positions": 0.0, "kl": 0.0, "same": 0.0, "loss": 0.0, "reference_loss": 0.0}
    following = np.asarray(tokens[1:])
    for start in range(0, len(tokens), ROWS):
        p = _log_softmax(np.asarray(reference_TV[start : start + ROWS]))
        q = _log_softmax(np.asarray(logits_TV[start : start + ROWS]))
        total["positions"] += len(p)
        total["kl"] += float((np.exp(p) * (p - q)).sum())
        total["same"] += float((p.argmax(1) == q.argmax(1)).sum())
        known = following[start : start + ROWS]
        places = np.arange(len(known))
        total["loss"] -= float(q[places, known].sum())
        total["reference_loss"] -= float(p[places, known].sum())
    return total


def _log_softmax(logits_RV: Any) -> Any:
    """Log-probabilities, float64 in the sum so that two engines' rounding does not count as divergence."""
    import numpy as np

    shifted = logits_RV - logits_RV.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
