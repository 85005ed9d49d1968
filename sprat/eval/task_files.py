"""A model asked the user's own tasks: JSONL files, or Python classes. All problems are answered in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sprat.engine import Engine, Output, Sampling
from sprat.errors import DataError
from sprat.eval.task_score import ProblemScore, TaskScore
from sprat.eval.tasks import problem_messages, score_output
from sprat.files.digest import of_bytes, of_json
from sprat.tasks import Problem, Split, Task, UserClassTask, UserTask, held_out_problems, is_correct, load_user_task
from sprat.tokens import render

CLASS_PROBLEMS = 100  # of a class that does not say how many it has
KEPT_ANSWERS = 1  # of each problem, to be read


def evaluate_task_files(
    engine: Engine,
    paths: Sequence[str | Path | UserTask | UserClassTask],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 512,
    thinking: bool | None = None,
    seed: int = 0,
    split: Split = "test",
    count: int | None = None,
) -> list[TaskScore]:
    """One score for each task. Every file is read and checked, and every prompt measured, before any is answered.

    Args:
        paths: JSONL files, or ``file.py:ClassName``; or tasks that were loaded.
        samples: answers of each problem; more than one needs a temperature, and gives pass@k.
        temperature: 0 is greedy.
        max_tokens: limit on think and answer together; less where the context holds less.
        thinking: True forces a think, False forbids it, None lets the model decide.
        count: problems of each task at most; all of them, and 100 of a class without ``__len__``, if not given.

    Raises:
        DataError, ConfigError: a task cannot be used, two have one name, a question does not fit into the context, or a
            class failed on each answer.
        MachineError: a judge needs a package that is not installed.
    """
    if samples < 1 or (samples > 1 and temperature <= 0):
        todo = "set a temperature above 0" if samples > 1 else "ask for at least one"
        raise DataError(f"{samples} samples at temperature {temperature:g}", where="samples", todo=todo)
    tasks = [path if isinstance(path, UserTask | UserClassTask) else load_user_task(str(path)) for path in paths]
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        what = "two tasks of one name" if tasks else "no task"
        raise DataError(what, where=", ".join(map(str, paths)), todo="name each file differently")
    asked = [(task, select_problems(task, split, count)) for task in tasks]
    return ask(
        engine,
        asked,
        samples=samples,
        temperature=temperature,
        max_tokens=max_tokens,
        thinking=thinking,
        seed=seed,
    )


def ask(
    engine: Engine,
    asked: Sequence[tuple[Task, Sequence[Problem]]],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 512,
    thinking: bool | None = None,
    seed: int = 0,
) -> list[TaskScore]:
    """One score for each of ``asked``, a task and problems of it; see ``evaluate_task_files`` for the rest."""
    for task, rows in asked:
        _check_prompts(engine, task.name, rows, thinking)
    sampling = Sampling(
        temperature=temperature, max_tokens=max_tokens, fit=True, seed=seed, thinking=thinking, n=samples
    )
    outputs = engine.generate([problem_messages(problem) for _, rows in asked for problem in rows], sampling)
    scores, start = [], 0
    for task, rows in asked:
        scores.append(_score(task, rows, outputs[start : start + len(rows) * samples], samples))
        start += len(rows) * samples
    return scores


def select_problems(task: UserTask | UserClassTask, split: Split = "test", count: int | None = None) -> list[Problem]:
    """The problems to ask: all of a file's, or as many different ones as a class gives; at most ``count``.

    Raises:
        DataError: there is none.
    """
    if isinstance(task, UserTask):
        task.problem(split, 0)  # that there is any
        return list(task.problems[split][:count])
    available = CLASS_PROBLEMS if task.num_problems is None else task.num_problems
    problems = held_out_problems(task, available if count is None else min(count, available), split)
    if not problems:
        raise DataError(f"no {split} problem", where=task.name, todo="ask for at least one")
    return problems


def _problem_ids(title: str, problems: Sequence[Problem]) -> list[str]:
    """What a result calls each problem: the row's id, or its place.

    Raises:
        DataError: two have one id.
    """
    ids = [str(problem.meta.get("id", place)) for place, problem in enumerate(problems)]
    if len(set(ids)) < len(ids):
        raise DataError("two problems of one id", where=title, todo="give each problem its own meta['id'], or none")
    return ids


def _check_prompts(engine: Engine, title: str, problems: Sequence[Problem], thinking: bool | None) -> None:
    """Every question has an id of its own and leaves room for an answer.

    Raises:
        DataError: one does not.
    """
    context = engine.model.config.context
    for problem_id, problem in zip(_problem_ids(title, problems), problems, strict=True):
        num_tokens = len(render(engine.tokenizer, problem_messages(problem), thinking=thinking))
        if num_tokens >= context:
            where = f"{title}, problem {problem_id}"
            what = f"a question of {num_tokens} tokens, and the context holds {context}"
            raise DataError(what, where=where, todo="shorten it or leave it out")


def _score(task: Task, problems: Sequence[Problem], outputs: list[Output], samples: int) -> TaskScore:
    """Judge the answers of one task, ``samples`` of each problem side by side."""
    rows, ids = [], _problem_ids(task.name, problems)
    for number, problem in enumerate(problems):
        answers = outputs[number * samples : (number + 1) * samples]
        correct = sum(is_correct(score_output(task, problem, answer)) for answer in answers)
        mean_tokens = sum(len(answer.token_ids) for answer in answers) / samples
        answer_texts = tuple(answer.text for answer in answers[:KEPT_ANSWERS])
        digest = of_bytes(problem.question.encode("utf-8", "replace"))
        rows.append(ProblemScore(ids[number], correct, samples, mean_tokens, digest, answer_texts))
    faults = 0
    if isinstance(task, UserClassTask):
        task.check_faults()
        faults = task.faults
    return TaskScore(
        task=task.name,
        digest=task.digest if isinstance(task, UserTask | UserClassTask) else _digest(problems),
        problems=tuple(rows),
        cut=sum(output.finish_reason == "length" for output in outputs) / len(outputs),
        thought=sum(bool((output.reasoning or "").strip()) for output in outputs) / len(outputs),
        faults=faults,
    )


def _digest(problems: Sequence[Problem]) -> str:
    """SHA-256 (hex) of what a task without a file was asked."""
    return of_json([[problem.question, problem.answer] for problem in problems])
