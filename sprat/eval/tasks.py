"""Problems asked of an engine and its answers scored: accuracy and pass@k on the tasks.

All problems of all tasks go to the engine in one call: a batch of 1,000 costs a small model little more
than a batch of 10.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from sprat.engine import Engine, Output, Sampling
from sprat.errors import DataError
from sprat.eval.score import Score, estimate_pass_at_k, wilson_interval
from sprat.tasks import Problem, Split, Task, held_out_problems, is_correct
from sprat.tokens import Message

Scorer = Callable[[Task, Problem, Output], float]  # from 0 to 1


def problem_messages(problem: Problem) -> list[Message]:
    """The conversation that puts one problem to the model: that of the problem, where it has one, or its question."""
    if "messages" in problem.meta:
        return [Message(**message) for message in problem.meta["messages"]]
    return [Message("user", problem.question)]


def score_output(task: Task, problem: Problem, output: Output) -> float:
    """The task's score of what the user sees; no visible text, or a think that never closed, is no answer."""
    return float(task.score(problem, (output.text.strip() or None) if output.closed else None))


def evaluate(
    engine: Engine,
    task: Task,
    *,
    count: int,
    thinking: bool | None,
    max_tokens: int,
    seed: int = 0,
    temperature: float = 0.0,
    split: Split = "test",
    samples: int = 8,
    scorer: Scorer = score_output,
) -> Score:
    """Score ``count`` problems of one task; see ``evaluate_many``."""
    return evaluate_many(
        engine,
        [task],
        count=count,
        thinking=thinking,
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature,
        split=split,
        samples=samples,
        scorer=scorer,
    )[0]


def evaluate_many(
    engine: Engine,
    tasks: Sequence[Task],
    *,
    count: int,
    thinking: bool | None,
    max_tokens: int,
    seed: int = 0,
    temperature: float = 0.0,
    split: Split = "test",
    samples: int = 8,
    scorer: Scorer = score_output,
) -> list[Score]:
    """One Score for each task, all problems answered in one batch.

    Args:
        count: problems of each task; distinct ones on dev and test, which may have fewer.
        thinking: True forces a think, False forbids it, None lets the model decide.
        max_tokens: limit on think and answer together.
        temperature: 0 is greedy.
        samples: how many full answers to keep of each task.
        scorer: scores an answer from 0 to 1; the task's own judge if not given.
    """
    problems = [_select_problems(task, split, count) for task in tasks]
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed, thinking=thinking)
    outputs = iter(engine.generate([problem_messages(problem) for row in problems for problem in row], sampling))
    task_outputs = [(task, row, [next(outputs) for _ in row]) for task, row in zip(tasks, problems, strict=True)]
    return [_score_task(task, row, row_outputs, samples, scorer) for task, row, row_outputs in task_outputs]


def pass_at_k(
    engine: Engine,
    task: Task,
    k: int,
    count: int,
    *,
    samples: int | None = None,
    thinking: bool | None = None,
    max_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    split: Split = "test",
    scorer: Scorer = score_output,
) -> float:
    """Mean unbiased pass@k over ``count`` problems with ``samples`` (default k) draws of each."""
    num_samples = samples or k
    problems = _select_problems(task, split, count)
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed, thinking=thinking, n=num_samples)
    outputs = engine.generate([problem_messages(problem) for problem in problems], sampling)
    correct_flags = [
        is_correct(scorer(task, problems[row // num_samples], output)) for row, output in enumerate(outputs)
    ]
    counts = [sum(correct_flags[start : start + num_samples]) for start in range(0, len(correct_flags), num_samples)]
    return sum(estimate_pass_at_k(num_samples, correct, k) for correct in counts) / len(counts)


def _select_problems(task: Task, split: Split, count: int) -> list[Problem]:
    """Distinct problems of a held-out split, or the first ones of the training split.

    Raises:
        DataError: there is none.
    """
    is_train = split == "train"  # these are drawn as they are learned, again and again
    problems = (
        [task.problem(split, index) for index in range(count)] if is_train else held_out_problems(task, count, split)
    )
    if not problems:
        raise DataError(f"no problem to evaluate of {count}", where=task.name, todo="ask for at least one")
    return problems


def _score_task(task: Task, problems: list[Problem], outputs: list[Output], samples: int, scorer: Scorer) -> Score:
    """Judge the answers of one task."""
    scores = [scorer(task, problem, output) for problem, output in zip(problems, outputs, strict=True)]
    correct_flags = [is_correct(score) for score in scores]
    lengths: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for problem, ok in zip(problems, correct_flags, strict=True):
        if "num_terms" in problem.meta:
            terms = int(problem.meta["num_terms"])
            lengths[terms] = (lengths[terms][0] + ok, lengths[terms][1] + 1)
    sample_rows = [
        {
            "question": problem.question,
            "expected": problem.answer,
            "reasoning": output.reasoning,
            "answer": output.text,
            "score": score,
        }
        for problem, output, score in list(zip(problems, outputs, scores, strict=True))[:samples]
    ]
    low, high = wilson_interval(sum(correct_flags), len(correct_flags))
    return Score(
        task=task.name,
        count=len(correct_flags),
        correct=sum(correct_flags),
        mean=sum(scores) / len(scores),
        low=low,
        high=high,
        mean_tokens=sum(len(output.token_ids) for output in outputs) / len(outputs),
        thought=sum(bool((output.reasoning or "").strip()) for output in outputs) / len(outputs),
        by_length=dict(sorted(lengths.items())),
        samples=sample_rows,
    )
