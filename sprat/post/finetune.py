"""Fine-tune any model on conversations of the user's, as a run that can be resumed and proves itself.

The quickstart's ``sft`` trains a model of its own pipeline on worked examples; this is the same loop for a model and
data from anywhere: a Hugging Face folder, a GGUF file, a run. The model comes in float32, whatever its file holds, and
what a file has quantised is refused, because a loop over codes would move nothing but the norms.

A part of the examples, chosen by what they say and not by where they stand, is kept from training; its mean loss is
measured before the first step, in between, and at the end, so that a run shows whether it learned more than by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sprat.config.finetune import FinetuneConfig
from sprat.data import loader, pack
from sprat.errors import ConfigError
from sprat.eval.loss import mean_loss
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.post.examples import EncodedExamples, encode_examples
from sprat.tokens import Message, Tokenizer
from sprat.train import loop
from sprat.trust.run import Run, open_run

Conversations = Sequence[Sequence[Message]]


@dataclass(frozen=True)
class Examples:
    """Conversations to train on, and those that are kept from it to measure with."""

    train: Conversations
    validation: Conversations


@dataclass(frozen=True)
class _Prepared:
    model: Transformer
    tokenizer: Tokenizer
    config: FinetuneConfig
    rows: pack.PackedDataset
    held_out: pack.PackedDataset | None
    facts: dict[str, object]


def finetune(
    model_path: str | Path,
    read_examples: Callable[[], Examples],
    out: str | Path,
    config: FinetuneConfig,
    *,
    inputs: dict[str, Path],
    dequantize: bool = False,
    on_prepared: Callable[[Tokenizer, EncodedExamples], None] = lambda tokenizer, encoded: None,
) -> Run:
    """Fine-tune and save; the finished run, also where it was finished before.

    Args:
        model_path: as ``sprat.load`` takes it.
        read_examples: called where there is work to do, before anything is touched.
        out: the run's folder; its ledger lies in the folder above it.
        inputs: what ``run.json`` names as inputs: the model's file or folder, the data's.
        dequantize: train a quantised model as the dense one that its codes stand for.
        on_prepared: is shown what will be trained, before it is.

    Raises:
        SpratError: a model, data or recipe that cannot be; nothing was touched.
    """
    out, prepared = Path(out), list[_Prepared]()

    def prepare(resuming: bool) -> None:
        ready = _prepare(model_path, read_examples(), config, dequantize=dequantize, on_prepared=on_prepared)
        prepared.append(ready)

    run = open_run(
        out,
        stage="sft",
        recipe=config,
        inputs=dict(inputs),
        seed=config.seed,
        ledger=out.parent / "ledger.jsonl",
        prepare=prepare,
    )
    if not run.done:
        _train(run, prepared[0])
    return run


def _prepare(
    model_path: str | Path,
    examples: Examples,
    config: FinetuneConfig,
    *,
    dequantize: bool,
    on_prepared: Callable[[Tokenizer, EncodedExamples], None],
) -> _Prepared:
    """The model and its rows, checked."""
    model, tokenizer = load(model_path, dequantize=dequantize)
    if config.seq_len > model.config.max_position_embeddings:
        what = f"rows of {config.seq_len} tokens do not fit a context of {model.config.max_position_embeddings}"
        raise ConfigError(what, where="seq_len", todo=f"set seq_len={model.config.max_position_embeddings}")
    shown = encode_examples(tokenizer, examples.train, config.examples, config.seq_len)
    on_prepared(tokenizer, shown)
    rows, held_out = shown.pack(config.seq_len), None
    facts: dict[str, object] = {"examples": shown.counts}
    if examples.validation:
        measured = encode_examples(tokenizer, examples.validation, config.examples, config.seq_len)
        held_out = measured.pack(config.seq_len)
        facts["validation"] = measured.counts
    batch_rows = min(config.batch_rows, rows.num_rows)
    epoch = rows.num_rows / batch_rows  # steps
    resolved = config.replace(
        batch_rows=batch_rows,
        steps=config.steps or max(1, round(config.epochs * epoch)),
        eval_every=config.eval_every or max(1, round(epoch)),
    )
    return _Prepared(model, tokenizer, resolved, rows, held_out, facts)


def _train(run: Run, ready: _Prepared) -> None:
    """Train, measure, save, finish."""
    model, config, held_out = ready.model, ready.config, ready.held_out
    run.add_facts(steps=config.steps, batch_rows=config.batch_rows, **ready.facts)
    source = loader.MixedBatchSource([(ready.rows, 1.0)], rows=config.batch_rows, seed=config.seed)

    def evaluate(model: Transformer) -> dict[str, float]:
        return {"loss": mean_loss(model, held_out)} if held_out is not None else {}

    if "validation_loss_before" not in run.facts and held_out is not None:
        run.add_facts(validation_loss_before=mean_loss(model, held_out))
    every = config.eval_every if held_out is not None else 0
    result = loop.train(model, source, config, run, evaluate=evaluate, eval_every=every)
    if held_out is not None:
        run.add_facts(validation_loss=mean_loss(model, held_out))
    run.add_facts(loss=result.loss, tokens_per_second=result.tokens_per_second)
    save(model, ready.tokenizer, run.artifact)
    run.finish(flops=result.flops, tokens=result.tokens)
