"""The data stage: text and tasks become a tokenizer, packed rows and held-out sets.

Pre-training documents of tasks are worked examples with their chain of thought and the think tags, and
only those: answers without a chain poison a small model (docs/log.md).
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sprat.data import baselines, corpus
from sprat.data.document import Document, folder_name
from sprat.data.pack import pack
from sprat.errors import DataError
from sprat.road.places import Road, load_task, title, write_problems
from sprat.road.recipe import DataRecipe
from sprat.tasks import Task, held_out
from sprat.tokens import Tokenizer
from sprat.tokens.chat import demonstration

TOKENIZER_EXAMPLES = 4000  # worked examples that the tokenizer sees


def data(road: Road, text: Path | None = None) -> None:
    """Run the data stage of ``road``; ``text`` is the user's own folder instead of the default corpus.

    Raises:
        DataError: the folder is missing, empty or binary; a task is unknown or has no held-out question.
    """
    recipe = road.recipe.data
    if text is not None and not (text.is_file() or text.is_dir()):
        raise DataError("no such text", where=str(text), todo="give a folder of text, a .jsonl or a .parquet file")
    inputs: dict[str, Path | str] = {} if text is None else {"text": text}
    run = road.open("data", "data", recipe, inputs, road.recipe.seed)
    if run.done:
        return
    found = _corpus(road.folder / "corpus", recipe, text)
    road.enter("corpus")
    for left in found.left_out:
        print(f"sprat: data: not learned from: {left}", file=sys.stderr, flush=True)
    train, test = found.split().train, found.split().held_out
    if not train or not test:
        raise DataError("too little text to hold some out", where=str(text or "default corpus"), todo="give more files")
    examples = list(worked_examples(recipe, road.recipe.seed))
    shown = examples[:: max(1, len(examples) // TOKENIZER_EXAMPLES)]
    texts = itertools.chain((d.text for d in train), ("\n".join(example) for example in shown))
    tokenizer = Tokenizer.train(texts, recipe.vocab_size, numbers=recipe.numbers)
    tokenizer.save(run.artefact / "tokenizer")

    tokens = _pack_text(tokenizer, train, recipe.seq_len, run.artefact / "text")
    rows = pack((demonstration(tokenizer, *example) for example in examples), recipe.seq_len)
    rows.save(run.artefact / "tasks")
    scores = _hold_out(tokenizer, train, test, recipe.seq_len, run.artefact / "heldout")
    for config in (*recipe.tasks, *recipe.unseen):
        task = load_task(config)
        write_problems(
            run.artefact / "problems" / f"{title(config)}.jsonl",
            held_out(task, config.test_problems or recipe.test_problems),
        )
    run.note(
        title="Data",
        sources=found.sources,
        text_faults=found.faults,
        documents={"train": len(train), "held_out": len(test), "worked_examples": len(examples)},
        baselines=scores,
    )
    run.finish(tokens=tokens + int((rows.segments > 0).sum()))


def worked_examples(recipe: DataRecipe, seed: int) -> Iterator[tuple[str, str, str]]:
    """``recipe.demonstrations`` triples (question, chain of thought, answer), tasks in proportion to their weights."""
    tasks: list[Task] = [load_task(config) for config in recipe.tasks]
    rng = random.Random(f"mix:{seed}")
    drawn: list[list[tuple[str, str, str]]] = [[] for _ in tasks]
    counts = [0] * len(tasks)
    for which in rng.choices(range(len(tasks)), [config.weight for config in recipe.tasks], k=recipe.demonstrations):
        limit = recipe.tasks[which].distinct or recipe.demonstrations
        if len(drawn[which]) < limit:
            problem = tasks[which].problem("train", counts[which])
            drawn[which].append((problem.question, tasks[which].explain(problem), problem.answer))
        yield drawn[which][counts[which] % limit]
        counts[which] += 1


def _corpus(folder: Path, recipe: DataRecipe, text: Path | None) -> corpus.Corpus:
    """The user's own text, or the default corpus; kept in ``folder``."""
    if text is not None:
        return corpus.from_text(text, folder, budget_bytes=recipe.text_bytes)
    return corpus.default(folder, budget_bytes=recipe.text_bytes, offline=recipe.offline)


def _pack_text(tokenizer: Tokenizer, documents: Sequence[Document], seq_len: int, folder: Path) -> int:
    """Pack documents with their end-of-text tokens; return how many tokens there are."""
    ids = tokenizer.encode_batch([d.text for d in documents])
    framed = [[tokenizer.ids.bos, *each, tokenizer.ids.eos] for each in ids]
    rows = pack(((each, [1] * len(each)) for each in framed), seq_len)
    rows.save(folder)
    return sum(map(len, framed))


def _hold_out(
    tokenizer: Tokenizer, train: Sequence[Document], test: Sequence[Document], seq_len: int, folder: Path
) -> dict[str, dict[str, float]]:
    """Pack the held-out text by domain and measure gzip and the byte 3-gram model on the same split."""
    scores: dict[str, dict[str, float]] = {}
    sizes: dict[str, int] = {}
    seen = "\n\n".join(d.text for d in train).encode()
    for domain in sorted({d.domain for d in test}):
        mine = [d for d in test if d.domain == domain]
        _pack_text(tokenizer, mine, seq_len, folder / folder_name(domain))
        blob = "\n\n".join(d.text for d in mine).encode()
        sizes[domain] = sum(len(d.text.encode()) for d in mine)
        scores[domain] = {
            "gzip": baselines.gzip_bpb(seen, blob),
            "trigram": baselines.ngram_bpb(seen, blob),
            "bytes": sizes[domain],
        }
    (folder / "bytes.json").write_text(json.dumps(sizes, sort_keys=True), encoding="utf-8")
    return scores
