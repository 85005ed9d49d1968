"""Threads share work out, keep its order, and hide no error."""

from __future__ import annotations

import threading

import pytest
import torch

from sprat.config import ModelConfig, TrainConfig
from sprat.data.loader import MixedBatchSource
from sprat.model import Transformer
from sprat.train import optim
from sprat.train.backward import backward
from sprat.train.losses import next_token_loss
from sprat.train.parallel import ThreadDataParallel


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
