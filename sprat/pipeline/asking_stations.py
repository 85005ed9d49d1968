"""The stations that ask a user's questions and have the answers judged: ``rl``, ``sample``, ``eval`` of ``data``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sprat.config.base import parse
from sprat.config.rl import RLRunConfig, load_rl_config
from sprat.config.road import EvalStage, QuestionsStage, RLStage, SampleStage
from sprat.config.sample import AskConfig, SampleConfig
from sprat.formats.load import locate
from sprat.pipeline.executor import notify
from sprat.post.rl.asking import score_held_out
from sprat.post.rl.questions import Questions
from sprat.post.rl.reinforce import reinforce
from sprat.post.rl.rejection import sample_examples
from sprat.trust import run_record
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.run import Run, open_run


def questions_of(stage: QuestionsStage | EvalStage) -> Questions:
    """What a stage asks, and who judges."""
    data = Path(stage.data) if stage.data else None
    second = stage.second_reward if isinstance(stage, RLStage) else ""
    tasks = stage.tasks if isinstance(stage, QuestionsStage) else ()
    return Questions(data, tasks, stage.reward, second, stage.map or None)


def rl_settings(stage: RLStage, where: str) -> RLRunConfig:
    """The config of the run that ``sprat rl`` makes."""
    questions_of(stage).check()
    table = stage.set | ({"init_from": stage.init_from} if stage.init_from else {})
    return load_rl_config(lora=stage.lora, table=table, where=where)


def rl(stage: RLStage, settings: RLRunConfig, out: Path) -> Run:
    """``sprat rl``."""
    return reinforce(
        stage.model,
        questions_of(stage),
        out,
        settings,
        dequantize=stage.dequantize,
        on_news=lambda text: notify(stage.name, f"says: {text}"),
    )


def sample_settings(stage: SampleStage, where: str) -> SampleConfig:
    """The config of the run that ``sprat sample`` makes."""
    questions_of(stage).check()
    return parse(SampleConfig, stage.set, where=where)


def sample(stage: SampleStage, settings: SampleConfig, out: Path) -> Run:
    """``sprat sample``."""
    return sample_examples(stage.model, questions_of(stage), out, settings, mix=stage.mix or None)


def held_out_score(stage: EvalStage, settings: AskConfig, out: Path) -> Run:
    """The score of a model on the held-out part of ``stage.data``; the artefact says what each question was paid."""
    path = locate(stage.model)
    inputs: dict[str, run_record.Input] = {"model": path, **inputs_of(stage)}
    run = open_run(out, stage="eval", recipe=settings, inputs=inputs, seed=0, ledger=out.parent / LEDGER_NAME)
    if not run.done:
        run.add_facts(held_out_score=score_held_out(path, questions_of(stage), settings, run.artifact))
        run.finish()
    return run


def inputs_of(stage: Any) -> dict[str, run_record.Input]:
    """The inputs of the run of a stage here, but for its model and where it starts."""
    inputs = questions_of(stage).inputs()
    return inputs | ({"mix": Path(stage.mix)} if isinstance(stage, SampleStage) and stage.mix else {})
