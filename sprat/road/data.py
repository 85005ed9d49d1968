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
from sprat.data import baselines, corpus
from sprat.data.document import Document, safe_name
from sprat.data.pack import pack
from sprat.data.split import Split
from sprat.errors import DataError
from sprat.road.places import DataArtefact, Road, load_task, write_problems
from sprat.road.recipe import DataRecipe, SplitRecipe
from sprat.tasks import HELD_OUT, Problem, Task, held_out
from sprat.tasks import Split as Part
from sprat.tokens import Tokenizer
from sprat.tokens.chat import encode_demonstration
from sprat.trust import atomic, record
from sprat.trust.facts import HeldOutText

TOKENIZER_EXAMPLES = 4000  # worked examples that the tokenizer sees


@dataclass(frozen=True)
class _Material:
    """What the data stage works on, read and drawn before anything is touched."""

    found: corpus.Corpus
    parts: Split
    examples: list[tuple[str, str, str]]
    problems: list[tuple[TaskConfig, Part, list[Problem]]]
    tokenizer: Tokenizer


def data(road: Road, text: Path | None = None) -> None:
    """Run the data stage of ``road``; ``text`` is the user's own folder instead of the default corpus.

    Raises:
        DataError: the folder is missing, empty or binary; a task is unknown or has no held-out question.
    """
    recipe = road.recipe.data
    if text is not None and not (text.is_file() or text.is_dir()):
        raise DataError("no such text", where=str(text), todo="give a folder of text, a .jsonl or a .parquet file")
    inputs: dict[str, record.Input] = {"split": SplitRecipe()}
    if text is not None:
        inputs["text"] = text
    opened = road.open("data", "data", recipe, inputs, road.recipe.seed, lambda goes_on: _material(road, text))
    if opened is None:
        return
    run, made = opened
    for left in made.found.left_out:
        print(f"sprat: data: not learned from: {left}", file=sys.stderr, flush=True)
    if text is not None:
        print(f"sprat: data: held out: {_shown(made.parts)}", file=sys.stderr, flush=True)
    tokenizer, train = made.tokenizer, made.parts.train
    tokenizer.save(run.artefact / "tokenizer")
    tokens = _pack_text(tokenizer, train, recipe.seq_len, run.artefact / "text")
    rows = pack((encode_demonstration(tokenizer, *example) for example in made.examples), recipe.seq_len)
    rows.save(run.artefact / "tasks")
    scores = _hold_out(tokenizer, train, made.parts.held_out, recipe.seq_len, run.artefact / "heldout")
    for config, split, problems in made.problems:
        write_problems(DataArtefact(run.artefact).problems(config, split), problems)
    run.note(
        title="Data",
        sources=made.found.sources,
        text_faults=made.found.faults,
        documents={
            "train": len(train),
            "held_out": len(made.parts.held_out),
            "worked_examples": len(made.examples),
        },
        baselines=scores,
    )
    run.finish(tokens=tokens + int((rows.segments > 0).sum()))


def _shown(parts: Split) -> str:
    """How much is held out, of how much, and the names of the first sources."""
    held, whole = (sum(one.size for one in side) for side in (parts.held_out, (*parts.train, *parts.held_out)))
    names = sorted({one.source for one in parts.held_out})
    more = ", …" if len(names) > 3 else ""
    return f"{held:,} of {whole:,} bytes ({', '.join(names[:3])}{more})"


def _material(road: Road, text: Path | None) -> _Material:
    """Read the text, draw from the tasks and train the tokenizer; the kept corpus is replaced only by a sound one."""
    recipe = road.recipe.data
    problems = [
        (config, split, held_out(load_task(config), recipe.count(config, split), split))
        for config in (*recipe.tasks, *recipe.unseen)
        for split in HELD_OUT
    ]
    examples = list(worked_examples(recipe, road.recipe.seed))
    found = _corpus(road.folder / "corpus", recipe, text)
    road.enter("corpus")
    parts = found.split().both(text or "default corpus")
    shown = examples[:: max(1, len(examples) // TOKENIZER_EXAMPLES)]
    texts = itertools.chain((d.text for d in parts.train), ("\n".join(example) for example in shown))
    tokenizer = Tokenizer.train(texts, recipe.vocab_size, numbers=recipe.numbers)
    return _Material(found, parts, examples, problems, tokenizer)


def worked_examples(recipe: DataRecipe, seed: int) -> Iterator[tuple[str, str, str]]:
    """``recipe.demonstrations`` triples (question, chain of thought, answer), tasks in proportion to their weights.

    The chain of each is left out, as in most text that is found, with chance ``recipe.terse_fraction``.
    """
    tasks: list[Task] = [load_task(config) for config in recipe.tasks]
    rng, terse = random.Random(f"mix:{seed}"), random.Random(f"terse:{seed}")
    drawn: list[list[tuple[str, str, str]]] = [[] for _ in tasks]
    counts = [0] * len(tasks)
    for which in rng.choices(range(len(tasks)), [config.weight for config in recipe.tasks], k=recipe.demonstrations):
        limit = recipe.tasks[which].distinct or recipe.demonstrations
        if len(drawn[which]) < limit:
            problem = tasks[which].problem("train", counts[which])
            drawn[which].append((problem.question, tasks[which].explain(problem), problem.answer))
        question, chain, answer = drawn[which][counts[which] % limit]
        yield question, "" if terse.random() < recipe.terse_fraction else chain, answer
        counts[which] += 1


def _corpus(folder: Path, recipe: DataRecipe, text: Path | None) -> corpus.Corpus:
    """The user's own text, or the default corpus; kept in ``folder``."""
    if text is not None:
        return corpus.from_text(text, folder, budget_bytes=recipe.text_bytes)
    return corpus.default(folder, budget_bytes=recipe.text_bytes, offline=recipe.offline)


def _pack_text(tokenizer: Tokenizer, documents: Sequence[Document], seq_len: int, folder: Path) -> int:
    """Pack documents with their end-of-text tokens; return how many tokens there are."""
    ids = tokenizer.encode_batch([d.text for d in documents])
    framed = [[tokenizer.special_ids.bos, *each, tokenizer.special_ids.eos] for each in ids]
    rows = pack(((each, [1] * len(each)) for each in framed), seq_len)
    rows.save(folder)
    return sum(map(len, framed))


def _hold_out(
    tokenizer: Tokenizer, train: Sequence[Document], test: Sequence[Document], seq_len: int, folder: Path
) -> dict[str, dict[str, float]]:
    """Pack the held-out text by domain; how well the baselines, given all the training text, predict it."""
    domains = {name: [d for d in test if d.domain == name] for name in sorted({d.domain for d in test})}
    for name, documents in domains.items():
        _pack_text(tokenizer, documents, seq_len, folder / safe_name(name))
    sizes = {name: sum(len(d.text.encode()) for d in documents) for name, documents in domains.items()}
    atomic.write_text(folder / "bytes.json", json.dumps(sizes, sort_keys=True))
    scores = baselines.baselines(_joined(train), {name: _joined(documents) for name, documents in domains.items()})
    return {name: HeldOutText(sizes[name], scores[name]).to_dict() for name in domains}


def _joined(documents: Sequence[Document]) -> bytes:
    return "\n\n".join(d.text for d in documents).encode()
