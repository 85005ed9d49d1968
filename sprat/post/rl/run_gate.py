"""The gate before a run on the user's questions: can this policy learn from this verifier?

The policy must be right now and then, as the user's own verifier judges it (pass@8 as RL samples), or at least be paid
otherwise for one answer than for another. And the verifier must say something: one that pays every answer alike
teaches nothing, and one that pays the very same answer differently when it is asked again pays by chance, which RL
would follow all the same. Whether thinking helps is asked only of a model that can do both; see ``gate``.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sprat.config.rl import RLRunConfig
from sprat.engine import Engine, Sampling
from sprat.errors import TrainingError
from sprat.eval.score import Score, two_proportion_p_value, wilson_interval
from sprat.post.rl.gate import GateResult
from sprat.post.rl.problem_mix import ProblemMix
from sprat.post.rl.rewards import FAULTS, all_failed, place_of
from sprat.post.rl.rollout import Payer, Rollout
from sprat.tasks import Problem, Task, is_correct
from sprat.tokens import Tokenizer

log = logging.getLogger(__name__)
_SAMPLES = 8
_SEED = 7919

Asked = Sequence[tuple[Task, Problem]]


@dataclass(frozen=True)
class RunGateResult:
    """What the gate saw.

    Attributes:
        problems, answers: how many of each.
        pass_at_8: share of problems with an answer of full marks (1) among eight.
        spread: share of problems of whose answers not all were paid alike.
        agreement: of the verifier with itself, on answers that it judged twice: 1 is the same each time, 0 chance; None
            where it was not asked.
        thinking, direct: accuracy where thinking is forced, and forbidden; None of a model that cannot do both.
        p_value: that these two differ by chance.
    """

    problems: int
    answers: int
    pass_at_8: float
    spread: float
    agreement: float | None = None
    thinking: float | None = None
    direct: float | None = None
    p_value: float | None = None

    def __str__(self) -> str:
        asked = f"{self.problems} problems, {self.answers} answers: one of full marks in {self.pass_at_8:.0%} of them"
        parts = [asked, f"answers paid differently in {self.spread:.0%}"]
        parts += [] if self.agreement is None else [f"asked again the verifier agrees ({self.agreement:.2f} of 1)"]
        parts += (
            [] if self.thinking is None else [f"right in {self.thinking:.0%} made to think, {self.direct:.0%} at once"]
        )
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def evaluate_run_gate(engine: Engine, mix: ProblemMix, config: RLRunConfig, payer: Payer, name: str) -> RunGateResult:
    """Ask ``config.gate_problems`` training problems and judge the answers as the run will.

    Args:
        name: of the reward, for errors.

    Raises:
        TrainingError: there is nothing to learn; the sentence says why.
    """
    asked = distinct_problems(mix, config.gate_problems)
    settings = [_sampling(config, _SAMPLES, None)] * len(asked)
    sampled = [pair for pair in asked for _ in range(_SAMPLES)]
    rollouts = payer.sample(engine, asked, settings, shaped=False)
    check_verdicts(rollouts, name)
    groups = [rollouts[start : start + _SAMPLES] for start in range(0, len(rollouts), _SAMPLES)]
    pass_at_8 = sum(any(is_correct(rollout.score) for rollout in group) for group in groups) / len(groups)
    spread = sum(_has_spread(group) for group in groups) / len(groups)
    result = RunGateResult(len(groups), len(rollouts), pass_at_8, spread)
    agreement = _agreement(payer, sampled, rollouts, config, name)
    if max(pass_at_8, spread) < config.gate_pass_at_8:
        what = f"{len(groups)} problems, eight answers each: one of full marks in {pass_at_8:.0%}, pay that differs in "
        todo = "ask easier questions, pay partial credit, show worked examples first (sprat sft), or set gate=false"
        what += f"{spread:.0%}; the gate asks for {config.gate_pass_at_8:.0%}"
        raise TrainingError(f"the policy is not ready for RL: {what}", where="gate_pass_at_8", todo=todo)
    changes: dict[str, Any] = {"agreement": agreement}
    if can_choose_to_think(engine.tokenizer):
        changes |= _check_thinking(engine, asked, config, payer)
    return RunGateResult(**{**result.to_dict(), **changes})


def check_verdicts(rollouts: Sequence[Rollout], name: str) -> None:
    """Refuse a verifier that failed on every answer, never paid, or paid all answers alike.

    Raises:
        TrainingError: it did.
    """
    count, faults = len(rollouts), [rollout for rollout in rollouts if rollout.outcome in FAULTS]
    if len(faults) == count:
        raise all_failed(name, count, faults[-1].detail)
    paid = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    where, todo = place_of(name), "check it on a few answers by hand, or ask questions of the right difficulty"
    if not paid:
        raise TrainingError(f"the verifier abstained from each of {count} answers", where=where, todo=todo)
    if len(set(paid)) == 1:
        what = f"the verifier paid each of {len(paid)} answers {paid[0]:g}, so there is nothing to learn"
        raise TrainingError(what, where=where, todo=todo)


def can_choose_to_think(tokenizer: Tokenizer) -> bool:
    """Whether the model's chat format can both force a think and forbid it."""
    form = tokenizer.chat_format
    return form.thinking_prompt is not None and form.default_thinking is None


def distinct_problems(mix: ProblemMix, count: int) -> list[tuple[Task, Problem]]:
    """The first ``count`` problems of the run, each once."""
    by_form: dict[tuple[str, str], tuple[Task, Problem]] = {}
    for group in range(4 * count):
        if len(by_form) < count:
            task, problem = mix.problem(group)
            by_form.setdefault((task.name, problem.canonical), (task, problem))
    return list(by_form.values())


def _sampling(config: RLRunConfig, n: int, thinking: bool | None) -> Sampling:
    greedy = thinking is not None
    return Sampling(
        temperature=0.0 if greedy else config.temperature,
        max_tokens=config.max_tokens,
        fit=greedy,  # think tags make a prompt longer than the run's own, which leaves room
        seed=config.seed + _SEED,
        thinking=thinking,
        n=n,
    )


def _has_spread(group: Sequence[Rollout]) -> bool:
    return len({rollout.reward for rollout in group if rollout.reward is not None}) > 1


def _agreement(
    payer: Payer, sampled: Asked, rollouts: Sequence[Rollout], config: RLRunConfig, name: str
) -> float | None:
    """How far the verifier says the same when it is asked again about the same answers.

    Raises:
        TrainingError: no further than by chance.
    """
    count = config.verifier.repeat
    if not count:
        return None
    chosen = range(0, len(rollouts), max(1, len(rollouts) // count))[:count]
    if (judged := payer.again([sampled[place] for place in chosen], [rollouts[place] for place in chosen])) is None:
        return None
    first, second = judged
    both = [
        (a.reward, b.reward)
        for a, b in zip(first, second, strict=True)
        if a.reward is not None and b.reward is not None
    ]
    if not both or all(a == b for a, b in both):
        return 1.0
    differing = [(a, b) for a, b in both if a != b]
    variance = statistics.pvariance([value for pair in both for value in pair])
    agreement = 1 - statistics.fmean((a - b) ** 2 for a, b in both) / (2 * variance)
    shown = f"{differing[0][0]:g} and then {differing[0][1]:g}"
    what = f"the verifier judged {len(differing)} of {len(both)} answers otherwise when it was asked again ({shown})"
    if agreement < config.verifier.min_agreement:
        todo = "let it be a function of question and answer, or set verifier.min_agreement"
        raise TrainingError(f"{what}: it pays by chance", where=place_of(name), todo=todo)
    log.warning("%s; an agreement of %.2f", what, agreement)
    return agreement


def _check_thinking(engine: Engine, asked: Asked, config: RLRunConfig, payer: Payer) -> dict[str, float]:
    """Whether thinking helps, where the model can choose.

    Raises:
        TrainingError: it does not, so RL would teach not to think.
    """
    scores = dict[bool, Score]()
    for thinking in (True, False):
        rollouts = payer.sample(engine, asked, [_sampling(config, 1, thinking)] * len(asked), shaped=False)
        rewards = [rollout.reward or 0.0 for rollout in rollouts]
        correct = sum(is_correct(value) for value in rewards)
        low, high = wilson_interval(correct, len(rewards))
        mean = sum(rewards) / len(rewards)
        scores[thinking] = Score("gate", len(rewards), correct, mean, low, high, mean_tokens=0.0)
    p_value = two_proportion_p_value(scores[True], scores[False])
    result = GateResult(1.0, scores[True].accuracy, scores[False].accuracy, p_value, 0.0)
    if result.failure:
        todo = "show demonstrations with reasoning first (sprat sft), or set gate=false"
        raise TrainingError(result.failure, where="gate", todo=todo)
    return {"thinking": scores[True].accuracy, "direct": scores[False].accuracy, "p_value": p_value}
