"""Is every answer of a run of RL trained exactly once? What the ledger of rollouts says, held against its own rule.

Step s trains the groups (s - 1) P to s P - 1 (with dynamic sampling: those that follow on the step before, until enough
have spread), each with all of its answers, and what the trainer was given is what is kept, to the bit. Groups in flight
when a run ends, or is looked at, were asked and belong to steps that are not done.
"""

from __future__ import annotations

from collections.abc import Iterator

from sprat.errors import TrustError
from sprat.post.rl.ledger import RolloutLedger
from sprat.post.rl.trajectory import digest_rollouts


def audit(ledger: RolloutLedger) -> list[str]:
    """Faults of the ledger, none if all is well."""
    try:
        return list(_faults(ledger))
    except TrustError as error:
        return [error.what]


def _faults(ledger: RolloutLedger) -> Iterator[str]:
    rows = ledger.steps()
    if not rows:
        return
    first, per_step = rows[0].step, ledger.prompts_per_step
    if [row.step for row in rows] != list(range(first, first + len(rows))):
        yield f"steps are missing: there are {[row.step for row in rows]}"
    start = first * per_step
    if ledger.dynamic_sampling and len(rows) > 1:  # a run that goes on where another ended begins anywhere
        start = min(ledger.done(rows[1].step), default=start)
    end = start
    for row in rows[1:]:
        done, begin = ledger.done(row.step), end
        end = begin + (len(done) if ledger.dynamic_sampling else per_step)
        expected = list(range(begin, end))
        if done != expected or not ledger.plan(row.step).is_complete:
            yield f"step {row.step} is done, and of its groups {expected} only {done} are answered"
        elif digest_rollouts(ledger.rollouts(row.step)) != row.trained:
            yield f"step {row.step} was trained with other answers than are kept"
        if row.version_in != row.step - 1:
            yield f"step {row.step} moved the weights of version {row.version_in}"
    asked = ledger.next_group(start)  # raises where one is missing
    if asked < end:
        yield f"{asked} groups were asked, and {end} were trained"
