# size: to ask, to keep and to sift answers are one noun
"""A teacher's answers to a user's questions, as a run whose artefact is a file of conversations for SFT.

While it is asked, every answer is a line of ``checkpoints/traces.jsonl``, on the disk before the next question of the
same thread goes out: a kill loses what is in flight and nothing else, and what stands there is never asked again. That
holds for other settings too, where they ask for the same (a longer ``max_tokens``, more questions): the run is then set
aside, and its answers are taken over. At the end ``artefact/traces.jsonl`` has what is learned from, in the order of
the questions, and ``artefact/rejected.jsonl`` the rest, each with its reason.

What is kept: answers that came to an end, of the model that was asked, with their usage; of a task's questions those
that its judge takes for right (rejection sampling: the teacher's errors are never taught); and of answers to one
question that differ in nothing but blanks, the first.

Source: sequence-level distillation, Kim and Rush, arXiv 1606.07947; of verified answers, DeepSeek-R1, arXiv 2501.12948,
section 2.4.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sprat.config.teach import TracesConfig
from sprat.data.prompts import Prompt, normalize
from sprat.engine import Engine, Output, Sampling
from sprat.errors import DataError, EngineError, ServeError, TrainingError
from sprat.eval.tasks import problem_messages
from sprat.files import atomic, digest
from sprat.post.teachers import CUT_OFF, EMPTY, HTTPTeacher, Limits, TeacherAnswer, Unanswered
from sprat.tasks import Problem, Task, UserClassTask, UserTask, held_out_problems, is_correct, load_user_task, overlap
from sprat.tokens.chat import Message
from sprat.trust.ledger import utc_now

LOG_NAME, REJECTED_NAME = "traces.jsonl", "rejected.jsonl"
WRONG, SAID_BEFORE, SENT_BEFORE = (
    "a wrong answer",
    "what an earlier answer says",
    "the very response of another question",
)
_LOCAL_BATCH = 32  # questions that a local teacher answers between two writes
_CLASS_PROBLEMS = 100  # of a class that does not say how many it has

log = logging.getLogger(__name__)
OnProgress = Callable[[int, int], None]
Row = dict[str, Any]
Response = tuple[str, int | None, int | None, str]  # id, time, tokens of the prompt, text


@dataclass(frozen=True)
class Question:
    """What is asked; ``problem`` where a task can judge the answer."""

    prompt: Prompt
    problem: Problem | None = None

    def key(self, teacher: str, config: TracesConfig) -> str:
        """SHA-256 (hex) of the question and of all that decides how it is answered, but for how much may be said.

        Args:
            teacher: the URL or the digest of who is asked.
        """
        turns = [[message.role, message.content] for message in self.prompt]
        unread = {"licence", "input_price", "output_price", "samples", "max_tokens"}
        return digest.of_json([teacher, turns, config.model_dump(mode="json", exclude=unread)])


class Teacher(Protocol):
    """Who answers; see ``ask_server`` and ``ask_engine``."""

    def __call__(self, missing: Sequence[tuple[Question, int]], book: AnswerBook, on_progress: OnProgress, /) -> None:
        """Put an answer to each of ``missing`` (a question and the number of its answer) into ``book``."""
        ...


@dataclass
class AnswerBook:
    """The answers that there are, in memory and in the file at ``path``, a line each.

    Attributes:
        teacher: the URL or the digest of who is asked.
        rows: by key of the question and number of the answer.
        replaced: what an earlier session got in place of answers; these questions are asked again.
        unanswered: questions of this session to which no answer came, by kind.
        examples: of each kind of fault, what the first one said.
    """

    path: Path
    teacher: str
    config: TracesConfig
    rows: dict[tuple[str, int], Row] = field(default_factory=dict)
    replaced: list[Row] = field(default_factory=list)
    unanswered: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what an earlier session wrote; the end of a line that a power cut tore is dropped.

        What was no answer then may be one now, since a server can be mended; only what was cut off will be so again.
        """
        self._lock, self._responses = threading.Lock(), dict[Response, str]()
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            atomic.write_bytes(self.path, whole)
        for row in _parse_lines(whole, self.path):
            if row["fault"] in ("", CUT_OFF):
                self._note(row)
            else:
                self.replaced.append(row)

    def add(self, question: Question, sample: int, answer: TeacherAnswer) -> None:
        """Write an answer down; it is on the disk when this returns. Any thread may call it."""
        key = question.key(self.teacher, self.config)
        with self._lock:
            fault = answer.fault
            row = _row(question, key, sample, answer, fault, self.config)
            if not fault and answer.response_id and self._responses.get(_response(row), key) != key:
                row["fault"] = fault = SENT_BEFORE
            atomic.append_line(self.path, json.dumps(row, ensure_ascii=False))
            self._note(row)
            if fault:
                self.examples.setdefault(fault, answer.detail)

    def add_unanswered(self, error: Unanswered) -> None:
        """Count a question to which no answer came; a run that did not finish asks it again when it goes on."""
        with self._lock:
            self.unanswered[error.kind] += 1
            self.examples.setdefault(error.kind, error.detail)

    def take_over(self, rows: Iterable[Row], questions: Mapping[str, Question]) -> int:
        """Keep of an earlier run's ``rows`` what was well answered and is asked now; how many those were."""
        count = 0
        for row in rows:
            place = (row["key"], row["sample"])
            if not row["fault"] and row["key"] in questions and place not in self.rows:
                atomic.append_line(self.path, json.dumps(row, ensure_ascii=False), durable=False)
                self._note(row)
                count += 1
        return count

    def faults(self) -> Counter[str]:
        """How many answers are none, and questions without one, by kind."""
        with self._lock:
            return Counter(row["fault"] for row in self.rows.values() if row["fault"]) + self.unanswered

    def check(self, limits: Limits, total: int) -> None:
        """Stop where more than the stated share has no good answer.

        Raises:
            ServeError: it has.
        """
        faults, asked = self.faults(), len(self.rows) + self.unanswered.total()
        if asked >= min(limits.min_asked, total) and faults.total() > limits.max_faults * asked:
            kinds = ", ".join(f"{count} {kind}" for kind, count in faults.most_common())
            first = next(
                (f": {self.examples[kind]}" for kind, _ in faults.most_common(1) if self.examples.get(kind)), ""
            )
            todo = "mend that and start the same command again; what was answered is kept"
            what = f"{faults.total()} of {asked} questions have no good answer ({kinds}{first})"
            raise ServeError(what, where=str(self.path), todo=todo)

    def _note(self, row: Row) -> None:
        self.rows[row["key"], row["sample"]] = row
        if row["response_id"] and not row["fault"]:
            self._responses.setdefault(_response(row), row["key"])


def _response(row: Row) -> Response:
    """By what a response is known again: servers that number their responses begin anew, or draw from a thousand."""
    prompt_tokens = row["usage"].get("prompt_tokens")
    return row["response_id"], row.get("created"), prompt_tokens, row["messages"][-1]["content"]


def _row(question: Question, key: str, sample: int, answer: TeacherAnswer, fault: str, config: TracesConfig) -> Row:
    """An answer as a line of the file: a conversation as SFT reads it, and where it comes from."""
    turns: list[Row] = []
    for message in question.prompt:
        unlearned = {"weight": 0} if message.role == "assistant" else {}
        turns.append({"role": message.role, "content": message.content, **unlearned})
    reasoning = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
    cost = None
    if answer.usage and config.input_price is not None and config.output_price is not None:
        prompt, completion = answer.usage["prompt_tokens"], answer.usage["completion_tokens"]
        cost = prompt * config.input_price + completion * config.output_price
    return {
        "messages": [*turns, {"role": "assistant", "content": answer.text, **reasoning}],
        "key": key,
        "sample": sample,
        "fault": fault,
        "finish_reason": answer.finish_reason,
        "response_id": answer.response_id,
        "created": answer.created,
        "model": answer.model,
        "usage": dict(answer.usage),
        "nano_yuan": cost,
        "licence": config.licence,
        "sampling": config.model_dump(mode="json", include={"temperature", "top_p", "max_tokens", "seed", "thinking"}),
        "time": utc_now(),
    }


def ask_server(teacher: HTTPTeacher) -> Teacher:
    """A teacher over HTTP, asked by ``limits.concurrency`` threads."""

    def ask(missing: Sequence[tuple[Question, int]], book: AnswerBook, on_progress: OnProgress) -> None:
        limits, total = teacher.limits, len(book.rows) + len(missing)
        pending, lock, failure = iter(missing), threading.Lock(), list[BaseException]()

        def work() -> None:
            while not teacher.stopping.is_set():
                with lock:
                    question, sample = next(pending, (None, 0))
                if question is None:
                    return
                try:
                    try:
                        book.add(question, sample, teacher.ask(question.prompt, sample))
                    except Unanswered as error:
                        if teacher.stopping.is_set():
                            return
                        book.add_unanswered(error)
                    book.check(limits, total)
                except BaseException as error:
                    failure.append(error)
                    teacher.stopping.set()
                    return
                on_progress(len(book.rows), total)

        with ThreadPoolExecutor(limits.concurrency, "sprat-teacher") as pool:
            futures = [pool.submit(work) for _ in range(limits.concurrency)]
            try:
                wait(futures)
            except KeyboardInterrupt:
                teacher.stopping.set()
                log.warning("waiting for the answers in flight, which are paid for; Ctrl-C again gives them up")
                try:
                    wait(futures)
                finally:
                    teacher.abort()
                raise
        if failure:
            raise failure[0]

    return ask


def ask_engine(engine: Engine, config: TracesConfig) -> Teacher:
    """A teacher on this machine, whose answers do not depend on how many questions it is asked at once."""
    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        fit=True,
        seed=config.seed or 0,
        thinking=config.thinking,
        n=config.samples,
    )

    def ask(missing: Sequence[tuple[Question, int]], book: AnswerBook, on_progress: OnProgress) -> None:
        total = len(book.rows) + len(missing)
        by_question = dict[int, tuple[Question, list[int]]]()
        for question, sample in missing:
            by_question.setdefault(id(question), (question, []))[1].append(sample)
        pending = list(by_question.values())
        batches = [pending[start : start + _LOCAL_BATCH] for start in range(0, len(pending), _LOCAL_BATCH)]
        while batches:
            batch = batches.pop(0)
            try:
                outputs = engine.generate([list(question.prompt) for question, _ in batch], sampling)
            except EngineError as error:  # refused before anything was computed
                if error.where != "prompt":
                    raise
                if len(batch) > 1:
                    half = len(batch) // 2
                    batches[:0] = [batch[:half], batch[half:]]
                else:
                    for _ in batch[0][1]:
                        book.add_unanswered(Unanswered("too long for the teacher", error.what))
                continue
            for number, (question, samples) in enumerate(batch):
                for sample in samples:
                    answer = _local_answer(outputs[number * config.samples + sample], book.teacher)
                    book.add(question, sample, answer)
                    on_progress(len(book.rows), total)

    return ask


def _local_answer(output: Output, teacher: str) -> TeacherAnswer:
    """What a local teacher said, and whether that is an answer."""
    fault = "" if output.text.strip() else EMPTY
    return TeacherAnswer(
        text=output.text,
        reasoning=output.reasoning,
        finish_reason=output.finish_reason,
        model=teacher,
        usage={"prompt_tokens": output.usage.prompt_tokens, "completion_tokens": output.usage.completion_tokens},
        fault=CUT_OFF if output.finish_reason != "stop" or not output.closed else fault,
    )


def _parse_lines(content: bytes, path: Path) -> list[Row]:
    """The rows of whole lines; what stands behind the last line's end is no row yet.

    Raises:
        DataError: a line is none that was written here.
    """
    rows = list[Row]()
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            row["key"], row["sample"], row["fault"], row["response_id"], row["messages"][-1]["content"]
        except (ValueError, KeyError, TypeError, IndexError):
            todo = "take that line out; its question will be asked again"
            raise DataError("not an answer of a teacher", where=f"{path}, line {number}", todo=todo) from None
        rows.append(row)
    return rows


def read_rows(folder: Path) -> list[Row]:
    """The answers of a run that is finished, open or set aside; none where there is none."""
    rows: list[Row] = []
    for path in (
        folder / "checkpoints" / LOG_NAME,
        folder / "artefact" / LOG_NAME,
        folder / "artefact" / REJECTED_NAME,
    ):
        rows += _parse_lines(path.read_bytes(), path) if path.is_file() else []
    return rows


def task_questions(source: str) -> tuple[Task, list[Question]]:
    """The training questions of the user's task ``source``, and the task, which judges.

    Raises:
        DataError: no row of it is for training; or see ``load_user_task``.
    """
    task = load_user_task(source)
    if isinstance(task, UserTask):
        problems = list(task.problems["train"])
    else:
        problems = held_out_problems(task, task.num_problems or _CLASS_PROBLEMS, "train")
    if not problems:
        todo = 'write {"split": "train"} into its first line; what a student is tested on must be another file'
        raise DataError("no question for training", where=source, todo=todo)
    return task, [Question(tuple(problem_messages(problem)), problem) for problem in problems]


def leave_out_tested(
    questions: Sequence[Question], sources: Sequence[str]
) -> tuple[list[Question], dict[str, list[str]]]:
    """``questions`` without those in which a question of an evaluation set stands, and which ones those are.

    Args:
        sources: task files, whose problems of test and dev are looked for (see ``tasks.overlap``).

    Returns:
        what is left; by the name of the task the ids of the problems that were found.

    Raises:
        DataError: see ``load_user_task``.
    """
    hits_by_task = dict[str, list[str]]()
    left = list(questions)
    for source in sources:
        task = load_user_task(source)
        if isinstance(task, UserTask):
            tested = [*task.problems["test"], *task.problems["dev"]]
        else:
            tested = held_out_problems(task, task.num_problems or _CLASS_PROBLEMS)
        if hits := overlap(tested, (_text(question.prompt) for question in left)):
            hits_by_task[task.name] = [str(problem.meta.get("id", problem.index)) for problem in hits]
            left = [question for question in left if not overlap(hits, [_text(question.prompt)])]
    return left, hits_by_task


def _text(prompt: Sequence[Message]) -> str:
    return "\n\n".join(message.content for message in prompt)


def sift(
    book: AnswerBook, questions: Sequence[Question], samples: int, task: Task | None
) -> tuple[list[Row], list[Row], dict[str, int]]:
    """The rows that are kept, those that are rejected with their reason, and how many of each reason.

    Raises:
        TrainingError: not one is kept.
    """
    accepted, rejected, counts = list[Row](), list[Row](), Counter[str]()
    for question in questions:
        key, texts = question.key(book.teacher, book.config), set[tuple[str, str]]()
        for sample in range(samples):
            if (row := book.rows.get((key, sample))) is None:
                continue
            answer = row["messages"][-1]
            text = (normalize(answer.get("reasoning_content", "")), normalize(answer["content"]))
            reason = row["fault"]
            if not reason and task is not None and question.problem is not None:
                right = is_correct(float(task.score(question.problem, answer["content"].strip() or None)))
                reason = "" if right else WRONG
            if not reason and text in texts:
                reason = SAID_BEFORE
            if reason:
                rejected.append({**row, "fault": reason})
                counts[reason] += 1
            else:
                texts.add(text)
                accepted.append(row)
    if isinstance(task, UserClassTask):
        task.check_faults()
    if not accepted:
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "none came"
        todo = "raise traces.max_tokens or traces.samples, or take another teacher"
        raise TrainingError(f"not one answer of the teacher can be learned: {kinds}", where="traces", todo=todo)
    return accepted, rejected, dict(counts)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write ``rows`` as JSONL, wholly or not at all."""
    atomic.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
