"""The last stage: the student in INT4, and what size and speed each model of the road has. Or any model, in INT4.

Where the recipe's rounding is GPTQ, it needs text: a road gives its student's own answers and text, any other model the
user's text, or what the quickstart learns from.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sprat.config import QuantConfig
from sprat.data import corpus, ingest
from sprat.data.document import Document
from sprat.data.pack import pack
from sprat.engine import Engine, Sampling, load, save
from sprat.errors import CheckpointError, DataError
from sprat.model import Transformer
from sprat.post import sft
from sprat.post.evaluate import problem_messages
from sprat.quant import quantize_model, quantized_weights, size_bytes
from sprat.road import measure
from sprat.road.places import Road
from sprat.road.training import finished, measured, mix
from sprat.tokens import Tokenizer

CALIBRATION = 16_384  # tokens: two to three minutes of one core for 135 million weights
OWN = 12 * CALIBRATION  # tokens of a road's own at most: its student is small, and gains by them (docs/log.md)
SHORT = 25  # tokens of a short question and answer: as many are drawn as fill the rows
WINDOW = 512  # tokens of a row of any other model's text
EXCERPT = 2000  # characters of one document, so that many are heard
CORPUS_BYTES = 400_000  # of the quickstart's text, where the user gives none


def squeeze(road: Road) -> None:
    """Quantise the distilled student and measure size, speed and loss of accuracy."""
    recipe, teacher = road.recipe.quant, road.path(f"rl-seed{road.recipe.rl.seeds[0]}")

    def prepare(goes_on: bool) -> tuple[Transformer, Tokenizer]:
        road.need(teacher)
        student, tokenizer = load(road.path("distill"))
        measure.check(road, student, tokenizer)
        return student, tokenizer

    inputs = {"model": road.path("distill"), **measured(road)}
    opened = road.open("quantize", "quantize", recipe, inputs, 0, prepare)
    if opened is None:
        return
    run, (student, tokenizer) = opened
    tokens_BT, segments_BT = _heard(road, student, tokenizer) if recipe.rounding == "gptq" else (None, None)
    small = quantize_model(student, recipe, calibration_BT=tokens_BT, segments_BT=segments_BT)
    save(small, tokenizer, run.artefact)
    rows = measure.scores(road, small, tokenizer, ("greedy", "thinking", "direct"))
    before = finished(road, "distill")["facts"]["scores"]
    models = {}
    for name, folder in (("teacher", teacher), ("student", road.path("distill")), ("int4", run.folder)):
        model, _ = load(folder)
        models[name] = {
            "size_bytes": sum(path.stat().st_size for path in (folder / "artefact").glob("*.safetensors")),
            "tokens_per_second": measure.speed(road, model, tokenizer),
        }
    run.note(
        title="Student in INT4",
        scores=rows,
        significance=measure.gains(before, rows),
        relative_loss=relative_loss(before, rows),
        models=models,
        parameters=finished(road, "distill")["facts"]["parameters"],
        drafts=measure.drafts(road, small, tokenizer),
        **models["int4"],
    )
    run.finish()


def _heard(road: Road, student: Transformer, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Rows [B, T] of what the student will say, tokens and segments: its own answers, and a quarter of text.

    It is asked no more questions than it was taught by.
    """
    text = road.artefacts.packed("text")
    own = min(OWN, SHORT * road.recipe.distill.distill.problems)
    rows = max(4, own // text.seq_len)
    drawn = sft.sample_problems(*mix(road), own // SHORT, f"calibration/{road.recipe.seed}")
    engine = Engine(student, tokenizer, max_batch=road.recipe.eval.batch)
    sampling = Sampling(temperature=0.7, max_tokens=road.recipe.eval.max_tokens, seed=road.recipe.seed)
    said = engine.generate([problem_messages(problem) for _, problem in drawn], sampling)
    answers = pack(((output.prompt_ids + output.token_ids, None) for output in said), text.seq_len)
    few = rows // 4
    tokens = np.concatenate((answers.tokens[: rows - few], text.tokens[:few]))
    segments = np.concatenate((answers.segments[: rows - few], text.segments[:few]))
    return torch.from_numpy(tokens[:, :-1]).long(), torch.from_numpy(segments[:, :-1]).long()


def relative_loss(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, float]:
    """For each task asked greedily, the share of the student's accuracy that INT4 lost (negative: gained)."""
    old = {row["task"]: row["accuracy"] for row in before if row["label"] == "greedy"}
    new = {row["task"]: row["accuracy"] for row in after if row["label"] == "greedy"}
    return {task: (old[task] - new[task]) / old[task] for task in new if old.get(task)}


def convert(
    model: Path,
    folder: Path,
    recipe: QuantConfig,
    text: Path | None,
    *,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Quantise the model at ``model`` into ``folder``; returns its sizes.

    Args:
        model: whatever ``sprat.load`` takes.
        text: what to calibrate on, if the recipe does; None is the quickstart's corpus.
        told: hears how many matrices are done, of how many.

    Raises:
        CheckpointError: the model cannot be read, is quantised already or is not finite, or ``folder`` is closed.
        DataError: the text is missing, binary or too short.
    """
    if folder.resolve() == model.resolve():
        raise CheckpointError("it would overwrite the model", where=str(folder), todo="give another folder")
    for place in (folder.resolve(), *folder.resolve().parents):
        if (place / "run.json").is_file():
            raise CheckpointError("it would change a finished run", where=str(place), todo="give another folder")
    dense, tokenizer = load(model)
    if quantized_weights(dense):
        todo = "give the model that it was made from"
        raise CheckpointError("the model is quantised already", where=str(model), todo=todo)
    rows_BT = segments_BT = None
    if recipe.rounding == "gptq":
        with tempfile.TemporaryDirectory(prefix="sprat-calibrate-") as kept:
            found = corpus.default(kept, budget_bytes=CORPUS_BYTES).split().train if text is None else ingest.read(text)
            rows_BT, segments_BT = calibration(found, tokenizer, min(WINDOW, dense.config.max_position_embeddings))
    small = quantize_model(dense, recipe, calibration_BT=rows_BT, segments_BT=segments_BT, on_progress=told)
    save(small, tokenizer, folder)
    tokens = 0 if rows_BT is None else rows_BT.numel()
    return {"size_bytes": size_bytes(small), "dense_bytes": size_bytes(dense), "calibration_tokens": tokens}


def calibration(documents: Iterable[Document], tokenizer: Tokenizer, window: int) -> tuple[Tensor, Tensor]:
    """Rows [B, window] (long) of excerpts of many documents, ``CALIBRATION`` tokens or what there is; their segments.

    Raises:
        DataError: there is not one row of text.
    """
    chosen = list(documents)
    random.Random(0).shuffle(chosen)
    ids: list[int] = []
    numbers: list[int] = []
    for number, document in enumerate(chosen, 1):
        ids += tokenizer.encode(document.text[:EXCERPT])
        numbers += [number] * (len(ids) - len(numbers))
        if len(ids) >= CALIBRATION:
            break
    rows = min(len(ids), CALIBRATION) // window
    if not rows:
        what = f"{len(ids)} tokens of text are too few to calibrate on"
        raise DataError(what, where="--calibrate", todo=f"give at least {window}, better {CALIBRATION}")
    tokens, segments = (torch.tensor(each[: rows * window]).view(rows, window) for each in (ids, numbers))
    return tokens, segments
