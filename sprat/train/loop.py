# size: to step, to go on, to stop and to say how far it is are one loop
"""One step, one loop.

A step draws its batch by number, adds up the gradients of its micro-batches, clips, moves the weights, and
moves the router bias once. Everything that the next step depends on is in the weights, the optimizer's state,
the step's number and the few running sums of the log window; all of it is in the checkpoint. So a run that is
killed at any moment and started again ends with the same bits as one that was not, and its log has the same
rows. Nothing that depends on the clock is logged.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sprat.config import LoopConfig
from sprat.data.loader import BatchSource
from sprat.errors import CheckpointError, TrainingError
from sprat.model import Transformer, flops_per_token
from sprat.train import balance, checkpoint, machine, optim, schedule
from sprat.train.backward import backward
from sprat.train.losses import LossFn, next_token_loss
from sprat.train.parallel import Parallel, ThreadDataParallel
from sprat.train.selection import Selection
from sprat.trust import Run, run_record

Evaluate = Callable[[Transformer], Mapping[str, float]]
_OWN_NAMES = {"step", "tokens", "lr_factor", "grad_norm", "max_violation"}


@dataclass(frozen=True)
class TrainResult:
    """What a run of training did; what it started from (``init_from``) had its own account.

    Attributes:
        steps: the number of the last step.
        tokens: places of all batches of this run, those before an interruption and padding included.
        loss: mean of the last log window, in nats.
        flops: forward and backward, three times the forward's.
        tokens_per_second: of this process, since it started or went on; 0 where no step was left.
    """

    steps: int
    tokens: int
    loss: float
    flops: float
    tokens_per_second: float


@dataclass(frozen=True)
class FinalPhase:
    """The last steps of a run, in which gradients are computed at other weights than are moved.

    Attributes:
        first_step: its first step, from 0.
        weights: is entered while a gradient is computed.
    """

    first_step: int
    weights: Callable[[], AbstractContextManager[None]]


@dataclass
class _MetricsWindow:
    """Sums since the last logged row; goes into the checkpoint, so that rows come out the same after a resume."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    last: float = math.nan

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def state(self) -> dict[str, Any]:
        last = self.last if math.isfinite(self.last) else None  # as JSON can hold it
        return {"sums": self.sums, "window": self.steps, "last": last}

    def close(self) -> dict[str, float]:
        means = {name: total / self.steps for name, total in sorted(self.sums.items())}
        self.last = means.get("loss", math.nan)
        self.sums, self.steps = {}, 0
        return means


def train(  # size: half of it says what it is given and what goes wrong
    model: Transformer,
    source: BatchSource,
    config: LoopConfig,
    run: Run,
    *,
    loss_fn: LossFn = next_token_loss,
    final_phase: FinalPhase | None = None,
    parallel: Parallel | None = None,
    evaluate: Evaluate | None = None,
    eval_every: int = 0,
    selection: Selection | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train ``model`` to step ``config.steps``, from the run's last checkpoint, ``config.init_from`` or the start.

    Rows of ``metrics.jsonl`` (means over the window): loss, grad_norm, max_violation, what else ``loss_fn`` gives;
    at the row: tokens so far, lr_factor, and ``eval_NAME`` of ``evaluate``. The caller saves the artefact and finishes.

    Args:
        model: on the device to train on; ``run`` keeps its checkpoints and metrics.
        source: ``batch(step)`` gives ``config.batch_rows`` rows; each process draws those of its rank.
        loss_fn: what is minimized; on CPUs the threads of ``ThreadDataParallel`` call it at once, each with its rows.
        final_phase: the last steps of the run, whose gradients are computed at other weights.
        parallel: who does a step together; None for threads of this process (on a GPU: one).
        evaluate: is asked for scores after every ``eval_every`` steps (0: never), in eval mode and without gradients.
        selection: which of the evaluations is the best, whose checkpoint stays, and when to stop before the last step.
        progress: show a bar, if this is a terminal.

    Raises:
        ValueError: ``eval_every`` is negative.
        TrainingError: it is quantized, a metric has a name of the log's, or is not finite (the last checkpoint stands).
        CheckpointError: the checkpoint belongs to another recipe, data or model, or ``init_from`` names none.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step with a checkpoint.
        MachineError: the disk is full.
    """
    selection = selection or Selection()
    parallel, optimizer = _prepare(model, config, run, parallel, eval_every)
    identity, window = {"config": config.digest(), "data": source.digest}, _MetricsWindow()
    done, tokens, start = _resume(model, optimizer, config, run, identity, window)
    first_tokens, speed, began, stable = tokens, 0.0, time.monotonic(), _stable_steps(config, final_phase)
    selection.replay(run_record.read_metrics(run.folder))

    def keep(folder: Path) -> None:
        state = identity | window.state() | {"tokens": tokens, "start": start}
        checkpoint.save(folder, done, model, optimizer, state, protected_step=selection.protected_step)

    with parallel, progress_bar(run, config.steps, done, shown=progress) as advance, deferred_interrupt() as stopped:
        while done < config.steps and not selection.is_exhausted:
            batch = source.batch(done)
            with nullcontext() if final_phase is None or done < final_phase.first_step else final_phase.weights():
                own = batch if parallel.world == 1 else source.batch(done, parallel.rank, parallel.world)
                metrics, expert_loads = backward(model, own, config, loss_fn, optimizer.parameters, parallel, batch)
            _step(model, config, optimizer, metrics, expert_loads, done, run)
            done, tokens = done + 1, tokens + batch.tokens_BT.numel()
            is_due = eval_every and (done % eval_every == 0 or (selection.evaluate_last and done == config.steps))
            scores = evaluate_now(model, evaluate) if evaluate is not None and is_due else {}
            is_best, is_last = selection.add(done, scores), done == config.steps or selection.is_exhausted
            _log(run, config, done, tokens, window, metrics, scores, is_last)
            speed = (tokens - first_tokens) / (time.monotonic() - began)
            advance(done, f"loss {metrics['loss']:.3f}  {speed:,.0f} tok/s")
            if done == stable:
                keep(run.checkpoints / checkpoint.STABLE)
            if (stop := stopped()) or done % config.checkpoint_every == 0 or is_last or (is_best and selection.keep):
                keep(run.checkpoints)
            if stop:
                raise KeyboardInterrupt
        if stopped():  # it came while the last checkpoint was written
            raise KeyboardInterrupt
    return TrainResult(done, tokens - start[1], window.last, _flops(model, config, start, (done, tokens)), speed)


def _prepare(
    model: Transformer, config: LoopConfig, run: Run, parallel: Parallel | None, eval_every: int
) -> tuple[Parallel, optim.OptimizersContainer]:
    """Ready ``model`` and the process for training; who does a step together, and the optimizer."""
    if eval_every < 0:
        raise ValueError(f"eval_every is a number of steps, or 0 for never, not {eval_every}")
    optim.check_trainable(model, run)
    machine.tune_allocator()
    model.train()
    parallel = parallel or ThreadDataParallel(None if model.norm.weight.device.type == "cpu" else 1)
    return parallel, optim.build(model, config.optim, parallel)


def _log(
    run: Run,
    config: LoopConfig,
    done: int,
    tokens: int,
    window: _MetricsWindow,
    metrics: dict[str, float],
    scores: dict[str, float],
    is_last: bool,
) -> None:
    """Add ``metrics`` to the window; write its row where it ends, and one of ``scores`` where there are any."""
    window.add(metrics)
    if done % config.log_every == 0 or is_last:
        run.log(done, **window.close(), tokens=tokens, lr_factor=_lr_factor(config, done - 1), **scores)
    elif scores:
        run.log(done, **scores)


def evaluate_now(model: Transformer, evaluate: Evaluate) -> dict[str, float]:
    """What ``evaluate`` finds, by ``eval_NAME``; random state and the model are afterwards as before, in train mode."""
    device = model.norm.weight.device
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        scores = {f"eval_{name}": value for name, value in evaluate(model).items()}
    model.train()
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)
    return scores


def _stable_steps(config: LoopConfig, final_phase: FinalPhase | None) -> int:
    """After how many steps a longer run would still have gone the same way."""
    full_rate = schedule.stable_steps(config.optim, config.steps)
    return min(full_rate, config.steps if final_phase is None else final_phase.first_step)


def _flops(model: Transformer, config: LoopConfig, start: list[int], end: tuple[int, int]) -> float:
    """Forward and backward from ``start`` to ``end``, each (steps, tokens)."""
    steps, tokens = end[0] - start[0], end[1] - start[1]
    return 3 * tokens * flops_per_token(model.config, tokens // max(1, steps * config.batch_rows))


def _lr_factor(config: LoopConfig, step: int) -> float:
    """The factor of the learning rates at ``step``, from 0."""
    return schedule.lr_factor(config.optim, step, config.steps)


def _step(
    model: Transformer,
    config: LoopConfig,
    optimizer: optim.OptimizersContainer,
    metrics: dict[str, float],
    expert_loads: list[Tensor],
    done: int,
    run: Run,
) -> None:
    """Move the weights by their gradient and add to ``metrics``. Nothing is moved when a number is not finite."""
    if taken := metrics.keys() & _OWN_NAMES:
        raise TrainingError(f"the log has its own {', '.join(sorted(taken))}", where="loss_fn", todo="rename metrics")
    metrics["grad_norm"] = optimizer.clip_grad_norm(config.optim.grad_clip)
    if not all(map(math.isfinite, metrics.values())):
        optimizer.zero_grad()
        broken = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
        todo = "lower optim.muon_lr and optim.adam_lr"
        if (latest := checkpoint.latest(run.checkpoints)) is not None:
            todo += f" and go on from the last checkpoint: --init-from {run.folder}@{latest.step}"
        raise TrainingError(f"{broken} is not finite at step {done + 1}", where=f"step {done + 1}", todo=todo)
    optimizer.step(lr_factor=_lr_factor(config, done))
    optimizer.zero_grad()
    balance.update_bias(model, expert_loads, config.bias_update_speed)
    if expert_loads:
        metrics["max_violation"] = balance.max_violation(expert_loads)


def _resume(
    model: Transformer,
    optimizer: optim.OptimizersContainer,
    config: LoopConfig,
    run: Run,
    identity: dict[str, str],
    window: _MetricsWindow,
) -> tuple[int, int, list[int]]:
    """(finished steps, tokens so far, both at this run's start) after taking over the last whole checkpoint of the run
    or else that of ``init_from``, if there is one."""
    own = checkpoint.latest(run.checkpoints)
    start = own or load_start(config.init_from, config.steps, run)
    if start is None:
        run.truncate_metrics(0)
        return 0, 0, [0, 0]
    extra: dict[str, Any] = start.extra
    if own and {name: extra.get(name) for name in identity} != identity:
        what = "the checkpoint was made with another recipe or other data"
        raise CheckpointError(what, where=str(start.folder), todo="remove the checkpoints or go back to that recipe")
    _check_kind(start)
    checkpoint.restore(start, model, optimizer)
    run.truncate_metrics(start.step)
    window.sums, window.steps = dict(extra["sums"]), int(extra["window"])
    window.last = math.nan if extra["last"] is None else float(extra["last"])
    tokens = int(extra["tokens"])
    return start.step, tokens, list(extra["start"]) if own else [start.step, tokens]


def load_start(init_from: str, steps: int, run: Run) -> checkpoint.Checkpoint | None:
    """The checkpoint of ``init_from``, from which ``run`` starts; None where it is empty.

    Raises:
        CheckpointError: there is none, or it is not before step ``steps``.
    """
    if not init_from:
        return None
    start = checkpoint.find_start(init_from, run.folder, run.identity["inputs"].get("init_from", {}).get("digest", ""))
    check_start_step(start, steps)
    return start


def check_start(start: checkpoint.Checkpoint, model: Transformer, config: LoopConfig) -> None:
    """Refuse a checkpoint from which ``train`` could not start, before anything is set aside for it.

    Raises:
        CheckpointError: it is not before the last step, or of another model, optimizer or kind of run.
    """
    check_start_step(start, config.steps)
    _check_kind(start)
    checkpoint.check_compatible(start, model, optim.build(model, config.optim))


def check_start_step(start: checkpoint.Checkpoint, steps: int) -> None:
    """Refuse a checkpoint that is not before step ``steps``.

    Raises:
        CheckpointError: it is not.
    """
    if start.step >= steps:
        what = f"the checkpoint is of step {start.step}, the recipe ends at step {steps}"
        todo = "raise steps: they count from the very start"
        raise CheckpointError(what, where=f"init_from {start.folder}", todo=todo)


def _check_kind(start: checkpoint.Checkpoint) -> None:
    if "window" not in start.extra:
        todo = "start from a run of pre-training, SFT or distillation"
        raise CheckpointError("the checkpoint is of another kind of run", where=str(start.folder), todo=todo)


@contextmanager
def progress_bar(run: Run, steps: int, done: int = 0, *, shown: bool = True) -> Iterator[Callable[[int, str], None]]:
    """Yields ``advance(done, note)`` for the ``steps`` of ``run``; other processes see them by ``read_progress``.

    The bar, with rate and time left, is shown where there is a terminal.
    """
    run.start_progress(steps, done)
    console = Console(stderr=True)
    title, note_text = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (title, BarColumn(), MofNCompleteColumn(), note_text, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(run.stage, total=steps, completed=done, note="")
        yield lambda now, note: progress.update(task, completed=now, note=note)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a question: did Ctrl-C or SIGTERM come? It then ends the run after the step, with a checkpoint.

    A second Ctrl-C ends it at once. Outside the main thread, where Python has no signals, nothing is held.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
