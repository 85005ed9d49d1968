"""Fine-tune any model on examples of the user's, as a run that can be resumed and proves itself: SFT and DPO.

The quickstart's ``sft`` trains a model of its own pipeline on worked examples; this is the same loop for a model and
data from anywhere: a Hugging Face folder, a GGUF file, a run. The model comes in float32, whatever its file holds. A
GGUF file's quantised weights are multiplied out, since that is all a GGUF of a small model ever is; other quantised
models only where that is asked for, because there a dense original exists that would be the better start.

A part of the examples, chosen by what they say and not by where they stand, is kept from training; its loss is
measured before the first step, in between, and at the end, so that a run shows whether it learned more than by heart.

The artefact is the whole model, adapters merged, so that every other verb takes the run's folder as it is. Adapters
stand beside it in ``adapter/``, in PEFT's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.data import loader
from sprat.data.conversations import read_examples, split_by_hash
from sprat.data.example import Example, PreferencePair
from sprat.data.pack import PackedDataset
from sprat.errors import ConfigError, DataError
from sprat.eval.bits_per_byte import mean_loss
from sprat.formats import gguf, peft
from sprat.formats.load import load, locate, save
from sprat.model import Transformer
from sprat.model.lora import add_lora, merge_lora
from sprat.post import dpo
from sprat.post.examples import EncodedExamples, encode_examples
from sprat.quant import quantized_weights
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
    dequantize: bool = False,
    on_prepared: OnPrepared = lambda tokenizer, encoded: None,
) -> Run:
    """SFT of ``model`` on ``data``, or with a ``DPOConfig`` DPO; the finished run, also where it was finished before.

    Args:
        model: as ``sprat.load`` takes it.
        data: a file or folder of conversations or texts (of preference pairs for DPO); see ``data.conversations``.
        out: the run's folder; its ledger lies in the folder above it.
        column_map: our names of columns to those of ``data``.
        dequantize: train a quantised model as the dense one that its codes stand for.
        on_prepared: is shown what will be trained, before it is.

    Raises:
        SpratError: a model, data or recipe that cannot be, before anything was touched; or see ``train.loop.train``.
    """
    out, prepared = Path(out), list[Prepared]()
    model_path, data = locate(model), Path(data)
    if not data.exists():
        raise DataError("no such file or folder of examples", where=str(data), todo="give the path of one")

    def check(resuming: bool) -> None:
        load_model = partial(load_trainable, model_path, dequantize=dequantize)
        prepared.append(prepare(load_model, data, config, column_map or {}, on_prepared, where=str(model_path)))

    run = open_run(
        out,
        stage="dpo" if isinstance(config, DPOConfig) else "sft",
        recipe=config,
        inputs={"model": model_path, "data": data},
        seed=config.seed,
        ledger=out.parent / LEDGER_NAME,
        prepare=check,
    )
    if not run.done:
        train(run, prepared[0], str(model))
    return run


def load_trainable(path: Path, *, dequantize: bool = False) -> tuple[Transformer, Tokenizer]:
    """The model at ``path`` in float32; a GGUF file's weights are multiplied out. Raises as ``sprat.load``."""
    return load(path, dequantize=dequantize or gguf.is_gguf(path))


def prepare(
    load_model: LoadModel,
    data: Path,
    config: FinetuneConfig,
    column_map: Mapping[str, str],
    on_prepared: OnPrepared,
    *,
    where: str,
) -> Prepared:
    """The model and its rows, checked.

    Args:
        load_model: the model to train, with its tokenizer.
        where: what the user calls it, for errors.

    Raises:
        SpratError: see ``finetune``.
    """
    examples = read_examples(data, column_map=column_map, on_bad=config.examples.on_bad)
    model, tokenizer = load_model()
    if packed := quantized_weights(model):
        what = f"{len(packed)} matrices of the model are quantised, and codes cannot be trained"
        todo = "start from the model that was quantised, or train what the codes stand for: --dequantize"
        raise ConfigError(what, where=where, todo=todo)
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
    return Prepared(model, tokenizer, _resolve(config, shown.rows.num_rows), train, shown.rows, held_out, facts)


def _resolve(config: FinetuneConfig, rows: int) -> FinetuneConfig:
    """``config`` with the steps that its epochs over ``rows`` rows take; batches are halved where the rows are few.

    They keep two rows, which two cores share.
    """
    batch_rows = config.batch_rows
    while batch_rows % 2 == 0 and batch_rows > 2 and rows < _MIN_STEPS_PER_EPOCH * batch_rows:
        batch_rows //= 2
    batch_rows = min(batch_rows, rows)
    epoch = rows / batch_rows  # steps
    return config.replace(
        batch_rows=batch_rows,
        steps=config.steps or max(1, round(config.epochs * epoch)),
        eval_every=config.eval_every or max(1, round(epoch)),
    )


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
    source = loader.MixedBatchSource([(ready.rows, 1.0)], rows=config.batch_rows, seed=config.seed)
    every = config.eval_every if measure else 0
    result = loop.train(model, source, config, run, loss_fn=loss_fn or own_loss_fn, evaluate=measure, eval_every=every)
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
