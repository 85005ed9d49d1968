"""What a trainer trains: it refuses a model that it could not train whole, and says how many weights it moves.

The codes of a quantized matrix are whole numbers without a gradient. A loop over such a model would run, and its loss
would even fall, but only the gains of the norms would move.
"""

from __future__ import annotations

import logging

from torch import nn

from sprat.errors import TrainingError
from sprat.quant import quantized_weights
from sprat.trust.run import Run

log = logging.getLogger(__name__)


def check(model: nn.Module, run: Run) -> None:
    """Note as the run's fact ``trained`` how many parameters of how many want a gradient, and log it.

    Raises:
        TrainingError: matrices of the model are quantized, or nothing of it wants a gradient.
    """
    parameters = list(model.parameters())
    trainable, total = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
    packed = quantized_weights(model)
    if packed:
        frozen = sum(part.width * part.codes.numel() // part.codes.shape[-1] for part in packed.values())
        what = f"{len(packed)} matrices are quantised: {trainable:,} of {total + frozen:,} parameters could be trained"
        todo = "train a dense model: sprat.load(path, dequantize=True), or sprat.quant.dequantize_model(model)"
        raise TrainingError(what, where=run.stage, todo=todo)
    if not trainable:
        raise TrainingError("no parameter wants a gradient", where=run.stage, todo="unfreeze what is to be trained")
    run.add_facts(trained={"trainable": trainable, "total": total})
    level = logging.INFO if trainable == total else logging.WARNING
    log.log(level, "%s trains %s of %s parameters", run.stage, f"{trainable:,}", f"{total:,}")
