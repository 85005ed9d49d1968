"""Problems that an environment draws itself, by seeds; and the pool and the payer of a run with an environment."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from sprat.config.rl import RLRunConfig
from sprat.errors import ConfigError, DataError
from sprat.post.rl.environment_episode import SEED
from sprat.post.rl.environment_pool import EnvironmentPool, EpisodeProcess, FaultError
from sprat.post.rl.problem_file import ProblemFile
from sprat.tasks import Problem, Split, Task
from sprat.tasks.base import sample_problem

_PROBES = 16


class EnvironmentTask:
    """What an environment asks: a ``Task`` whose problems are seeds, and whose judge is the environment.

    The question of a seed says which split it belongs to, so that none that is held out is trained under another seed.
    Where an environment asks the same again and again (a game whose secret it keeps), the seed itself says so.

    Raises:
        ConfigError, DataError: it asks nothing by itself.
    """

    def __init__(self, pool: EnvironmentPool) -> None:
        self.name, self._pool = pool.name.rpartition(":")[2].rpartition("/")[2], pool
        self._process: EpisodeProcess | None = None
        if pool.takes_problem:
            todo = "give questions: --data FILE or --task FILE"
            raise ConfigError("its reset takes a problem, and there is none", where=pool.label, todo=todo)
        questions = {self._draw(seed)["question"] for seed in range(_PROBES)}
        self._by_question = len(questions) > _PROBES // 2

    def problem(self, split: Split, index: int) -> Problem:
        """See ``Task``."""
        return sample_problem(self._generate, split, index)

    def score(self, problem: Problem, answer: str | None) -> float:
        """Nobody but the environment knows.

        Raises:
            DataError: always.
        """
        raise DataError("an environment judges episodes, no answers", where=self._pool.label, todo="play an episode")

    def verdict(self, problem: Problem, answer: str | None) -> None:
        """Of an answer alone nobody knows; see ``tasks.task_verdict``."""

    def chain_of_thought(self, problem: Problem) -> str:
        """There is none.

        Raises:
            DataError: always.
        """
        raise DataError("an environment has no chains of thought", where=self._pool.label, todo="train on another")

    def close(self) -> None:
        """End the process that draws."""
        if self._process is not None:
            self._process.close()

    def _generate(self, key: int) -> Problem:
        seed = int.from_bytes(hashlib.sha256(f"environment/{key}".encode()).digest()[:4], "big") >> 1
        drawn = self._draw(seed)
        form = drawn["canonical"] or ("" if self._by_question else f"seed {seed}")
        meta: dict[str, Any] = {SEED: seed, "id": str(seed)}
        return Problem(self.name, key, drawn["question"], drawn["answer"], meta, form)

    def _draw(self, seed: int) -> dict[str, str]:
        """What the environment asks with ``seed``.

        Raises:
            DataError: it fails, or asks nothing.
        """
        todo = "mend the environment, or give questions of your own: --data FILE or --task FILE"
        try:
            self._process = self._process or self._pool.open()
            reply = self._process.reset(None, seed)
        except FaultError as fault:
            self._process = None
            raise DataError(f"reset {fault.detail} (seed {seed})", where=self._pool.label, todo=todo) from None
        rows = reply["messages"] or []
        question = reply["content"] or "\n\n".join(str(row["content"]) for row in rows)
        if not question.strip():
            raise DataError("its reset asks nothing, and there are no questions", where=self._pool.label, todo=todo)
        return {"question": question, "answer": reply.get("answer", ""), "canonical": reply.get("canonical", "")}


def open_environment(name: str, config: RLRunConfig) -> EnvironmentPool:
    """The environment of a run.

    Raises:
        SpratError: there is none, or the run is of a kind that has none.
    """
    if config.rollout.workers:
        what = "episodes of an environment are sampled in the run's own process, and rollout.workers is set"
        raise ConfigError(what, where="rollout.workers", todo="leave rollout.workers out, or the environment")
    if config.seeding != "group":
        what, todo = f"an environment needs seeding=group, and it is {config.seeding}", "set seeding=group"
        raise ConfigError(what, where="seeding", todo=todo)
    return EnvironmentPool(name, config.environment)


def check_paid(pool: EnvironmentPool, tasks: Sequence[Task], has_reward: bool) -> None:
    """See that somebody says what an episode is worth.

    Raises:
        ConfigError: nobody does.
    """
    if pool.pays or has_reward or not any(isinstance(task, ProblemFile | EnvironmentTask) for task in tasks):
        return
    what = "nobody says what an episode is worth: it has neither step nor get_reward"
    raise ConfigError(what, where=pool.label, todo="give --reward file.py:function, or a --task with a judge")
