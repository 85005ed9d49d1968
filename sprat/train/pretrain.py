"""Pre-train on plain text of the user's, a new model or one that goes on, as a run that proves itself.

The quickstart's ``pretrain`` trains on text and worked examples of its own pipeline; this is the same loop for any text
and any model. Text is read as ``data.ingest`` reads it, what is said twice is left out, and whole sources are held out
by the hash of their names (``data.text_split``), so that bits per byte before, during and after say whether anything
but the text itself was learned.

A new model is a size of the dial with a tokenizer that is trained on the text, or borrowed. One that exists keeps its
tokenizer. From a checkpoint of another run (``init_from``) its optimizer's state and its step go on as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sprat.config import ModelConfig
from sprat.config.pretrain import PretrainConfig, ScratchConfig
from sprat.config.recipe import ModelRecipe
from sprat.config.sizes import size, size_names
from sprat.data import loader
from sprat.data.dedup import exact_dedup
from sprat.data.document import Document, count_and_bytes
from sprat.data.folder import ExclusionTally, warn_of_excluded
from sprat.data.ingest import read_texts
from sprat.data.pack import PackedDataset, pack
from sprat.data.text_split import held_out_sources, split_documents
from sprat.errors import CheckpointError, ConfigError, DataError
from sprat.eval.bits_per_byte import bits_per_byte
from sprat.files.json import read_json
from sprat.formats.load import load_dense, load_tokenizer, locate, save
from sprat.model import Transformer, count_parameters
from sprat.tokens import Tokenizer
from sprat.train import checkpoint, loop
from sprat.trust import run_record
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.run import Run, open_run

_EVALUATIONS = 10  # of a run, where nobody says


@dataclass(frozen=True)
class _Prepared:
    """All that a run needs, checked."""

    model: Transformer
    tokenizer: Tokenizer
    config: PretrainConfig
    rows: PackedDataset
    held_out: PackedDataset
    held_out_bytes: int
    facts: dict[str, Any]


def pretrain(
    model: str | Path | None,
    data: str | Path,
    out: str | Path,
    config: PretrainConfig,
    *,
    tokenizer: str | Path | None = None,
    dequantize: bool = False,
) -> Run:
    """Pre-train on the text in ``data``; the finished run, also where it was finished before.

    Args:
        model: as ``sprat.load`` takes it; None with a ``ScratchConfig``, which says what is made, or with an
            ``init_from`` of a finished run, whose model it is.
        data: a folder or file of text; see ``data.ingest``.
        out: the run's folder; its ledger lies in the folder above it.
        tokenizer: of a new model, as ``sprat.load`` takes it; None trains one on the text.
        dequantize: train a quantised model as the dense one that its codes stand for.

    Raises:
        SpratError: a model, text or recipe that cannot be, before anything was touched; or see ``train.loop.train``.
    """
    out, data, prepared = Path(out), Path(data), list[_Prepared]()
    if not data.exists():
        raise DataError("no such file or folder of text", where=str(data), todo="give the path of one")
    if isinstance(config, ScratchConfig) == (model is not None):
        raise ConfigError("a size and a model are two beginnings", where="pretrain", todo="give one of them")
    if model is not None and Path(model).resolve() == out.resolve():
        raise ConfigError("a run cannot start from itself", where=str(out), todo="give another --out")
    inputs: dict[str, run_record.Input] = {"data": data}
    if model is not None:
        inputs["model"] = locate(model)
    if tokenizer is not None:
        inputs["tokenizer"] = locate(tokenizer)
    start = checkpoint.start_input(config.init_from, out, config.digest())
    if start and isinstance(config, ScratchConfig) and tokenizer is None:
        _check_same_text(config.init_from, data)

    def prepare(resuming: bool) -> None:
        prepared.append(_prepare(inputs, config, dequantize))
        if start and not resuming:
            digest = run_record.describe_input(start["init_from"], out.parent)["digest"]
            loop.check_start(
                checkpoint.find_start(config.init_from, out, digest), prepared[0].model, prepared[0].config
            )

    run = open_run(
        out,
        stage="pretrain",
        recipe=config,
        inputs={**inputs, **start},
        seed=config.seed,
        ledger=out.parent / LEDGER_NAME,
        prepare=prepare,
    )
    if not run.done:
        _train(run, prepared[0])
    return run


def find_beginning(model: str | Path | None, init_from: str) -> tuple[str, str | Path | None]:
    """(size of a new model or "", model that goes on or None): what ``model`` means, or the run of ``init_from``.

    Raises:
        ConfigError: neither is given.
    """
    if model is not None:
        is_size = str(model) in size_names() and not Path(model).exists()
        return (str(model), None) if is_size else ("", model)
    if not init_from:
        todo = f"name a model, or a size: {', '.join(size_names()[:5])}"
        raise ConfigError("no model to train", where="train", todo=todo)
    return "", checkpoint.parse_init_from(init_from)[0]


def model_config(recipe: ModelRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """The model that ``recipe`` names, with the vocabulary and special ids of ``tokenizer``.

    Raises:
        ConfigError: it cannot be, or has fewer ids than the tokenizer.
    """
    ids = tokenizer.special_ids
    special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    known = {key: number if number >= 0 else None for key, number in special.items()}
    config = size(recipe.size, **{"vocab_size": tokenizer.vocab_size, **known, **recipe.changes})
    if config.vocab_size < tokenizer.vocab_size:
        what = f"{config.vocab_size} ids are fewer than the tokenizer's {tokenizer.vocab_size}"
        raise ConfigError(what, where="changes.vocab_size", todo="leave it out")
    return config


def _check_same_text(init_from: str, data: Path) -> None:
    """Refuse to go on from a run whose tokenizer was trained on another text: the ids would mean something else."""
    folder, _ = checkpoint.parse_init_from(init_from)
    record = read_json(folder / "run.json") or read_json(folder / "open.json") or {}
    if record.get("inputs", {}).get("data", {}).get("digest") != run_record.describe_input(data, data)["digest"]:
        what = "that run's tokenizer was trained on another text"
        todo = "leave the size out: the finished run is the model then, with its tokenizer"
        raise CheckpointError(what, where=f"init_from {init_from}", todo=todo)


def _prepare(inputs: dict[str, Any], config: PretrainConfig, dequantize: bool) -> _Prepared:
    """The model, its rows and the held-out rows, checked."""
    tally, data = ExclusionTally(), inputs["data"]
    documents = list(read_texts(data, tally))
    warn_of_excluded(tally.excluded(), data)
    unique = list(exact_dedup(documents))
    split = split_documents(unique, held_out_sources(unique).__contains__).require_both_sides(data)
    if isinstance(config, ScratchConfig):
        if "tokenizer" in inputs:
            tokenizer = load_tokenizer(inputs["tokenizer"])
        else:
            tokenizer = Tokenizer.train((document.text for document in split.train), config.vocab_size)
        shape = model_config(ModelRecipe(size=config.size, changes=config.changes), tokenizer)
        model = Transformer.create(shape, config.seed)
    else:
        model, tokenizer = load_dense(inputs["model"], dequantize=dequantize)
    if config.seq_len > model.config.context:
        what = f"rows of {config.seq_len} tokens do not fit a context of {model.config.context}"
        raise ConfigError(what, where="seq_len", todo=f"set seq_len={model.config.context}")
    rows = _pack(tokenizer, split.train, config.seq_len, with_end=True)
    held_out = _pack(tokenizer, split.held_out, config.seq_len, with_end=False)
    (num_train, train_bytes), (num_held_out, held_out_bytes) = map(count_and_bytes, (split.train, split.held_out))
    counts = count_parameters(model.config)
    facts = {
        "documents": {"train": num_train, "held_out": num_held_out, "copies": len(documents) - len(unique)},
        "bytes": {"train": train_bytes, "held_out": held_out_bytes},
        "tokens": rows.num_targets,
        "text_left_out": [asdict(each) for each in tally.excluded()],
        "parameters": {"total": counts.total, "active": counts.active},
    }
    return _Prepared(model, tokenizer, _resolve(config, rows.num_rows), rows, held_out, held_out_bytes, facts)


def _pack(tokenizer: Tokenizer, documents: Sequence[Document], seq_len: int, *, with_end: bool) -> PackedDataset:
    """Rows of whole documents, each behind the token that begins a text, and before the one that ends it.

    What is measured has no end token, as in ``eval.text_file``: it has no bytes.
    """
    ids, special = tokenizer.encode_batch([document.text for document in documents]), tokenizer.special_ids
    begin, end = ([number] if number >= 0 else [] for number in (special.bos, special.eos if with_end else -1))
    return pack((([*begin, *sequence, *end], None) for sequence in ids), seq_len)


def _resolve(config: PretrainConfig, rows: int) -> PretrainConfig:
    """``config`` with the steps that its epochs over ``rows`` rows take, and when the held-out text is looked at."""
    batch_rows = config.batch_rows if config.micro_batches > 1 else min(config.batch_rows, rows)
    steps = config.steps or max(1, round(config.epochs * rows / batch_rows))
    eval_every = config.eval_every or max(1, steps // _EVALUATIONS)
    return config.replace(batch_rows=batch_rows, steps=steps, eval_every=eval_every)


def _train(run: Run, ready: _Prepared) -> None:
    """Train, measure, save, finish."""
    model, config = ready.model, ready.config

    def measure(model: Transformer) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(model, ready.held_out, ready.held_out_bytes)}

    run.add_facts(title="Pre-training", steps=config.steps, batch_rows=config.batch_rows, **ready.facts)
    if "validation_before" not in run.facts:
        run.add_facts(validation_before=measure(model))
    source = loader.MixedBatchSource([(ready.rows, 1.0)], rows=config.batch_rows, seed=config.seed)
    result = loop.train(model, source, config, run, evaluate=measure, eval_every=config.eval_every)
    run.add_facts(validation_after=measure(model), loss=result.loss, tokens_per_second=result.tokens_per_second)
    save(model, ready.tokenizer, run.artifact)
    checkpoint.copy_to_artefact(checkpoint.latest(run.checkpoints / checkpoint.STABLE), run.artifact)
    run.finish(flops=result.flops, tokens=result.tokens)
