"""One step, one loop.

A step draws its batch by number, adds up the gradients of its micro-batches, clips, moves the weights, and
moves the router bias once. Everything that the next step depends on is in the weights, the optimiser's state,
the step's number and the few running sums of the log window; all of it is in the checkpoint. So a run that is
killed at any moment and started again ends with the same bits as one that was not, and its log has the same
rows. Nothing that depends on the clock is logged.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sprat.config import TrainConfig
from sprat.data.loader import Batch, Source
from sprat.errors import CheckpointError, TrainingError
from sprat.model import Transformer, flops_per_token
from sprat.train import balance, checkpoint, machine, optim, schedule, trainable
from sprat.train.backward import backward
from sprat.train.objective import LossFn, next_token
from sprat.train.progress import bar
from sprat.train.team import Team
from sprat.trust import Run


@dataclass(frozen=True)
class TrainResult:
    """What a run of training did.

    Attributes:
        steps: optimiser steps, those before an interruption included.
        tokens: places of all batches, padding included.
        loss: mean of the last log window, in nats.
        flops: forward and backward, three times the forward's.
        tokens_per_second: of this process, since it started or went on; 0 where no step was left.
    """

    steps: int
    tokens: int
    loss: float
    flops: float
    tokens_per_second: float


@dataclass
class _Window:
    """Sums since the last logged row; goes into the checkpoint, so that rows come out the same after a resume."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    last: float = math.nan

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def close(self) -> dict[str, float]:
        means = {name: total / self.steps for name, total in sorted(self.sums.items())}
        self.last = means.get("loss", math.nan)
        self.sums, self.steps = {}, 0
        return means


def train(
    model: Transformer,
    source: Source,
    config: TrainConfig,
    run: Run,
    *,
    loss_fn: LossFn = next_token,
    progress: bool = True,
) -> TrainResult:
    """Train ``model`` in place for ``config.steps`` steps, going on from the run's last checkpoint if there is one.

    Rows of ``metrics.jsonl`` (means over the window): loss, grad_norm, max_violation, what else ``loss_fn`` gives;
    and at the row: tokens so far and lr_factor. The caller saves the artefact and finishes the run.

    Args:
        model: on the device to train on.
        source: ``batch(step)`` gives ``config.batch_rows`` rows.
        run: its ``checkpoints`` folder and metrics are used.
        loss_fn: what is minimised; see ``LossFn``. On CPUs the members of a ``Team`` call it at the same time, each
            with rows of its own.
        progress: show a bar, if this is a terminal.

    Raises:
        TrainingError: the model is quantised; or loss or gradient is not finite (the weights were not moved, the last
            checkpoint stands).
        CheckpointError: the checkpoint belongs to another recipe, data or model.
        MachineError: the disk is full.
    """
    trainable.check(model, run)
    machine.tune()
    model.train()
    optimiser = optim.build(model, config.optim)
    identity = {"config": config.digest(), "data": source.digest}
    window = _Window()
    done, tokens = _resume(model, optimiser, run, identity, window)
    first_step, first_tokens, began = done, tokens, time.monotonic()

    def keep() -> None:
        state = {"tokens": tokens, "sums": window.sums, "window": window.steps, "last": _plain(window.last)}
        checkpoint.save(run.checkpoints, done, model, optimiser, {**identity, **state})

    with Team() as team, bar(run, config.steps, done, shown=progress) as advance, _held_interrupt() as interrupted:
        while done < config.steps:
            batch = source.batch(done)
            metrics = _step(model, batch, config, optimiser, loss_fn, done, team)
            done, tokens = done + 1, tokens + batch.tokens_BT.numel()
            window.add(metrics)
            if done % config.log_every == 0 or done == config.steps:
                factor = schedule.factor(config.optim, done - 1, config.steps)
                run.log(done, **window.close(), tokens=tokens, lr_factor=factor)
            rate = (tokens - first_tokens) / (time.monotonic() - began)
            advance(done, f"loss {metrics['loss']:.3f}  {rate:,.0f} tok/s")
            if interrupted() or done % config.checkpoint_every == 0 or done == config.steps:
                keep()
            if interrupted():
                raise KeyboardInterrupt
    seconds = time.monotonic() - began
    speed = (tokens - first_tokens) / seconds if done > first_step else 0.0
    flops = 3 * tokens * flops_per_token(model.config, config.seq_len)
    return TrainResult(done, tokens, window.last, flops, speed)


def _step(
    model: Transformer,
    batch: Batch,
    config: TrainConfig,
    optimiser: optim.Optimiser,
    loss_fn: LossFn,
    done: int,
    team: Team,
) -> dict[str, float]:
    """One optimiser step on ``batch``; returns its metrics. Nothing is moved when a number is not finite."""
    metrics, loads = backward(model, batch, config, loss_fn, optimiser.parameters, team)
    metrics["grad_norm"] = optimiser.clip(config.optim.grad_clip)
    if not all(map(math.isfinite, metrics.values())):
        optimiser.zero_grad()
        broken = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
        todo = "lower optim.muon_lr and optim.adam_lr; the last checkpoint still stands"
        raise TrainingError(f"{broken} is not finite at step {done + 1}", where=f"step {done + 1}", todo=todo)
    optimiser.step(schedule.factor(config.optim, done, config.steps), team)
    optimiser.zero_grad()
    balance.update(model, loads, config.bias_update_speed)
    if loads:
        metrics["max_violation"] = balance.max_violation(loads)
    return metrics


def _resume(
    model: Transformer, optimiser: optim.Optimiser, run: Run, identity: dict[str, str], window: _Window
) -> tuple[int, int]:
    """(finished steps, tokens so far) after taking over the last whole checkpoint, or (0, 0)."""
    found = checkpoint.latest(run.checkpoints)
    if found is None:
        run.rewind(0)
        return 0, 0
    extra: dict[str, Any] = found.extra
    if {name: extra.get(name) for name in identity} != identity:
        what = "the checkpoint was made with another recipe or other data"
        raise CheckpointError(what, where=str(found.folder), todo="remove the checkpoints or go back to that recipe")
    checkpoint.restore(found, model, optimiser)
    run.rewind(found.step)
    window.sums, window.steps = dict(extra["sums"]), int(extra["window"])
    window.last = math.nan if extra["last"] is None else float(extra["last"])
    return found.step, int(extra["tokens"])


def _plain(value: float) -> float | None:
    """A float as JSON can hold it."""
    return value if math.isfinite(value) else None


@contextmanager
def _held_interrupt() -> Iterator[Any]:
    """Yields a question: was Ctrl-C pressed? It then ends the run after the step, with a checkpoint.

    A second Ctrl-C ends it at once. Outside the main thread, where Python has no signals, nothing is held.
    """
    pressed: list[int] = []
    try:
        before = signal.getsignal(signal.SIGINT)

        def note(number: int, frame: Any) -> None:
            pressed.append(number)
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, note)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
