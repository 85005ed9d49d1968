"""What a run of RL asks and who judges the answers, as the user names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sprat.config.finetune import ColumnMapConfig
from sprat.config.recipe import TaskConfig
from sprat.config.rl import EnvironmentInput, TasksInput
from sprat.errors import ConfigError, DataError
from sprat.post.rl.problem_file import read_problems
from sprat.post.rl.reward_sources import reward_inputs
from sprat.post.rl.rewards import ENVIRONMENT
from sprat.tasks import Task, load, load_user_task, task_input
from sprat.tasks.environments import check_name, is_built_in
from sprat.trust import run_record

BUILT_IN = "the task's own judge"


@dataclass(frozen=True)
class Questions:
    """What is asked and who judges, as the user names them.

    Attributes:
        data: a file of problems, judged by ``reward``.
        tasks: JSONL files, ``file.py:Class``, ``reasoning-gym/NAME`` or ``sums``, with judges of their own.
        reward: ``file.py:function``, ``module:function`` or a command; empty for the tasks' own judges.
        second_reward: the same for a judge that only looks on; where there is none and ``reward`` stands before tasks,
            their own judges do.
        column_map: our names of columns to those of ``data``.
        environment: ``file.py:Class``, ``module:Class`` or a built-in one that answers the model turn by turn; empty
            where one answer is all.
    """

    data: Path | None = None
    tasks: tuple[str, ...] = ()
    reward: str = ""
    second_reward: str = ""
    column_map: Mapping[str, str] | None = None
    environment: str = ""

    @property
    def judge(self) -> str:
        """What errors call who judges."""
        built_in = f"{ENVIRONMENT}{self.environment}" if self.environment else BUILT_IN
        return self.reward or built_in

    def check(self) -> None:
        """See that there is a question and a judge.

        Raises:
            ConfigError, DataError: there is not.
        """
        if self.data is None and not self.tasks and not self.environment:
            todo = "give --task FILE, file.py:Class or reasoning-gym/NAME, or --data FILE with --reward"
            raise ConfigError("no questions", where="rl", todo=todo)
        if self.data is not None and not self.reward and not self.environment:
            todo = "give --reward file.py:function, or a command; a file whose rows name their judge is a --task"
            raise ConfigError("nobody judges the answers to --data", where="rl", todo=todo)
        if self.environment:
            check_name(self.environment)
        for path in (self.data, *(Path(task) for task in self.tasks if task.endswith(".jsonl"))):
            if path is not None and not path.exists():
                raise DataError("no such file of questions", where=str(path), todo="give the path of one")
        if self.column_map and self.data is None:
            raise ConfigError("columns are mapped, and there is no --data", where="--map", todo="leave it out")

    def inputs(self) -> dict[str, run_record.Input]:
        """What a run is made of, beside its model and where it starts."""
        inputs: dict[str, run_record.Input] = {} if self.data is None else {"data": self.data}
        drawn = [task for task in self.tasks if is_drawn(task)]
        inputs |= {f"task-{n}": task_input(task) for n, task in enumerate(self.tasks) if task not in drawn}
        inputs |= {"tasks": TasksInput(names=drawn)} if drawn else {}
        inputs |= {"map": ColumnMapConfig(columns=dict(self.column_map))} if self.column_map else {}
        if is_built_in(self.environment):
            inputs |= {"environment": EnvironmentInput(name=self.environment)}
        named = {"reward": self.reward, "second_reward": self.second_reward}
        named |= {} if is_built_in(self.environment) else {"environment": self.environment}
        for key, name in named.items():
            inputs |= reward_inputs(name, key) if name else {}
        return inputs


def load_tasks(questions: Questions) -> list[Task]:
    """The tasks and the file of problems, each of a name of its own.

    Raises:
        SpratError: one cannot be used, or two have one name.
    """
    tasks: list[Task] = []
    for name in questions.tasks:
        drawn = TaskConfig(name=name, title=name.rpartition("/")[2])
        tasks.append(load(drawn) if is_drawn(name) else load_user_task(name))
    if questions.data is not None:
        tasks.append(read_problems(questions.data, questions.column_map))
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError("two tasks of one name", where=", ".join(names), todo="name each file differently")
    return tasks


def is_drawn(task: str) -> bool:
    """Whether ``task`` is one of Sprat's own generators, or reasoning-gym's, and no file of the user's."""
    return not Path(task).exists() and (task == "sums" or task.startswith("reasoning-gym/"))
