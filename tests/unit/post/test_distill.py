"""A student comes to answer as its teacher does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sprat.config import Config, DistillConfig, OptimConfig, QuantConfig, TrainConfig
from sprat.config.model import ModelConfig
from sprat.engine import Engine
from sprat.errors import TrainingError
from sprat.model import Transformer, balance_loss, flops_per_token
from sprat.post.distill import distill, distillation_loss, sample_traces
from sprat.post.sft import build_source
from sprat.quant import dequantize_tensor, quantize_tensor
from sprat.tokens import Tokenizer
from sprat.train import checkpoint
from sprat.train.backward import backward
from sprat.train.losses import forward_kl
from sprat.train.parallel import ThreadDataParallel
from sprat.trust.run import Run

Open = Callable[[str, Config], Run]
FAST = OptimConfig(muon_lr=0.03, adam_lr=0.02, warmup_steps=5)
CONFIG = DistillConfig(mode="logits", steps=40, batch_rows=16, checkpoint_every=1000, optim=FAST)
ROWS = TrainConfig(batch_rows=16, seq_len=32)


@pytest.fixture
def shown() -> list[tuple[str, str, str]]:
    return [(f"{n % 100} train", str(n % 7) if n % 3 else "", str(n % 10)) for n in range(300)]


@pytest.fixture
def small(shape: ModelConfig) -> Transformer:
    return Transformer.create(shape.replace(hidden_size=16, moe_intermediate_size=16), 1)


def divergence(student: Transformer, teacher: Transformer, tokenizer: Tokenizer, shown: list[Any]) -> float:
    batch = build_source(tokenizer, shown, ROWS).batch(0)
    chosen = batch.targets_BT >= 0
    x, goal = (net.hidden(batch.tokens_BT, segments_BT=batch.segments_BT).x_BTD[chosen] for net in (student, teacher))
    with torch.no_grad():
        return float(forward_kl(x, student.head.weight, goal, teacher.head.weight, batch.targets_BT[chosen])[1])


def test_a_student_equal_to_its_teacher_is_left_alone(guesser: Transformer, tokenizer: Tokenizer, shown: Any) -> None:
    student = copy.deepcopy(guesser)
    batch = build_source(tokenizer, shown, ROWS).batch(0)
    loss = distillation_loss(guesser, CONFIG)(student, batch, CONFIG)
    assert loss.metrics["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mode", ["logits", "both"])
def test_a_student_approaches_its_teacher(
    mode: str, small: Transformer, guesser: Transformer, tokenizer: Tokenizer, shown: Any, open_stage: Open
) -> None:
    config = CONFIG.replace(mode=mode)
    before = divergence(small, guesser, tokenizer, shown)
    held = {name: value.clone() for name, value in guesser.state_dict().items()}
    distill(small, guesser, build_source(tokenizer, shown, ROWS), config, open_stage("distill", config))
    assert divergence(small, guesser, tokenizer, shown) < 0.25 * before
    assert all(torch.equal(value, guesser.state_dict()[name]) for name, value in held.items())
    assert all(weight.grad is None for weight in guesser.parameters())


@pytest.mark.parametrize(("mode", "weight"), [("logits", 1.0), ("both", 0.3), ("both", 0.8)])
def test_the_loss_is_hintons_mixture_and_so_is_its_gradient(
    mode: str, weight: float, small: Transformer, guesser: Transformer, tokenizer: Tokenizer, shown: Any
) -> None:
    config = CONFIG.replace(
        mode=mode, logits_weight=weight if mode == "both" else 0.5, temperature=2.0, balance_weight=0
    )
    batch = build_source(tokenizer, shown, ROWS).batch(0)
    loss = distillation_loss(guesser, config)(small, batch, config)
    loss.total.backward()
    found = {name: value.grad.clone() for name, value in small.named_parameters() if value.grad is not None}
    small.zero_grad()
    chosen = batch.targets_BT >= 0
    mine, goal = (net(batch.tokens_BT, segments_BT=batch.segments_BT)[chosen] for net in (small, guesser))
    cross = torch.nn.functional.cross_entropy(mine, batch.targets_BT[chosen])
    soft = ((goal.detach() / 2).log_softmax(-1), (mine / 2).log_softmax(-1))
    kl = (soft[0].exp() * (soft[0] - soft[1])).sum(-1).mean()
    expected = weight * 4 * kl + (1 - weight) * cross
    torch.testing.assert_close(loss.total.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert loss.metrics["loss"] == pytest.approx(cross.item(), rel=1e-4)
    expected.backward()
    for name, value in small.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(found[name], value.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_traces_alone_are_next_token_training(
    small: Transformer, guesser: Transformer, tokenizer: Tokenizer, shown: Any, open_stage: Open
) -> None:
    config = CONFIG.replace(mode="traces", steps=20)
    result = distill(small, guesser, build_source(tokenizer, shown, ROWS), config, open_stage("distill", config))
    assert result.steps == 20 and result.loss < 4


def test_the_teachers_forward_passes_are_part_of_the_cost(
    small: Transformer, guesser: Transformer, tokenizer: Tokenizer, shown: Any, open_stage: Open
) -> None:
    """Three forward passes of the student, and one of the teacher where its distributions are asked."""
    row = ROWS.seq_len
    for mode, teacher in (("traces", 0), ("logits", 1), ("both", 1)):
        config = CONFIG.replace(mode=mode, steps=2)
        result = distill(small, guesser, build_source(tokenizer, shown, ROWS), config, open_stage(mode, config))
        passes = 3 * flops_per_token(small.config, row) + teacher * flops_per_token(guesser.config, row)
        assert result.flops == pytest.approx(result.tokens * passes)


def test_only_right_and_finished_answers_become_traces(guesser: Transformer, tokenizer: Tokenizer, task: Any) -> None:
    engine = Engine(guesser, tokenizer, max_batch=128)
    how: dict[str, Any] = {"count": 60, "samples": 4, "max_tokens": 10, "temperature": 1.0, "thinking": None}
    found = sample_traces(engine, [task], [1.0], **how)
    assert found.num_samples == 240 and 0 < len(found.demonstrations) < 120
    assert {one.answer for one in found.demonstrations} == {"7"}
    assert len(set(found.demonstrations)) == len(found.demonstrations)
    assert found == sample_traces(engine, [task], [1.0], **how)


def answers(model: Transformer, said: Sequence[tuple[str, str]]) -> Any:
    """An engine that answers (text, finish reason), one token each after five of the prompt."""

    def answer(text: str, end: str) -> Any:
        usage = SimpleNamespace(cache_miss_tokens=5)
        return SimpleNamespace(text=text, reasoning="", closed=True, finish_reason=end, token_ids=[1], usage=usage)

    return SimpleNamespace(model=model, generate=lambda prompts, sampling: [answer(*one) for one in said])


def test_an_answer_that_was_cut_off_is_no_trace_even_if_it_is_right(model: Transformer, task: Any) -> None:
    found = sample_traces(answers(model, [("7", "stop"), ("7", "length")] * 2), [task], [1.0], count=4, max_tokens=4)
    assert (found.num_samples, len(found.demonstrations), found.tokens) == (4, 2, 4)
    assert found.flops == 4 * 6 * flops_per_token(model.config, 6)


def test_what_nobody_can_judge_is_taught_as_it_comes_but_not_half(model: Transformer, task: Any) -> None:
    engine = answers(model, [("7", "stop"), ("8", "stop"), ("8", "length")])
    found = [sample_traces(engine, [task], [1.0], count=3, max_tokens=4, verified=one) for one in (True, False)]
    assert [[shown.answer for shown in one.demonstrations] for one in found] == [["7"], ["7", "8"]]


def test_a_teacher_that_is_never_right_is_refused(guesser: Transformer, tokenizer: Tokenizer, task: Any) -> None:
    class Hopeless(type(task)):  # type: ignore[misc]
        def score(self, problem: Any, answer: str | None) -> float:
            return 0.0

    with pytest.raises(TrainingError, match="answered none"):
        sample_traces(Engine(guesser, tokenizer), [Hopeless()], [1.0], count=4, max_tokens=6)


def test_different_vocabularies_are_refused(
    guesser: Transformer, shape: ModelConfig, tokenizer: Tokenizer, shown: Any, open_stage: Open
) -> None:
    other = Transformer.create(shape.replace(vocab_size=shape.vocab_size + 1), 0)
    with pytest.raises(TrainingError, match="same tokenizer"):
        distill(other, guesser, build_source(tokenizer, shown, ROWS), CONFIG, open_stage("distill", CONFIG))


@pytest.mark.parametrize("mode", ["logits", "both"])
def test_every_depth_of_the_student_learns_from_what_the_teacher_says_there(
    mode: str, shape: ModelConfig, guesser: Transformer, tokenizer: Tokenizer, shown: Any
) -> None:
    """Hinton's loss by torch's own operators, at each depth over its own targets; and however the rows are cut."""
    config = CONFIG.replace(mode=mode, mtp_weight=0.7, balance_weight=0.0, temperature=2.0, micro_batches=4)
    student = Transformer.create(shape.replace(num_nextn_predict_layers=2), 1)
    batch = build_source(tokenizer, shown, ROWS).batch(0)
    tokens, segments, targets = batch.tokens_BT, batch.segments_BT, batch.targets_BT
    kl_weight = 1.0 if mode == "logits" else config.logits_weight
    with torch.no_grad():
        goal = guesser(tokens, segments_BT=segments)
    hidden = student.hidden(tokens, segments_BT=segments)
    terms = []
    for depth in range(3):
        if depth:
            hidden = student.mtp_hidden(hidden, tokens, segments_BT=segments, depth=depth)
        time = tokens.shape[1] - depth
        chosen = (targets[:, depth:] >= 0) & (segments[:, :time] == segments[:, depth:])
        logits = student.head(hidden.x_BTD)[chosen]
        pair = (logits / 2).log_softmax(-1), (goal[:, depth:][chosen] / 2).log_softmax(-1)
        kl = 4 * F.kl_div(*pair, log_target=True, reduction="batchmean")
        terms.append(kl_weight * kl + (1 - kl_weight) * F.cross_entropy(logits, targets[:, depth:][chosen]))
    parameters = list(student.parameters())
    wanted = torch.autograd.grad(terms[0] + 0.7 * (terms[1] + terms[2]) / 2, parameters, allow_unused=True)
    with ThreadDataParallel(1) as workers:
        metrics, loads = backward(student, batch, config, distillation_loss(guesser, config), parameters, workers)
    assert len(loads) == len(student.moe_layers()) and metrics["mtp_loss"] > 0
    for (name, parameter), theirs in zip(student.named_parameters(), wanted, strict=True):
        assert parameter.grad is not None and theirs is not None, name
        assert (parameter.grad - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7, name


def test_the_students_router_is_kept_even_as_in_pretraining(
    shape: ModelConfig, guesser: Transformer, tokenizer: Tokenizer, shown: Any
) -> None:
    student = Transformer.create(shape.replace(first_k_dense_replace=0), 1)
    batch = build_source(tokenizer, shown, ROWS).batch(0)
    loss_fn = distillation_loss(guesser, CONFIG)
    without, with_it = (
        loss_fn(student, batch, CONFIG.replace(balance_weight=weight)).total.item() for weight in (0.0, 2.0)
    )
    routing = student.hidden(batch.tokens_BT, segments_BT=batch.segments_BT).routing
    expected = sum(balance_loss(each, len(batch.tokens_BT)).item() for each in routing) / len(routing)
    assert with_it - without == pytest.approx(2 * expected, rel=1e-3)


@pytest.mark.parametrize(("fraction", "rounds"), [(0.0, []), (0.4, [3, 4]), (1.0, [0, 1, 2, 3, 4])])
def test_the_last_steps_learn_with_rounded_weights(
    fraction: float, rounds: list[int], small: Transformer, guesser: Transformer, tokenizer: Tokenizer, shown: Any,
    open_stage: Open, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = CONFIG.replace(steps=5, qat_fraction=fraction)
    form, seen, table = QuantConfig(bits=8), list[bool](), small.embed_tokens.weight
    source = build_source(tokenizer, shown, ROWS)
    hidden = Transformer.hidden

    def watched(self: Transformer, *rest: Any, **more: Any) -> Any:
        if self is small:
            codes = quantize_tensor(table.detach(), bits=8, group=0)  # of what is on codes already they are exact
            seen.append(torch.equal(dequantize_tensor(codes), table))
        return hidden(self, *rest, **more)

    monkeypatch.setattr(Transformer, "hidden", watched)
    distill(small, guesser, source, config, open_stage("rounded", config), form)
    assert [step for step, exact in enumerate(seen) if exact] == rounds
    assert not torch.equal(dequantize_tensor(quantize_tensor(table.detach(), bits=8, group=0)), table)


@pytest.mark.parametrize(("fraction", "kept"), [(0.0, 7), (0.1, 7), (0.5, 4), (1.0, None)])
def test_a_longer_run_goes_on_from_before_the_weights_are_rounded(
    fraction: float, kept: int | None, small: Transformer, guesser: Transformer, tokenizer: Tokenizer, shown: Any,
    open_stage: Open,
) -> None:  # fmt: skip
    optim = FAST.replace(warmup_steps=1, decay_fraction=0.25)
    config = CONFIG.replace(steps=8, qat_fraction=fraction, optim=optim.model_dump())
    run = open_stage("stable", config)
    distill(small, guesser, build_source(tokenizer, shown, ROWS), config, run)
    found = checkpoint.latest(run.checkpoints / checkpoint.STABLE)
    assert (None if found is None else found.step) == kept
