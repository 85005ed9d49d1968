"""Threads share work out, keep its order, and hide no error."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sprat.config import ModelConfig, OptimConfig, TrainConfig
from sprat.data.loader import MixedBatchSource
from sprat.model import Transformer
from sprat.train import TrainResult, optim, train
from sprat.train.backward import backward
from sprat.train.losses import next_token_loss
from sprat.train.parallel import Share, ThreadDataParallel
from sprat.trust import Run


def test_results_come_in_order_and_from_several_threads() -> None:
    together = threading.Barrier(2, timeout=60)

    def work(item: int) -> tuple[int, int]:
        together.wait()  # passes only if two threads are in here at once
        return item * 10, threading.get_ident()

    with ThreadDataParallel(2) as workers:
        found = workers.map(work, [1, 2])
    assert [value for value, _ in found] == [10, 20]
    assert len({thread for _, thread in found}) == 2


def test_every_member_uses_its_share_of_the_cores_and_the_caller_gets_its_own_back() -> None:
    torch.set_num_threads(4)
    with ThreadDataParallel(4) as workers:
        assert workers.size == 4
        assert workers.map(lambda _: torch.get_num_threads(), range(4)) == [1] * 4
    assert torch.get_num_threads() == 4


def test_an_error_of_any_member_is_raised_after_all_have_ended() -> None:
    ended: list[int] = []

    def work(item: int) -> None:
        if item == 1:
            raise ValueError("broken")
        ended.append(item)

    with ThreadDataParallel(3) as workers, pytest.raises(ValueError, match="broken"):
        workers.map(work, [0, 1, 2])
    assert sorted(ended) == [0, 2]


def test_one_thread_is_the_caller() -> None:
    with ThreadDataParallel(1) as workers:
        assert workers.size == 1
        assert workers.map(lambda item: threading.get_ident(), [1, 2]) == [threading.get_ident()] * 2


class Twin(ThreadDataParallel):
    """One of two processes: what each has summed goes over a wire, and both add it up in the order of ranks."""

    world = 2

    def __init__(self, rank: int, wire: dict[int, Share], both: threading.Barrier) -> None:
        super().__init__(1)
        self.rank, self._wire, self._both = rank, wire, both

    def sum(self, shares: Iterable[Share]) -> Share:
        mine = super().sum(shares)
        self._both.wait()
        self._wire[self.rank] = Share([None if g is None else g.clone() for g in mine.grads], mine.metrics, [])
        self._wire[self.rank].expert_loads = list(mine.expert_loads)
        self._both.wait()
        total = Share([None if g is None else g.clone() for g in self._wire[0].grads], dict(self._wire[0].metrics), [])
        total.expert_loads = list(self._wire[0].expert_loads)
        total += self._wire[1]
        return total


def test_two_processes_learn_what_one_learns(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: Callable[[str], Run]
) -> None:
    """Each draws its own rows and adds the other's gradient: both end with the same bits, and as one alone would."""
    optim = OptimConfig(name="adamw", warmup_steps=2)
    config = recipe.replace(steps=3, log_every=1, balance_weight=0.1, mtp_weight=0.5, optim=optim.model_dump())
    alone, twins = Transformer.create(shape, 0), [Transformer.create(shape, 0) for _ in range(2)]
    runs = [new_run(name) for name in ("alone", "first", "second")]
    expected = train(alone, source, config, runs[0])
    wire, both = dict[int, Share](), threading.Barrier(2, timeout=60)

    def work(rank: int) -> TrainResult:
        return train(twins[rank], source, config, runs[rank + 1], parallel=Twin(rank, wire, both), progress=False)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(2)))
    rows = [[json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert rows[1] == rows[2]
    for mine, theirs in zip(rows[0], rows[1], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert [(each.tokens, each.flops) for each in results] == [(expected.tokens, expected.flops)] * 2
    pairs = zip(alone.state_dict().items(), twins[0].state_dict().values(), twins[1].state_dict().values(), strict=True)
    for (name, one), first, second in pairs:
        assert torch.equal(first, second), name
        torch.testing.assert_close(one, first, rtol=1e-3, atol=2e-4, msg=name)


def test_rows_are_split_evenly_and_all_of_them() -> None:
    rows = torch.arange(7)
    for threads, sizes in ((1, [7]), (2, [3, 4]), (3, [2, 2, 3]), (4, [1, 2, 2, 2])):
        parts = ThreadDataParallel(threads).split(rows)
        assert [len(part) for part in parts] == sizes
        assert torch.equal(torch.cat(parts), rows)
    assert [len(part) for part in ThreadDataParallel(4).split(rows[:2])] == [1, 1]


def test_gradients_own_their_memory_so_that_clipping_scales_each_of_them_once(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig
) -> None:
    batch, model, twin = source.batch(0), Transformer.create(shape, 0), Transformer.create(shape, 0)
    optimizer = optim.build(model, recipe.optim)
    with ThreadDataParallel(1) as workers:
        backward(model, batch, recipe, next_token_loss, optimizer.parameters, workers)
    for parameter in optimizer.parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)
    next_token_loss(twin, batch, recipe).total.backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(mine.grad, 0.5 * theirs.grad, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_threads_than_one_are_refused_and_no_rows_are_no_parts(threads: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ThreadDataParallel(threads)
    assert [ThreadDataParallel(size).split(torch.zeros(0, 3)) for size in (1, 2)] == [[], []]
