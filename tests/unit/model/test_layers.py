"""Another format takes the place of the matrices that it names, and the model computes what that format stands for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sprat
from sprat.config.sizes import size
from sprat.engine import Engine, Sampling
from sprat.engine.backends.torch import TorchBackend
from sprat.errors import CheckpointError, ConfigError
from sprat.model import Experts, KVCache, Linear, Transformer
from sprat.model.layers import LinearBase, linears, replace_linears
from sprat.quant import quantize_model
from sprat.quant.layers import QuantLinear
from sprat.tokens import Tokenizer
from tests.byte_fallback import byte_fallback


class LowRank(nn.Module):
    """A frozen linear and a product of two small matrices beside it (LoRA, arXiv 2106.09685, section 4.1)."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.up, self.down = (torch.full(shape, 0.05) for shape in ((base.out_features, 2), (2, base.in_features)))

    def dense_weight(self) -> Tensor:
        """The sum, [out, in]."""
        return self.base.weight + self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out]."""
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


@torch.no_grad()
def test_adapters_in_all_linears_compute_what_their_sums_do(model: Transformer) -> None:
    """The sums are made by hand, in the weights themselves; forward, MTP, and absorbed from a cache."""
    adapted, merged = copy.deepcopy(model), copy.deepcopy(model)
    replace_linears(adapted, lambda name, linear: LowRank(linear) if isinstance(linear, Linear) else None)
    count = 0
    for module in merged.modules():
        if isinstance(module, Linear):
            module.weight += 0.05 * 0.05 * 2
            count += 1
    assert sum(isinstance(module, LowRank) for module in adapted.modules()) == count > 10
    tokens = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
    assert (merged(tokens) - model(tokens)).abs().max() > 1e-2
    assert (adapted(tokens) - merged(tokens)).abs().max() < 1e-4
    cache = KVCache.create(model.config, 2, 9)
    steps = [adapted(tokens[:, start : start + 3], cache=cache) for start in range(0, 9, 3)]
    assert (torch.cat(steps, 1) - merged(tokens)).abs().max() < 1e-4
    if model.mtp:
        ours, theirs = (each.mtp_hidden(each.hidden(tokens), tokens).x_BTD for each in (adapted, merged))
        assert (ours - theirs).abs().max() < 1e-4


def test_every_matrix_is_offered_but_the_routers_and_what_is_left_stays(model: Transformer) -> None:
    offered: dict[str, LinearBase] = {}
    before = dict(model.named_modules())
    replace_linears(model, lambda name, linear: offered.setdefault(name, linear) and None)  # type: ignore[func-returns-value]
    wide = {name for name, weight in model.named_parameters() if weight.dim() > 1 and not name.endswith("gate.weight")}
    assert {f"{name}.{leaf}" for name, linear in offered.items() for leaf in linear.weight_names} == wide
    assert dict(model.named_modules()) == before
    only = "layers.1.self_attn.o_proj"
    replace_linears(model, lambda name, linear: nn.Identity() if name == only else None)
    assert {name for name, module in model.named_modules() if module is not before[name]} == {only}
    assert any(isinstance(linear, Experts) for linear in offered.values()) == model.config.is_mla


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes and a few pieces."""
    return Tokenizer(byte_fallback(), config={"eos_token": "</s>"})


def test_a_linear_cannot_be_replaced_in_itself() -> None:
    with pytest.raises(ConfigError, match="the module that holds it"):
        replace_linears(Linear(2, 3), lambda name, linear: Linear(2, 3))
    replace_linears(Linear(2, 3), lambda name, linear: None)


class Doubled(Linear):
    """A ``Linear`` by name and tensors, and another function."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice as much."""
        return 2 * super().forward(x)


@pytest.mark.parametrize("place", ["layers.1.self_attn.o_proj", "head", "layers.1.mlp"])
@pytest.mark.parametrize("kind", ["low rank", "subclass"])
def test_the_engine_lets_torch_run_adapters_and_says_what_the_model_does(
    tokenizer: Tokenizer, place: str, kind: str
) -> None:
    """The judge is the adapted model itself, asked for one token after the other."""
    config = size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=100, tie_word_embeddings=False)
    adapted = Transformer.create(config, 3)

    def make(name: str, linear: LinearBase) -> nn.Module | None:
        if not isinstance(linear, Linear) or not name.startswith(place):
            return None
        if kind == "low rank":
            return LowRank(linear)
        doubled = Doubled(linear.in_features, linear.out_features)
        doubled.weight = linear.weight
        return doubled

    replace_linears(adapted, make)
    engine, ids = Engine(adapted, tokenizer), [5, 6, 7]
    assert isinstance(engine.backend, TorchBackend)
    (output,) = engine.generate([ids], Sampling(temperature=0, max_tokens=6))
    for token in output.token_ids:
        with torch.no_grad():
            assert token == int(adapted(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].argmax())
        ids = [*ids, token]


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_what_could_not_be_loaded_is_not_saved(tokenizer: Tokenizer, bits: int, tied: bool, tmp_path: Path) -> None:
    config = size("pico", vocab_size=tokenizer.vocab_size, tie_word_embeddings=tied)
    plain = Transformer.create(config, 3)
    if bits == 4:
        plain = quantize_model(plain)
    names = [name for name, linear in linears(plain) if isinstance(linear, Linear | QuantLinear)]
    assert "head" in names and len(names) > 10
    makers = (
        LowRank,
        lambda linear: Linear(linear.in_features + 32, linear.out_features),
        lambda linear: nn.Identity(),
    )
    for place in ("head", names[0], names[-1]) if not tied else names[:2]:
        for made in makers:
            adapted = copy.deepcopy(plain)
            replace_linears(adapted, lambda name, linear: made(linear) if name == place else None)  # noqa: B023
            with pytest.raises(CheckpointError, match=rf"{place}.*could not be loaded.*dense_weight"):
                sprat.save(adapted, tokenizer, tmp_path / "refused")
            assert not (tmp_path / "refused").exists()
    adapted = copy.deepcopy(plain)
    replace_linears(adapted, lambda name, linear: LowRank(linear) if name == names[0] else None)  # type: ignore[arg-type]

    def merge(name: str, adapter: nn.Module) -> None:
        merged = Linear(adapter.in_features, adapter.out_features)  # type: ignore[arg-type]
        merged.weight = nn.Parameter(adapter.dense_weight().detach())  # type: ignore[operator]
        adapted.set_submodule(name, merged)

    merge(names[0], adapted.get_submodule(names[0]))
    sprat.save(adapted, tokenizer, tmp_path / "merged")
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(sprat.load(tmp_path / "merged")[0](tokens), adapted(tokens))


def test_a_model_whose_weights_the_engine_took_is_not_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = quantize_model(Transformer.create(size("pico", vocab_size=tokenizer.vocab_size), 3))
    if isinstance(Engine(model, tokenizer, consume=True).backend, TorchBackend):
        pytest.skip("torch takes nothing")
    with pytest.raises(CheckpointError, match="could not be loaded"):
        sprat.save(model, tokenizer, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
