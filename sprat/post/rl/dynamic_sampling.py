"""Dynamic sampling: further groups are asked until a step has its number of groups that teach something.

A group whose answers were all paid alike has no advantage: nothing is learned from it, and the better (or the worse)
the policy is, the more groups are like that and the fewer a step learns from. DAPO (arXiv 2503.14476, section 3.2)
samples further groups until as many have spread as a step is to train. Here, with P = ``prompts_per_step``, a step asks
P groups, then as many as are still missing, and so on, until P have spread or ``dynamic_sampling`` x P were asked.

- No group is too many: what is asked next is never more than what is missing, so no answer is thrown away that could
  have taught, and the last group of a step is always one that it needed.
- Order of dispatch decides, never order of arrival: whether further groups are asked is decided once all that were
  asked are paid, so a long answer is trained as often as a short one, and which groups a step has is the same in one
  process and with any number of workers.
- Every group has its line in the ledger, and those that were not used say why.

That the mix of questions shifts towards those that the policy sometimes solves is what it is for. The reward in the log
stays that of all answers that were asked, with spread or without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprat.config.rl import RLRunConfig
from sprat.post.rl.losses import advantages, reward_tensor

if TYPE_CHECKING:
    from sprat.post.rl.rollout import Rollout


@dataclass(frozen=True)
class StepPlan:
    """Of a step: how many groups may be asked by now, and whether that is all and all are paid."""

    size: int
    is_complete: bool


def plan_step(spread: Sequence[bool | None], per_step: int, factor: int = 0) -> StepPlan:
    """How a step goes on.

    Args:
        spread: of the groups that were asked, in order of dispatch: whether they have spread; None: not paid yet.
        per_step: groups with spread that it is to train.
        factor: at most so many times ``per_step`` groups are asked; 0 and 1: none but the first.

    >>> plan_step([True, False, True], 3, 4), plan_step([True, False, True, None], 3, 4)
    (StepPlan(size=4, is_complete=False), StepPlan(size=4, is_complete=False))
    >>> plan_step([True, False, True], 3), plan_step([True, False, True, True], 3, 4)
    (StepPlan(size=3, is_complete=True), StepPlan(size=4, is_complete=True))
    """
    size, limit = per_step, per_step * max(1, factor)
    while len(spread) >= size and None not in spread[:size]:
        missing = min(per_step - sum(map(bool, spread[:size])), limit - size)
        if missing <= 0:
            return StepPlan(size, True)
        size += missing
    return StepPlan(size, False)


def unused_reason(rewards: Sequence[float | None]) -> str:
    """Why nothing is learned from a group that was paid ``rewards`` (None: abstained); empty where something is.

    >>> unused_reason([1.0, 0.0, None]), unused_reason([1.0, 1.0]), unused_reason([None, 0.5])
    ('', 'all answers were paid alike (1)', 'only one answer was paid')
    """
    paid = [reward for reward in rewards if reward is not None]
    if len(paid) < 2:
        return "only one answer was paid" if paid else "no answer was paid"
    if advantages(reward_tensor(list(rewards), len(rewards)), True).any():
        return ""
    return f"all answers were paid alike ({paid[0]:g})"


def sample_step(sample: Callable[[range], list[Rollout]], first: int, config: RLRunConfig) -> list[Rollout]:
    """All answers of a step.

    Args:
        sample: samples and pays groups by their numbers.
        first: the number of the step's first group.
    """
    rollouts: list[Rollout] = []
    spread, size = list[bool | None](), config.group_size
    while not (plan := plan_step(spread, config.prompts_per_step, config.dynamic_sampling)).is_complete:
        new = sample(range(first + len(spread), first + plan.size))
        rewards = [rollout.reward for rollout in new]
        spread += [not unused_reason(rewards[start : start + size]) for start in range(0, len(new), size)]
        rollouts += new
    return rollouts
