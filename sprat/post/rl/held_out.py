"""The score on problems that are kept from training: before the first step, in between, and at the end.

The same problems are asked each time, greedily by default, and paid by the run's own reward, so that two evaluations
differ by the weights alone and are compared problem by problem (``eval.comparison``). What each evaluation found is a
line of ``held_out.jsonl``, in the run's checkpoints and then in its artefact; a few answers are kept to be read.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sprat.config.rl import RLRunConfig
from sprat.engine import Engine, Sampling
from sprat.eval.comparison import Comparison, compare, paired_interval, sign_test_p_value
from sprat.eval.task_score import ProblemScore, TaskScore
from sprat.files import atomic
from sprat.files.digest import of_bytes, of_json
from sprat.post.rl.environment_episode import SEED
from sprat.post.rl.rollout import Payer, Rollout
from sprat.tasks import Problem, Task, is_correct
from sprat.trust.stage_facts import Sample, read_samples, write_samples

FILE_NAME = "held_out.jsonl"
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class ProblemResult:
    """One problem in one evaluation.

    Attributes:
        key: SHA-256 (hex) of task and question, and of the seed where an environment drew it.
        reward: mean over the answers that were paid; None where none was.
        correct, samples: answers of full marks, and those that were paid.
        tokens, cut: mean length of an answer, and share of answers that ended at the limit.
        second: mean of the second judge's; None where there is none.
    """

    key: str
    reward: float | None
    correct: int
    samples: int
    tokens: float
    cut: float
    second: float | None = None


@dataclass(frozen=True)
class Change:
    """How the held-out rewards differ from those of an earlier evaluation, on the problems that both paid.

    Attributes:
        count, better, worse: problems in all, and those that are paid more, or less.
        difference: of the mean rewards, with its 95 % interval ``low`` to ``high``.
        p_value: two-sided, of the sign test.
    """

    count: int
    better: int
    worse: int
    difference: float
    low: float
    high: float
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class HeldOut:
    """Asks the held-out problems of a run.

    Args:
        asked: the problems.
        payer: of the run.
        folder: of the files; what an earlier session found is read back.
    """

    def __init__(
        self, engine: Engine, asked: Sequence[tuple[Task, Problem]], config: RLRunConfig, payer: Payer, folder: Path
    ) -> None:
        self._engine, self.asked, self._config, self._payer, self._folder = engine, asked, config, payer, folder
        self.results: dict[int, list[ProblemResult]] = {}  # by step
        path = folder / FILE_NAME
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            row = json.loads(line)
            self.results[int(row["step"])] = [ProblemResult(**each) for each in row["problems"]]

    @property
    def first(self) -> int:
        """The step of the first evaluation; -1 where there is none yet."""
        return min(self.results, default=-1)

    def forget_after(self, step: int) -> None:
        """Drop the evaluations of later steps than ``step``."""
        self.results = {at: found for at, found in self.results.items() if at <= step}
        write_samples(self._folder, [sample for sample in read_samples(self._folder) if sample.step <= step])
        self._write()

    def is_due(self, step: int) -> bool:
        """Whether the weights after ``step`` are to be asked; the last step's always are."""
        every = self._config.held_out.every
        return bool(self.asked) and (step == self._config.steps or bool(every and step % every == 0))

    def evaluate(self, step: int) -> dict[str, float]:
        """Ask all problems now; the scores for the log, ``eval_NAME``.

        ``eval_reward``, ``eval_accuracy``, ``eval_response_length``, ``eval_cut_share``, ``eval_second_reward``; from
        the second evaluation on ``eval_gain``, over the first, with ``eval_p_value``, and ``eval_loss_p_value``, of a
        fall below the best so far (1 where it did not fall).
        """
        samples = self._config.held_out.samples
        sampling = Sampling(
            temperature=0.0 if samples == 1 else self._config.temperature,
            max_tokens=self._config.max_tokens,
            seed=self._config.seed,
            n=samples,
        )
        rollouts = self._payer.sample(self._engine, self.asked, [sampling] * len(self.asked), shaped=False)
        groups = [rollouts[start : start + samples] for start in range(0, len(rollouts), samples)]
        earlier = {at: found for at, found in self.results.items() if at < step}
        self.results = {**earlier, step: [_result(*pair) for pair in zip(self.asked, groups, strict=True)]}
        self._write()
        self._keep_samples(step, groups)
        scores = _scores(self.results[step])
        if earlier:
            gain = self.change(self.first, step)
            best = max(earlier, key=lambda at: (_mean_reward(earlier[at]), -at))
            loss = self.change(best, step)
            scores |= {"gain": gain.difference, "p_value": gain.p_value}
            scores |= {"loss_p_value": loss.p_value if loss.difference < 0 else 1.0}
        return {f"eval_{name}": value for name, value in scores.items()}

    def change(self, first: int, second: int) -> Change:
        """The evaluation after step ``second`` against that after ``first``."""
        before = {each.key: each.reward for each in self.results[first]}
        known = ((before.get(each.key), each.reward) for each in self.results[second])
        pairs = [(float(a), float(b)) for a, b in known if a is not None and b is not None]
        differences = [b - a for a, b in pairs]
        better, worse = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
        mean = statistics.fmean(differences) if differences else 0.0
        low, high = _interval(pairs, mean) if pairs else (0.0, 0.0)
        return Change(len(pairs), better, worse, mean, low, high, sign_test_p_value(better, worse))

    def compare(self, first: int, second: int) -> Comparison | None:
        """Two evaluations by right answers (those of full marks); None where no problem was paid in both."""
        rows = {at: {each.key: each for each in self.results[at] if each.samples} for at in (first, second)}
        keys = [key for key in rows[first] if key in rows[second]]
        least = min((rows[at][key].samples for at in rows for key in keys), default=0)
        keys = [key for key in keys if all(rows[at][key].samples == self._config.held_out.samples for at in rows)]
        if not keys or not least:
            return None
        a, b = (_task_score([rows[at][key] for key in keys]) for at in (first, second))
        return compare(a, b)

    def summary(self, step: int) -> dict[str, float]:
        """The scores of the evaluation after ``step``."""
        return _scores(self.results[step])

    def _keep_samples(self, step: int, groups: Sequence[Sequence[Rollout]]) -> None:
        """Keep the first answers of this evaluation; those of this step and later ones were of a killed session."""
        kept = [sample for sample in read_samples(self._folder) if sample.step < step]
        for (_, problem), group in list(zip(self.asked, groups, strict=True))[: self._config.held_out.kept_answers]:
            response = group[0].response
            expected = problem.answer or None
            content, reasoning = response.content, response.reasoning
            if len(group[0].trained or ()) > 1:  # all that was said in an episode
                ids = group[0].token_ids
                content, reasoning = self._payer.tokenizer.decode(ids, skip_special_tokens=False), ""
            kept.append(Sample(step, problem.question, content, expected, reasoning, group[0].finish, group[0].reward))
        write_samples(self._folder, kept)

    def _write(self) -> None:
        lines = [
            json.dumps({"step": step, "problems": [asdict(each) for each in found]})
            for step, found in sorted(self.results.items())
        ]
        self._folder.mkdir(exist_ok=True)
        atomic.write_text(self._folder / FILE_NAME, "".join(line + "\n" for line in lines))


def _interval(pairs: Sequence[tuple[float, float]], mean: float) -> tuple[float, float]:
    """95 % interval of the difference: Newcombe's where rewards are from 0 to 1, else that of a normal mean."""
    if all(0 <= value <= 1 for pair in pairs for value in pair):
        return paired_interval([a for a, _ in pairs], [b for _, b in pairs])
    half = 0.0
    if len(pairs) > 1:
        half = _Z95 * statistics.stdev(b - a for a, b in pairs) / math.sqrt(len(pairs))
    return mean - half, mean + half


def _result(pair: tuple[Task, Problem], group: Sequence[Rollout]) -> ProblemResult:
    task, problem = pair
    paid = [rollout for rollout in group if rollout.reward is not None]
    seconds = [rollout.second for rollout in group if rollout.second is not None]
    drawn = [str(problem.meta[SEED])] if SEED in problem.meta else []
    return ProblemResult(
        key=of_bytes("\n".join([task.name, problem.question, *drawn]).encode("utf-8", "replace")),
        reward=sum(rollout.reward or 0.0 for rollout in paid) / len(paid) if paid else None,
        correct=sum(is_correct(rollout.score) for rollout in paid),
        samples=len(paid),
        tokens=sum(rollout.num_sampled for rollout in group) / len(group),
        cut=sum(rollout.finish == "length" for rollout in group) / len(group),
        second=sum(seconds) / len(seconds) if seconds else None,
    )


def _scores(found: Sequence[ProblemResult]) -> dict[str, float]:
    """The means over problems; of those that were paid, where that matters."""
    paid = [each for each in found if each.samples]
    seconds = [each.second for each in found if each.second is not None]
    scores = {
        "reward": _mean_reward(found),
        "accuracy": sum(each.correct / each.samples for each in paid) / max(1, len(paid)),
        "response_length": statistics.fmean(each.tokens for each in found),
        "cut_share": statistics.fmean(each.cut for each in found),
    }
    return scores | ({"second_reward": statistics.fmean(seconds)} if seconds else {})


def _mean_reward(found: Sequence[ProblemResult]) -> float:
    rewards = [each.reward for each in found if each.reward is not None]
    return statistics.fmean(rewards) if rewards else 0.0


def _task_score(found: Sequence[ProblemResult]) -> TaskScore:
    digest = of_json([each.key for each in found])
    rows = tuple(ProblemScore(each.key, each.correct, each.samples, each.tokens, each.key) for each in found)
    return TaskScore("held out", digest, rows, cut=statistics.fmean(each.cut for each in found))
