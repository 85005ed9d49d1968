"""The stages that train: pre-train, its dense twin, cold start, RL, its control, distil, and its control.

Each function is one stage: it opens its run, returns at once when that is done, trains, measures, and
closes the run with what it found. Arguments are plain, so that a stage can run in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sprat.data.loader import MixedSource, gather
from sprat.data.pack import Packed
from sprat.engine import Engine, load, save
from sprat.model import Transformer, count_parameters
from sprat.post import control, distill, grpo, reward_sources, rewards, sft
from sprat.road import measure
from sprat.road.places import Road, load_task, model_config
from sprat.road.recipe import DistillRecipe, ModelRecipe, PretrainRecipe
from sprat.tasks import Task
from sprat.tokens import Tokenizer
from sprat.train import evaluate, loop
from sprat.trust.run import Run

ALL_WAYS = ("greedy", "thinking", "direct")
LOAD_ROWS = 64  # packed rows on which expert loads are measured


def pretrain(road: Road, name: str = "pretrain", twin: ModelRecipe | None = None) -> None:
    """Pre-train the teacher, or its dense ``twin`` (the control), on text and worked examples."""
    recipe = road.recipe.pretrain
    recipe = recipe if twin is None else recipe.replace(model=twin.model_dump())
    run = road.open(name, "pretrain", recipe, {"data": road.path("data")}, road.recipe.seed)
    if run.done:
        return
    tokenizer = road.artefacts.tokenizer()
    model = Transformer.create(model_config(recipe.model, tokenizer), road.recipe.seed)
    result = loop.train(model, _source(road, recipe), recipe.train, run)
    ways = ALL_WAYS if twin is None else ("greedy", "thinking")
    facts = _text_facts(road, model) | ({} if twin is None else {"control_of": "pretrain"})
    label = "Pre-training" if twin is None else "Pre-training, dense twin at equal FLOPs"
    _close(road, run, model, tokenizer, result, label, ways, facts)


def cold_start(road: Road) -> None:
    """SFT on few and mostly terse demonstrations: the format is learned, the habit of thinking is rare."""
    recipe = road.recipe.sft.sft
    run = road.open("sft", "sft", recipe, {"model": road.path("pretrain"), "data": road.path("data")}, road.recipe.seed)
    if run.done:
        return
    model, tokenizer = load(road.path("pretrain"))
    tasks, weights = _mix(road)
    shown = sft.cold_start(
        tasks, weights, count=recipe.demonstrations, terse_fraction=recipe.terse_fraction, seed=road.recipe.seed
    )
    result = sft.sft(model, tokenizer, shown, recipe, run)
    _close(road, run, model, tokenizer, result, "Cold start", ALL_WAYS)


def reinforce(road: Road, seed: int) -> None:
    """GRPO with rule rewards from the cold start, with its own ``seed``."""
    recipe = road.recipe.rl.rl.replace(seed=seed)
    inputs = {"model": road.path("sft"), "data": road.path("data")}
    reward = rewards.load_reward(recipe.reward, recipe.reward_timeout) if recipe.reward else None
    if reward is not None:
        inputs |= reward_sources.sources(recipe.reward)
    run = road.open(f"rl-seed{seed}", "rl", recipe, inputs, seed)
    if run.done:
        return
    model, tokenizer = load(road.path("sft"))
    tasks, weights = _mix(road)
    result = grpo.grpo(model, tokenizer, tasks, weights, recipe, run, reward=reward, gate=recipe.gate)
    first = seed == road.recipe.rl.seeds[0]
    ways, label = (ALL_WAYS if first else ("greedy",)), f"Reinforcement learning, seed {seed}"
    _close(road, run, model, tokenizer, result, label, ways, before="sft", unseen=first)


def labels(road: Road) -> None:
    """The control of RL: SFT on bare answers for the FLOPs that RL spent."""
    recipe = road.recipe.sft.sft
    spent = finished(road, f"rl-seed{road.recipe.rl.seeds[0]}")["flops"]
    inputs = {
        "model": road.path("sft"),
        "data": road.path("data"),
        "rl": road.path(f"rl-seed{road.recipe.rl.seeds[0]}"),
    }
    run = road.open("sft-labels", "sft", recipe, inputs, road.recipe.seed)
    if run.done:
        return
    model, tokenizer = load(road.path("sft"))
    tasks, weights = _mix(road)
    result = control.control(model, tokenizer, tasks, weights, recipe, run, flops=spent)
    label, facts = "SFT on labels, equal compute", {"control_of": "rl"}
    _close(road, run, model, tokenizer, result, label, ("greedy",), facts, before="sft")


def student(road: Road) -> None:
    """Distil the RL teacher into a small student: its verified answers, its distributions, and text."""
    recipe, teacher_run = road.recipe.distill, f"rl-seed{road.recipe.rl.seeds[0]}"
    inputs = {"teacher": road.path(teacher_run), "data": road.path("data")}
    run = road.open("distill", "distill", recipe, inputs, road.recipe.seed)
    if run.done:
        return
    teacher, tokenizer = load(road.path(teacher_run))
    tasks, weights = _mix(road)
    engine = Engine(teacher, tokenizer, max_batch=road.recipe.eval.batch)
    settings: dict[str, Any] = {
        "count": recipe.distill.problems,
        "max_tokens": road.recipe.eval.max_tokens,
        "seed": road.recipe.seed,
    }
    taught = distill.traces(engine, tasks, weights, thinking=None, **settings)
    source, counts = _student_source(road, recipe, tokenizer, taught.kept)
    model = Transformer.create(model_config(recipe.student, tokenizer), road.recipe.seed + 1)
    result = distill.distill(model, teacher, source, recipe.distill, run)
    facts = {"traces": {"asked": taught.asked, "kept": len(taught.kept), "tokens": taught.tokens, **counts}}
    _close(road, run, model, tokenizer, result, "Distilled student", ALL_WAYS, facts, unseen=True)


def scratch(road: Road) -> None:
    """The control of distillation: the student's size from scratch, same steps, on what the teacher was taught."""
    recipe = road.recipe.distill
    plain = PretrainRecipe(
        model=recipe.student,
        train={name: getattr(recipe.distill, name) for name in type(road.recipe.pretrain.train).model_fields},
        text_share=recipe.text_share,
    )
    run = road.open("student-scratch", "pretrain", plain, {"data": road.path("data")}, road.recipe.seed)
    if run.done:
        return
    tokenizer = road.artefacts.tokenizer()
    model = Transformer.create(model_config(plain.model, tokenizer), road.recipe.seed + 1)
    result = loop.train(model, _source(road, plain), plain.train, run)
    label, facts = "Student's size from scratch, equal tokens", {"control_of": "distill"}
    _close(road, run, model, tokenizer, result, label, ("greedy", "thinking"), facts)


def _mix(road: Road) -> tuple[list[Task], list[float]]:
    """The trained tasks and their weights."""
    configs = road.recipe.data.tasks
    return [load_task(config) for config in configs], [config.weight for config in configs]


def _source(road: Road, recipe: PretrainRecipe) -> MixedSource:
    """Text and worked examples in the recipe's shares."""
    data = road.artefacts
    parts = [(data.packed("text"), recipe.text_share), (data.packed("tasks"), 1 - recipe.text_share)]
    return MixedSource(parts, rows=recipe.train.batch_rows, seed=road.recipe.seed)


def _student_source(
    road: Road, recipe: DistillRecipe, tokenizer: Tokenizer, taught: Sequence[tuple[str, str, str]]
) -> tuple[MixedSource, dict[str, int]]:
    """The teacher's answers, worked examples and text in the recipe's shares; and how many answers fit into a row."""
    answers, counts = sft.pack_demonstrations(tokenizer, taught, recipe.distill.seq_len)
    parts = [(road.artefacts.packed("text"), recipe.text_share), (answers, 1 - recipe.text_share - recipe.task_share)]
    if recipe.task_share:
        parts.append((road.artefacts.packed("tasks"), recipe.task_share))
    return MixedSource(parts, rows=recipe.distill.batch_rows, seed=road.recipe.seed), counts


def finished(road: Road, name: str) -> dict[str, Any]:
    """``run.json`` of the finished run ``name``."""
    record: dict[str, Any] = json.loads((road.path(name) / "run.json").read_text(encoding="utf-8"))
    return record


def _text_facts(road: Road, model: Transformer) -> dict[str, Any]:
    """Bits per byte on held-out text beside gzip and the 3-gram model, and which experts read what."""
    data = road.artefacts
    baselines = finished(road, "data")["facts"]["baselines"]
    table, by_domain = {}, {}
    for domain, size_bytes in data.held_out_domains().items():
        packed = data.held_out(domain)
        table[domain] = {**baselines[domain], "model": evaluate.bits_per_byte(model, packed, size_bytes)}
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


def _close(
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
    model.eval()
    save(model, tokenizer, run.artefact)
    rows = measure.scores(road, model, tokenizer, ways, unseen=unseen)
    counts = count_parameters(model.config)
    if before is not None:
        run.note(significance=measure.gains(finished(road, before)["facts"]["scores"], rows))
    run.note(title=label, scores=rows, parameters={"total": counts.total, "active": counts.active}, **(facts or {}))
    run.finish(flops=result.flops, tokens=result.tokens)
