"""What a model can do while it is trained: loss on what was kept back, the user's tasks, and a few answers to read.

Loss says how well the examples are predicted, not whether an answer is right, so tasks are asked by the engine, of the
weights as they are: a dense model's where they lie, adapters merged into a copy. Everything is greedy, and the same
problems and prompts come each time, so that two evaluations differ by the weights alone. Training does not notice:
``train.loop`` puts back modes and random state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.config.finetune import DPOConfig, EvaluationConfig, FinetuneConfig
from sprat.data.example import Conversation, Example, PreferencePair
from sprat.engine import Engine, Output, Sampling
from sprat.errors import ConfigError, DataError
from sprat.eval.task_files import evaluate_task_files
from sprat.model import Transformer
from sprat.model.lora import adapters, merge_lora
from sprat.tasks import UserClassTask, UserTask, load_user_task
from sprat.tokens import Message, Tokenizer, render
from sprat.train.loop import Evaluate
from sprat.train.selection import Selection
from sprat.trust.stage_facts import Sample, read_samples, write_samples


@dataclass(frozen=True)
class SamplePrompt:
    """A question whose answers are kept, and the answer that its example has; None where the question is the user's."""

    messages: tuple[Message, ...]
    expected: str | None = None


class Evaluation:
    """Evaluates the model that is trained, as ``train.loop.train`` asks for it.

    Args:
        loss: the scores of what was kept back; None without it.
        tasks: the user's.
        folder: of ``samples.jsonl``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: EvaluationConfig,
        *,
        loss: Evaluate | None,
        tasks: Sequence[UserTask | UserClassTask] = (),
        prompts: Sequence[SamplePrompt] = (),
        seed: int = 0,
        folder: Path,
    ) -> None:
        self._tokenizer, self._config, self._loss, self._seed = tokenizer, config, loss, seed
        self._tasks, self._prompts, self._folder = tasks, prompts, folder
        self._answers: list[Output] = []

    def __call__(self, model: Transformer) -> dict[str, float]:
        """Scores by name: those of ``loss``, ``accuracy/TASK``, and without either the tokens of a sample.

        Raises:
            EngineError: the model cannot answer.
        """
        scores = dict(self._loss(model)) if self._loss is not None else {}
        if not self._tasks and not self._prompts:
            return scores
        if adapters(model):
            model = copy.deepcopy(model)
            merge_lora(model)
        engine = Engine(model, self._tokenizer)
        if self._tasks:
            task_scores = evaluate_task_files(
                engine,
                self._tasks,
                count=self._config.problems,
                max_tokens=self._config.max_tokens,
                seed=self._seed,
            )
            scores |= {f"accuracy/{score.task}": score.accuracy for score in task_scores}
        if self._prompts:
            sampling = Sampling(temperature=0, max_tokens=self._config.max_tokens, fit=True, seed=self._seed)
            self._answers = engine.generate([list(prompt.messages) for prompt in self._prompts], sampling)
            lengths = [len(answer.token_ids) for answer in self._answers]
            scores = scores or {"sample_tokens": sum(lengths) / len(lengths)}
        return scores

    def write_samples(self, step: int, row: Mapping[str, Any]) -> None:
        """Keep the answers of the evaluation that was logged as ``row``; see ``Run.on_log``.

        Rows of this step and later ones go: an earlier session that was killed wrote them.

        Raises:
            MachineError: the disk is full.
        """
        if not self._answers or not any(name.startswith("eval_") for name in row):
            return
        samples = [sample for sample in read_samples(self._folder) if sample.step < step]
        for prompt, output in zip(self._prompts, self._answers, strict=True):
            text, reasoning, reason = output.text, output.reasoning or "", output.finish_reason
            samples.append(Sample(step, prompt.messages[-1].content, text, prompt.expected, reasoning, str(reason)))
        write_samples(self._folder, samples)
        self._answers = []


def load_tasks(sources: Sequence[str]) -> list[UserTask | UserClassTask]:
    """The user's tasks, JSONL files or ``file.py:ClassName``, each of a name of its own.

    Raises:
        DataError, ConfigError, MachineError: one cannot be used, or two have one name.
    """
    tasks = [load_user_task(source) for source in sources]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise DataError("two tasks of one name", where=", ".join(sources), todo="name each file differently")
    return tasks


def sample_prompts(
    tokenizer: Tokenizer, examples: Sequence[Example], config: EvaluationConfig, context: int
) -> list[SamplePrompt]:
    """The first of ``examples`` that ask something which fits ``context`` tokens, then the user's own prompts.

    Raises:
        DataError: a prompt of the user's does not fit.
    """
    prompts: list[SamplePrompt] = []
    for example in examples:
        if len(prompts) == config.samples:
            break
        if isinstance(example, Conversation):
            prompt = SamplePrompt(example.messages[:-1], example.messages[-1].content)
        elif isinstance(example, PreferencePair):
            prompt = SamplePrompt(example.prompt, example.chosen[-1].content)
        else:
            continue
        if _fits(tokenizer, prompt, context):
            prompts.append(prompt)
    for text in config.prompts:
        prompt = SamplePrompt((Message("user", text),))
        if not text.strip() or not _fits(tokenizer, prompt, context):
            raise DataError(f"cannot be asked: {text[:60]!r}", where="eval.prompts", todo="shorten it or leave it out")
        prompts.append(prompt)
    return prompts


def _fits(tokenizer: Tokenizer, prompt: SamplePrompt, context: int) -> bool:
    try:
        return len(render(tokenizer, prompt.messages)) < context
    except DataError:  # of what the chat format has no place for
        return False


def make_selection(
    config: FinetuneConfig, tasks: Sequence[UserTask | UserClassTask], has_validation: bool
) -> Selection:
    """What decides which evaluation is the best: the loss of what was kept back, or the accuracy of a task.

    Raises:
        ConfigError: nothing is measured under the name that ``config`` gives.
    """
    if not config.keep_best and not config.patience:
        return Selection(evaluate_last=True)
    losses = ("loss", *(("reward_margin", "reward_accuracy") if isinstance(config, DPOConfig) else ()))
    if config.best_metric in losses and config.best_metric in [task.name for task in tasks]:
        what = f"{config.best_metric!r} is a task's name and that of what is measured on examples"
        raise ConfigError(what, where="best_metric", todo="rename the task's file")
    by_name = {name: (name, name != "loss") for name in losses if has_validation}
    by_name |= {task.name: (f"accuracy/{task.name}", True) for task in tasks}
    if config.best_metric not in by_name:
        todo = f"there is {', '.join(by_name)}" if by_name else "keep some examples back (examples.validation)"
        raise ConfigError(f"nothing called {config.best_metric!r} is measured", where="best_metric", todo=todo)
    metric, higher = by_name[config.best_metric]
    return Selection(
        metric,
        higher=higher,
        keep=config.keep_best,
        patience=config.patience,
        min_delta=config.min_delta,
        evaluate_last=True,
    )
