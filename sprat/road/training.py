"""The stages that train: pre-train and its dense twin, SFT, RL, distil; what they are measured against: ``controls``.

Each function is one stage: it opens its run, returns at once when that is done, trains, measures, and
closes the run with what it found. Arguments are plain, so that a stage can run in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sprat.config import LoopConfig, RLConfig
from sprat.data.loader import MixedSource, gather
from sprat.data.pack import Packed
from sprat.engine import Engine, load, save
from sprat.model import Transformer, count_parameters
from sprat.post import distill, grpo, reward_sources, rewards, sft
from sprat.post.rl_gate import evaluate_gate
from sprat.road import measure
from sprat.road.places import Road, load_task, model_config
from sprat.road.recipe import AskedRecipe, DataRecipe, DenseRecipe, DistillRecipe, ModelRecipe, PretrainRecipe
from sprat.tasks import Task
from sprat.tokens import Tokenizer
from sprat.train import checkpoint, evaluate, loop
from sprat.trust import record
from sprat.trust.facts import HeldOutText
from sprat.trust.run import Run

ALL_WAYS = ("greedy", "sampled", "thinking", "direct")
Mix = tuple[list[Task], list[float]]  # tasks and their weights
LEAP = 1_000_003  # between the seeds of RL of one road and those of the next
LOAD_ROWS = 64  # packed rows on which expert loads are measured


def pretrain(road: Road, twin: DenseRecipe | None = None) -> None:
    """Pre-train the teacher, or a dense ``twin`` of it (a control), on text and worked examples."""
    recipe = road.recipe.pretrain
    if twin is not None:
        train = recipe.train.replace(init_from="", steps=twin.steps or recipe.train.steps)
        shape = ModelRecipe(size=twin.size, changes=twin.changes)
        recipe = recipe.replace(model=shape.model_dump(), train=train.model_dump())
    opened = open_pretraining(road, twin.run if twin else "pretrain", recipe, road.recipe.seed)
    if opened is None:
        return
    run, (model, tokenizer, batches) = opened
    result = loop.train(model, batches, recipe.train, run)
    ways = ALL_WAYS if twin is None else ("greedy", "thinking")
    facts = _text_facts(road, model) | ({} if twin is None else {"control_of": "pretrain"})
    label = "Pre-training" if twin is None else f"Pre-training, dense twin at equal {twin.equal}"
    close(road, run, model, tokenizer, result, label, ways, facts)


def fine_tune(road: Road) -> None:
    """SFT on demonstrations that show their thinking: RL starts from it, or is measured against it."""
    recipe = road.recipe.sft.sft

    def prepare(goes_on: bool) -> tuple[Transformer, Tokenizer, list[sft.Demonstration]]:
        model, tokenizer = load(road.path("pretrain"))
        shown = sft.sample_demonstrations(
            *mix(road), count=recipe.demonstrations, terse_fraction=recipe.terse_fraction, seed=road.recipe.seed
        )
        measure.check(road, model, tokenizer, rows=recipe.seq_len)
        sft.build_source(tokenizer, shown, recipe)
        return model, tokenizer, shown

    inputs = {"model": road.path("pretrain"), **measured(road)}
    opened = road.open("sft", "sft", recipe, inputs, road.recipe.seed, prepare, recipe.init_from, fits(recipe))
    if opened is None:
        return
    run, (model, tokenizer, shown) = opened
    result = sft.sft(model, tokenizer, shown, recipe, run)
    facts = {} if road.recipe.rl.start == "sft" else {"control_of": "rl"}
    close(road, run, model, tokenizer, result, "SFT on worked examples", ALL_WAYS, facts, before="pretrain")


def reinforce(road: Road, seed: int) -> None:
    """GRPO with rule rewards, with its own ``seed``, from the pre-trained model (R1-Zero) or after SFT (R1).

    Another seed of the road is another one of RL too.
    """
    own = (seed + LEAP * road.recipe.seed) % 2**63
    recipe, start = RLConfig(**road.recipe.rl.rl.model_dump(), seed=own), road.recipe.rl.start
    first = seed == road.recipe.rl.seeds[0]
    ways = ALL_WAYS if first else ("greedy",)
    inputs = {"model": road.path(start), **measured(road), "asked": AskedRecipe(ways=ways, unseen=first)}
    if recipe.reward:
        inputs |= reward_sources.reward_files(recipe.reward)

    def prepare(goes_on: bool) -> tuple[Transformer, Tokenizer, Mix, rewards.Verifier | None]:
        reward = rewards.load_reward(recipe.reward, recipe.reward_timeout) if recipe.reward else None
        model, tokenizer = load(road.path(start))
        measure.check(road, model, tokenizer, answer=recipe.max_tokens, unseen=first)
        tasks = mix(road)
        if recipe.gate and not goes_on and not recipe.init_from:
            engine = Engine(model, tokenizer, max_batch=recipe.prompts_per_step * recipe.group_size)
            evaluate_gate(engine, *tasks, recipe, reward).raise_if_failed()
        return model, tokenizer, tasks, reward

    def suits(made: tuple[Transformer, Tokenizer, Mix, rewards.Verifier | None], found: checkpoint.Checkpoint) -> None:
        grpo.check_start(found, made[0], recipe)

    opened = road.open(f"rl-seed{seed}", "rl", recipe, inputs, seed, prepare, recipe.init_from, suits)
    if opened is None:
        return
    run, (model, tokenizer, tasks, reward) = opened
    result = grpo.grpo(model, tokenizer, *tasks, recipe, run, reward=reward, gate=False)
    label = f"Reinforcement learning, seed {seed}"
    close(road, run, model, tokenizer, result, label, ways, before=start, unseen=first)


def student(road: Road) -> None:
    """Distil the RL teacher into a small student: its verified answers, its distributions, and text."""
    recipe, teacher_run = road.recipe.distill, f"rl-seed{road.recipe.rl.seeds[0]}"

    def prepare(goes_on: bool) -> tuple[Transformer, Transformer, Tokenizer, Mix]:
        teacher, tokenizer = load(road.path(teacher_run))
        model = Transformer.create(model_config(recipe.student, tokenizer), road.recipe.seed + 1)
        measure.check(road, model, tokenizer, rows=road.artefacts.packed("text").seq_len, unseen=True)
        measure.check(road, teacher, tokenizer)
        return model, teacher, tokenizer, mix(road)

    inputs = {"teacher": road.path(teacher_run), **measured(road)}
    if round(recipe.distill.qat_fraction * recipe.distill.steps):  # it learns with nearest codes, however they are made
        inputs["quant"] = road.recipe.quant.replace(rounding="nearest")
    start, suits = recipe.distill.init_from, fits(recipe.distill)
    opened = road.open("distill", "distill", recipe, inputs, road.recipe.seed, prepare, start, suits)
    if opened is None:
        return
    run, (model, teacher, tokenizer, tasks) = opened
    engine = Engine(teacher, tokenizer, max_batch=road.recipe.eval.batch)
    taught = distill.sample_traces(
        engine,
        *tasks,
        count=recipe.distill.problems,
        thinking=None,
        max_tokens=road.recipe.eval.max_tokens,
        seed=road.recipe.seed,
        verified=recipe.verified,
    )
    batches, counts = student_source(road, recipe, tokenizer, taught.demonstrations)
    result = distill.distill(model, teacher, batches, recipe.distill, run, road.recipe.quant)
    result = replace(result, flops=result.flops + taught.flops)
    facts = {
        "traces": {"asked": taught.num_samples, "kept": len(taught.demonstrations), "tokens": taught.tokens, **counts}
    }
    close(road, run, model, tokenizer, result, "Distilled student", ALL_WAYS, facts, unseen=True)


def open_pretraining(
    road: Road, name: str, recipe: PretrainRecipe, weights_seed: int
) -> tuple[Run, tuple[Transformer, Tokenizer, MixedSource]] | None:
    """A run of pre-training with its model, tokenizer and batches; None where it is done."""

    def prepare(goes_on: bool) -> tuple[Transformer, Tokenizer, MixedSource]:
        tokenizer = road.artefacts.tokenizer()
        model = Transformer.create(model_config(recipe.model, tokenizer), weights_seed)
        batches = source(road, recipe)
        measure.check(road, model, tokenizer, rows=batches.parts[0].seq_len)
        return model, tokenizer, batches

    start, suits = recipe.train.init_from, fits(recipe.train)
    return road.open(name, "pretrain", recipe, measured(road), road.recipe.seed, prepare, start, suits)


def fits(config: LoopConfig) -> Callable[[tuple[Transformer, *tuple[Any, ...]], checkpoint.Checkpoint], None]:
    """Refuses a checkpoint from which ``config`` cannot go on with the model that was prepared first."""
    return lambda made, start: loop.check_start(start, made[0], config)


def measured(road: Road) -> dict[str, record.Input]:
    """What every stage that is measured reads: the data, the tasks, and how answers are drawn when they are judged.

    Tasks and their weights too: a few worked examples may be the same with other weights, what is drawn later is not.
    """
    tasks = DataRecipe(tasks=road.recipe.data.tasks)
    return {"data": road.path("data"), "tasks": tasks, "eval": road.recipe.eval.replace(batch=1)}


def mix(road: Road) -> Mix:
    """The trained tasks and their weights."""
    configs = road.recipe.data.tasks
    return [load_task(config) for config in configs], [config.weight for config in configs]


def source(road: Road, recipe: PretrainRecipe, seed: int | None = None) -> MixedSource:
    """Text and worked examples in the recipe's shares, in an order by ``seed`` (the road's)."""
    data = road.artefacts
    parts = [(data.packed("text"), recipe.text_share), (data.packed("tasks"), 1 - recipe.text_share)]
    return MixedSource(parts, rows=recipe.train.batch_rows, seed=road.recipe.seed if seed is None else seed)


def student_source(
    road: Road, recipe: DistillRecipe, tokenizer: Tokenizer, taught: Sequence[tuple[str, str, str]]
) -> tuple[MixedSource, dict[str, int]]:
    """The teacher's answers, worked examples and text in the recipe's shares; and how many answers fit into a row.

    Without answers the worked examples take their share.
    """
    text, counts = road.artefacts.packed("text"), dict[str, int]()
    examples, parts = 1 - recipe.text_share, [(text, recipe.text_share)]
    if taught:
        answers, counts = sft.pack_demonstrations(tokenizer, taught, text.seq_len)
        examples = recipe.task_share
        parts.append((answers, 1 - recipe.text_share - recipe.task_share))
    if examples:
        shown = road.artefacts.packed("tasks")
        if recipe.examples is not None:
            few = sft.sample_demonstrations(*mix(road), count=recipe.examples, terse_fraction=0, seed=road.recipe.seed)
            shown, _ = sft.pack_demonstrations(tokenizer, few, text.seq_len)
        parts.append((shown, examples))
    return MixedSource(parts, rows=recipe.distill.batch_rows, seed=road.recipe.seed), counts


def finished(road: Road, name: str) -> dict[str, Any]:
    """``run.json`` of the finished run ``name``."""
    record: dict[str, Any] = json.loads((road.path(name) / "run.json").read_text(encoding="utf-8"))
    return record


def _text_facts(road: Road, model: Transformer) -> dict[str, Any]:
    """Bits per byte on held-out text beside the baselines, and which experts read what."""
    data = road.artefacts
    baselines = finished(road, "data")["facts"]["baselines"]
    table, by_domain = {}, {}
    for domain, size_bytes in data.held_out_domains().items():
        packed = data.held_out(domain)
        told = HeldOutText.of(baselines[domain])
        table[domain] = replace(told, model=evaluate.bits_per_byte(model, packed, size_bytes)).to_dict()
        by_domain[domain] = _loads(model, packed)
    by_domain["tasks"] = _loads(model, data.packed("tasks"))
    facts: dict[str, Any] = {"bits_per_byte": table}
    if model.moe_layers():
        facts["expert_domain"] = by_domain
        facts["expert_load"] = by_domain["tasks"]
    return facts


@torch.no_grad()
def _loads(model: Transformer, packed: Packed) -> list[list[int]]:
    """Tokens that each expert of each layer received on the first rows of ``packed``."""
    batch = gather(packed, range(min(LOAD_ROWS, packed.rows)))
    routing = model.hidden(batch.tokens_BT, segments_BT=batch.segments_BT).routing
    return [one.load_E.tolist() for one in routing]


def close(
    road: Road,
    run: Run,
    model: Transformer,
    tokenizer: Tokenizer,
    result: loop.TrainResult | grpo.RLResult,
    label: str,
    ways: Sequence[str],
    facts: Mapping[str, Any] | None = None,
    *,
    before: str | None = None,
    unseen: bool = False,
) -> None:
    """Save the model, measure it, and finish the run; ``before`` names the run whose scores it must beat."""
    run.note(training_cpu_seconds=round(run.cpu_seconds, 3))  # before anything is measured
    model.eval()
    save(model, tokenizer, run.artefact)
    checkpoint.copy_to_artefact(checkpoint.latest(run.checkpoints / checkpoint.STABLE), run.artefact)
    rows = measure.scores(road, model, tokenizer, ways, unseen=unseen)
    counts = count_parameters(model.config)
    if before is not None:
        run.note(significance=measure.gains(finished(road, before)["facts"]["scores"], rows))
    run.note(title=label, scores=rows, parameters={"total": counts.total, "active": counts.active}, **(facts or {}))
    run.finish(flops=result.flops, tokens=result.tokens)
