"""``sprat eval``: how good a model is, on tasks of a recipe, of the user's or of lm-eval's harness, or on a text."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sprat.cli.verb import ModelFolder, Overrides, Recipe, Result
from sprat.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sprat.eval.comparison import Comparison

_TASK_HELP = "A JSONL file of yours, file.py:Class, or a task of the recipe; repeat for more; else the recipe's."
Task = Annotated[list[str] | None, typer.Option("--task", metavar="NAME", help=_TASK_HELP)]
_COUNT_HELP = "Problems for each task; left out: the recipe's number, or all of a file or of the harness's task."
Count = Annotated[int | None, typer.Option("--count", "--limit", min=1, help=_COUNT_HELP)]
_SAMPLES_HELP = "Answers to each problem of a file, for pass@k; more than one needs a temperature."
Samples = Annotated[int, typer.Option("--samples", min=1, max=10_000, help=_SAMPLES_HELP)]
_TEMPERATURE_HELP = "Of the answers to problems of a file; 0 is greedy."
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, max=100.0, help=_TEMPERATURE_HELP)]
_MAX_TOKENS_HELP = "Tokens of an answer, thinking included; left out: the recipe's, or 512 for a file."
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, max=2**31 - 1, help=_MAX_TOKENS_HELP)]
_TEXT_HELP = "Score a text instead: bits per byte and perplexity of a file or folder."
Text = Annotated[Path | None, typer.Option("--text", metavar="FILE", help=_TEXT_HELP)]
_DATA_HELP = "Score the held-out part of a file of questions instead, as `sprat rl` splits it; needs --reward."
Data = Annotated[Path | None, typer.Option("--data", metavar="FILE", help=_DATA_HELP)]
_REWARD_HELP = "With --data: your verifier, file.py:function or a command."
Reward = Annotated[str | None, typer.Option("--reward", metavar="NAME", help=_REWARD_HELP)]
_AGAINST_HELP = "What `sprat eval OTHER --task … --json` printed, to compare with problem by problem."
Against = Annotated[Path | None, typer.Option("--against", metavar="FILE", help=_AGAINST_HELP)]
_LM_EVAL_HELP = "Tasks of EleutherAI's lm-evaluation-harness instead (extra lm-eval); * stands for any text."
LMEval = Annotated[str | None, typer.Option("--lm-eval", metavar="TASK[,TASK]", help=_LM_EVAL_HELP)]
_NUM_FEWSHOT_HELP = "With --lm-eval: examples before each question; left out: the task's own number."
NumFewshot = Annotated[int | None, typer.Option("--num-fewshot", min=0, help=_NUM_FEWSHOT_HELP)]
_INCLUDE_PATH_HELP = "With --lm-eval: a folder of task files (YAML) of yours."
IncludePath = Annotated[Path | None, typer.Option("--include-path", metavar="DIR", help=_INCLUDE_PATH_HELP)]
_CHAT_HELP = "With --lm-eval: put questions through the model's chat format."
ApplyChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help=_CHAT_HELP)]


def evaluate(
    model: ModelFolder,
    task: Task = None,
    count: Count = None,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Force or forbid thinking.")] = None,
    samples: Samples = 1,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = None,
    text: Text = None,
    data: Data = None,
    reward: Reward = None,
    against: Against = None,
    lm_eval: LMEval = None,
    num_fewshot: NumFewshot = None,
    include_path: IncludePath = None,
    apply_chat_template: ApplyChatTemplate = False,
    recipe: Recipe = "quickstart",
    overrides: Overrides = None,
) -> Result:
    """Score a model: greedily on held-out problems of a recipe, on tasks of yours or of lm-eval, or on a text.

    Example: sprat eval runs/mine --task questions.jsonl

    Example: sprat eval runs/mine --lm-eval arc_easy,hellaswag --limit 100
    """
    if lm_eval is not None:
        excluded: dict[str, object] = {"--task": task, "--text": text, "--against": against, "--max-tokens": max_tokens}
        excluded |= {"--samples": samples > 1, "--temperature": temperature > 0, "--set": overrides}
        excluded["--recipe"] = recipe != "quickstart"
        _refuse(excluded, "this is not for the harness, whose tasks say how they are asked", "leave it out")
        return _score_harness(model, lm_eval, include_path, count, num_fewshot, apply_chat_template, think)
    harness: dict[str, object] = {"--num-fewshot": num_fewshot is not None, "--include-path": include_path}
    harness["--apply-chat-template"] = apply_chat_template
    _refuse(harness, "this is for tasks of the harness", "name one: --lm-eval TASK")
    if data is not None or reward is not None:
        excluded = {"--task": task, "--text": text, "--against": against, "--count": count}
        excluded |= {"--think/--no-think": think is not None, "--recipe": recipe != "quickstart"}
        _refuse(excluded, "questions with a verifier are asked alone", "leave it out")
        return _score_held_out(model, data, reward, samples, temperature, max_tokens, overrides)
    files = [name for name in task or () if name.endswith(".jsonl") or ".py:" in name]
    if text is not None:
        if task or against:
            raise ConfigError("a text and tasks are two questions", where="--text", todo="ask them one by one")
        return _score_text(model, text)
    if files:
        if others := [name for name in task or () if name not in files]:
            todo = "ask for files by themselves"
            raise ConfigError(f"{others[0]!r} is a task of a recipe", where="--task", todo=todo)
        return _score_files(model, files, count, think, samples, temperature, max_tokens, against)
    if against is not None or samples > 1:
        given = "--against" if against is not None else "--samples"
        raise ConfigError("this is for tasks of yours", where=given, todo="name one: --task questions.jsonl")
    return _score_recipe(model, task, count, think, max_tokens, recipe, overrides)


def _refuse(options: Mapping[str, object], what: str, todo: str) -> None:
    """Raise a ConfigError for the first of ``options`` that is given."""
    if given := [name for name, value in options.items() if value]:
        raise ConfigError(what, where=given[0], todo=todo)


def _score_harness(
    model: Path,
    tasks: str,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    chat: bool,
    think: bool | None,
) -> Result:
    from sprat.eval.lm_eval import evaluate_harness_tasks

    names = [name for name in map(str.strip, tasks.split(",")) if name]
    if not names:
        raise ConfigError("no task was named", where="--lm-eval", todo="name some: --lm-eval arc_easy,hellaswag")
    if think is not None and not chat:
        todo = "add --apply-chat-template"
        raise ConfigError("a model thinks in a chat alone", where="--think/--no-think", todo=todo)
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints as it likes
        report = evaluate_harness_tasks(
            model,
            names,
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            chat=chat,
            think=think,
        )
    return Result({"model": str(model), "lm_eval": report.results}, report.table)


def _score_held_out(
    model: Path,
    data: Path | None,
    reward: str | None,
    samples: int,
    temperature: float,
    max_tokens: int | None,
    overrides: Overrides,
) -> Result:
    import tempfile

    from sprat.config import parse
    from sprat.config.sample import AskConfig
    from sprat.formats.load import locate
    from sprat.post.rl.asking import score_held_out
    from sprat.post.rl.questions import Questions

    settings = {"samples": samples, "temperature": temperature or None, "max_tokens": max_tokens}
    changes = [f"{name}={value}" for name, value in settings.items() if value is not None]
    config = parse(AskConfig, {}, where="eval", overrides=[*changes, *(overrides or ())])
    with tempfile.TemporaryDirectory() as folder:
        score = score_held_out(locate(model), Questions(data, reward=reward or ""), config, Path(folder))
    share = f"{score['accuracy']:.1%} of {score['count']} held-out questions right"
    line = f"{share} ({score['low']:.1%} to {score['high']:.1%}), reward {score['reward']:.3f}"
    return Result({"model": str(model), "held_out_score": score}, line)


def _score_text(model: Path, text: Path) -> Result:
    from sprat.eval.text_file import evaluate_text_file
    from sprat.formats.load import load

    score = evaluate_text_file(*load(model), text)
    return Result({"model": str(model), "text": score.to_dict()}, str(score))


def _score_files(
    model: Path,
    files: list[str],
    count: int | None,
    think: bool | None,
    samples: int,
    temperature: float,
    max_tokens: int | None,
    against: Path | None,
) -> Result:
    from sprat.engine import Engine
    from sprat.eval.comparison import compare, read_scores
    from sprat.eval.task_files import evaluate_task_files
    from sprat.formats.load import load

    others = {} if against is None else read_scores(against)
    engine = Engine(*load(model))
    scores = evaluate_task_files(
        engine,
        files,
        samples=samples,
        temperature=temperature,
        max_tokens=max_tokens or 512,
        thinking=think,
        count=count,
    )
    comparisons = [compare(others[score.task], score) for score in scores if score.task in others]
    if against is not None and not comparisons:
        todo = f"it has {', '.join(others)}"
        raise DataError("no task in common to compare", where=str(against), todo=todo)
    data = {"model": str(model), "scores": [score.to_dict() for score in scores]}
    if against is not None:
        data["comparisons"] = [each.to_dict() for each in comparisons]
    return Result(data, "\n".join([*(str(score) for score in scores), *(_describe(each) for each in comparisons)]))


def _describe(each: Comparison) -> str:
    return (
        f"{each.task}: {each.difference:+.1%} ({each.low:+.1%} to {each.high:+.1%}) against {each.first:.1%}, "
        f"better on {each.second_better} problems, worse on {each.first_better}, p = {each.p_value:.2g} ({each.test})"
    )


def _score_recipe(
    model: Path,
    task: list[str] | None,
    count: int | None,
    think: bool | None,
    max_tokens: int | None,
    recipe: str,
    overrides: Overrides,
) -> Result:
    from sprat.config.recipe import task_title
    from sprat.engine import Engine
    from sprat.eval.tasks import evaluate_many
    from sprat.formats.load import load
    from sprat.pipeline.pipeline import load_task
    from sprat.pipeline.recipe import load_recipe
    from sprat.tasks import HeldOutTask, held_out_problems

    pipeline_recipe = load_recipe(recipe, tuple(overrides or ()))
    mix, split = pipeline_recipe.data, pipeline_recipe.eval.split
    task_configs = {task_title(config): config for config in (*mix.tasks, *mix.unseen)}
    for name in task or ():
        if name not in task_configs:
            raise DataError(f"no task {name!r} in the recipe", where="--task", todo=f"it has {', '.join(task_configs)}")
    tasks = []
    for config in (task_configs[name] for name in dict.fromkeys(task or task_configs)):
        loaded_task = load_task(config)
        problems = held_out_problems(loaded_task, count or mix.count(config, split), split)
        tasks.append(HeldOutTask(loaded_task, tuple(problems), split))
    scores = evaluate_many(
        Engine(*load(model), max_batch=pipeline_recipe.eval.batch),
        tasks,
        count=max(len(task.problems) for task in tasks),
        thinking=think,
        max_tokens=max_tokens or pipeline_recipe.eval.max_tokens,
        samples=pipeline_recipe.eval.samples,
        split=split,
    )
    lines = [
        f"{s.task}: {s.accuracy:.1%} of {s.count} ({s.low:.1%} to {s.high:.1%}), {s.mean_tokens:.0f} tokens each"
        for s in scores
    ]
    return Result({"model": str(model), "scores": [score.to_dict() for score in scores]}, "\n".join(lines))
