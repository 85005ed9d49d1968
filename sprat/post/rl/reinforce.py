"""RL of any model on the user's questions and verifier, as a run that can be resumed and proves itself.

The quickstart's ``rl`` reinforces a model of its own pipeline on its own tasks; this is the same loop (``grpo``) for a
model and questions from anywhere. What the run is made of (the model, the questions, the reward with what it imports)
is noted by digest, so that another reward is another run. A part of the questions is kept from training and asked
before, during and after, paid by the same reward; a second judge may look on without ever paying. Trip wires send a
run back or end it where its reward rises for the wrong reason.

The artefact is that of fine-tuning: the whole model, adapters merged; ``adapter/`` in PEFT's layout; ``checkpoint/`` to
start from; the samples and what the held-out problems were paid.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from sprat.config.rl import RLRunConfig
from sprat.formats import peft
from sprat.formats.load import load_dense, locate, save
from sprat.model.lora import merge_lora
from sprat.post.rl import grpo
from sprat.post.rl.held_out import FILE_NAME, HeldOut
from sprat.post.rl.ledger import LEDGER_FILE
from sprat.post.rl.monitor import OnNews, RunMonitor
from sprat.post.rl.orchestrator import Commands, open_ledger, wait_for_predecessor
from sprat.post.rl.questions import Questions
from sprat.post.rl.recorded import RecordedSource
from sprat.post.rl.roles import keep_questions, train_with_roles
from sprat.post.rl.rollout import RolloutSource
from sprat.post.rl.run_preparation import Closable, Prepared, prepare
from sprat.post.rl.training_state import first_group_after
from sprat.train import checkpoint
from sprat.trust import run_record
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.run import Run, open_run
from sprat.trust.stage_facts import SAMPLES_FILE

log = logging.getLogger(__name__)


def reinforce(
    model: str | Path,
    questions: Questions,
    out: str | Path,
    config: RLRunConfig,
    *,
    dequantize: bool = False,
    on_news: OnNews = lambda text: None,
    commands: Commands | None = None,
) -> Run:
    """RL of ``model`` on ``questions``; the finished run, also where it was finished before.

    Args:
        model: as ``sprat.load`` takes it.
        out: the run's folder; its ledger lies in the folder above it.
        dequantize: train a quantised model as the dense one that its codes stand for.
        on_news: is told what a person at the terminal should know.
        commands: how processes are started, where ``config.rollout`` asks for them.

    Raises:
        SpratError: a model, questions, a reward or a recipe that cannot be, before anything was touched; the policy is
            not ready (``run_gate``), or a trip wire ended the run.
    """
    out, config, questions = Path(out), *_named_in_recipe(config, questions)
    questions.check()
    model_path = locate(model)
    start_input = checkpoint.start_input(config.init_from, out, config.digest())
    inputs: dict[str, run_record.Input] = {"model": model_path, **questions.inputs(), **start_input}
    prepared, pools, steps_before, first_group = list[Prepared](), list[Closable](), 0, 0
    wait_for_predecessor(out)

    def check(resuming: bool) -> None:
        nonlocal steps_before, first_group
        start = _find_start(start_input, config, out)
        if start is not None and config.init_state == "continue":
            steps_before, first_group = start.step, start.step * config.prompts_per_step
            first_group = first_group_after(start, config) if config.dynamic_sampling else first_group
        load_model = partial(load_dense, model_path, dequantize=dequantize)
        prepared.append(prepare(load_model, questions, config, start, asks_gate=not resuming, on_news=on_news))
        pools.extend(prepared[0].pools)

    try:
        ledger = out.parent / LEDGER_NAME
        run = open_run(out, stage="rl", recipe=config, inputs=inputs, seed=config.seed, ledger=ledger, prepare=check)
        if not run.done and config.rollout.workers:
            described = {"name": str(model), "path": model_path, "dequantize": dequantize}
            asker = keep_questions(run, prepared.pop(), config)
            train_with_roles(run, asker, questions, config, described, steps_before, first_group, commands=commands)
        elif not run.done:
            source = RecordedSource(prepared[0].source(), open_ledger(run, config), run, first_group)
            result = train(run, prepared[0], source, str(model), questions.judge, on_news)
            run.ledger.add_file(run.folder / LEDGER_FILE)
            run.finish(flops=result.flops, tokens=result.tokens)
        return run
    finally:
        for pool in pools:
            pool.close()


def _named_in_recipe(config: RLRunConfig, questions: Questions) -> tuple[RLRunConfig, Questions]:
    """A recipe may name the reward; it is an input of the run, by digest, and no setting of it."""
    if not config.reward:
        return config, questions
    reward = questions.reward or config.reward
    return config.replace(reward=""), Questions(**{**vars(questions), "reward": reward})


def _find_start(start_input: Mapping[str, Path | str], config: RLRunConfig, out: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint that ``start_input`` names, checked; None where there is none."""
    if not start_input:
        return None
    expected_digest = run_record.describe_input(start_input["init_from"], out.parent)["digest"]
    return checkpoint.find_start(config.init_from, out, expected_digest)


def train(
    run: Run, ready: Prepared, source: RolloutSource, base_model: str, reward_name: str, on_news: OnNews
) -> grpo.RLResult:
    """Train, measure, save; the run can then be finished.

    Args:
        source: who samples; it is closed.
        base_model: what PEFT shall take an adapter's base to be.
        reward_name: of the verifier.

    Raises:
        TrainingError, CheckpointError, MachineError: see ``grpo.train``.
    """
    config = ready.config
    run.add_facts(steps=config.steps, **ready.facts)
    held_out = HeldOut(ready.engine, ready.mix.held_out, config, ready.payer, run.checkpoints)
    monitor = RunMonitor(run, config, held_out, ready.mix, ready.reference, reward_name, on_news)
    try:
        result = grpo.train(ready.model, source, config, run, reward_name=reward_name, monitor=monitor)
    finally:
        source.close()
    run.add_facts(last_step=result.steps, reward=result.reward, accuracy=result.accuracy)
    if held_out.asked:
        first, last = held_out.first, max(held_out.results)
        comparison = held_out.compare(first, last)
        run.add_facts(
            validation_before=held_out.summary(first),
            validation_after=held_out.summary(last),
            eval_tasks={"accuracy": len(held_out.asked)},
            held_out={
                "change": held_out.change(first, last).to_dict(),
                "comparison": None if comparison is None else comparison.to_dict(),
            },
        )
    _save(run, ready, base_model)
    return result


def _save(run: Run, ready: Prepared, base_model: str) -> None:
    """The artefact; see the module's text."""
    model = ready.model
    if ready.config.lora is not None or ready.config.keep_checkpoint:
        checkpoint.copy_to_artefact(checkpoint.latest(run.checkpoints), run.artifact)
    if ready.config.lora is not None:
        peft.save_peft(model, run.artifact / "adapter", base_model=base_model)
        merge_lora(model)
    for name in (SAMPLES_FILE, FILE_NAME):
        if (path := run.checkpoints / name).is_file():
            shutil.copyfile(path, run.artifact / name)
    save(model, ready.tokenizer, run.artifact)
