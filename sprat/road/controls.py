"""What stands beside a stage, so that its gain is its own: from the same start, for the same cost.

Beside RL: SFT on demonstrations (``training.fine_tune``), rejection sampling with the same verifier, and pre-training
that goes on; as many CPU seconds as RL took, which the recipe's steps say and each run notes. Beside distillation: the
student without a teacher.
"""

from __future__ import annotations

from dataclasses import replace

from sprat.config import LoopConfig
from sprat.data.loader import MixedSource
from sprat.engine import Engine, load
from sprat.model import Transformer
from sprat.post import distill, sft
from sprat.road import measure, training
from sprat.road.places import Road, model_config
from sprat.road.recipe import ControlsRecipe, DistillRecipe
from sprat.tokens import Tokenizer
from sprat.train import loop


def rejection_sampling(road: Road) -> None:
    """SFT on the start's own right answers to training problems: RL's verifier alone (RAFT, arXiv 2304.06767)."""
    recipe, start = _recipe(road).rft, road.recipe.rl.start

    def prepare(goes_on: bool) -> tuple[Transformer, Tokenizer, training.Mix]:
        model, tokenizer = load(road.path(start))
        measure.check(road, model, tokenizer, rows=recipe.seq_len, answer=recipe.max_tokens)
        return model, tokenizer, training.mix(road)

    inputs = {"model": road.path(start), **training.measured(road)}
    opened = road.open("rft", "rft", recipe, inputs, road.recipe.seed, prepare, recipe.init_from, training.fits(recipe))
    if opened is None:
        return
    run, (model, tokenizer, tasks) = opened
    own = distill.sample_traces(
        Engine(model, tokenizer, max_batch=road.recipe.eval.batch),
        *tasks,
        count=recipe.problems,
        samples=recipe.samples,
        thinking=recipe.thinking or None,
        temperature=recipe.temperature,
        max_tokens=recipe.max_tokens,
        seed=road.recipe.seed,
    )
    result = sft.sft(model, tokenizer, own.demonstrations, recipe, run)
    result = replace(result, flops=result.flops + own.flops)
    facts = {
        "control_of": "rl",
        "traces": {"asked": own.num_samples, "kept": len(own.demonstrations), "tokens": own.tokens},
    }
    label = "Rejection-sampling fine-tuning"
    training.close(road, run, model, tokenizer, result, label, training.ALL_WAYS, facts, before=start)


def more_pretraining(road: Road) -> None:
    """Pre-training that goes on: the same text and worked examples, from RL's start."""
    recipe, start = _recipe(road).more, road.recipe.rl.start
    mixed = road.recipe.pretrain.replace(train=recipe.model_dump())

    def prepare(goes_on: bool) -> tuple[Transformer, Tokenizer, MixedSource]:
        model, tokenizer = load(road.path(start))
        return model, tokenizer, training.source(road, mixed, seed=road.recipe.seed + 1)

    inputs = {"model": road.path(start), **training.measured(road)}
    name, suits = "pretrain-more", training.fits(recipe)
    opened = road.open(name, "pretrain", recipe, inputs, road.recipe.seed, prepare, recipe.init_from, suits)
    if opened is None:
        return
    run, (model, tokenizer, batches) = opened
    result = loop.train(model, batches, recipe, run)
    label, facts = "Pre-training that goes on", {"control_of": "rl"}
    training.close(road, run, model, tokenizer, result, label, training.ALL_WAYS, facts, before=start)


def scratch(road: Road) -> None:
    """The control of distillation: the student's size without a teacher, on the worked examples that there are."""
    _alone(road, "student-scratch", road.recipe.distill, "Student's size without a teacher")


def scratch_on_examples(road: Road) -> None:
    """The same where there are worked examples in place of the teacher's answers: what a teacher stands in for."""
    examples = _recipe(road).student_examples
    recipe = road.recipe.distill.replace(examples=examples, scratch_steps=None)
    _alone(road, "student-examples", recipe, f"Student's size without a teacher, on {examples:,} worked examples")


def _alone(road: Road, name: str, recipe: DistillRecipe, label: str) -> None:
    """Pre-train the student's size as run ``name``, on worked examples and text in ``recipe``'s shares."""
    steps = {"steps": recipe.scratch_steps or recipe.distill.steps, "init_from": ""}
    train = LoopConfig(**{name: getattr(recipe.distill, name) for name in LoopConfig.model_fields} | steps)

    def prepare(goes_on: bool) -> tuple[Transformer, Tokenizer, MixedSource]:
        tokenizer = road.artefacts.tokenizer()
        model = Transformer.create(model_config(recipe.student, tokenizer), road.recipe.seed + 1)
        batches, _ = training.student_source(road, recipe, tokenizer, ())
        measure.check(road, model, tokenizer, rows=batches.parts[0].seq_len)
        return model, tokenizer, batches

    inputs = training.measured(road)
    opened = road.open(name, "pretrain", recipe, inputs, road.recipe.seed, prepare)
    if opened is None:
        return
    run, (model, tokenizer, batches) = opened
    result = loop.train(model, batches, train, run)
    training.close(road, run, model, tokenizer, result, label, ("greedy", "thinking"), {"control_of": "distill"})


def _recipe(road: Road) -> ControlsRecipe:
    """The recipe of RL's controls."""
    return road.recipe.controls or ControlsRecipe()
