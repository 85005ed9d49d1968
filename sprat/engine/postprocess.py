"""What a step sampled becomes part of the answers: tokens are appended, drafts accepted, ends noticed.

Plain answers of a plain step cost one short loop; it runs for every row of every step, and 512 rows of a rollout
must not wait for it. Whatever else there is (text that is made along, drafts, errors) takes the long way round.
"""

from __future__ import annotations

from sprat.engine.request import RequestHandle
from sprat.engine.runner import Runner, StepResult
from sprat.engine.sampling.ops import add_at
from sprat.engine.sequence import ScheduledStep, Sequence


def postprocess(
    step: ScheduledStep, result: StepResult, runner: Runner, handles: dict[int, RequestHandle], eos_ids: frozenset[int]
) -> tuple[list[Sequence], dict[int, int]]:
    """Give each row its token, or tokens.

    Args:
        eos_ids: ids that end any answer.

    Returns:
        the sequences that have come to their end or have failed, and by slot how many drafts were accepted.
    """
    if step.drafts or result.samples.errors:
        return _postprocess_general(step, result, runner, handles, eos_ids)
    rows, samples = result.sequences, result.samples
    if samples.logprobs_R is not None:
        for row, logprob in enumerate(samples.logprobs_R.tolist()):
            _record_logprobs(rows[row], row, logprob, result)
    ended = []
    for sequence, token in zip(rows, samples.tokens, strict=True):
        output_ids = sequence.output_ids
        output_ids.append(token)
        may_stop = sequence.needs_stop_check or token in eos_ids or len(output_ids) >= sequence.max_tokens
        if may_stop and _check_stop(sequence, token, handles[sequence.id], eos_ids):
            ended.append(sequence)
    runner.sampler.advance(result.slot_index)
    runner.scheduler.commit(result.slot_index)
    return ended, {}


def _postprocess_general(
    step: ScheduledStep, result: StepResult, runner: Runner, handles: dict[int, RequestHandle], eos_ids: frozenset[int]
) -> tuple[list[Sequence], dict[int, int]]:
    """``postprocess`` where rows have drafts, or have failed."""
    samples = result.samples
    tokens, errors = samples.tokens, samples.errors
    logprobs = samples.logprobs_R.tolist() if samples.logprobs_R is not None else []
    ended, accepted = [], {}
    counts: list[int] = []
    start = 0
    for index, sequence in enumerate(result.sequences):
        output_ids, count, done = sequence.output_ids, 0, False
        drafts = step.drafts.get(sequence.slot, ()) if index < len(step.decoding) else ()
        for offset, row in enumerate(range(start, start + len(drafts) + 1)):
            if row in errors:
                handles[sequence.id].fail(errors[row])
                done = True
                break
            token = tokens[row]
            output_ids.append(token)
            count += 1
            if logprobs:
                _record_logprobs(sequence, row, logprobs[row], result)
            may_stop = sequence.needs_stop_check or token in eos_ids or len(output_ids) >= sequence.max_tokens
            done = may_stop and _check_stop(sequence, token, handles[sequence.id], eos_ids)
            if done or offset == len(drafts) or drafts[offset] != tokens[row]:
                break
        if drafts:
            accepted[sequence.slot] = max(0, count - 1)
        if done:
            ended.append(sequence)
        counts.append(count)
        start += len(drafts) + 1
    add_at(runner.scheduler.num_computed, result.slot_index, [max(0, count - 1) for count in counts])
    runner.sampler.advance(result.slot_index, counts)
    runner.scheduler.commit(result.slot_index, most=max(1, *counts))
    return ended, accepted


def _record_logprobs(sequence: Sequence, row: int, logprob: float, result: StepResult) -> None:
    """Keep the log-probabilities that a request asked for."""
    if sequence.sampling.logprobs:
        sequence.logprobs.append(logprob)
        if row in result.samples.top_logprobs:
            sequence.top_logprobs.append(result.samples.top_logprobs[row])


def _check_stop(sequence: Sequence, token: int, handle: RequestHandle, eos_ids: frozenset[int]) -> bool:
    """Follow a token that was just appended; whether the answer ends with it, and then why."""
    sampling, output_ids = sequence.sampling, sequence.output_ids
    if not sequence.max_tokens:  # no answer was wanted
        for answer in (output_ids, sequence.logprobs, sequence.top_logprobs):
            answer.clear()
        sequence.finish_reason = "length"
        return True
    is_end = token in eos_ids and not (sampling.ignore_eos and sampling.response is None)
    stopped = sequence.detokenize and handle.push(token, is_end=is_end)
    if stopped or is_end or (token in sampling.stop_token_ids and len(output_ids) > sampling.min_tokens):
        sequence.finish_reason = "stop"
    elif len(output_ids) >= sequence.max_tokens:
        sequence.finish_reason = "length"
    return sequence.finish_reason is not None
