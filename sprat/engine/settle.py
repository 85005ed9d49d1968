"""What a step sampled becomes part of the answers: tokens are appended, drafts judged, ends noticed.

Plain answers of a plain step cost one short loop; it runs for every row of every step, and 512 rows of a rollout
must not wait for it. Whatever else there is (text that is read along, drafts, faults) takes the long way round.
"""

from __future__ import annotations

from collections.abc import Mapping

from sprat.engine.handle import Handle
from sprat.engine.plan import Plan, add_at
from sprat.engine.runner import Result, Runner
from sprat.engine.sequence import Sequence


def settle(
    plan: Plan, result: Result, runner: Runner, handles: Mapping[int, Handle], ends: frozenset[int]
) -> tuple[list[Sequence], dict[int, int]]:
    """Give each row its token, or tokens.

    Args:
        ends: ids that end any answer.

    Returns:
        the sequences that have come to their end or have failed, and by slot how many drafts held.
    """
    if plan.drafts or result.samples.faults:
        return _settle_slowly(plan, result, runner, handles, ends)
    rows, samples = result.rows, result.samples
    if samples.logprobs_R is not None:
        for row, logprob in enumerate(samples.logprobs_R.tolist()):
            _note(rows[row], row, logprob, result)
    ended = []
    for sequence, token in zip(rows, samples.tokens, strict=True):
        said = sequence.token_ids
        said.append(token)
        if (sequence.watched or token in ends or len(said) >= sequence.limit) and _ends(
            sequence, token, handles[sequence.id], ends
        ):
            ended.append(sequence)
    runner.sampler.advance(result.at)
    runner.scheduler.gained(result.at)
    return ended, {}


def _settle_slowly(
    plan: Plan, result: Result, runner: Runner, handles: Mapping[int, Handle], ends: frozenset[int]
) -> tuple[list[Sequence], dict[int, int]]:
    """``settle`` where rows have drafts, or have failed."""
    samples = result.samples
    tokens, faults = samples.tokens, samples.faults
    logprobs = samples.logprobs_R.tolist() if samples.logprobs_R is not None else []
    ended, accepted = [], {}
    gained: list[int] = []
    start = 0
    for number, sequence in enumerate(result.rows):
        said, gains, over = sequence.token_ids, 0, False
        drafts = plan.drafts.get(sequence.slot, ()) if number < len(plan.rows) else ()
        for ahead, row in enumerate(range(start, start + len(drafts) + 1)):
            if row in faults:
                handles[sequence.id].fail(faults[row])
                over = True
                break
            token = tokens[row]
            said.append(token)
            gains += 1
            if logprobs:
                _note(sequence, row, logprobs[row], result)
            over = (sequence.watched or token in ends or len(said) >= sequence.limit) and _ends(
                sequence, token, handles[sequence.id], ends
            )
            if over or ahead == len(drafts) or drafts[ahead] != tokens[row]:
                break
        if drafts:
            accepted[sequence.slot] = max(0, gains - 1)
        if over:
            ended.append(sequence)
        gained.append(gains)
        start += len(drafts) + 1
    add_at(runner.scheduler.stored, result.at, [max(0, gains - 1) for gains in gained])
    runner.sampler.advance(result.at, gained)
    runner.scheduler.gained(result.at, most=max(1, *gained))
    return ended, accepted


def _note(sequence: Sequence, row: int, logprob: float, result: Result) -> None:
    """Keep the log-probabilities that a request asked for."""
    if sequence.sampling.logprobs:
        sequence.logprobs.append(logprob)
        if row in result.samples.tops:
            sequence.top_logprobs.append(result.samples.tops[row])


def _ends(sequence: Sequence, token: int, handle: Handle, ends: frozenset[int]) -> bool:
    """Follow a token that was just appended; whether the answer ends with it, and then why."""
    stopped = sequence.followed and handle.feed(token)
    if stopped or token in ends or token in sequence.sampling.stop_token_ids:
        sequence.finish_reason = "stop"
    elif len(sequence.token_ids) >= sequence.limit:
        sequence.finish_reason = "length"
    return sequence.finish_reason is not None
