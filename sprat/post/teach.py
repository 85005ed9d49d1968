"""Any teacher, any student: the teacher's answers to a user's questions, and a student that learns from them.

Two runs in one folder: ``OUT-traces`` holds what the teacher said, ``OUT`` the student that learned it. They are two,
because answers are paid for once, and students are many: with other settings of training, or another student, the
traces are found as they are. The student is trained by the very functions of ``sprat sft``. With ``config.logits`` a
third run, ``OUT-logits``, holds the teacher's distributions on the rows of the student.

Over HTTP the user states the licence of the answers. Most providers restrict what may be trained on them, nothing in a
response says so, and afterwards nobody can find out; a run that proves where its data come from must not be silent on
their terms. What is stated stands in each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sprat.config.sizes import size, size_names
from sprat.config.teach import LogitsCacheConfig, NewStudentConfig, ServerConfig, TeachConfig, TracesConfig
from sprat.data.prompts import read_prompts
from sprat.engine import Engine
from sprat.errors import ConfigError, DataError
from sprat.files.lock import lock_folder
from sprat.formats.load import load, locate
from sprat.formats.memory import check_available_memory
from sprat.model import Transformer, count_parameters
from sprat.post import finetune, traces
from sprat.post.finetune import OnPrepared
from sprat.post.teacher_logits import OnSize, TeacherLogits, cache_logits, logits_loss
from sprat.post.teachers import HTTPTeacher, Limits, check_url
from sprat.post.traces import LOG_NAME, AnswerBook, OnProgress, Question
from sprat.tasks import Task
from sprat.tokens import Tokenizer
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.run import Run, open_run
from sprat.trust.run_record import Input


def is_url(teacher: str) -> bool:
    """Whether ``teacher`` is asked over HTTP."""
    return teacher.startswith(("http://", "https://"))


def traces_folder(out: str | Path) -> Path:
    """Where the traces of the student ``out`` are: beside it."""
    out = Path(out)
    return out.with_name(f"{out.name}-traces")


def logits_folder(out: str | Path) -> Path:
    """Where the teacher's distributions on the rows of the student ``out`` are: beside it."""
    out = Path(out)
    return out.with_name(f"{out.name}-logits")


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
    inputs: dict[str, Input] = {"questions": Path(data) if data is not None else _task_file(str(task))}
    inputs |= {f"held_out_{number}": _task_file(source) for number, source in enumerate(held_out)}
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
            book = AnswerBook(run.checkpoints / LOG_NAME, name, config)
            _collect(run, book, *prepared[0], on_progress)
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
    rows = list(book.rows.values())
    spent = [row["nano_yuan"] for row in rows if row["nano_yuan"] is not None]
    tokens = sum(row["usage"].get("completion_tokens", 0) for row in rows)
    kept, rejected, counts = traces.sift(book, list(by_key.values()), config.samples, task)
    run.add_facts(
        **questions.facts,
        questions=len(by_key),
        answers=len(rows),
        taken_over=taken_over,
        kept=len(kept),
        rejected=counts,
        unanswered=dict(book.unanswered),
        judge=None if task is None else task.name,
        licence=config.licence,
        teacher_tokens=tokens,
        teacher_nano_yuan=sum(spent) if spent else None,
    )
    traces.write_rows(run.artifact / LOG_NAME, kept)
    traces.write_rows(run.artifact / traces.REJECTED_NAME, rejected)
    run.finish(tokens=tokens)


def distill(
    teacher: str,
    student: str,
    out: str | Path,
    config: TeachConfig,
    traces_run: Run,
    *,
    tokenizer: str | None = None,
    dequantize: bool = False,
    on_prepared: OnPrepared = lambda tokenizer, encoded: None,
    on_size: OnSize = lambda size: None,
) -> Run:
    """The finished run of a student that learned from ``traces_run``, also where it was finished before.

    Args:
        teacher: as for ``collect_traces``.
        student: a model as ``sprat.load`` takes it, or a size (``config.sizes``) for fresh weights.
        out: the run's folder, in the folder of the traces.
        tokenizer: a model whose tokenizer a fresh student gets; the teacher, if not given.
        dequantize: train a quantised student as the dense one that its codes stand for.
        on_prepared: is shown what will be trained, before it is.
        on_size: with ``config.logits``, is told how many bytes the teacher's distributions take, before they are made.

    Raises:
        SpratError: see ``finetune.finetune`` and ``teacher_logits.cache_logits``.
    """
    out, data = Path(out), traces_run.artifact / LOG_NAME
    inputs: dict[str, Input] = {"traces": traces_run.folder}
    if student in size_names() and not Path(student).exists():
        source = locate(_tokenizer_source(teacher, tokenizer))
        inputs |= {"student": NewStudentConfig(size=student), "tokenizer": source}
        load_student = partial(create_student, student, source, config.seed)
    else:
        inputs["student"] = locate(student)
        load_student = partial(finetune.load_trainable, locate(student), dequantize=dequantize)
    prepared, teacher_logits = list[finetune.Prepared](), None

    def prepare(resuming: bool) -> None:
        if not prepared:
            prepared.append(finetune.prepare(load_student, data, config, {}, on_prepared, where=student))

    if config.logits is not None:
        if is_url(teacher):
            todo = "leave out --logits, or give the teacher's own weights"
            raise ConfigError("a server does not say its distributions", where=teacher, todo=todo)
        prepare(False)
        ready, settings = prepared[0], config.logits.model_dump(include=set(LogitsCacheConfig.model_fields))
        cache = LogitsCacheConfig.model_validate(settings)
        folder = logits_folder(out)
        logits_run = cache_logits(locate(teacher), ready.tokenizer, ready.rows, folder, cache, on_size=on_size)
        inputs["logits"], teacher_logits = folder, TeacherLogits(logits_run.artifact, ready.rows)
    run = open_run(
        out,
        stage="distill",
        recipe=config,
        inputs=inputs,
        seed=config.seed,
        ledger=out.parent / LEDGER_NAME,
        prepare=prepare,
    )
    if not run.done:
        loss_fn = None if not teacher_logits or not config.logits else logits_loss(teacher_logits, config.logits)
        finetune.train(run, prepared[0], student, loss_fn)
    return run


def _tokenizer_source(teacher: str, tokenizer: str | None) -> str:
    """The model whose tokenizer a fresh student gets."""
    if tokenizer is None and is_url(teacher):
        todo = "name a model that has the tokenizer it shall have: --tokenizer MODEL"
        raise ConfigError("a fresh student needs a tokenizer, and a server hands out none", where=teacher, todo=todo)
    return tokenizer or teacher


def create_student(name: str, tokenizer_source: str | Path, seed: int) -> tuple[Transformer, Tokenizer]:
    """A model of size ``name`` with fresh weights, and the tokenizer of the model at ``tokenizer_source``.

    Raises:
        CheckpointError: see ``sprat.load``.
    """
    tokenizer = load(tokenizer_source)[1]
    ids = tokenizer.special_ids
    special: dict[str, Any] = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    config = size(name, vocab_size=tokenizer.vocab_size, **special)
    check_available_memory(4 * count_parameters(config).total, f"size {name}")
    return Transformer.create(config, seed), tokenizer
