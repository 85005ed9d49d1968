"""What stands beside a stage, so that its gain is its own: from the same start, for the same cost.

Beside RL: SFT on demonstrations (``training.sft``), rejection sampling with the same verifier, and pre-training
that goes on; as many CPU seconds as RL took, which the recipe's steps say and each run notes. Beside distillation: the
student without a teacher.
"""

from __future__ import annotations

from dataclasses import replace

from sprat.config.recipe import ControlsRecipe, DistillRecipe
from sprat.data.loader import MixedBatchSource
from sprat.engine import Engine
from sprat.formats.load import load
from sprat.model import Transformer
from sprat.pipeline import evaluation, training
from sprat.pipeline.pipeline import Pipeline
from sprat.post import distill as post_distill
from sprat.post import sft as post_sft
from sprat.tokens import Tokenizer
from sprat.train import loop
from sprat.train.pretrain import model_config


def rft(pipeline: Pipeline) -> None:
    """SFT on the start's own right answers to training problems: RL's verifier alone (RAFT, arXiv 2304.06767)."""
    recipe, start = _recipe(pipeline).rft, pipeline.recipe.rl.start

    def prepare(resuming: bool) -> tuple[Transformer, Tokenizer, training.TaskMix]:
        model, tokenizer = load(pipeline.run_folder(start))
        evaluation.check_context(pipeline, model, tokenizer, rows=recipe.seq_len, answer=recipe.max_tokens)
        return model, tokenizer, training.task_mix(pipeline)

    inputs = {"model": pipeline.run_folder(start), **training.evaluation_inputs(pipeline)}
    if (opened := pipeline.open_run("rft", "rft", recipe, inputs, prepare, loop.check_start)) is None:
        return
    run, (model, tokenizer, tasks) = opened
    traces = post_distill.sample_traces(
        Engine(model, tokenizer, max_batch=pipeline.recipe.eval.batch),
        *tasks,
        count=recipe.problems,
        samples=recipe.samples,
        thinking=recipe.thinking or None,
        temperature=recipe.temperature,
        max_tokens=recipe.max_tokens,
        seed=pipeline.recipe.seed,
    )
    result = post_sft.sft(model, tokenizer, traces.demonstrations, recipe, run)
    result = replace(result, flops=result.flops + traces.flops)
    facts = {"control_of": "rl", "traces": training.trace_counts(traces)}
    label = "Rejection-sampling fine-tuning"
    training.finish_run(pipeline, run, model, tokenizer, result, label, training.ALL_MODES, facts, before=start)


def pretrain_more(pipeline: Pipeline) -> None:
    """Pre-training that goes on: the same text and worked examples, from RL's start."""
    recipe, start = _recipe(pipeline).more, pipeline.recipe.rl.start
    pretrain_recipe = pipeline.recipe.pretrain.replace(**recipe.model_dump())

    def prepare(resuming: bool) -> tuple[Transformer, Tokenizer, MixedBatchSource]:
        model, tokenizer = load(pipeline.run_folder(start))
        return model, tokenizer, training.pretraining_source(pipeline, pretrain_recipe, seed=pipeline.recipe.seed + 1)

    inputs = {"model": pipeline.run_folder(start), **training.evaluation_inputs(pipeline)}
    if (opened := pipeline.open_run("pretrain-more", "pretrain", recipe, inputs, prepare, loop.check_start)) is None:
        return
    run, (model, tokenizer, batches) = opened
    result = loop.train(model, batches, recipe, run)
    label, facts = "Pre-training that goes on", {"control_of": "rl"}
    training.finish_run(pipeline, run, model, tokenizer, result, label, training.ALL_MODES, facts, before=start)


def student_scratch(pipeline: Pipeline) -> None:
    """The control of distillation: the student's size without a teacher, on the worked examples that there are."""
    _pretrain_student(pipeline, "student-scratch", pipeline.recipe.distill, "Student's size without a teacher")


def student_examples(pipeline: Pipeline) -> None:
    """The same where there are worked examples in place of the teacher's answers: what a teacher stands in for."""
    examples = _recipe(pipeline).student_examples
    recipe = pipeline.recipe.distill.replace(examples=examples, scratch_steps=None)
    label = f"Student's size without a teacher, on {examples:,} worked examples"
    _pretrain_student(pipeline, "student-examples", recipe, label)


def _pretrain_student(pipeline: Pipeline, name: str, recipe: DistillRecipe, label: str) -> None:
    """Pre-train the student's size as run ``name``, on worked examples and text in ``recipe``'s shares."""

    def prepare(resuming: bool) -> tuple[Transformer, Tokenizer, MixedBatchSource]:
        tokenizer = pipeline.data_artifact.tokenizer()
        model = Transformer.create(model_config(recipe.student, tokenizer), pipeline.recipe.seed + 1)
        batches, _ = training.student_source(pipeline, recipe, tokenizer, ())
        evaluation.check_context(pipeline, model, tokenizer, rows=batches.parts[0].seq_len)
        return model, tokenizer, batches

    inputs = training.evaluation_inputs(pipeline)
    if (opened := pipeline.open_run(name, "pretrain", recipe, inputs, prepare)) is None:
        return
    run, (model, tokenizer, batches) = opened
    result = loop.train(model, batches, recipe.replace(steps=recipe.scratch_steps or recipe.steps, init_from=""), run)
    modes, facts = ("greedy", "thinking"), {"control_of": "distill"}
    training.finish_run(pipeline, run, model, tokenizer, result, label, modes, facts)


def _recipe(pipeline: Pipeline) -> ControlsRecipe:
    """The recipe of RL's controls."""
    return pipeline.recipe.controls or ControlsRecipe()
