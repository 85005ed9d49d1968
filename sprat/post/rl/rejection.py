"""Rejection sampling: a model's own answers to a user's questions, those that the verifier pays, as examples for SFT.

DeepSeek-R1 uses it twice (arXiv 2501.12948, section 2.3): long thoughts of a model that RL has taught to think are its
cold start, and the right answers of its RL checkpoint, mixed with data of other kinds, teach the base anew (RAFT, arXiv
2304.06767).

Only questions to train on are asked; those that RL holds out are never among them. An answer is kept where it came to
its end, was paid ``min_reward`` at least, and differs in more than blanks from those that were kept of its question.
``artefact/examples.jsonl`` has what is learned from, ``artefact/answers.jsonl`` every answer with what it was paid and
why it is not learned.

Answers are drawn batch by batch, each written at once: killed in the midst, a run goes on with the batches that stand
and ends with the same bits, as long as the verifier is a function of question and answer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sprat.config.sample import SampleConfig
from sprat.data.conversations import read_examples
from sprat.data.example import Conversation
from sprat.data.prompts import normalize
from sprat.engine import Output, Sampling
from sprat.errors import DataError, TrainingError
from sprat.eval.tasks import problem_messages
from sprat.files import atomic
from sprat.formats.load import locate
from sprat.post.rl.asking import Asked, asked
from sprat.post.rl.questions import Questions
from sprat.post.rl.rewards import FAULTS, Response, Verdict, parse_response
from sprat.post.rl.rollout import problem_id
from sprat.post.rl.run_gate import can_choose_to_think
from sprat.tasks import Problem, Task
from sprat.tokens.chat import Message
from sprat.trust import run_record
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.run import Run, open_run

EXAMPLES_FILE, ANSWERS_FILE = "examples.jsonl", "answers.jsonl"
KEPT, WRONG, CUT_OFF, EMPTY, SAID_BEFORE, ENOUGH, UNJUDGED = (
    "kept",
    "paid less than min_reward",
    "cut off",
    "empty",
    "what an earlier answer says",
    "one more than keep",
    "not judged",
)
_DRAWN = 100  # questions of a generator, where nobody says how many

OnProgress = Callable[[int, int], None]
Row = dict[str, Any]
Pair = tuple[Task, Problem]


def sample_examples(
    model: str | Path,
    questions: Questions,
    out: str | Path,
    config: SampleConfig,
    *,
    mix: str | Path | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Run:
    """The finished run of rejection sampling, also where it was finished before; see the module's text.

    Args:
        model: as ``sprat.load`` takes it.
        out: the run's folder; its ledger lies in the folder above it.
        mix: a file of conversations of other kinds; as many are added as make ``config.mix_share`` of all, chosen by a
            hash of what they say.
        on_progress: is told how many questions of how many are answered.

    Raises:
        SpratError: a model, questions, a reward or conversations that cannot be used, before anything was touched.
        TrainingError: not one answer is kept, or the verifier is broken.
    """
    out, path = Path(out), locate(model)
    questions.check()
    inputs: dict[str, run_record.Input] = {"model": path, **questions.inputs()}
    inputs |= {"mix": Path(mix)} if mix is not None else {}
    general = [] if mix is None else general_examples(Path(mix))
    ready = list[Asked]()
    with ExitStack() as stack:

        def prepare(resuming: bool) -> None:
            ready.append(stack.enter_context(asked(path, questions, config)))

        ledger = out.parent / LEDGER_NAME
        run = open_run(
            out, stage="sample", recipe=config, inputs=inputs, seed=config.seed, ledger=ledger, prepare=prepare
        )
        if not run.done:
            _sample(run, ready[0], config, general, on_progress)
    return run


def _sample(
    run: Run, ready: Asked, config: SampleConfig, general: Sequence[Conversation], on_progress: OnProgress
) -> None:
    """Ask what is missing, sift all of it, finish the run."""
    pairs = training_pairs(ready, config)
    batches = [pairs[start : start + config.batch] for start in range(0, len(pairs), config.batch)]
    run.start_progress(len(pairs))
    rows = list[Row]()
    for number, batch in enumerate(batches):
        path = run.checkpoints / f"batch-{number:06d}.jsonl"
        if not path.is_file():
            lines = [json.dumps(row, ensure_ascii=False) for row in _answers(ready, batch, config)]
            atomic.write_text(path, "".join(line + "\n" for line in lines))
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        answered = min(len(pairs), (number + 1) * config.batch)
        run.start_progress(len(pairs), answered)
        on_progress(answered, len(pairs))
    reasons = sift(rows, config)
    examples = [_example(row) for row, reason in zip(rows, reasons, strict=True) if reason == KEPT]
    counts = Counter(reasons)
    if not examples:
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        todo = "ask easier questions, raise samples or max_tokens, lower min_reward, or start from a better model"
        raise TrainingError(f"not one of {len(rows)} answers can be learned: {kinds}", where="sample", todo=todo)
    mixed = _mixed(general, len(examples), config)
    _write_rows(run.artifact / EXAMPLES_FILE, [*examples, *mixed])
    answers = [{**row, "why": reason} for row, reason in zip(rows, reasons, strict=True)]
    _write_rows(run.artifact / ANSWERS_FILE, answers)
    tokens = sum(row["tokens"] for row in rows)
    run.add_facts(
        questions=len(pairs),
        answers=len(rows),
        kept=len(examples),
        answered=len({row["question"] for row, reason in zip(rows, reasons, strict=True) if reason == KEPT}),
        mixed=len(mixed),
        rejected={reason: count for reason, count in counts.items() if reason != KEPT},
        mean_tokens=tokens / len(rows),
        faults=sum(row["outcome"] in FAULTS for row in rows),
        skipped=ready.skipped,
    )
    run.finish(tokens=tokens)


def training_pairs(ready: Asked, config: SampleConfig) -> list[Pair]:
    """The questions that are asked: a file's in the order of a hash, so that the first ones are no part of a kind.

    Where not all of several tasks are asked, they take turns.
    """
    pairs = list[list[Pair]]()
    for part in ready.parts:
        if part.problems is None:
            drawn = (part.nth(number, f"sample/{config.seed}") for number in range(config.problems or _DRAWN))
            problems = list({problem.canonical: problem for problem in drawn}.values())
        else:
            problems = sorted(part.problems, key=lambda problem: _hash(f"{config.seed}/{problem.canonical}"))
        pairs.append([(part.task, problem) for problem in problems])
    if not config.problems:
        return [pair for own in pairs for pair in own]
    return [pair for turn in zip_longest(*pairs) for pair in turn if pair is not None][: config.problems]


def sift(rows: Sequence[Row], config: SampleConfig) -> list[str]:
    """Of each answer whether it is ``kept``, or why not; answers to one question stand together."""
    reasons, said, kept = list[str](), dict[str, set[tuple[str, str]]](), Counter[str]()
    for row in rows:
        question, answer = row["question"], row["answer"]
        text = (normalize(answer["reasoning"]), normalize(answer["content"]))
        texts = said.setdefault(question, set())
        if row["finish"] != "stop" or not answer["closed"]:
            reason = CUT_OFF
        elif not answer["content"].strip():
            reason = EMPTY
        elif row["reward"] is None:
            reason = UNJUDGED
        elif row["reward"] < config.min_reward - 1e-6:  # but for the rounding of a score that was added up
            reason = WRONG
        elif text in texts:
            reason = SAID_BEFORE
        elif config.keep and kept[question] == config.keep:
            reason = ENOUGH
        else:
            reason = KEPT
            texts.add(text)
            kept[question] += 1
        reasons.append(reason)
    return reasons


def _answers(ready: Asked, batch: Sequence[Pair], config: SampleConfig) -> list[Row]:
    """The answers to ``batch``, judged, those of one question side by side."""
    can_choose = can_choose_to_think(ready.tokenizer)
    thinking = True if config.thinking and can_choose else None
    prompts = [_prompt(problem, "" if can_choose else config.instruction) for _, problem in batch]
    settings = [
        Sampling(
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            fit=True,
            seed=int(_hash(f"{config.seed}/{task.name}/{problem.question}")[:8], 16),
            thinking=thinking,
            n=config.samples,
        )
        for task, problem in batch
    ]
    outputs = ready.engine.generate(prompts, settings)
    pairs = [pair for pair in batch for _ in range(config.samples)]
    read = [
        parse_response(ready.tokenizer, each.token_ids, thinking=thinking, finished=each.finish_reason == "stop")
        for each in outputs
    ]
    verdicts = ready.payer.judge(pairs, read)
    return [_row(*each) for each in zip(pairs, outputs, read, verdicts, strict=True)]


def _prompt(problem: Problem, instruction: str) -> list[Message]:
    """What is said to the model: the problem's conversation, and behind its last turn ``instruction``."""
    *before, last = problem_messages(problem)
    return [*before, replace(last, content=f"{last.content}\n{instruction}") if instruction else last]


def _row(pair: Pair, output: Output, read: Response, verdict: Verdict) -> Row:
    """An answer, as it is written down."""
    task, problem = pair
    return {
        "task": task.name,
        "id": problem_id(problem),
        "question": _hash(f"{task.name}\n{problem.canonical}"),
        "messages": [{"role": message.role, "content": message.content} for message in problem_messages(problem)],
        "answer": {"reasoning": read.reasoning, "content": read.content, "closed": read.closed},
        "tokens": len(output.token_ids),
        "finish": str(output.finish_reason),
        "reward": verdict.reward,
        "outcome": verdict.outcome,
    }


def _example(row: Row) -> Row:
    """An answer as SFT reads it, with the question as it will be asked; earlier answers in it are not learned."""
    turns = [turn | ({"weight": 0} if turn["role"] == "assistant" else {}) for turn in row["messages"]]
    answer = row["answer"]
    reasoning = {"reasoning_content": answer["reasoning"].strip()} if answer["reasoning"].strip() else {}
    return {"messages": [*turns, {"role": "assistant", "content": answer["content"].strip(), **reasoning}]}


def general_examples(path: Path) -> list[Conversation]:
    """The general examples in the file at ``path``, without those that call tools.

    Raises:
        DataError: there is no such file, or they are no conversations.
    """
    if not path.exists():
        raise DataError("no such file or folder of examples", where=str(path), todo="give the path of one")
    examples = read_examples(path).of_kind(Conversation)
    return [each for each in examples if not any(turn.role == "tool" or turn.tool_calls for turn in each.messages)]


def _mixed(general: Sequence[Conversation], count: int, config: SampleConfig) -> list[Row]:
    """As many of ``general`` as make ``mix_share`` of all at most, beside ``count`` of our own."""
    wanted = math.floor(count * config.mix_share / (1 - config.mix_share) + 1e-6)  # 7 x 0.3 / 0.7 is 3
    rows = [_conversation_row(each) for each in general]
    return sorted(rows, key=lambda row: _hash(f"{config.seed}/{json.dumps(row, sort_keys=True)}"))[:wanted]


def _conversation_row(example: Conversation) -> Row:
    turns = [
        {
            "role": message.role,
            "content": message.content,
            **({"reasoning_content": message.reasoning} if message.reasoning else {}),
            **({"weight": message.weight} if message.role == "assistant" else {}),
        }
        for message in example.messages
    ]
    return {"messages": turns}


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    atomic.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
