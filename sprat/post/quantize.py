"""Any model, smaller: the user's text calibrates it, and a folder that loads again comes out.

What was asked and what came up stand in ``quantize.json`` beside the weights.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sprat import quant
from sprat.config.quant import QuantizeConfig
from sprat.data import ingest
from sprat.data.document import Document
from sprat.errors import CheckpointError, ConfigError, DataError
from sprat.files.json import write_json
from sprat.formats.export import new_folder, refuse_existing_folder
from sprat.formats.load import load, save
from sprat.tokens import Tokenizer

CALIBRATION_TOKENS = 16_384  # two to three minutes of one core for 135 million weights
CALIBRATION_WINDOW = 512  # tokens of a row
EXCERPT_CHARS = 2000  # characters of one document, so that many are heard
FACTS = "quantize.json"


def quantize_model(
    model: Path,
    folder: Path,
    config: QuantizeConfig,
    text: Path | None,
    *,
    dequantize: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Quantise the model at ``model`` into ``folder``, which is there whole or not at all; its sizes and what came up.

    Args:
        model: whatever ``sprat.load`` takes.
        text: what to calibrate on; a folder or file as ``read_texts`` takes it.
        dequantize: whether a model that is quantised already may be taken for what its codes stand for.
        on_progress: hears how many matrices are done, of how many.

    Raises:
        CheckpointError: the model cannot be read, is quantised already or is not finite, or ``folder`` is in a run.
        MachineError: the disk is full or closed to us; nothing is left.
        ConfigError: the config needs text and there is none, or asks for what the model's structure does not allow;
            something is at ``folder`` already.
        DataError: the text is missing, binary or too short, or reaches too few experts where that is refused.
    """
    if text is None and config.needs_text:
        what = "GPTQ needs text to calibrate on" if config.rounding == "gptq" else "AWQ needs text to calibrate on"
        raise ConfigError(what, where="--calibrate", todo="give a folder or file of text, or round to the nearest")
    if folder.resolve() == model.resolve():
        raise CheckpointError("it would overwrite the model", where=str(folder), todo="give another folder")
    for parent in (folder.resolve(), *folder.resolve().parents):
        if (parent / "run.json").is_file():
            raise CheckpointError("it would change a finished run", where=str(parent), todo="give another folder")
    refuse_existing_folder(folder)
    dense, tokenizer = load(model)
    if quant.quantized_weights(dense):
        if not dequantize:
            todo = "give the model that it was made from, or --dequantize to start from what its codes stand for"
            raise CheckpointError("the model is quantised already", where=str(model), todo=todo)
        dense = quant.dequantize_model(dense)
    rows_BT = segments_BT = None
    if text is not None:
        window = min(CALIBRATION_WINDOW, dense.config.max_position_embeddings)
        rows_BT, segments_BT = calibration_rows(ingest.read_texts(text), tokenizer, window, config.calibration_tokens)
    seen = quant.QuantizeFacts()
    small = quant.quantize_model(
        dense, config, calibration_BT=rows_BT, segments_BT=segments_BT, on_progress=on_progress, facts=seen
    )
    facts: dict[str, Any] = {"size_bytes": quant.size_bytes(small), "dense_bytes": quant.size_bytes(dense)}
    facts |= {"calibration_tokens": 0 if rows_BT is None else rows_BT.numel(), **seen.experts}
    facts |= {"mtp_dropped": seen.mtp_dropped} if seen.mtp_dropped else {}
    with new_folder(Path(os.path.abspath(folder))) as temporary:
        save(small, tokenizer, temporary)
        write_json(temporary / FACTS, {"config": config.model_dump(mode="json"), "facts": facts})
    return facts


def calibration_rows(
    documents: Iterable[Document], tokenizer: Tokenizer, window: int, num_tokens: int = CALIBRATION_TOKENS
) -> tuple[Tensor, Tensor]:
    """Rows [B, window] (long) of excerpts of many documents, and their segments.

    ``num_tokens`` tokens, or what there is.

    Raises:
        DataError: there is not one row of text.
    """
    chosen = list(documents)
    random.Random(0).shuffle(chosen)
    ids: list[int] = []
    segment_ids: list[int] = []
    for number, document in enumerate(chosen, 1):
        ids += tokenizer.encode(document.text[:EXCERPT_CHARS])
        segment_ids += [number] * (len(ids) - len(segment_ids))
        if len(ids) >= num_tokens:
            break
    rows = min(len(ids), num_tokens) // window
    if not rows:
        what = f"{len(ids)} tokens of text are too few to calibrate on"
        raise DataError(what, where="--calibrate", todo=f"give at least {window}, better {num_tokens}")
    tokens, segments = (torch.tensor(values[: rows * window]).view(rows, window) for values in (ids, segment_ids))
    return tokens, segments
