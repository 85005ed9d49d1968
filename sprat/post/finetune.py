"""Fine-tune any model on examples of the user's, as a run that can be resumed and proves itself: SFT and DPO.

The quickstart's ``sft`` trains a model of its own pipeline on worked examples; this is the same loop for a model and
data from anywhere: a Hugging Face folder, a GGUF file, a run. The model comes in float32, whatever its file holds. A
GGUF file's quantised weights are multiplied out, since that is all a GGUF of a small model ever is; other quantised
models only where that is asked for, because there a dense original exists that would be the better start.

A part of the examples, chosen by what they say and not by where they stand, is kept from training; its loss is
measured before the first step, in between, and at the end, so that a run shows whether it learned more than by heart.

A model forgets what it is not shown. Text of any kind can be *replayed* beside the examples (Rolnick et al. 2019, arXiv
1811.11682; Ibrahim et al. 2024, arXiv 2403.08763): some rows of every step are of that text.

The artefact is the whole model, adapters merged, so that every other verb takes the run's folder as it is. Adapters
stand beside it in ``adapter/``, in PEFT's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.data import ingest, loader, pack
from sprat.data.conversations import read_examples, split_by_hash
from sprat.data.example import Example, PreferencePair
from sprat.data.pack import PackedDataset
from sprat.errors import ConfigError, DataError
from sprat.eval.bits_per_byte import mean_loss
from sprat.formats import peft
from sprat.formats.load import load_dense, locate, save
from sprat.model import Transformer
from sprat.model.lora import add_lora, merge_lora
from sprat.post import dpo
from sprat.post.examples import EncodedExamples, encode_examples, text_ids
from sprat.tokens import Tokenizer
from sprat.train import loop, losses
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.run import Run, open_run

_MIN_STEPS_PER_EPOCH = 8
OnPrepared = Callable[[Tokenizer, EncodedExamples], None]
LoadModel = Callable[[], tuple[Transformer, Tokenizer]]


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


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    config: FinetuneConfig,
    *,
    column_map: Mapping[str, str] | None = None,
    replay: str | Path | None = None,
    dequantize: bool = False,
    on_prepared: OnPrepared = lambda tokenizer, encoded: None,
) -> Run:
    """SFT of ``model`` on ``data``, or with a ``DPOConfig`` DPO; the finished run, also where it was finished before.

    Args:
        model: as ``sprat.load`` takes it.
        data: a file or folder of conversations or texts (of preference pairs for DPO); see ``data.conversations``.
        out: the run's folder; its ledger lies in the folder above it.
        column_map: our names of columns to those of ``data``.
        replay: text, as ``data.ingest.read_texts`` takes it, that is mixed in (``examples.replay_share``); SFT only.
        dequantize: train a quantised model as the dense one that its codes stand for.
        on_prepared: is shown what will be trained, before it is.

    Raises:
        SpratError: a model, data or recipe that cannot be, before anything was touched; or see ``train.loop.train``.
    """
    out, prepared = Path(out), list[Prepared]()
    model_path, data = locate(model), Path(data)
    if not data.exists():
        raise DataError("no such file or folder of examples", where=str(data), todo="give the path of one")
    inputs = {"model": model_path, "data": data}
    if replay is not None:
        if isinstance(config, DPOConfig):
            raise ConfigError("DPO replays no text", where="replay", todo="leave it out")
        inputs["replay"] = Path(replay)

    def check(resuming: bool) -> None:
        load_model = partial(load_dense, model_path, dequantize=dequantize)
        ready = prepare(load_model, data, config, column_map or {}, on_prepared, replay=inputs.get("replay"))
        prepared.append(ready)

    run = open_run(
        out,
        stage="dpo" if isinstance(config, DPOConfig) else "sft",
        recipe=config,
        inputs=inputs,
        seed=config.seed,
        ledger=out.parent / LEDGER_NAME,
        prepare=check,
    )
    if not run.done:
        train(run, prepared[0], str(model))
    return run


def prepare(
    load_model: LoadModel,
    data: Path,
    config: FinetuneConfig,
    column_map: Mapping[str, str],
    on_prepared: OnPrepared,
    *,
    replay: Path | None = None,
) -> Prepared:
    """The model and its rows, checked.

    Args:
        load_model: the model to train, with its tokenizer.
        replay: text that is mixed in.

    Raises:
        SpratError: see ``finetune``.
    """
    examples = read_examples(data, column_map=column_map, on_bad=config.examples.on_bad)
    model, tokenizer = load_model()
    if config.seq_len > model.config.max_position_embeddings:
        what = f"rows of {config.seq_len} tokens do not fit a context of {model.config.max_position_embeddings}"
        raise ConfigError(what, where="seq_len", todo=f"set seq_len={model.config.max_position_embeddings}")
    if isinstance(config, DPOConfig) != isinstance(examples.examples[0], PreferencePair):
        todo = "preference pairs are for sprat dpo, conversations and texts for sprat sft"
        raise DataError(f"examples of the form {', '.join(examples.forms)}", where=str(data), todo=todo)
    train, validation = examples.examples, tuple[Example, ...]()
    if config.examples.validation and len(train) > 1:
        train, validation = split_by_hash(train, config.examples.validation, config.seed)
    shown = encode_examples(tokenizer, train, config)
    on_prepared(tokenizer, shown)
    facts: dict[str, Any] = {"examples": shown.counts, "skipped": [asdict(each) for each in examples.skipped]}
    held_out = None
    if validation:
        measured = encode_examples(tokenizer, validation, config)
        held_out, facts["validation"] = measured.rows, measured.counts
    if config.lora is not None:
        add_lora(model, config.lora, config.seed)
    parts = [(shown.rows, 1.0)]
    if replay is not None:
        replayed = _text_rows(tokenizer, replay, config.seq_len)
        facts["replay"] = {"rows": replayed.num_rows, "tokens": replayed.num_targets}
        parts = [(shown.rows, 1 - config.examples.replay_share), (replayed, config.examples.replay_share)]
    config, source = _resolve(config, parts)
    return Prepared(model, tokenizer, config, source, train, shown.rows, held_out, facts)


def _text_rows(tokenizer: Tokenizer, path: Path, seq_len: int) -> PackedDataset:
    """The text at ``path`` in rows; a document longer than a row goes on in others."""
    return pack.pack(((text_ids(tokenizer, each.text), None) for each in ingest.read_texts(path)), seq_len)


def _resolve(
    config: FinetuneConfig, parts: Sequence[tuple[PackedDataset, float]]
) -> tuple[FinetuneConfig, loader.MixedBatchSource]:
    """``config`` with the steps that its epochs over the first of ``parts`` take, and the batches of those steps.

    Batches are halved where its rows are few; they keep two rows, which two cores share.
    """
    rows = parts[0][0].num_rows
    batch_rows = config.batch_rows
    while batch_rows % 2 == 0 and batch_rows > 2 and rows < _MIN_STEPS_PER_EPOCH * batch_rows:
        batch_rows //= 2
    batch_rows = max(min(batch_rows, rows), len(parts))
    source = loader.MixedBatchSource(parts, rows=batch_rows, seed=config.seed)
    epoch = rows / source.part_rows[0]  # steps
    resolved = config.replace(
        batch_rows=batch_rows,
        steps=config.steps or max(1, round(config.epochs * epoch)),
        eval_every=config.eval_every or max(1, round(epoch)),
    )
    return resolved, source


def train(run: Run, ready: Prepared, base_model: str, loss_fn: losses.LossFn | None = None) -> None:
    """Train, measure, save, finish.

    Args:
        base_model: what PEFT shall take an adapter's base to be.
        loss_fn: what is minimized, where it is not what ``ready.config`` says.

    Raises:
        TrainingError, CheckpointError, MachineError: see ``train.loop.train``.
    """
    model, config, held_out = ready.model, ready.config, ready.held_out
    run.add_facts(steps=config.steps, batch_rows=config.batch_rows, **ready.facts)
    own_loss_fn, measure = _objective(model, config, ready.rows, held_out)
    if measure and "validation_before" not in run.facts:
        run.add_facts(validation_before=measure(model))
    every = config.eval_every if measure else 0
    result = loop.train(
        model, ready.source, config, run, loss_fn=loss_fn or own_loss_fn, evaluate=measure, eval_every=every
    )
    if measure:
        run.add_facts(validation_after=measure(model))
    run.add_facts(loss=result.loss, tokens_per_second=result.tokens_per_second)
    if config.lora is not None:
        peft.save_peft(model, run.artifact / "adapter", base_model=base_model)
        merge_lora(model)
    save(model, ready.tokenizer, run.artifact)
    run.finish(flops=result.flops, tokens=result.tokens)


def _objective(
    model: Transformer, config: FinetuneConfig, rows: PackedDataset, held_out: PackedDataset | None
) -> tuple[losses.LossFn, loop.Evaluate | None]:
    """What is minimized, and what is measured on the examples that are kept from training."""
    if not isinstance(config, DPOConfig):
        return losses.next_token_loss, None if held_out is None else lambda model: {"loss": mean_loss(model, held_out)}
    loss_fn = dpo.preference_loss(config, dpo.reference_logprobs(model, rows))
    if held_out is None:
        return loss_fn, None
    measured = dpo.preference_loss(config, dpo.reference_logprobs(model, held_out))
    return loss_fn, lambda model: dpo.mean_metrics(model, measured, held_out, config)
