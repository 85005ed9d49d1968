"""What a step sampled becomes part of the answers: tokens are appended, drafts judged, ends noticed.

Plain answers of a plain step cost one short loop; it runs for every row of every step, and 512 rows of a rollout
must not wait for it. Whatever else there is (text that is read along, drafts, faults) takes the long way round.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sprat.engine.handle import Handle
from sprat.engine.plan import Plan
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
    samples, stored = result.samples, runner.scheduler.stored
    tokens = samples.tokens
    logprobs = samples.logprobs_R.tolist() if samples.logprobs_R is not None else tokens
    ended, accepted = [], {}
    said = np.zeros(len(result.rows), np.int64)
    start = 0
    for number, sequence in enumerate(result.rows):
        slot, over = sequence.slot, False
        drafts = plan.drafts.get(slot, ()) if number < len(plan.rows) else ()
        for ahead, row in enumerate(range(start, start + len(drafts) + 1)):
            if row in samples.faults:
                handles[sequence.id].fail(samples.faults[row])
                over = True
                break
            sequence.token_ids.append(tokens[row])
            _note(sequence, row, logprobs[row], result)
            runner.last[slot] = tokens[row]
            said[number] = ahead + 1
            over = _ends(sequence, tokens[row], handles[sequence.id], ends)
            if over or ahead == len(drafts) or drafts[ahead] != tokens[row]:
                break
        stored[slot] += max(0, int(said[number]) - 1)
        if drafts:
            accepted[slot] = max(0, int(said[number]) - 1)
        if over:
            ended.append(sequence)
        start += len(drafts) + 1
    runner.sampler.advance(result.at, said)
    runner.scheduler.gained(result.at, most=int(said.max(initial=1)))
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
