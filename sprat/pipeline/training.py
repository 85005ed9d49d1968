# size: the stages that train are one noun, each a flat function
"""The stages that train: pre-train and its dense twin, SFT, RL, distil; what they are measured against: ``controls``.

Each function is one stage: it opens its run, returns at once when that is done, trains, measures, and
closes the run with what it found. Arguments are plain, so that a stage can run in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sprat.config.recipe import DataRecipe, DenseRecipe, DistillRecipe, EvalScopeRecipe, PretrainRecipe
from sprat.data.loader import MixedBatchSource, gather_rows
from sprat.data.pack import PackedDataset
from sprat.engine import Engine
from sprat.eval.bits_per_byte import bits_per_byte, bits_per_byte_by_domain
from sprat.eval.score import HeldOutScores
from sprat.formats.load import load, save
from sprat.model import Transformer, count_parameters
from sprat.pipeline import evaluation
from sprat.pipeline.pipeline import Pipeline, load_task
from sprat.post import distill as post_distill
from sprat.post import sft as post_sft
from sprat.post.rl import grpo, reward_sources, rewards
from sprat.post.rl.gate import evaluate_gate
from sprat.tasks import Task
from sprat.tokens import Tokenizer
from sprat.train import checkpoint, loop
from sprat.train.pretrain import model_config
from sprat.trust import run_record
from sprat.trust.run import Run

ALL_MODES = ("greedy", "sampled", "thinking", "direct")
TaskMix = tuple[list[Task], list[float]]  # tasks and their weights
SEED_STRIDE = 1_000_003  # between the seeds of RL of one pipeline and those of the next
EXPERT_LOAD_ROWS = 64  # packed rows on which expert loads are measured


def pretrain(pipeline: Pipeline, dense: DenseRecipe | None = None, *, eval_every: int = 0) -> None:
    """Pre-train the teacher, or its ``dense`` counterpart (a control), on text and worked examples.

    Bits per byte of the held-out text are logged after every ``eval_every`` steps (0: never), from Python only:
    ``data.data(pipeline)``, then ``training.pretrain(pipeline, eval_every=100)``.
    """
    recipe = pipeline.recipe.pretrain
    if dense is not None:
        shape, steps = {"size": dense.size, "changes": dense.changes}, dense.steps or recipe.steps
        recipe = recipe.replace(model=shape, steps=steps, init_from="")

    def prepare(resuming: bool) -> tuple[Transformer, Tokenizer, MixedBatchSource]:
        tokenizer = pipeline.data_artifact.tokenizer()
        model = Transformer.create(model_config(recipe.model, tokenizer), pipeline.recipe.seed)
        batches = pretraining_source(pipeline, recipe)
        evaluation.check_context(pipeline, model, tokenizer, rows=batches.parts[0].seq_len)
        return model, tokenizer, batches

    name, inputs = dense.run if dense else "pretrain", evaluation_inputs(pipeline)
    if (opened := pipeline.open_run(name, "pretrain", recipe, inputs, prepare, loop.check_start)) is None:
        return
    run, (model, tokenizer, batches) = opened
    scores = partial(_held_out_bits, pipeline)
    result = loop.train(model, batches, recipe, run, evaluate=scores, eval_every=eval_every)
    modes = ALL_MODES if dense is None else ("greedy", "thinking")
    facts = _text_facts(pipeline, model) | ({} if dense is None else {"control_of": "pretrain"})
    label = "Pre-training" if dense is None else f"Pre-training, dense twin at equal {dense.equal}"
    finish_run(pipeline, run, model, tokenizer, result, label, modes, facts)


def sft(pipeline: Pipeline) -> None:
    """SFT on demonstrations that show their thinking: RL starts from it, or is measured against it."""
    recipe = pipeline.recipe.sft

    def prepare(resuming: bool) -> tuple[Transformer, Tokenizer, list[post_sft.Demonstration]]:
        model, tokenizer = load(pipeline.run_folder("pretrain"))
        examples = post_sft.sample_demonstrations(
            *task_mix(pipeline),
            count=recipe.demonstrations,
            terse_fraction=recipe.terse_fraction,
            seed=pipeline.recipe.seed,
        )
        evaluation.check_context(pipeline, model, tokenizer, rows=recipe.seq_len)
        post_sft.build_source(tokenizer, examples, recipe)
        return model, tokenizer, examples

    inputs = {"model": pipeline.run_folder("pretrain"), **evaluation_inputs(pipeline)}
    if (opened := pipeline.open_run("sft", "sft", recipe, inputs, prepare, loop.check_start)) is None:
        return
    run, (model, tokenizer, demonstrations) = opened
    result = post_sft.sft(model, tokenizer, demonstrations, recipe, run)
    facts = {} if pipeline.recipe.rl.start == "sft" else {"control_of": "rl"}
    finish_run(pipeline, run, model, tokenizer, result, "SFT on worked examples", ALL_MODES, facts, before="pretrain")


def rl(pipeline: Pipeline, seed: int) -> None:
    """GRPO with rule rewards, with its own ``seed``, from the pre-trained model (R1-Zero) or after SFT (R1).

    Another seed of the pipeline is another one of RL too.
    """
    rl_seed = (seed + SEED_STRIDE * pipeline.recipe.seed) % 2**63
    recipe, start = pipeline.recipe.rl.with_seed(rl_seed), pipeline.recipe.rl.start
    is_first_seed = seed == pipeline.recipe.rl.seeds[0]
    modes = ALL_MODES if is_first_seed else ("greedy",)
    inputs = {"model": pipeline.run_folder(start), **evaluation_inputs(pipeline)}
    inputs["asked"] = EvalScopeRecipe(ways=modes, unseen=is_first_seed)
    if recipe.reward:
        inputs |= reward_sources.reward_files(recipe.reward)

    def prepare(resuming: bool) -> tuple[Transformer, Tokenizer, TaskMix, rewards.Verifier | None]:
        reward = rewards.load_reward(recipe.reward, recipe.reward_timeout) if recipe.reward else None
        model, tokenizer = load(pipeline.run_folder(start))
        evaluation.check_context(pipeline, model, tokenizer, answer=recipe.max_tokens, unseen=is_first_seed)
        tasks = task_mix(pipeline)
        if recipe.gate and not resuming and not recipe.init_from:
            engine = Engine(model, tokenizer, max_batch=recipe.prompts_per_step * recipe.group_size)
            evaluate_gate(engine, *tasks, recipe, reward).raise_if_failed()
        return model, tokenizer, tasks, reward

    name = f"rl-seed{seed}"
    if (opened := pipeline.open_run(name, "rl", recipe, inputs, prepare, grpo.check_start, seed)) is None:
        return
    run, (model, tokenizer, tasks, reward) = opened
    result = grpo.grpo(model, tokenizer, *tasks, recipe, run, reward=reward, gate=False)
    label = f"Reinforcement learning, seed {seed}"
    finish_run(pipeline, run, model, tokenizer, result, label, modes, before=start, unseen=is_first_seed)


def distill(pipeline: Pipeline) -> None:
    """Distil the RL teacher into a small student: its verified answers, its distributions, and text."""
    recipe, teacher_name = pipeline.recipe.distill, f"rl-seed{pipeline.recipe.rl.seeds[0]}"

    def prepare(resuming: bool) -> tuple[Transformer, Transformer, Tokenizer, TaskMix]:
        teacher, tokenizer = load(pipeline.run_folder(teacher_name))
        model = Transformer.create(model_config(recipe.student, tokenizer), pipeline.recipe.seed + 1)
        rows = pipeline.data_artifact.packed("text").seq_len
        evaluation.check_context(pipeline, model, tokenizer, rows=rows, unseen=True)
        evaluation.check_context(pipeline, teacher, tokenizer)
        return model, teacher, tokenizer, task_mix(pipeline)

    inputs = {"teacher": pipeline.run_folder(teacher_name), **evaluation_inputs(pipeline)}
    if round(recipe.qat_fraction * recipe.steps):  # it learns with nearest codes, however they are made
        inputs["quant"] = pipeline.recipe.quant.replace(rounding="nearest")
    if (opened := pipeline.open_run("distill", "distill", recipe, inputs, prepare, loop.check_start)) is None:
        return
    run, (model, teacher, tokenizer, tasks) = opened
    engine = Engine(teacher, tokenizer, max_batch=pipeline.recipe.eval.batch)
    traces = post_distill.sample_traces(
        engine,
        *tasks,
        count=recipe.problems,
        thinking=None,
        max_tokens=pipeline.recipe.eval.max_tokens,
        seed=pipeline.recipe.seed,
        verified=recipe.verified,
    )
    batches, counts = student_source(pipeline, recipe, tokenizer, traces.demonstrations)
    result = post_distill.distill(model, teacher, batches, recipe, run, pipeline.recipe.quant)
    result = replace(result, flops=result.flops + traces.flops)
    facts = {"traces": trace_counts(traces) | counts}
    finish_run(pipeline, run, model, tokenizer, result, "Distilled student", ALL_MODES, facts, unseen=True)


def trace_counts(traces: post_distill.Traces) -> dict[str, int]:
    """How many answers were sampled, how many of them count, and their tokens, as a run's facts have it."""
    return {"asked": traces.num_samples, "kept": len(traces.demonstrations), "tokens": traces.tokens}


def evaluation_inputs(pipeline: Pipeline) -> dict[str, run_record.Input]:
    """What every stage that is measured reads: the data, the tasks, and how answers are drawn when they are judged.

    Tasks and their weights too: a few worked examples may be the same with other weights, what is drawn later is not.
    """
    tasks = DataRecipe(tasks=pipeline.recipe.data.tasks)
    return {"data": pipeline.run_folder("data"), "tasks": tasks, "eval": pipeline.recipe.eval.replace(batch=1)}


def task_mix(pipeline: Pipeline) -> TaskMix:
    """The trained tasks and their weights."""
    configs = pipeline.recipe.data.tasks
    return [load_task(config) for config in configs], [config.weight for config in configs]


def pretraining_source(pipeline: Pipeline, recipe: PretrainRecipe, seed: int | None = None) -> MixedBatchSource:
    """Text and worked examples in the recipe's shares, in an order by ``seed`` (the pipeline's)."""
    data = pipeline.data_artifact
    parts = [(data.packed("text"), recipe.text_share), (data.packed("tasks"), 1 - recipe.text_share)]
    return MixedBatchSource(parts, rows=recipe.batch_rows, seed=pipeline.recipe.seed if seed is None else seed)


def student_source(
    pipeline: Pipeline, recipe: DistillRecipe, tokenizer: Tokenizer, traces: Sequence[tuple[str, str, str]]
) -> tuple[MixedBatchSource, dict[str, int]]:
    """The teacher's answers, worked examples and text in the recipe's shares; and how many answers fit into a row.

    Without answers the worked examples take their share.
    """
    text, counts = pipeline.data_artifact.packed("text"), dict[str, int]()
    task_share, parts = 1 - recipe.text_share, [(text, recipe.text_share)]
    if traces:
        answers, counts = post_sft.pack_demonstrations(tokenizer, traces, text.seq_len)
        task_share = recipe.task_share
        parts.append((answers, 1 - recipe.text_share - recipe.task_share))
    if task_share:
        demonstrations = pipeline.data_artifact.packed("tasks")
        if recipe.examples is not None:
            examples = post_sft.sample_demonstrations(
                *task_mix(pipeline), count=recipe.examples, terse_fraction=0, seed=pipeline.recipe.seed
            )
            demonstrations, _ = post_sft.pack_demonstrations(tokenizer, examples, text.seq_len)
        parts.append((demonstrations, task_share))
    return MixedBatchSource(parts, rows=recipe.batch_rows, seed=pipeline.recipe.seed), counts


def finished_record(pipeline: Pipeline, name: str) -> dict[str, Any]:
    """``run.json`` of the finished run ``name``."""
    record: dict[str, Any] = json.loads((pipeline.run_folder(name) / "run.json").read_text(encoding="utf-8"))
    return record


def _held_out_bits(pipeline: Pipeline, model: Transformer) -> dict[str, float]:
    """Bits per byte of the held-out text of each domain, as scores for the log."""
    data = pipeline.data_artifact
    domains = {name: (data.held_out(name), size_bytes) for name, size_bytes in data.held_out_domains().items()}
    return {f"bits_per_byte.{name}": bits for name, bits in bits_per_byte_by_domain(model, domains).items()}


def _text_facts(pipeline: Pipeline, model: Transformer) -> dict[str, Any]:
    """Bits per byte on held-out text beside the baselines, and which experts read what."""
    data = pipeline.data_artifact
    baselines = finished_record(pipeline, "data")["facts"]["baselines"]
    table, by_domain = {}, {}
    for domain, size_bytes in data.held_out_domains().items():
        dataset = data.held_out(domain)
        scores = HeldOutScores.from_dict(baselines[domain])
        table[domain] = replace(scores, model=bits_per_byte(model, dataset, size_bytes)).to_dict()
        by_domain[domain] = _expert_loads(model, dataset)
    by_domain["tasks"] = _expert_loads(model, data.packed("tasks"))
    facts: dict[str, Any] = {"bits_per_byte": table}
    if model.moe_layers():
        facts["expert_domain"] = by_domain
        facts["expert_load"] = by_domain["tasks"]
    return facts


@torch.no_grad()
def _expert_loads(model: Transformer, dataset: PackedDataset) -> list[list[int]]:
    """Tokens that each expert of each layer received on the first rows of ``dataset``."""
    batch = gather_rows(dataset, range(min(EXPERT_LOAD_ROWS, dataset.num_rows)))
    routing = model.hidden(batch.tokens_BT, segments_BT=batch.segments_BT).routing
    return [layer_routing.load_E.tolist() for layer_routing in routing]


def finish_run(
    pipeline: Pipeline,
    run: Run,
    model: Transformer,
    tokenizer: Tokenizer,
    result: loop.TrainResult | grpo.RLResult,
    label: str,
    modes: Sequence[str],
    facts: Mapping[str, Any] | None = None,
    *,
    before: str | None = None,
    unseen: bool = False,
) -> None:
    """Save the model, measure it, and finish the run; ``before`` names the run whose scores it must beat."""
    run.add_facts(training_cpu_seconds=round(run.cpu_seconds, 3))  # before anything is measured
    model.eval()
    save(model, tokenizer, run.artifact)
    checkpoint.copy_to_artefact(checkpoint.latest(run.checkpoints / checkpoint.STABLE), run.artifact)
    rows = evaluation.score_tasks(pipeline, model, tokenizer, modes, unseen=unseen)
    counts = count_parameters(model.config)
    if before is not None:
        scores_before = finished_record(pipeline, before)["facts"]["scores"]
        run.add_facts(significance=evaluation.accuracy_changes(scores_before, rows))
    parameters = {"total": counts.total, "active": counts.active}
    run.add_facts(title=label, scores=rows, parameters=parameters, **(facts or {}))
    run.finish(flops=result.flops, tokens=result.tokens)
