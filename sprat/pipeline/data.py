"""The data stage: text and tasks become a tokenizer, packed rows and held-out sets.

Pre-training documents of tasks are worked examples, with think tags and their chain of thought, or without the chain.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sprat.config import TaskConfig
from sprat.config.recipe import DataRecipe, SplitRecipe
from sprat.data import baselines, corpus
from sprat.data.document import Document, safe_name
from sprat.data.pack import pack
from sprat.data.text_split import TextSplit
from sprat.errors import DataError
from sprat.eval.score import HeldOutScores
from sprat.files import atomic
from sprat.pipeline.pipeline import DataArtifact, Pipeline, load_task, write_problems
from sprat.tasks import HELD_OUT_SPLITS, Problem, Task, held_out_problems
from sprat.tasks import Split as Part
from sprat.tasks.base import SPLIT_SALT
from sprat.tokens import Tokenizer
from sprat.tokens.chat import encode_demonstration
from sprat.trust import run_record

TOKENIZER_EXAMPLES = 4000  # worked examples that the tokenizer sees


@dataclass(frozen=True)
class _DataInputs:
    """What the data stage works on, read and drawn before anything is touched."""

    source_corpus: corpus.Corpus
    text_split: TextSplit
    examples: list[tuple[str, str, str]]
    problems: list[tuple[TaskConfig, Part, list[Problem]]]
    tokenizer: Tokenizer


def data(pipeline: Pipeline, text: Path | None = None) -> None:
    """Run the data stage of ``pipeline``; ``text`` is the user's own folder instead of the default corpus.

    Raises:
        DataError: the folder is missing, empty or binary; a task is unknown or has no held-out question.
    """
    recipe = pipeline.recipe.data
    if text is not None and not (text.is_file() or text.is_dir()):
        raise DataError("no such text", where=str(text), todo="give a folder of text, a .jsonl or a .parquet file")
    inputs: dict[str, run_record.Input] = {"split": SplitRecipe(salt=SPLIT_SALT)}
    if text is not None:
        inputs["text"] = text
    opened = pipeline.open_run("data", "data", recipe, inputs, lambda resuming: _read_inputs(pipeline, text))
    if opened is None:
        return
    run, data_inputs = opened
    for excluded in data_inputs.source_corpus.excluded:
        print(f"sprat: data: not learned from: {excluded}", file=sys.stderr, flush=True)
    if text is not None:
        print(f"sprat: data: held out: {_held_out_summary(data_inputs.text_split)}", file=sys.stderr, flush=True)
    tokenizer, train = data_inputs.tokenizer, data_inputs.text_split.train
    tokenizer.save(run.artifact / "tokenizer")
    tokens = _pack_text(tokenizer, train, recipe.seq_len, run.artifact / "text")
    rows = pack((encode_demonstration(tokenizer, *example) for example in data_inputs.examples), recipe.seq_len)
    rows.save(run.artifact / "tasks")
    scores = _pack_held_out(tokenizer, train, data_inputs.text_split.held_out, recipe.seq_len, run.artifact / "heldout")
    for config, split, problems in data_inputs.problems:
        write_problems(DataArtifact(run.artifact).problems_file(config, split), problems)
    run.add_facts(
        title="Data",
        sources=data_inputs.source_corpus.sources,
        text_faults=data_inputs.source_corpus.faults,
        documents={
            "train": len(train),
            "held_out": len(data_inputs.text_split.held_out),
            "worked_examples": len(data_inputs.examples),
        },
        baselines=scores,
    )
    run.finish(tokens=tokens + int((rows.segments > 0).sum()))


def _held_out_summary(text_split: TextSplit) -> str:
    """How much is held out, of how much, and the names of the first sources."""
    held_out_bytes = sum(document.size for document in text_split.held_out)
    total_bytes = held_out_bytes + sum(document.size for document in text_split.train)
    names = sorted({document.source for document in text_split.held_out})
    ellipsis = ", …" if len(names) > 3 else ""
    return f"{held_out_bytes:,} of {total_bytes:,} bytes ({', '.join(names[:3])}{ellipsis})"


def _read_inputs(pipeline: Pipeline, text: Path | None) -> _DataInputs:
    """Read the text, draw from the tasks and train the tokenizer; the kept corpus is replaced only by a sound one."""
    recipe = pipeline.recipe.data
    problems = [
        (config, split, held_out_problems(load_task(config), recipe.count(config, split), split))
        for config in (*recipe.tasks, *recipe.unseen)
        for split in HELD_OUT_SPLITS
    ]
    examples = list(worked_examples(recipe, pipeline.recipe.seed))
    source_corpus = _load_corpus(pipeline.folder / "corpus", recipe, text)
    pipeline.add_file("corpus")
    text_split = source_corpus.split().require_both_sides(text or "default corpus")
    sampled = examples[:: max(1, len(examples) // TOKENIZER_EXAMPLES)]
    texts = itertools.chain((d.text for d in text_split.train), ("\n".join(example) for example in sampled))
    tokenizer = Tokenizer.train(texts, recipe.vocab_size, numbers=recipe.numbers)
    return _DataInputs(source_corpus, text_split, examples, problems, tokenizer)


def worked_examples(recipe: DataRecipe, seed: int) -> Iterator[tuple[str, str, str]]:
    """``recipe.demonstrations`` triples (question, chain of thought, answer), tasks in proportion to their weights.

    The chain of each is left out, as in most text that is found, with chance ``recipe.terse_fraction``.
    """
    tasks: list[Task] = [load_task(config) for config in recipe.tasks]
    rng, terse_rng = random.Random(f"mix:{seed}"), random.Random(f"terse:{seed}")
    examples_by_task: list[list[tuple[str, str, str]]] = [[] for _ in tasks]
    counts = [0] * len(tasks)
    for index in rng.choices(range(len(tasks)), [config.weight for config in recipe.tasks], k=recipe.demonstrations):
        task, examples, count = tasks[index], examples_by_task[index], counts[index]
        limit = recipe.tasks[index].distinct or recipe.demonstrations
        if len(examples) < limit:
            problem = task.problem("train", count)
            examples.append((problem.question, task.chain_of_thought(problem), problem.answer))
        question, chain, answer = examples[count % limit]
        yield question, "" if terse_rng.random() < recipe.terse_fraction else chain, answer
        counts[index] += 1


def _load_corpus(folder: Path, recipe: DataRecipe, text: Path | None) -> corpus.Corpus:
    """The user's own text, or the default corpus; kept in ``folder``."""
    if text is not None:
        return corpus.text_corpus(text, folder, budget_bytes=recipe.text_bytes)
    return corpus.default_corpus(folder, budget_bytes=recipe.text_bytes, offline=recipe.offline)


def _pack_text(tokenizer: Tokenizer, documents: Sequence[Document], seq_len: int, folder: Path) -> int:
    """Pack documents with their end-of-text tokens; return how many tokens there are."""
    ids = tokenizer.encode_batch([d.text for d in documents])
    framed = [[tokenizer.special_ids.bos, *sequence, tokenizer.special_ids.eos] for sequence in ids]
    rows = pack(((sequence, [1] * len(sequence)) for sequence in framed), seq_len)
    rows.save(folder)
    return sum(map(len, framed))


def _pack_held_out(
    tokenizer: Tokenizer, train: Sequence[Document], test: Sequence[Document], seq_len: int, folder: Path
) -> dict[str, dict[str, float]]:
    """Pack the held-out text by domain; how well the baselines, given all the training text, predict it."""
    domains = {name: [d for d in test if d.domain == name] for name in sorted({d.domain for d in test})}
    for name, documents in domains.items():
        _pack_text(tokenizer, documents, seq_len, folder / safe_name(name))
    sizes = {name: sum(len(d.text.encode()) for d in documents) for name, documents in domains.items()}
    atomic.write_text(folder / "bytes.json", json.dumps(sizes, sort_keys=True))
    texts = {name: _join_texts(documents) for name, documents in domains.items()}
    scores = baselines.baseline_scores(_join_texts(train), texts)
    return {name: HeldOutScores(sizes[name], scores[name]).to_dict() for name in domains}


def _join_texts(documents: Sequence[Document]) -> bytes:
    return "\n\n".join(d.text for d in documents).encode()
