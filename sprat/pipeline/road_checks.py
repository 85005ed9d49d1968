"""What a road needs, read before its first stage runs: a fault that the last stage would find is said at once.

Questions, verifiers, examples and models that the user named are read as their stages will read them; what a stage
before makes is not there yet. Whatever several stages name is read once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sprat.config.finetune import FinetuneConfig
from sprat.config.road import EvalStage, FinetuneStage, QuestionsStage, RLStage, SampleStage
from sprat.data.conversations import read_examples
from sprat.errors import ConfigError, SpratError
from sprat.formats.load import load, load_dense
from sprat.pipeline.asking_stations import questions_of
from sprat.pipeline.road_stages import RoadStage
from sprat.post.finetune import examples_file
from sprat.post.rl.asking import check_judge, held_out_questions, split_questions
from sprat.post.rl.questions import Questions
from sprat.post.rl.rejection import general_examples


def check_inputs(stages: Sequence[RoadStage], *, models: bool = True) -> None:
    """Read what ``stages`` name, but for what is to be made by one of them, and for stages that are done.

    Args:
        models: whether models too are loaded (one that is only a name is fetched).

    Raises:
        SpratError: what the stage would say of it.
    """
    made, seen = {str(stage.folder) for stage in stages}, set[str]()
    for stage in stages:
        if stage.state() == "done":
            continue
        for key, check in _checks(stage, made):
            if key not in seen:
                check()
                seen.add(key)
        if models and stage.config.uses in _ASKING and stage.config.model not in made:
            _check_model(stage, seen)


_ASKING = ("rl", "sft", "dpo", "sample")


def _checks(stage: RoadStage, made: set[str]) -> Iterator[tuple[str, Any]]:
    """What of ``stage`` is to be read: by what it is known, and a function that reads it."""
    config: Any = stage.config
    if isinstance(config, QuestionsStage) or (isinstance(config, EvalStage) and config.data):
        questions, settings = questions_of(config), stage.settings
        split = getattr(settings, "held_out")  # noqa: B009 (each of their settings has it)
        yield f"questions {questions} {split.share} {split.problems}", lambda: split_questions(questions, split)
        judges = Questions(reward=questions.reward, second_reward=questions.second_reward)
        yield f"judges {judges}", lambda: check_judge(judges)
    if isinstance(config, SampleStage) and config.mix:
        yield f"general {config.mix}", lambda: general_examples(Path(config.mix))
    if isinstance(config, FinetuneStage):
        if config.data not in made:
            path, columns = examples_file(Path(config.data)), config.map or None
            yield f"examples {path} {columns}", lambda: read_examples(path, column_map=columns)
        if config.held_out.data:
            yield f"held out {config.held_out}", lambda: held_out_questions(config.held_out)


def _check_model(stage: RoadStage, seen: set[str]) -> None:
    """Load the model that ``stage`` starts from, and see that its context holds what is asked of it.

    Raises:
        SpratError: it cannot be loaded, or trained; or what is asked is longer than its context.
    """
    config: Any = stage.config
    settings: Any = stage.settings
    length, key = (settings.seq_len, "seq_len") if isinstance(settings, FinetuneConfig) else (0, "max_tokens")
    length = length or settings.max_tokens
    known = f"model {os.path.abspath(config.model)} {config.uses} {length}"
    if known in seen:
        return
    is_trained = isinstance(config, (RLStage, FinetuneStage))
    read = load_dense if is_trained else load
    try:
        model, _ = read(config.model, dequantize=getattr(config, "dequantize", False))
    except SpratError as error:
        raise type(error)(error.what, where=f"{stage.where}: {error.where}", todo=error.todo) from None
    context = model.config.max_position_embeddings if key == "seq_len" else model.config.context - 1
    if length > context:
        what = f"{length} tokens do not fit a context of {model.config.context}"
        raise ConfigError(what, where=f"{stage.where}, {key}", todo=f"--set {key}={min(length, context // 2 * 2)}")
    seen.add(known)
