"""``sprat distill`` of any teacher into any student; without a teacher it is the station of a road."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sprat.cli import finetune, stages
from sprat.cli.progress import progress_bar
from sprat.cli.verb import Overrides, Result, print_err
from sprat.errors import ConfigError

if TYPE_CHECKING:
    from sprat.trust.run import Run

_TEACHER_HELP = "A model, or the URL of a server up to /v1; left out: the road's."
Teacher = Annotated[str | None, typer.Argument(metavar="[TEACHER]", help=_TEACHER_HELP)]
_STUDENT_HELP = "A model to train, or a size (pico, nano, micro, mini, small) for fresh weights."
Student = Annotated[str | None, typer.Option("--student", metavar="MODEL|SIZE", help=_STUDENT_HELP)]
_DATA_HELP = "Questions: .jsonl, .json, .csv, .tsv or .parquet (also .gz, .zst), or a folder of them."
Data = Annotated[Path | None, typer.Option("--data", metavar="FILE", help=_DATA_HELP)]
_TASK_HELP = "A task of yours instead: its training questions are asked, its judge keeps right answers."
Task = Annotated[str | None, typer.Option("--task", metavar="FILE", help=_TASK_HELP)]
_HELD_OUT_HELP = "A task to be tested on: its questions are named and not asked; repeat it."
HeldOut = Annotated[list[str] | None, typer.Option("--held-out", metavar="FILE", help=_HELD_OUT_HELP)]
_OUT_HELP = "The student's run; the traces' is beside it. Without TEACHER, the road."
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help=_OUT_HELP)]
_MODEL_HELP = "What the server calls the teacher."
TeacherModel = Annotated[str | None, typer.Option("--teacher-model", metavar="NAME", help=_MODEL_HELP)]
_KEY_HELP = "The environment variable that holds the server's key."
KeyEnv = Annotated[str, typer.Option("--key-env", metavar="NAME", help=_KEY_HELP)]
_LICENCE_HELP = "On what terms the answers may be trained on; needed for a server."
Licence = Annotated[str | None, typer.Option("--licence", metavar="TEXT", help=_LICENCE_HELP)]
_PRICE_HELP = "Nano-yuan for a token in and out; 1000 is one yuan per million."
Price = Annotated[str | None, typer.Option("--price", metavar="IN,OUT", help=_PRICE_HELP)]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Answers to each question; 1 if left out.")]
Temperature = Annotated[float | None, typer.Option("--temperature", min=0.0, help="Of the teacher; 0.7 if left out.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Of an answer; 1024 if left out.")]
_TOKENIZER_HELP = "Whose tokenizer fresh weights get; the teacher's if left out."
_SPANS_HELP = "Learn how likely it finds each piece of an answer; for a student with another tokenizer."
Spans = Annotated[bool, typer.Option("--spans", help=_SPANS_HELP)]
_LOGITS_HELP = "Learn from the teacher's distributions too, which need its weights and its tokenizer."
Logits = Annotated[bool, typer.Option("--logits", help=_LOGITS_HELP)]
TokenizerOf = Annotated[str | None, typer.Option("--tokenizer", metavar="MODEL", help=_TOKENIZER_HELP)]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, max=1024, help="Requests at once.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="For one answer.")]
_FAULTS_HELP = "The share of questions without a good answer at which to stop."
MaxFaults = Annotated[float, typer.Option("--max-faults", min=0.0, max=1.0, metavar="SHARE", help=_FAULTS_HELP)]


def distill(  # size: an option a line
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    task: Task = None,
    held_out: HeldOut = None,
    out: Out = None,
    teacher_model: TeacherModel = None,
    key_env: KeyEnv = "SPRAT_TEACHER_KEY",
    licence: Licence = None,
    price: Price = None,
    samples: Samples = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    tokenizer: TokenizerOf = None,
    logits: Logits = False,
    spans: Spans = False,
    concurrency: Concurrency = 4,
    timeout: Timeout = 600.0,
    max_faults: MaxFaults = 0.5,
    lora: finetune.Lora = None,
    map_columns: finetune.Map = None,
    dequantize: finetune.Dequantize = False,
    init_from: stages.InitFrom = None,
    recipe: finetune.Recipe = None,
    overrides: Overrides = None,
) -> Result:
    """Let TEACHER answer questions, and a student learn from what it said; without TEACHER, the road's.

    Example: sprat distill runs/mine --student pico --data questions.jsonl --out runs/small
    """
    if teacher is None:
        given = {"--student": student, "--data": data, "--task": task, "--teacher-model": teacher_model}
        if alone := [name for name, value in given.items() if value is not None]:
            todo = "name the teacher first: sprat distill TEACHER --student MODEL --data FILE --out RUN"
            raise ConfigError(f"{alone[0]} is for a teacher of yours, and none was named", where="distill", todo=todo)
        return stages.distill(out or stages.DEFAULT_OUT, init_from, recipe or "quickstart", overrides)
    if init_from is not None:
        todo = "leave it out: what was interrupted goes on by itself, with the same command"
        raise ConfigError("a road's station starts from a checkpoint", where="--init-from", todo=todo)
    for name, value in (("--student", student), ("--out", out)):
        if value is None:
            raise ConfigError(f"{name} is missing", where="distill", todo=f"give it: {name} …")
    assert student is not None and out is not None
    from sprat.config.teach import load_teach_config
    from sprat.data.conversations import parse_column_map
    from sprat.post import collect, teach
    from sprat.post.teachers import Limits

    options = {
        "traces.teacher_model": teacher_model,
        "traces.licence": licence,
        "traces.samples": samples,
        "traces.temperature": temperature,
        "traces.max_tokens": max_tokens,
        **_prices(price),
    }
    changes = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    config = load_teach_config(student, lora=lora, recipe=recipe, overrides=(*changes, *(overrides or ())))
    if logits and config.logits is None:
        config = config.replace(logits={})
    if spans and config.spans is None:
        config = config.replace(spans={})
    teach.check_student(teacher, student, config, tokenizer)
    column_map = parse_column_map(",".join(map_columns)) if map_columns else None
    limits = Limits(concurrency=concurrency, seconds=timeout, max_faults=max_faults)
    with progress_bar("answers") as on_progress:
        traces_run = collect.collect_traces(
            teacher,
            teach.traces_folder(out),
            config.traces,
            data=data,
            task=task,
            held_out=tuple(held_out or ()),
            column_map=column_map,
            key=os.environ.get(key_env, ""),
            limits=limits,
            on_progress=on_progress,
        )
    print_err(_traces_summary(traces_run))
    run = teach.distill(
        teacher,
        student,
        out,
        config,
        traces_run,
        tokenizer=tokenizer,
        dequantize=dequantize,
        on_prepared=finetune.show_examples,
        on_size=lambda size: print_err(f"sprat: the teacher's distributions take {size / 1e6:.1f} MB"),
    )
    facts = {"teacher": teacher, "student": student, "traces": traces_run.record}
    return Result({"run": str(run.folder), **facts, **run.record}, finetune.summary(run))


def _prices(price: str | None) -> dict[str, int | None]:
    """The two prices of ``IN,OUT``.

    Raises:
        ConfigError: they are not two whole numbers.
    """
    if price is None:
        return {}
    parts = [part.strip() for part in price.split(",")]
    if len(parts) != 2 or not all(part.isdecimal() and part.isascii() and len(part) < 16 for part in parts):
        todo = "write two whole numbers of nano-yuan, as 2000,3000"
        raise ConfigError(f"no price: {price!r}", where="--price", todo=todo)
    return {"traces.input_price": int(parts[0]), "traces.output_price": int(parts[1])}


def _traces_summary(run: Run) -> str:
    """What came of the questions, for a person."""
    facts = run.facts
    parts = [f"{facts['kept']} of {facts['answers']} answers to {facts['questions']} questions are kept"]
    left_out = {**facts["rejected"], **{f"unanswered: {kind}": n for kind, n in facts["unanswered"].items()}}
    parts += [f"{count} {reason}" for reason, count in left_out.items()]
    parts += [f"{len(ids)} questions of {name} left out" for name, ids in facts["held_out_overlap"].items()]
    if facts["teacher_nano_yuan"] is not None:
        parts.append(f"¥{facts['teacher_nano_yuan'] / 1e9:.6f}")
    return f"sprat: {run.folder}: {', '.join(parts)}"
