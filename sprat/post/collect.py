"""A teacher asked a user's questions, as a run; see ``traces`` for what is kept, and how.

Over HTTP the user states the licence of the answers. Most providers restrict what may be trained on them, nothing in a
response says so, and afterwards nobody can find out; a run that proves where its data come from must not be silent on
their terms. What is stated stands in each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.config.finetune import ColumnMapConfig
from sprat.config.teach import ServerConfig, TracesConfig
from sprat.data.folder import warn_of_excluded
from sprat.data.prompts import read_prompts
from sprat.engine import Engine
from sprat.errors import ConfigError, DataError
from sprat.files.lock import lock_folder
from sprat.formats.load import load, locate
from sprat.post import traces
from sprat.post.teachers import HTTPTeacher, Limits, check_url
from sprat.post.traces import LOG_NAME, AnswerBook, OnProgress, Question
from sprat.tasks import Task, task_input
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.run import Run, open_run
from sprat.trust.run_record import Input


def is_url(teacher: str) -> bool:
    """Whether ``teacher`` is asked over HTTP."""
    return teacher.startswith(("http://", "https://"))


def collect_traces(
    teacher: str,
    folder: str | Path,
    config: TracesConfig,
    *,
    data: str | Path | None = None,
    task: str | None = None,
    held_out: Sequence[str] = (),
    column_map: Mapping[str, str] | None = None,
    key: str = "",
    limits: Limits | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Run:
    """The finished run of a teacher's answers, also where it was finished before; see ``post.traces``.

    Args:
        teacher: a URL up to ``/v1``, or a model as ``sprat.load`` takes it.
        folder: of the run; its ledger lies in the folder above it.
        data: a file or folder of questions; see ``data.prompts``.
        task: instead of ``data``, a task of the user's: its training questions are asked, its judge decides.
        held_out: task files whose questions must not be among those that are asked; where they are, they are left out.
        column_map: our names of columns to those of ``data``.
        key: of the server.
        limits: how the server is treated.
        on_progress: is told how many of how many answers there are; from several threads, if the teacher is a server.

    Raises:
        ConfigError: neither or both of ``data`` and ``task``; no licence or no name of a model behind a URL.
        ServeError: the server refuses, or too many of its answers are none; what came is kept.
        SpratError: questions, task or teacher cannot be used; nothing was touched.
    """
    folder = Path(folder)
    _check_settings(teacher, config, data, task)
    inputs: dict[str, Input] = {"questions": Path(data) if data is not None else task_input(str(task))}
    inputs |= {f"held_out_{number}": task_input(source) for number, source in enumerate(held_out)}
    inputs |= {"map": ColumnMapConfig(columns=dict(column_map))} if column_map else {}
    server = HTTPTeacher(teacher, config, key=key, limits=limits) if is_url(teacher) else None
    path = None if server else locate(teacher)
    inputs["teacher"] = path or ServerConfig(url=check_url(teacher), model=config.teacher_model)
    prepared = list[tuple[_Questions, traces.Teacher]]()

    def prepare(resuming: bool) -> None:
        _check_unlocked(folder / "checkpoints")
        questions = _read_questions(data, task, held_out, column_map)
        prepared.append((questions, traces.ask_server(server) if server else _local_teacher(str(path), config)))

    run = open_run(
        folder,
        stage="traces",
        recipe=config,
        inputs=inputs,
        seed=config.seed or 0,
        ledger=folder.parent / LEDGER_NAME,
        prepare=prepare,
    )
    if not run.done:
        with lock_folder(run.checkpoints):
            name = server.url if server else str(run.identity["inputs"]["teacher"]["digest"])
            _collect(run, AnswerBook(run.checkpoints / LOG_NAME, name, config), *prepared[0], on_progress)
    return run


def _check_settings(teacher: str, config: TracesConfig, data: str | Path | None, task: str | None) -> None:
    """Raise ConfigError or DataError where what was said contradicts itself or is not enough."""
    if (data is None) == (task is None):
        what = "neither questions nor a task" if data is None else "both questions and a task"
        raise ConfigError(what, where="distill", todo="give one of --data FILE and --task FILE")
    source = Path(data) if data is not None else _task_file(str(task))
    if not source.exists():
        raise DataError("no such file or folder of questions", where=str(source), todo="give the path of one")
    if config.samples > 1 and config.temperature == 0:
        raise ConfigError("several samples at temperature 0 are all alike", where="samples", todo="raise --temperature")
    if (config.input_price is None) != (config.output_price is None):
        raise ConfigError("one price of two", where="price", todo="give both, or none")
    if not is_url(teacher):
        return
    if not config.teacher_model:
        todo = "give the name that its server has for it: --teacher-model NAME"
        raise ConfigError("which model of this server is the teacher", where=teacher, todo=todo)
    if not config.licence.strip():
        todo = 'say on what terms its answers may be trained on, as --licence "MIT, section 3 of the terms of use"'
        raise ConfigError("no licence was stated for the teacher's answers", where=teacher, todo=todo)


def _check_unlocked(folder: Path) -> None:
    """Raise MachineError where another process collects answers in ``folder`` right now."""
    if folder.is_dir():
        with lock_folder(folder):
            pass


def _local_teacher(path: str, config: TracesConfig) -> traces.Teacher:
    """The model at ``path``, loaded to answer."""
    return traces.ask_engine(Engine(*load(path), frozen=True, consume=True), config)


def _task_file(source: str) -> Path:
    """The file of a user's task, which may be file.py:Class."""
    return Path(source if source.endswith(".jsonl") else source.partition(":")[0])


@dataclass(frozen=True)
class _Questions:
    """What is asked, the task that judges where there is one, and what is to be said of them."""

    questions: list[Question]
    task: Task | None
    facts: dict[str, Any]


def _read_questions(
    data: str | Path | None, task: str | None, held_out: Sequence[str], column_map: Mapping[str, str] | None
) -> _Questions:
    """The questions of ``data`` or ``task`` in which none of ``held_out`` stands."""
    facts, judge = dict[str, Any](), None
    if task is not None:
        judge, asked = traces.task_questions(task)
    else:
        prompts = read_prompts(str(data), column_map=column_map)
        asked = [Question(prompt) for prompt in prompts.prompts]
        warn_of_excluded(prompts.skipped, data or "")
        facts["skipped"] = [vars(each) for each in prompts.skipped]
    left, facts["held_out_overlap"] = traces.leave_out_tested(asked, held_out)
    if not left:
        raise DataError("every question is one of an evaluation set", where="held_out", todo="give others")
    return _Questions(left, judge, facts)


def _collect(
    run: Run,
    book: AnswerBook,
    questions: _Questions,
    ask: traces.Teacher,
    on_progress: OnProgress,
) -> None:
    """Ask what is missing, sift all of it, finish the run."""
    config, task = book.config, questions.task
    by_key = {question.key(book.teacher, config): question for question in questions.questions}
    taken_over = book.take_over(traces.read_rows(run.set_aside), by_key) if run.set_aside else 0
    missing = [
        (question, sample)
        for key, question in by_key.items()
        for sample in range(config.samples)
        if (key, sample) not in book.rows
    ]
    run.start_progress(len(book.rows) + len(missing), len(book.rows))
    if missing:
        ask(missing, book, on_progress)
    paid = [*book.rows.values(), *book.replaced]
    spent = [row["nano_yuan"] for row in paid if row["nano_yuan"] is not None]
    tokens = sum(row["usage"].get("completion_tokens", 0) for row in paid)
    accepted, rejected, counts = traces.sift(book, list(by_key.values()), config.samples, task)
    run.add_facts(
        **questions.facts,
        questions=len(by_key),
        answers=len(book.rows),
        asked_again=len(book.replaced),
        taken_over=taken_over,
        kept=len(accepted),
        rejected=counts,
        unanswered=dict(book.unanswered),
        judge=None if task is None else task.name,
        licence=config.licence,
        teacher_tokens=tokens,
        teacher_nano_yuan=sum(spent) if spent else None,
    )
    traces.write_rows(run.artifact / LOG_NAME, accepted)
    traces.write_rows(run.artifact / traces.REJECTED_NAME, [*rejected, *book.replaced])
    run.finish(tokens=tokens)
