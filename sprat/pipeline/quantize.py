"""The last stage: the student in INT4, and what size and speed each model of the pipeline has.

Where the recipe's rounding is GPTQ, it needs text: the student's own answers, and text. Any other model is
``post.quantize``'s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sprat import quant
from sprat.data.pack import pack
from sprat.engine import Engine, Sampling
from sprat.eval.tasks import problem_messages
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.pipeline import evaluation
from sprat.pipeline.pipeline import Pipeline
from sprat.pipeline.training import evaluation_inputs, finished_record, task_mix
from sprat.post import sft as post_sft
from sprat.tokens import Tokenizer

# Tokens of a pipeline's own at most: its student is small, and gains by them (docs/log.md).
STUDENT_CALIBRATION_TOKENS = 12 * 16_384
SHORT_EXAMPLE_TOKENS = 25  # tokens of a short question and answer: as many are drawn as fill the rows


def quantize(pipeline: Pipeline) -> None:
    """Quantise the distilled student and measure size, speed and loss of accuracy."""
    recipe, teacher = pipeline.recipe.quant, pipeline.run_folder(f"rl-seed{pipeline.recipe.rl.seeds[0]}")

    def prepare(resuming: bool) -> tuple[Transformer, Tokenizer]:
        pipeline.require_finished(teacher)
        student, tokenizer = load(pipeline.run_folder("distill"))
        evaluation.check_context(pipeline, student, tokenizer)
        return student, tokenizer

    inputs = {"model": pipeline.run_folder("distill"), **evaluation_inputs(pipeline)}
    if (opened := pipeline.open_run("quantize", "quantize", recipe, inputs, prepare, seed=0)) is None:
        return
    run, (student, tokenizer) = opened
    rows_BT = segments_BT = None
    if recipe.rounding == "gptq":
        rows_BT, segments_BT = _student_calibration_rows(pipeline, student, tokenizer)
    quantized = quant.quantize_model(student, recipe, calibration_BT=rows_BT, segments_BT=segments_BT)
    save(quantized, tokenizer, run.artifact)
    rows = evaluation.score_tasks(pipeline, quantized, tokenizer, ("greedy", "thinking", "direct"))
    before = finished_record(pipeline, "distill")["facts"]["scores"]
    models = {}
    for name, folder in (("teacher", teacher), ("student", pipeline.run_folder("distill")), ("int4", run.folder)):
        model, _ = load(folder)
        models[name] = {
            "size_bytes": sum(path.stat().st_size for path in (folder / "artefact").glob("*.safetensors")),
            "tokens_per_second": evaluation.tokens_per_second(pipeline, model, tokenizer),
        }
    run.add_facts(
        title="Student in INT4",
        scores=rows,
        significance=evaluation.accuracy_changes(before, rows),
        relative_loss=relative_loss(before, rows),
        models=models,
        parameters=finished_record(pipeline, "distill")["facts"]["parameters"],
        drafts=evaluation.draft_speedup(pipeline, quantized, tokenizer),
        **models["int4"],
    )
    run.finish()


def _student_calibration_rows(pipeline: Pipeline, student: Transformer, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Rows [B, T] of what the student will say, tokens and segments: its own answers, and a quarter of text.

    It is asked no more questions than it was taught by.
    """
    text = pipeline.data_artifact.packed("text")
    num_tokens = min(STUDENT_CALIBRATION_TOKENS, SHORT_EXAMPLE_TOKENS * pipeline.recipe.distill.problems)
    rows = max(4, num_tokens // text.seq_len)
    count, key = num_tokens // SHORT_EXAMPLE_TOKENS, f"calibration/{pipeline.recipe.seed}"
    problems = post_sft.sample_problems(*task_mix(pipeline), count, key)
    engine = Engine(student, tokenizer, max_batch=pipeline.recipe.eval.batch)
    sampling = Sampling(temperature=0.7, max_tokens=pipeline.recipe.eval.max_tokens, seed=pipeline.recipe.seed)
    outputs = engine.generate([problem_messages(problem) for _, problem in problems], sampling)
    answers = pack(((output.prompt_ids + output.token_ids, None) for output in outputs), text.seq_len)
    text_rows = rows // 4
    tokens = np.concatenate((answers.tokens[: rows - text_rows], text.tokens[:text_rows]))
    segments = np.concatenate((answers.segments[: rows - text_rows], text.segments[:text_rows]))
    return torch.from_numpy(tokens[:, :-1]).long(), torch.from_numpy(segments[:, :-1]).long()


def relative_loss(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, float]:
    """For each task asked greedily, the share of the student's accuracy that INT4 lost (negative: gained)."""
    accuracy_before = {row["task"]: row["accuracy"] for row in before if row["label"] == "greedy"}
    accuracy_after = {row["task"]: row["accuracy"] for row in after if row["label"] == "greedy"}
    return {
        task: (accuracy_before[task] - accuracy_after[task]) / accuracy_before[task]
        for task in accuracy_after
        if accuracy_before.get(task)
    }
