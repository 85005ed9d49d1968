"""Adapters compute what their papers say, change nothing while fresh, learn alone, and merge into plain matrices."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from sprat.config import LoRAConfig
from sprat.config.sizes import size
from sprat.engine import Engine, Sampling
from sprat.errors import CheckpointError, ConfigError
from sprat.kernels import ops
from sprat.model import MLP, Embedding, Experts, KVCache, Linear, Transformer
from sprat.model.layers import linears, set_compute_dtype
from sprat.model.lora import (
    LoRAExperts,
    LoRALinear,
    LoRAMLP,
    LowRank,
    adapters,
    add_lora,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    target_names,
)
from sprat.quant import dequantize_model, quantize_model
from sprat.tokens import Tokenizer
from tests.byte_fallback import byte_fallback
from tests.unit.model.conftest import tiny, tiny_dense

Array = npt.NDArray[np.float64]
KINDS: list[dict[str, Any]] = [{}, {"rslora": True}, {"dora": True}]


def tokens_of(time: int) -> Tensor:
    return torch.randint(37, (2, time), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def train_a_little(model: nn.Module) -> None:
    """Adapters as after some steps: nothing of them is zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_state_dict(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def wide(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def matrix(weight: Tensor, adapter: LowRank, config: LoRAConfig) -> Array:
    """W + s B A in float64, or DoRA's m (W + s B A) / |W + s B A|, by the papers' formulas."""
    scaling = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
    total: Array = wide(weight) + scaling * (wide(adapter.lora_B) @ wide(adapter.lora_A))
    if adapter.lora_magnitude_vector is None:
        return total
    lengths = np.sqrt((total**2).sum(-1))
    return (wide(adapter.lora_magnitude_vector) / lengths)[..., None] * total


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("targets", [("all-linear",), ("up_proj",)], ids=str)
def test_a_fresh_adapter_changes_no_bit(model: Transformer, kind: dict[str, Any], targets: tuple[str, ...]) -> None:
    """With few rows, and with enough for merged products and their kernels."""
    adapted = copy.deepcopy(model)
    add_lora(adapted, LoRAConfig(rank=5, targets=targets, **kind), 3)
    with torch.no_grad():
        for time in (3, 150):
            ours, theirs = adapted.hidden(tokens_of(time)), model.hidden(tokens_of(time))
            assert torch.equal(adapted.logits(ours.x_BTD), model.logits(theirs.x_BTD))
            if model.mtp:
                pairs = [
                    each.mtp_hidden(hidden, tokens_of(time)) for each, hidden in ((adapted, ours), (model, theirs))
                ]
                assert torch.equal(*(pair.x_BTD for pair in pairs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_linear_computes_the_papers_formula(kind: dict[str, Any], bias: bool) -> None:
    config, generator = LoRAConfig(rank=3, alpha=5, **kind), torch.Generator().manual_seed(0)
    base = Linear(7, 6, bias)
    for parameter in base.parameters():
        nn.init.normal_(parameter, generator=generator)
    linear = LoRALinear(base, LowRank(base.weight, config, generator))
    train_a_little(linear)
    x = torch.randn(2, 4, 7, generator=generator)
    expected = wide(x) @ matrix(base.weight, linear.adapter, config).T + (0 if base.bias is None else wide(base.bias))
    assert np.abs(wide(linear(x)) - expected).max() < 2e-6 * np.abs(expected).max()
    assert np.abs(wide(linear.dense_weight()) - matrix(base.weight, linear.adapter, config)).max() < 2e-6


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("projections", [("gate_proj", "up_proj", "down_proj"), ("down_proj",), ("up_proj",)], ids=str)
def test_each_expert_has_an_adapter_of_its_own(kind: dict[str, Any], projections: tuple[str, ...], rows: int) -> None:
    """One expert after the other in float64; one of them has no rows."""
    config, generator = LoRAConfig(rank=4, alpha=6, **kind), torch.Generator().manual_seed(0)
    base = Experts(3, 8, 12)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    stacks = {"gate_proj": base.w_gate_EFD, "up_proj": base.w_up_EFD, "down_proj": base.w_down_EDF}
    experts = LoRAExperts(base, {name: LowRank(stacks[name], config, generator) for name in projections})
    for name in projections:
        train_a_little(nn.ModuleDict({"x": LoRALinear(Linear(1, 1), getattr(experts, name))}))
    counts = [rows, 0, 2 * rows]
    x = torch.randn(sum(counts), 8, generator=generator)
    gate, up, down = (
        matrix(stack, getattr(experts, name), config) if name in projections else wide(stack)
        for name, stack in stacks.items()
    )
    expected = []
    for expert, part in enumerate(np.split(wide(x), np.cumsum(counts)[:-1])):
        hidden = part @ gate[expert].T
        expected.append((hidden / (1 + np.exp(-hidden)) * (part @ up[expert].T)) @ down[expert].T)
    whole = np.concatenate(expected)
    assert np.abs(wide(experts(x, torch.tensor(counts))) - whole).max() < 3e-6 * np.abs(whole).max()
    merged = experts.merge()
    assert np.abs(wide(merged(x, torch.tensor(counts))) - whole).max() < 3e-6 * np.abs(whole).max()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_merged_model_is_plain_and_computes_the_same(model: Transformer, kind: dict[str, Any]) -> None:
    adapted, config, before = copy.deepcopy(model), LoRAConfig(rank=4, **kind), model.state_dict()
    add_lora(adapted, config, 3)
    train_a_little(adapted)
    expected = {}
    for target, adapter in adapters(adapted).items():
        stem, _, last = target.rpartition(".")
        names = {"gate_proj": "w_gate_EFD", "up_proj": "w_up_EFD", "down_proj": "w_down_EDF"}
        name = f"{stem}.{names[last]}" if stem.endswith(".experts") else f"{target}.weight"
        expected[name] = matrix(before[name], adapter, config)
    assert len(expected) > 10
    with torch.no_grad():
        logits = adapted(tokens_of(50))
        cache = KVCache.create(model.config, 2, 9)
        steps = [adapted(tokens_of(9)[:, start : start + 3], cache=cache) for start in range(0, 9, 3)]
        merge_lora(adapted)
        assert (logits - model(tokens_of(50))).abs().max() > 0.1
        assert (logits - adapted(tokens_of(50))).abs().max() < 1e-4
        assert (torch.cat(steps, 1) - adapted(tokens_of(9))).abs().max() < 1e-4
    assert [type(module) for module in adapted.modules()] == [type(module) for module in model.modules()]
    assert all(parameter.requires_grad for parameter in adapted.parameters())
    after = adapted.state_dict()
    assert list(after) == list(before)
    for name, value in after.items():
        if name in expected:
            assert np.abs(wide(value) - expected[name]).max() < 2e-6 * np.abs(expected[name]).max()
        else:
            assert torch.equal(value, before[name])


def loss_of(model: Transformer) -> Tensor:
    tokens = tokens_of(150)
    hidden = model.hidden(tokens)
    return ops.linear_cross_entropy(hidden.x_BTD.flatten(0, 1), model.head.dense_weight(), tokens.flatten())


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_get_the_gradient_of_the_matrix_that_they_stand_for(model: Transformer, dora: bool) -> None:
    """By the chain rule from the gradient G of a plain model with the same matrices: s B^T G and s G A^T.

    In DoRA G times the factor, whose norm is a constant, and for the magnitude the sum of G times the direction.
    """
    config = LoRAConfig(rank=4, alpha=4, dora=dora)
    add_lora(model, config, 3)
    train_a_little(model)
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name) == (parameter.grad is not None) or "mtp" in name
    merged = copy.deepcopy(model)
    merge_lora(merged)
    merged.zero_grad()
    loss_of(merged).backward()
    checked = 0
    for target, adapter in adapters(model).items():
        if not target.startswith("layers.1") or "experts" in target:
            continue
        linear, base = merged.get_submodule(target), model.get_submodule(target)
        assert isinstance(linear, Linear) and isinstance(base, LoRALinear) and linear.weight.grad is not None
        grad, a, b = wide(linear.weight.grad), wide(adapter.lora_A), wide(adapter.lora_B)
        if adapter.lora_magnitude_vector is not None:
            total = wide(base.base.weight) + b @ a
            lengths = np.sqrt((total**2).sum(1))
            close(adapter.lora_magnitude_vector, (grad * total).sum(1) / lengths)
            grad = grad * (wide(adapter.lora_magnitude_vector) / lengths)[:, None]
        close(adapter.lora_A, b.T @ grad)
        close(adapter.lora_B, grad @ a.T)
        checked += 1
    assert checked >= 4


def close(parameter: nn.Parameter, expected: Array) -> None:
    assert parameter.grad is not None
    assert np.abs(wide(parameter.grad) - expected).max() <= 1e-4 * np.abs(expected).max() + 1e-9


def test_inputs_of_frozen_matrices_are_not_kept() -> None:
    """Of a linear's input only the thin product with A is left to be known: without A's gradient, nothing is."""
    base = Linear(64, 64)
    nn.init.normal_(base.weight)
    linear = LoRALinear(base.requires_grad_(False), LowRank(base.weight, LoRAConfig(rank=2), torch.Generator()))
    linear.adapter.lora_A.requires_grad_(False)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(torch.randn(33, 64))
    assert kept and (33, 64) not in kept


def test_targets_are_the_ends_of_names() -> None:
    config = tiny()
    names = target_names(Transformer(config))
    assert "layers.0.mlp.gate_proj" in names and "layers.1.mlp.experts.down_proj" in names and "mtp.0.eh_proj" in names
    assert not any("head" in name or "embed" in name or name.endswith("gate") for name in names)
    for targets, expected in {
        ("all-linear",): set(names),
        ("kv_b_proj",): {name for name in names if name.endswith(".kv_b_proj")},
        ("shared_experts.up_proj", "layers.0.self_attn.o_proj"): {
            "layers.0.self_attn.o_proj",
            "layers.1.mlp.shared_experts.up_proj",
            "mtp.0.block.mlp.shared_experts.up_proj",
        },
        ("experts.gate_proj",): {"layers.1.mlp.experts.gate_proj", "mtp.0.block.mlp.experts.gate_proj"},
    }.items():
        model = Transformer(config)
        add_lora(model, LoRAConfig(targets=targets))
        assert set(adapters(model)) == expected and target_names(model) == names
        assert isinstance(model.get_submodule("layers.0.mlp"), MLP)
        fused = isinstance(model.get_submodule("layers.0.mlp"), LoRAMLP)
        assert fused == bool(expected & {"layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"})


def test_what_cannot_be_adapted_is_one_sentence_and_nothing_is_changed() -> None:
    model = Transformer(tiny_dense())
    before = dict(model.named_modules())
    for target in ("query_key_value", "proj", "head", "embed_tokens", "gate", "norm"):
        with pytest.raises(ConfigError, match=rf"no linear '{target}'.*there are down_proj, gate_proj, k_proj, o_proj"):
            add_lora(model, LoRAConfig(targets=("q_proj", target)))
    assert dict(model.named_modules()) == before and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match=r"dense matrices.*Quant.*dequantize=True"):
        add_lora(quantize_model(model), LoRAConfig())
    add_lora(model, LoRAConfig(targets=("q_proj",)))
    with pytest.raises(ConfigError, match="has adapters already.*merge"):
        add_lora(model, LoRAConfig(targets=("k_proj",)))
    assert {type(linear) for _, linear in linears(model)} == {Linear, LoRALinear, Embedding}


@pytest.mark.parametrize(
    "settings",
    [{"rank": 0}, {"alpha": 0}, {"targets": ()}, {"targets": ("",)}, {"targets": ("q_proj", "q_proj")}]
    + [{"targets": ("all-linear", "q_proj")}, {"alpha": float("nan")}, {"r": 8}],
    ids=str,
)
def test_a_config_that_cannot_hold_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="LoRAConfig"):
        LoRAConfig(**settings)


def test_the_seed_decides_and_names_draw_apart() -> None:
    states = []
    for seed, targets in ((0, ("all-linear",)), (0, ("q_proj",)), (1, ("q_proj",))):
        model = Transformer(tiny_dense())
        add_lora(model, LoRAConfig(rank=8, targets=targets), seed)
        states.append(lora_state_dict(model))
    whole, part, other = states
    assert part and all(torch.equal(value, whole[name]) for name, value in part.items())
    assert not any(torch.equal(value, other[name]) for name, value in part.items() if name.endswith("lora_A"))
    firsts = [value for name, value in whole.items() if name.endswith("lora_A")]
    assert len({value.flatten()[0].item() for value in firsts}) == len(firsts)
    for value in firsts:  # uniform between the bounds that Kaiming's rule has for a = sqrt 5
        reference = nn.init.kaiming_uniform_(torch.empty(20_000, value.shape[-1]), a=math.sqrt(5))
        assert value.abs().max() <= reference.abs().max() * 1.001
        assert value.std().item() == pytest.approx(reference.std().item(), rel=0.2)
    assert not any(value.any() for name, value in whole.items() if name.endswith("lora_B"))


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_move_to_another_copy_of_the_base(model: Transformer, dora: bool) -> None:
    config, here, there = LoRAConfig(rank=4, dora=dora), copy.deepcopy(model), copy.deepcopy(model)
    add_lora(here, config, 0)
    add_lora(there, config, 1)
    train_a_little(here)
    state = {name: value.clone() for name, value in lora_state_dict(here).items()}
    name = next(iter(state))
    for fault, broken in {
        "missing": {key: value for key, value in state.items() if key != name},
        "have it not": state | {"layers.0.extra.lora_A": state[name]},
        "have it": state | {name: state[name][..., :-1]},
        "not finite": state | {name: state[name] * math.inf},
    }.items():
        before = [value.clone() for value in lora_state_dict(there).values()]
        with pytest.raises(CheckpointError, match=fault):
            load_lora_state_dict(there, broken)
        assert all(map(torch.equal, before, lora_state_dict(there).values()))
    load_lora_state_dict(there, state)
    with torch.no_grad():
        assert torch.equal(here(tokens_of(9)), there(tokens_of(9)))


def test_adapters_beside_narrow_matrices_are_wide() -> None:
    """As PEFT has them: a step of 1e-4 would be lost in bfloat16."""
    model = Transformer.create(tiny(rope_interleave=False), 0).bfloat16()
    plain = copy.deepcopy(model)
    add_lora(model, LoRAConfig(rank=4, dora=True))
    assert {value.dtype for value in lora_state_dict(model).values()} == {torch.float32}
    loss_of(model).backward()
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_a_base_can_be_quantized_under_its_adapters_and_is_then_not_merged() -> None:
    """The judge is the model whose quantized matrices were made dense before the adapters came."""
    model = Transformer.create(tiny(), 1)
    expected = dequantize_model(quantize_model(model))
    for each in (model, expected):
        add_lora(each, LoRAConfig(rank=4, dora=True))
        train_a_little(each)
    load_lora_state_dict(expected, lora_state_dict(model))
    with torch.no_grad():
        packed = quantize_model(model)
        for time in (3, 150):
            assert (packed(tokens_of(time)) - expected(tokens_of(time))).abs().max() < 1e-4
    with pytest.raises(ConfigError, match="merge first, then quantize"):
        merge_lora(packed)
    assert len(adapters(packed)) == len(adapters(model))


def test_the_engine_serves_an_adapted_model_as_its_merged_one_says() -> None:
    tokenizer = Tokenizer(byte_fallback(), config={"eos_token": "</s>"})
    model = Transformer.create(size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=100), 3)
    add_lora(model, LoRAConfig(rank=4))
    train_a_little(model)
    ids = [5, 6, 7]
    (output,) = Engine(model, tokenizer).generate([ids], Sampling(temperature=0, max_tokens=5))
    merge_lora(model)
    for token in output.token_ids:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].argmax())
        ids = [*ids, token]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_in_bfloat16_a_step_is_the_same_but_for_its_rounding(model: Transformer, kind: dict[str, Any]) -> None:
    """Loss and gradients are float32's but for eight bits of a factor; nothing of it is left behind."""
    add_lora(model, LoRAConfig(rank=4, alpha=4, **kind), 3)
    train_a_little(model)
    wanted = [p for p in model.parameters() if p.requires_grad and p.dim() > 0]
    before = model.state_dict()
    losses, gradients = [], []
    for dtype in (None, torch.bfloat16):
        set_compute_dtype(model, dtype)
        loss = loss_of(model)
        losses.append(float(loss.detach()))
        gradients.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)
    assert [g is None for g in gradients[0]] == [g is None for g in gradients[1]]
    exact, rounded = (torch.cat([g.flatten() for g in each if g is not None]) for each in gradients)
    assert rounded.dtype == torch.float32
    assert float((exact - rounded).norm()) < 0.1 * float(exact.norm())
    set_compute_dtype(model, None)
    assert float(loss_of(model)) == losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
