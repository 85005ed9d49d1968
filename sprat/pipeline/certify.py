"""Certify a squeezed model: ask it and its original the same, and write down what it lost.

In this order: tokens of texts, choices of experts, tasks, long continuations, speed. Both models are in memory at once.
The facts are ``sprat.eval.certificate``'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from sprat.config.recipe import PipelineRecipe, task_title
from sprat.data import ingest
from sprat.data.document import Document
from sprat.data.sources import chinese_manual, python_library
from sprat.data.sources.source import SourceRequest
from sprat.engine import Engine
from sprat.engine.backend import Backend
from sprat.engine.backends import select_backend
from sprat.errors import CheckpointError, DataError
from sprat.eval import task_files
from sprat.eval.certificate import Certificate, CertifiedModel, Machine, RouterFlips, Speed, TaskLoss, TextLoss
from sprat.eval.comparison import compare
from sprat.eval.continuation import compare_continuations
from sprat.eval.divergence import Window, compare_on_text, compare_routing, cut_windows, routers_agree
from sprat.eval.intervals import relative_loss
from sprat.eval.speed import ROUNDS, compare_speed
from sprat.files.json import read_json
from sprat.formats.load import find_model, fingerprint, load
from sprat.formats.memory import check_available_memory
from sprat.machine import processor_name
from sprat.model import Transformer
from sprat.pipeline.pipeline import load_task
from sprat.post.quantize import FACTS, MADE_FROM
from sprat.quant import size_bytes
from sprat.tasks import HeldOutTask, Problem, Task, held_out_problems, load_user_task
from sprat.tokens import Tokenizer
from sprat.tokens.tokenizer import first_difference

MAX_BATCH = 32  # requests at once
OPENING_TOKENS = 32  # of a long continuation
MIN_DOCUMENT_CHARS = 400  # characters of a document of the texts that are asked by default


@dataclass(frozen=True)
class CertifySettings:
    """What is asked, and how much of it.

    Args:
        tasks: JSONL files, ``file.py:Class``, or names of the recipe's tasks.
        text: a file or folder in place of the texts that are asked by default.
        max_loss: the bar for the upper end of each capability's relative loss; None sets none.
        count: problems of each task at most; None: all of a file, or the recipe's number.
        documents, window: windows of each text, and tokens of one.
        thinking: True forces a think, False forbids it, None lets the models decide.
        max_tokens: of an answer; None: 512, or the recipe's for its own tasks.
        prompts, continuation: openings that are continued, and tokens of each; 0 leaves them out.
        speed: whether to measure it.
        offline: fetch no package; the Chinese text is then left out.
    """

    tasks: tuple[str, ...] = ()
    text: Path | None = None
    max_loss: float | None = None
    count: int | None = None
    documents: int = 50
    window: int = 256
    thinking: bool | None = None
    max_tokens: int | None = None
    prompts: int = 32
    continuation: int = 256
    speed: bool = True
    offline: bool = False


Progress = Callable[[int, int], None]


def certify(
    model: str | Path,
    original: str | Path,
    settings: CertifySettings,
    recipe: PipelineRecipe,
    *,
    on_progress: Progress = lambda done, of: None,
) -> Certificate:
    """What ``model`` lost against ``original``; both are whatever ``sprat.load`` takes.

    Args:
        recipe: names of tasks are its own.
        on_progress: hears how many parts are done, of how many.

    Raises:
        CheckpointError: a model cannot be read, there is no memory for both, or their tokenizers differ.
        DataError, ConfigError: a task or a text cannot be used.
        MachineError: a task needs a package that is not installed.
    """
    asked = _tasks(settings, recipe)
    texts, missing = _texts(settings)
    described = _describe(model), _describe(original)
    pair = _load_pair(model, original)
    tokenizer, context = pair.tokenizer, min(pair.before.config.context, pair.after.config.context)
    window, openings = min(settings.window, context), settings.prompts and settings.continuation
    cut = {
        name: cut_windows(tokenizer, rows, documents=settings.documents, window=window) for name, rows in texts.items()
    }
    total = sum(len(windows) for windows, _ in cut.values()) + 2 * bool(asked) + bool(openings)
    advance = _Counter(total + (ROUNDS + 1) * settings.speed, on_progress)

    old, new = select_backend(pair.before), select_backend(pair.after)
    texts_lost, routing = list[TextLoss](), list[RouterFlips]()
    for name, (windows, unit) in cut.items():
        texts_lost.append(compare_on_text(old, new, name, windows, unit, on_progress=advance))
        if routers_agree(pair.before, pair.after):
            routing.append(compare_routing(pair.before, pair.after, name, windows))
    engines = _engine(pair.before, tokenizer, old), _engine(pair.after, tokenizer, new)
    tasks_lost = _compare_tasks(engines, asked, settings, recipe, advance)
    continuations, speeds = None, tuple[Speed, ...]()
    if openings:
        prompts = _openings([window for windows, _ in cut.values() for window in windows], settings.prompts)
        room = max(1, min(settings.continuation, context - OPENING_TOKENS))
        continuations = compare_continuations(engines[0], engines[1], prompts, max_tokens=room)
        advance()
    if settings.speed:
        speeds = compare_speed(old, new, vocab=tokenizer.vocab_size, context=context, on_progress=advance)
    return Certificate(
        *described,
        machine=Machine(processor_name(), torch.get_num_threads()),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        max_loss=settings.max_loss,
        tasks=tasks_lost,
        texts=tuple(texts_lost),
        routing=tuple(routing),
        continuations=continuations,
        speeds=speeds,
        missing=(*_origin(model, described[1]), *missing),
        settings={"window": window, "thinking": settings.thinking, "backend": type(new).__name__},
    )


@dataclass(frozen=True)
class _Pair:
    """Both models, and the original's tokenizer, whose ids mean the same to both."""

    before: Transformer
    after: Transformer
    tokenizer: Tokenizer


def _engine(model: Transformer, tokenizer: Tokenizer, backend: Backend) -> Engine:
    """An engine that answers without drafts, so that both models are asked in one way."""
    return Engine(model, tokenizer, backend=backend, max_batch=MAX_BATCH, speculate="off")


class _Counter:
    """Counts parts that are done and tells of each."""

    def __init__(self, total: int, on_progress: Progress) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def __call__(self) -> None:
        self.done += 1
        self.on_progress(self.done, self.total)


def _load_pair(model: str | Path, original: str | Path) -> _Pair:
    """Both models; see ``certify`` for the errors."""
    before, tokenizer = load(original)
    check_available_memory(size_bytes(before), f"{model}, beside {original}")
    after, other = load(model)
    if (token_id := first_difference(tokenizer, other)) is not None:
        todo = "give the model that it was made from"
        what = f"the two have different tokenizers: id {token_id} is not the same"
        raise CheckpointError(what, where=f"{model}, {original}", todo=todo)
    return _Pair(before.eval(), after.eval(), tokenizer)


def _describe(path: str | Path) -> CertifiedModel:
    """Size and digest of the files that ``load`` reads the model from."""
    return CertifiedModel(str(path), *fingerprint(path))


def _origin(model: str | Path, original: CertifiedModel) -> list[str]:
    """A sentence where the model says of itself that it was made from other files than those of ``original``."""
    facts = (read_json(find_model(model) / FACTS) or {}).get("facts")
    made_from = facts.get(MADE_FROM) if isinstance(facts, dict) else None
    if made_from in (None, original.digest):
        return []
    return [f"{model} was made from other files than those of {original.path}: what it lost since, these do not say"]


def _tasks(settings: CertifySettings, recipe: PipelineRecipe) -> list[tuple[Task, list[Problem], bool]]:
    """Each task, its problems, and whether it is one of the recipe's."""
    configs = {task_title(config): config for config in (*recipe.data.tasks, *recipe.data.unseen)}
    asked: list[tuple[Task, list[Problem], bool]] = []
    for name in dict.fromkeys(settings.tasks):
        if name.endswith(".jsonl") or ".py:" in name:
            user_task = load_user_task(name)
            asked.append((user_task, task_files.select_problems(user_task, "test", settings.count), False))
        elif name in configs:
            task = load_task(configs[name])
            problems = held_out_problems(task, settings.count or recipe.data.count(configs[name], "test"), "test")
            asked.append((HeldOutTask(task, tuple(problems)), problems, True))
        else:
            what = f"{name!r} is neither a file of yours nor a task of the recipe"
            raise DataError(what, where="--task", todo=f"the recipe has {', '.join(configs)}")
    if len({task.name for task, _, _ in asked}) < len(asked):
        raise DataError("two tasks of one name", where="--task", todo="name each file differently")
    return asked


def _compare_tasks(
    engines: Sequence[Engine],
    asked: Sequence[tuple[Task, list[Problem], bool]],
    settings: CertifySettings,
    recipe: PipelineRecipe,
    advance: Callable[[], None],
) -> tuple[TaskLoss, ...]:
    """Each task's loss, in the order of ``asked``."""
    if not asked:
        return ()
    scores = []
    for engine in engines:
        rows = {}
        for own, limit in ((False, 512), (True, recipe.eval.max_tokens)):
            group = [(task, problems) for task, problems, is_own in asked if is_own == own]
            limit = settings.max_tokens or limit
            for score in task_files.ask(engine, group, max_tokens=limit, thinking=settings.thinking) if group else ():
                rows[score.task] = score
        scores.append(rows)
        advance()
    losses = []
    for task, _, _ in asked:
        before, after = (rows[task.name] for rows in scores)
        right = [[problem.correct > 0 for problem in score.problems] for score in (before, after)]
        losses.append(TaskLoss(compare(before, after), relative_loss(*right)))
    return tuple(losses)


def _texts(settings: CertifySettings) -> tuple[dict[str, list[str]], list[str]]:
    """Texts by name, and why others are missing."""
    if settings.text is not None:
        texts = [document.text for document in ingest.read_texts(settings.text)]
        return {settings.text.name or str(settings.text): texts}, []
    texts_by_name = {"English (Python's language reference)": _choose(list(python_library.topics()))}
    chinese = chinese_manual.PACKAGE.read(SourceRequest(offline=settings.offline))
    if chinese.documents:
        texts_by_name["Chinese (manual pages)"] = _choose(chinese.documents)
        return texts_by_name, []
    return texts_by_name, [f"no Chinese text: {chinese.record(()).fault}"]


def _choose(documents: Sequence[Document]) -> list[str]:
    """The texts that are long enough, in an order that their names alone decide."""
    chosen = [document for document in documents if len(document.text) >= MIN_DOCUMENT_CHARS]
    return [each.text for each in sorted(chosen, key=lambda each: hashlib.sha256(each.id.encode()).digest())]


def _openings(windows: Sequence[Window], count: int) -> list[list[int]]:
    """The beginnings of ``count`` windows, spread over all of them: 32 tokens, of a short one the first half."""
    step = max(1, len(windows) // count)
    chosen = [list(window.ids) for window in windows[::step]][:count]
    return [ids[: min(OPENING_TOKENS, -(-len(ids) // 2))] for ids in chosen]
