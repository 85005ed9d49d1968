"""Any model, smaller: the user's text calibrates it, and a folder that loads again comes out.

What was asked and what came up stand in ``quantize.json`` beside the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sprat import quant
from sprat.config.quant import QuantizeConfig
from sprat.data.folder import ExclusionTally, warn_of_excluded
from sprat.data.pack import PackedDataset
from sprat.errors import CheckpointError, ConfigError
from sprat.files.json import write_json
from sprat.formats.export import new_folder, refuse_existing_folder
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.post.calibration import CalibrationData, calibration_rows, join_rows, read_calibration
from sprat.post.tune_scales import HELD_OUT_ROWS, STEP_ROWS, WINDOW, hold_out, tune_scales
from sprat.tokens import Tokenizer

CALIBRATION_WINDOW = 512  # tokens of a row
FACTS = "quantize.json"


def quantize_model(
    model: Path,
    folder: Path,
    config: QuantizeConfig,
    text: Path | None,
    *,
    dequantize: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
    on_tuned: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Quantise the model at ``model`` into ``folder``, which is there whole or not at all; its sizes and what came up.

    Args:
        model: whatever ``sprat.load`` takes.
        text: what to calibrate on; a folder or file as ``read_calibration`` takes it.
        dequantize: whether a model that is quantised already may be taken for what its codes stand for.
        on_progress: hears how many matrices are done, of how many.
        on_tuned: hears how many steps of ``tune_scales`` are done, of how many.

    Raises:
        CheckpointError: the model cannot be read, is quantised already or is not finite, or ``folder`` is in a run.
        MachineError: the disk is full or closed to us; nothing is left.
        ConfigError: the config needs text and there is none, or asks for what the model's structure does not allow;
            something is at ``folder`` already.
        DataError: the text is missing, binary or too short, or reaches too little where that is refused.
    """
    if text is None and config.needs_text:
        name = "GPTQ" if config.rounding == "gptq" else "AWQ" if config.awq else "tune_steps"
        what = f"{name} needs text to calibrate on"
        raise ConfigError(what, where="--calibrate", todo="give a folder or file of text, or round to the nearest")
    if folder.resolve() == model.resolve():
        raise CheckpointError("it would overwrite the model", where=str(folder), todo="give another folder")
    for parent in (folder.resolve(), *folder.resolve().parents):
        if os.path.isfile(parent / "run.json"):
            raise CheckpointError("it would change a finished run", where=str(parent), todo="give another folder")
    refuse_existing_folder(folder)
    data = None if text is None else read_calibration(text)
    dense, tokenizer = load(model)
    if quant.quantized_weights(dense):
        if not dequantize:
            todo = "give the model that it was made from, or --dequantize to start from what its codes stand for"
            raise CheckpointError("the model is quantised already", where=str(model), todo=todo)
        dense = quant.dequantize_model(dense)
    rows_BT = segments_BT = None
    parts = list[PackedDataset]()
    if data is not None:
        tally = ExclusionTally()
        window = min(CALIBRATION_WINDOW, dense.config.max_position_embeddings)
        rows_BT, segments_BT = join_rows(calibration_rows(data, tokenizer, window, config.calibration_tokens, tally))
        warn_of_excluded(tally.excluded(), data.path)
        parts = _rows_to_tune_on(data, tokenizer, dense, config) if config.tune_steps else []
    seen = quant.QuantizeFacts()
    small = quant.quantize_model(
        dense, config, calibration_BT=rows_BT, segments_BT=segments_BT, on_progress=on_progress, facts=seen
    )
    facts: dict[str, Any] = {"size_bytes": quant.size_bytes(small), "dense_bytes": quant.size_bytes(dense)}
    facts |= {"calibration_tokens": 0 if segments_BT is None else int((segments_BT > 0).sum()), **seen.tokens}
    facts |= {"mtp_dropped": seen.mtp_dropped} if seen.mtp_dropped else {}
    if parts:
        settings: dict[str, Any] = {"steps": config.tune_steps, "lr": config.tune_lr, "seed": config.seed}
        facts["tuned"] = tune_scales(small, dense, parts, on_progress=on_tuned, **settings)
    with new_folder(Path(os.path.abspath(folder))) as temporary:
        save(small, tokenizer, temporary)
        write_json(temporary / FACTS, {"config": config.model_dump(mode="json"), "facts": facts})
    return facts


def _rows_to_tune_on(
    data: CalibrationData, tokenizer: Tokenizer, model: Transformer, config: QuantizeConfig
) -> list[PackedDataset]:
    """As many rows as the steps of ``tune_scales`` take, and those that it keeps apart.

    Raises:
        DataError: see ``hold_out``.
    """
    window = min(WINDOW, model.config.max_position_embeddings)
    num_tokens = max(config.calibration_tokens, (config.tune_steps + HELD_OUT_ROWS) * STEP_ROWS * window)
    parts = calibration_rows(data, tokenizer, window, num_tokens, ExclusionTally())
    for part in parts:
        hold_out(part, config.seed)  # what it refuses is refused now, and not when all is rounded
    return parts
