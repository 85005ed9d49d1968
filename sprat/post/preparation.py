"""All that a fine-tuning needs, checked before anything is touched: model, rows, tasks, and where it starts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.data import ingest, loader, pack
from sprat.data.conversations import ExampleSet, read_examples, split_by_hash
from sprat.data.example import Example, PreferencePair, Text
from sprat.data.folder import ExclusionTally, warn_of_excluded
from sprat.data.pack import PackedDataset
from sprat.data.record import Where
from sprat.errors import ConfigError, DataError
from sprat.eval.task_files import select_problems
from sprat.model import Transformer
from sprat.model.layers import set_compute_dtype
from sprat.model.lora import add_lora
from sprat.post import evaluation
from sprat.post.examples import EncodedExamples, encode_example, encode_examples, has_rows
from sprat.post.overlap import remove_held_out, remove_overlap
from sprat.tasks import Problem, UserClassTask, UserTask
from sprat.tokens import Tokenizer
from sprat.train import checkpoint, loop, machine
from sprat.train.selection import Selection

log = logging.getLogger(__name__)
_MIN_STEPS_PER_EPOCH = 8
OnPrepared = Callable[[Tokenizer, EncodedExamples], None]
LoadModel = Callable[[], tuple[Transformer, Tokenizer]]
_Settings = TypeVar("_Settings", bound=FinetuneConfig)


@dataclass(frozen=True)
class Prepared:
    """All that a run needs, checked; ``rows`` are made of ``examples``."""

    model: Transformer
    tokenizer: Tokenizer
    config: FinetuneConfig
    source: loader.MixedBatchSource
    examples: tuple[Example, ...]
    rows: PackedDataset
    held_out: PackedDataset | None
    facts: dict[str, Any]
    tasks: Sequence[UserTask | UserClassTask]
    prompts: Sequence[evaluation.SamplePrompt]
    selection: Selection
    start: checkpoint.Checkpoint | None


def resolve_dtype(config: _Settings) -> _Settings:
    """``config`` with the dtype that ``auto`` stands for here, so that a run says what it was computed in.

    Raises:
        MachineError: its device is not there.
    """
    return config.replace(dtype=machine.resolve_dtype(config.dtype, config.device))


def prepare(
    load_model: LoadModel,
    data: Path,
    config: FinetuneConfig,
    column_map: Mapping[str, str],
    on_prepared: OnPrepared,
    *,
    replay: str | Path | None = None,
    tasks: Sequence[UserTask | UserClassTask] = (),
    test_questions: Sequence[Problem] = (),
    start: checkpoint.Checkpoint | None = None,
) -> Prepared:
    """The model and its rows, checked.

    Args:
        load_model: the model to train, with its tokenizer.
        replay: text that is mixed in.
        tasks: what is asked at each evaluation.
        test_questions: what must not be learned, beside that.
        start: the checkpoint of ``config.init_from``.

    Raises:
        SpratError: see ``finetune``.
    """
    device = _check_device(config)
    examples = read_examples(data, column_map=column_map, on_bad=config.examples.on_bad)
    warn_of_excluded(examples.skipped, data)
    model, tokenizer = load_model()
    _check_form(model, examples, config, data)
    train, overlap = _remove_asked(examples.examples, tasks, test_questions, config)
    train, validation = _split(tokenizer, train, config)
    shown = encode_examples(tokenizer, train, config)
    on_prepared(tokenizer, shown)
    facts: dict[str, Any] = {"examples": shown.counts, "skipped": [asdict(each) for each in examples.skipped]}
    facts |= overlap
    facts |= {"unread_columns": list(examples.ignored_columns)} if examples.ignored_columns else {}
    if tasks:
        facts["eval_tasks"] = {task.name: len(select_problems(task, count=config.eval.problems)) for task in tasks}
    held_out = None
    if validation:
        measured = encode_examples(tokenizer, validation, config)
        held_out, facts["validation"] = measured.rows, measured.counts
    if config.lora is not None:
        add_lora(model, config.lora, config.seed)
    _place(model, device, config)
    parts = [(shown.rows, 1.0)]
    if replay is not None:
        replayed, facts["replay"] = _text_rows(tokenizer, replay, tasks, test_questions, config)
        parts = [(shown.rows, 1 - config.examples.replay_share), (replayed, config.examples.replay_share)]
    resolved, source = _resolve(config, parts, start)
    if start is not None and config.init_state == "continue":
        loop.check_start(start, model, resolved)
    elif start is not None:
        checkpoint.restore_weights(start, model)
        resolved = resolved.replace(init_from="")
    selection = evaluation.make_selection(config, tasks, held_out is not None)
    prompts = evaluation.sample_prompts(tokenizer, validation, config.eval, model.config.context)
    return Prepared(
        model, tokenizer, resolved, source, train, shown.rows, held_out, facts, tasks, prompts, selection, start
    )


def _remove_asked(
    examples: Sequence[Example],
    tasks: Sequence[UserTask | UserClassTask],
    test_questions: Sequence[Problem],
    config: FinetuneConfig,
    noun: str = "examples",
) -> tuple[tuple[Example, ...], dict[str, Any]]:
    """``examples`` without those that ask what is asked to score the model, and what is to be said of them."""
    left, held_out_overlap = remove_held_out(examples, test_questions, noun)
    left, overlap = remove_overlap(left, tasks, config.examples.overlap, noun)
    facts = {"overlap": overlap, "held_out_overlap": held_out_overlap}
    return left, {name: value for name, value in facts.items() if value}


def _split(
    tokenizer: Tokenizer, examples: tuple[Example, ...], config: FinetuneConfig
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Training and validation, each with something in rows; no validation where not two examples have that.

    Where a side has nothing in rows, validation is chosen of those examples that have.
    """
    fraction = config.examples.validation
    if not fraction or len(examples) < 2:
        return examples, ()
    sides = split_by_hash(examples, fraction, config.seed)
    if all(any(has_rows(tokenizer, each, config) for each in side) for side in sides):
        return sides
    fitting = tuple(each for each in examples if has_rows(tokenizer, each, config))
    validation = split_by_hash(fitting, fraction, config.seed)[1] if len(fitting) > 1 else ()
    chosen = set(map(id, validation))
    return tuple(each for each in examples if id(each) not in chosen), validation


def _check_device(config: FinetuneConfig) -> torch.device:
    """The device to train on; what its type of number costs there is said."""
    device = machine.check_device(config.device)
    if config.dtype == "bfloat16" and device.type == "cpu" and not machine.has_bfloat16():
        log.warning("this processor has no bfloat16 products (AMX, AVX-512 BF16): bfloat16 is slower than float32 here")
    return device


def _place(model: Transformer, device: torch.device, config: FinetuneConfig) -> None:
    """``model`` on its device, computing as ``config`` says; elsewhere than on CPUs, autocast sees to the dtype."""
    model.to(device).activation_checkpointing = config.activation_checkpointing
    if config.dtype == "bfloat16" and device.type == "cpu":
        set_compute_dtype(model, torch.bfloat16)


def _check_form(model: Transformer, examples: ExampleSet, config: FinetuneConfig, data: Path) -> None:
    """Refuse rows that are longer than the context, and examples of the other verb's form."""
    if config.seq_len > model.config.max_position_embeddings:
        what = f"rows of {config.seq_len} tokens do not fit a context of {model.config.max_position_embeddings}"
        raise ConfigError(what, where="seq_len", todo=f"set seq_len={model.config.max_position_embeddings}")
    if isinstance(config, DPOConfig) != isinstance(examples.examples[0], PreferencePair):
        todo = "preference pairs are for sprat dpo, conversations and texts for sprat sft"
        raise DataError(f"examples of the form {', '.join(examples.forms)}", where=str(data), todo=todo)


def _text_rows(
    tokenizer: Tokenizer,
    path: str | Path,
    tasks: Sequence[UserTask | UserClassTask],
    test_questions: Sequence[Problem],
    config: FinetuneConfig,
) -> tuple[PackedDataset, dict[str, Any]]:
    """The text at ``path`` in rows, and what they are; a document longer than a row goes on in others."""
    tally = ExclusionTally()
    documents = [Text(each.text, Where(each.id, 1)) for each in ingest.read_texts(path, tally)]
    warn_of_excluded(tally.excluded(), path)
    texts, overlap = _remove_asked(documents, tasks, test_questions, config, "documents of replayed text")
    encoded = (encode_example(tokenizer, each, keep_reasoning=True) for each in texts)
    rows = pack.pack((sequence for sequences in encoded for sequence in sequences), config.seq_len)
    facts: dict[str, Any] = {"rows": rows.num_rows, "tokens": rows.num_targets}
    facts |= {"left_out": [asdict(each) for each in tally.excluded()]} if tally.excluded() else {}
    return rows, facts | overlap


def _resolve(
    config: FinetuneConfig, parts: Sequence[tuple[PackedDataset, float]], start: checkpoint.Checkpoint | None
) -> tuple[FinetuneConfig, loader.MixedBatchSource]:
    """``config`` with the steps that its epochs over the first of ``parts`` take, and the batches of those steps.

    Batches are halved where its rows are few; they keep two rows, which two cores share. Epochs that go on from
    ``start`` come after its steps.
    """
    first = start.step if start is not None and config.init_state == "continue" else 0
    rows = parts[0][0].num_rows
    batch_rows = config.batch_rows
    while batch_rows % 2 == 0 and batch_rows > 2 and rows < _MIN_STEPS_PER_EPOCH * batch_rows:
        batch_rows //= 2
    batch_rows = max(min(batch_rows, rows), len(parts))
    source = loader.MixedBatchSource(parts, rows=batch_rows, seed=config.seed)
    epoch = rows / source.part_rows[0]  # steps
    resolved = config.replace(
        batch_rows=batch_rows,
        steps=config.steps or first + max(1, round(config.epochs * epoch)),
        eval_every=config.eval_every or max(1, round(epoch)),
    )
    return resolved, source
