"""Any teacher, any student: a student that learns from what a teacher said, as runs in one folder.

``OUT-traces`` holds what the teacher said (``collect``), ``OUT`` the student that learned it. They are two, because
answers are paid for once, and students are many: with other settings of training, or another student, the traces are
found as they are. The student is trained by the very functions of ``sprat sft``. With ``config.logits`` a third run,
``OUT-logits``, holds the teacher's distributions on the rows of the student.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from sprat.config.sizes import size
from sprat.config.teach import LogitsCacheConfig, LogitsConfig, NewStudentConfig, TeachConfig, is_size
from sprat.errors import ConfigError
from sprat.formats.load import load, load_dense, locate
from sprat.formats.memory import check_available_memory
from sprat.model import Transformer, count_parameters
from sprat.post import finetune, preparation
from sprat.post.collect import is_url
from sprat.post.preparation import OnPrepared
from sprat.post.span_likelihood import span_loss, span_targets
from sprat.post.teacher_logits import OnSize, TeacherLogits, cache_logits, logits_loss
from sprat.post.traces import LOG_NAME
from sprat.tokens import Tokenizer
from sprat.train.losses import LossFn
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.run import Run, open_run
from sprat.trust.run_record import Input


def traces_folder(out: str | Path) -> Path:
    """Where the traces of the student ``out`` are: beside it."""
    out = Path(out)
    return out.with_name(f"{out.name}-traces")


def logits_folder(out: str | Path) -> Path:
    """Where the teacher's distributions on the rows of the student ``out`` are: beside it."""
    out = Path(out)
    return out.with_name(f"{out.name}-logits")


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
        teacher: as for ``collect.collect_traces``.
        student: a model as ``sprat.load`` takes it, or a size (``config.sizes``) for fresh weights.
        out: the run's folder, in the folder of the traces.
        tokenizer: a model whose tokenizer a fresh student gets; the teacher, if not given.
        dequantize: train a quantised student as the dense one that its codes stand for.
        on_prepared, on_size: are shown, before, what is trained and how many bytes the teacher's distributions take.

    Raises:
        SpratError: see ``finetune.finetune`` and ``teacher_logits.cache_logits``.
    """
    check_student(teacher, student, config, tokenizer)
    out, data, config = Path(out), traces_run.artifact / LOG_NAME, preparation.resolve_dtype(config)
    inputs: dict[str, Input] = {"traces": traces_run.folder}
    if is_size(student):
        source = locate(_tokenizer_source(teacher, tokenizer))
        inputs |= {"student": NewStudentConfig(size=student), "tokenizer": source}
        load_student = partial(create_student, student, source, config.seed)
    else:
        inputs["student"] = path = locate(student)
        load_student = partial(load_dense, path, dequantize=dequantize)
    prepared, loss_fn = list[preparation.Prepared](), None

    def prepare(resuming: bool) -> None:
        if not prepared:
            prepared.append(preparation.prepare(load_student, data, config, {}, on_prepared))

    if config.logits is not None:
        prepare(False)
        logits_run = _cache_logits(teacher, prepared[0], out, config.logits, on_size)
        inputs["logits"] = logits_run.folder
        loss_fn = logits_loss(TeacherLogits(logits_run.artifact, prepared[0].rows), config.logits)
    if config.spans is not None:
        inputs["teacher"] = locate(teacher)
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
        finetune.train(run, prepared[0], student, loss_fn or _spans_loss(run, teacher, prepared[0], config))
    return run


def check_student(teacher: str, student: str, config: TeachConfig, tokenizer: str | None = None) -> None:
    """That a student can be had and taught, as far as it can be known before the teacher is asked, and paid.

    Raises:
        ConfigError, CheckpointError: it cannot.
    """
    if config.logits is not None and config.spans is not None:
        todo = "use --logits where the tokenizers are the same, --spans where they are not"
        raise ConfigError("distributions and spans are two ways to the same", where="distill", todo=todo)
    if (config.logits or config.spans) is not None and is_url(teacher):
        todo = "leave out --logits and --spans, or give the teacher's own weights"
        raise ConfigError("a server does not say its distributions", where=teacher, todo=todo)
    locate(_tokenizer_source(teacher, tokenizer) if is_size(student) else student)


def _cache_logits(teacher: str, ready: preparation.Prepared, out: Path, config: LogitsConfig, on_size: OnSize) -> Run:
    """The teacher's distributions on the rows of the student ``out``."""
    settings = config.model_dump(include=set(LogitsCacheConfig.model_fields))
    cache, folder = LogitsCacheConfig.model_validate(settings), logits_folder(out)
    return cache_logits(locate(teacher), ready.tokenizer, ready.rows, folder, cache, on_size=on_size)


def _spans_loss(run: Run, teacher: str, ready: preparation.Prepared, config: TeachConfig) -> LossFn | None:
    """The loss that matches how likely the teacher finds the pieces of what the student learns; None without them."""
    if config.spans is None:
        return None
    model, tokenizer = load(locate(teacher))
    targets = span_targets(model, tokenizer, ready.tokenizer, ready.examples, ready.rows, config)
    run.add_facts(spans=targets.counts)
    return span_loss(targets, config.spans.weight)


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
