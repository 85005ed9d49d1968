"""What the kernels compute, in torch: each is held to its reference by a test.

Where there is no compiler torch multiplies dequantized floats instead, which loses nothing but time.

Attention, routing, norms and the rest of a step need no page of their own: their reference is ``sprat.model``.
Training's operations stand in ``ops.py``, each beside its torch form.
"""

# K rows, I inputs, O outputs

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # inputs that are rounded with one scale
ROW_SHARE, OWN_SHARE = 0.07, 0.2  # see ``kRowShare`` in ``src/linear.h``


def fake_quantize_rows(rows_KI: Tensor, *, per_row: bool = True) -> Tensor:
    """Rows as products with quantized weights see them: bytes of -127 … 127, one scale for every 32 inputs.

    float32 in and out. This is llama.cpp's Q8_0 with a float32 scale (halves are rounded to even), except that an
    input which stands far above its group stays as it is, and the others are rounded without it.

    Args:
        per_row: "far" is judged by the row (the outlier would bring more than 7 % of the row's error); else by the
            group alone (all others are within a fifth of it), as where rows are rounded piece by piece.
    """
    width = rows_KI.shape[-1]
    groups = torch.nn.functional.pad(rows_KI, (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    ranked = groups.abs().topk(2)
    (top, following), index = ranked.values.split(1, -1), ranked.indices[..., :1]
    if per_row:
        squares = top.square()
        far = squares - following.square() > ROW_SHARE * squares.sum(-2, keepdim=True)
    else:
        far = (top > 0) & (following <= OWN_SHARE * top)
    alone = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, index, far)
    top = torch.where(far, following, top)
    inverse = _inverse(top)
    rounded = torch.where(alone, groups, (groups * inverse).round() * (top * (1 / 127)))
    return rounded.flatten(-2)[..., :width]


def _inverse(top: Tensor) -> Tensor:
    """127 / top, 0 for 0. As one division: ``127.0 / tensor`` is torch's ``reciprocal() * 127``, rounded twice."""
    return torch.where(top > 0, torch.full_like(top, 127.0) / top, 0.0)


def product(rows_KI: Tensor, weight_OI: Tensor, *, quantized: bool, bias_O: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias``, float32 [K, O]; quantized weights (given dequantized) meet rounded rows."""
    rows = fake_quantize_rows(rows_KI) if quantized else rows_KI
    return torch.nn.functional.linear(rows, weight_OI.float(), bias_O)


def fake_quantize_token(values: Tensor) -> Tensor:
    """A key, a value or a latent as the KV cache of format ``i8`` keeps it: one scale for the last dimension."""
    top = values.abs().amax(-1, keepdim=True)
    inverse = _inverse(top)
    return (values * inverse).round() * (top / 127.0)
