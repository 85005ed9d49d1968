"""The loop learns, logs, stops and goes on."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sprat.config import LoRAConfig, OptimConfig, TrainConfig
from sprat.config.model import ModelConfig
from sprat.data.loader import Batch, MixedBatchSource
from sprat.errors import CheckpointError, TrainingError
from sprat.model import Transformer, flops_per_token
from sprat.model.lora import add_lora
from sprat.train import Loss, next_token_loss, train
from sprat.trust import Run

NewRun = Callable[[str], Run]


class _Stops:
    """A source that calls ``act`` when batch ``at`` is asked for."""

    def __init__(self, source: MixedBatchSource, at: int, act: Callable[[], Any]) -> None:
        self._source, self._at, self._act, self.digest = source, at, act, source.digest

    def batch(self, step: int) -> Batch:
        if step == self._at:
            self._act()
        return self._source.batch(step)


class _Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


def _kill() -> None:
    raise _Killed


def _rows(run: Run) -> str:
    return (run.folder / "metrics.jsonl").read_text()


def _same(one: Transformer, other: Transformer) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_loss_falls_and_every_window_is_logged(
    model: Transformer, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    run = new_run("a")
    result = train(model, source, recipe.replace(steps=30, log_every=10), run)
    rows = [json.loads(line) for line in _rows(run).splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["tokens"] == result.tokens == 30 * 4 * 32
    assert result.loss == rows[-1]["loss"] and result.steps == 30
    assert result.flops == 3 * result.tokens * flops_per_token(model.config, 32)  # the way back costs two ways forth
    assert {"grad_norm", "max_violation", "lr_factor", "mtp_loss"} <= rows[0].keys()


def test_a_row_says_the_mean_of_its_window(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    rows = {}
    for every in (1, 4):
        run = new_run(str(every))
        train(Transformer.create(shape, 0), source, recipe.replace(log_every=every), run)
        rows[every] = [json.loads(line) for line in _rows(run).splitlines()]
    for name in ("loss", "mtp_loss", "grad_norm", "max_violation"):
        each = [row[name] for row in rows[1]]
        assert [row[name] for row in rows[4]] == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 4])


def test_same_seed_twice_gives_the_same_bits(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    models, runs = [Transformer.create(shape, 0) for _ in range(2)], [new_run("a"), new_run("b")]
    for model, run in zip(models, runs, strict=True):
        train(model, source, recipe, run)
        assert (run.checkpoints / "step-00000008").is_dir()
    assert _same(*models)
    assert _rows(runs[0]) == _rows(runs[1])


@pytest.mark.parametrize("at", [1, 3, 4, 7])
def test_an_interrupted_run_ends_with_the_same_bits_and_rows(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun, at: int
) -> None:
    whole, broken = Transformer.create(shape, 0), Transformer.create(shape, 0)
    straight = new_run("whole")
    expected = train(whole, source, recipe, straight)
    with pytest.raises(_Killed):
        train(broken, _Stops(source, at, _kill), recipe, new_run("broken"))
    again, resumed = Transformer.create(shape, 5), new_run("broken")
    if at < recipe.checkpoint_every:
        again = Transformer.create(shape, 0)
    result = train(again, source, recipe, resumed)
    assert _same(whole, again)
    assert _rows(straight) == _rows(resumed)
    assert (result.loss, result.tokens, result.flops) == (expected.loss, expected.tokens, expected.flops)


@pytest.mark.parametrize("at", [4, 7])
def test_an_interrupted_run_of_adapters_ends_with_the_same_bits_over_the_same_base(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun, at: int
) -> None:
    """Checkpoints hold the adapters and not the base, neither of whose weights nor router biases moves."""

    def adapted(seed: int) -> Transformer:
        model = Transformer.create(shape, 0)
        add_lora(model, LoRAConfig(rank=4, dora=True), seed)
        return model

    whole, broken, again = adapted(0), adapted(0), adapted(1)
    straight, resumed = new_run("whole"), new_run("broken")
    train(whole, source, recipe, straight)
    with pytest.raises(_Killed):
        train(broken, _Stops(source, at, _kill), recipe, resumed)
    train(again, source, recipe, resumed)
    assert _same(whole, again) and _rows(straight) == _rows(resumed)
    fresh, own = adapted(0).state_dict(), whole.state_dict()
    assert {name for name in own if torch.equal(own[name], fresh[name])} == {n for n in own if "lora_" not in n}
    stored = load_file(straight.checkpoints / "step-00000008" / "model.safetensors")
    assert {n for n in own if "lora_" in n} == {n for n in stored if "bias" not in n}


def test_adapters_are_not_put_on_another_base(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    model, other = Transformer.create(shape, 0), Transformer.create(shape, 1)
    for each in (model, other):
        add_lora(each, LoRAConfig(rank=4))
    train(model, source, recipe, new_run("a"))
    before = copy.deepcopy(other)
    with pytest.raises(CheckpointError, match=r"other frozen weights.*load the base model"):
        train(other, source, recipe, new_run("a"))
    assert _same(before, other)
    with pytest.raises(CheckpointError, match="of another model"):
        train(Transformer.create(shape, 0), source, recipe, new_run("a"))


def test_ctrl_c_keeps_the_step_it_interrupts(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    model, run = Transformer.create(shape, 0), new_run("a")
    with pytest.raises(KeyboardInterrupt):
        train(model, _Stops(source, 4, lambda: signal.raise_signal(signal.SIGINT)), recipe, run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000003", "step-00000005"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    whole = Transformer.create(shape, 0)
    train(whole, source, recipe, new_run("whole"))
    train(model, source, recipe, new_run("a"))
    assert _same(whole, model)


def test_micro_batches_give_the_gradient_of_the_whole_batch(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    """Uneven numbers of targets included, and the router bias moves by the loads of all of them."""
    recipe = recipe.replace(steps=1, balance_weight=0.1, mtp_weight=0.5)
    one, two = Transformer.create(shape, 0), Transformer.create(shape, 0)
    train(one, source, recipe, new_run("one"))
    train(two, source, recipe.replace(micro_batches=2), new_run("two"))
    for (name, mine), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4, msg=name)
    for mine, theirs in zip(one.moe_layers(), two.moe_layers(), strict=True):
        assert torch.equal(mine.gate.e_score_correction_bias, theirs.gate.e_score_correction_bias)


def test_two_threads_repeat_themselves_and_agree_with_one(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    """The same bits for the same number of threads; another number only rounds differently."""
    recipe = recipe.replace(
        steps=2, balance_weight=0.0, mtp_weight=0.0, optim=OptimConfig(name="adamw", warmup_steps=2)
    )
    models = {name: Transformer.create(shape, 0) for name in ("one", "two", "again")}
    for name, model in models.items():
        torch.set_num_threads(1 if name == "one" else 2)
        train(model, source, recipe, new_run(name))
    assert torch.get_num_threads() == 2
    assert _same(models["two"], models["again"])
    for mine, theirs in zip(models["one"].parameters(), models["two"].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4)


def test_rows_that_cannot_be_cut_evenly_are_one_sentence(
    model: Transformer, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    with pytest.raises(TrainingError, match="4 rows cannot be cut into 3"):
        train(model, source, recipe.replace(batch_rows=6, micro_batches=3), new_run("a"))


def test_a_loss_that_is_not_finite_moves_nothing(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    calls = 0

    def poisoned(model: Transformer, batch: Batch, config: TrainConfig, whole: Batch | None = None) -> Loss:
        nonlocal calls
        calls += 1
        loss = next_token_loss(model, batch, config, whole)
        if calls <= 4:
            return loss
        return Loss(loss.total * float("nan"), {**loss.metrics, "loss": float("nan")}, loss.expert_loads)

    model, run = Transformer.create(shape, 0), new_run("a")
    with pytest.raises(TrainingError, match="loss, grad_norm is not finite at step 5") as caught:
        train(model, source, recipe, run, loss_fn=poisoned)
    assert "lower optim" in caught.value.todo
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000003"]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_checkpoint_of_other_data_is_refused(
    model: Transformer, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    train(model, source, recipe, new_run("a"))
    other = MixedBatchSource([(source.parts[0], 1.0)], 4, 1)
    with pytest.raises(CheckpointError, match="another recipe or other data"):
        train(model, other, recipe, new_run("a"))


def test_a_finished_training_is_not_done_twice(
    model: Transformer, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    first = train(model, source, recipe, new_run("a"))
    again = train(model, _Stops(source, 0, _kill), recipe, new_run("a"))
    assert (again.steps, again.tokens, again.loss, again.flops) == (first.steps, first.tokens, first.loss, first.flops)


def test_scores_stand_beside_the_loss_and_change_nothing(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    """Asked after every third of eight steps, by one who draws, computes and leaves the model in another mode."""
    plain, scored = Transformer.create(shape, 0), Transformer.create(shape, 0)
    asked = list[bool]()

    def evaluate(model: Transformer) -> dict[str, float]:
        asked.extend([model.training, torch.is_grad_enabled()])
        torch.rand(3)
        model.requires_grad_(False)
        return {"norm": float(model.norm.weight.norm()), "loss": 1.0, "step": 2.0, "tokens": 3.0, "lr_factor": 4.0}

    states, runs = list[torch.Tensor](), [new_run("plain"), new_run("scored")]
    for model, run, scores in ((plain, runs[0], None), (scored, runs[1], evaluate)):
        torch.manual_seed(0)
        train(model, source, recipe, run, evaluate=scores, eval_every=3)
        states.append(torch.get_rng_state())
    assert asked == [False] * 4 and scored.training
    assert all(parameter.requires_grad for parameter in scored.parameters())
    assert torch.equal(*states) and _same(plain, scored)
    rows = [json.loads(line) for line in _rows(runs[1]).splitlines()]
    assert [(row["step"], "eval_norm" in row, "loss" in row) for row in rows] == [
        (2, False, True), (3, True, False), (4, False, True), (6, True, True), (8, False, True)
    ]  # fmt: skip
    assert rows[1]["eval_norm"] != rows[3]["eval_norm"]
    assert [rows[3][f"eval_{name}"] for name in ("loss", "step", "tokens", "lr_factor")] == [1.0, 2.0, 3.0, 4.0]
    windows = [
        {name: value for name, value in row.items() if not name.startswith("eval_")} for row in rows if "loss" in row
    ]
    assert windows == [json.loads(line) for line in _rows(runs[0]).splitlines()]


def test_names_of_the_log_and_negative_intervals_are_refused(
    shape: ModelConfig, source: MixedBatchSource, recipe: TrainConfig, new_run: NewRun
) -> None:
    def named(model: Transformer, batch: Batch, config: TrainConfig, whole: Batch | None = None) -> Loss:
        loss = next_token_loss(model, batch, config, whole)
        return Loss(loss.total, {**loss.metrics, "tokens": 1.0, "step": 1.0}, loss.expert_loads)

    with pytest.raises(TrainingError, match="its own step, tokens"):
        train(Transformer.create(shape, 0), source, recipe, new_run("a"), loss_fn=named)
    with pytest.raises(ValueError, match="eval_every"):
        train(Transformer.create(shape, 0), source, recipe, new_run("b"), evaluate=lambda _: {}, eval_every=-2)


def test_nothing_is_printed_when_not_at_a_terminal(
    model: Transformer,
    source: MixedBatchSource,
    recipe: TrainConfig,
    new_run: NewRun,
    capfd: pytest.CaptureFixture[str],
) -> None:
    train(model, source, recipe, new_run("a"))
    assert capfd.readouterr() == ("", "")
