"""Experts whose rows are no whole 16 bytes compute, learn and decode what they do in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sprat import Engine, Sampling, kernels
from sprat.config.model import ModelConfig
from sprat.engine.backends.torch import TorchBackend
from sprat.formats.hf import save_folder
from sprat.model import Transformer
from sprat.tokens import Tokenizer

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
WIDTHS = [(23, 7), (22, 6), (24, 5), (21, 12), (20, 10), (9, 3)]  # hidden, expert
widths = pytest.mark.parametrize(("hidden", "expert"), WIDTHS)


def config(hidden: int, expert: int, **changes: Any) -> ModelConfig:
    """A tiny DeepSeek-V3."""
    table: dict[str, Any] = {
        "vocab_size": 37, "hidden_size": hidden, "intermediate_size": 17, "moe_intermediate_size": expert,
        "num_hidden_layers": 2, "num_attention_heads": 3, "q_lora_rank": 7, "kv_lora_rank": 9, "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 4, "v_head_dim": 3, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "initializer_range": 0.3,
    }  # fmt: skip
    return ModelConfig(**{**table, **changes})


def foreign(ours: Transformer, folder: Path) -> Any:
    """The same weights in transformers, each expert for itself."""
    save_folder(ours, folder)
    wanted = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.DeepseekV3ForCausalLM.from_pretrained(folder, **wanted).eval()


@widths
@pytest.mark.parametrize("time", [5, 150])  # single products, and enough rows for gate and up in one
def test_logits_and_gradients_are_those_of_transformers(hidden: int, expert: int, time: int, tmp_path: Path) -> None:
    ours = Transformer.create(config(hidden, expert), 1)
    theirs = foreign(ours, tmp_path)
    tokens = torch.randint(37, (2, time), generator=torch.Generator().manual_seed(0))
    mine, other = ours(tokens), theirs(input_ids=tokens).logits
    assert (mine - other).abs().max() <= 1e-4
    pull = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    (mine * pull).sum().backward()
    (other * pull).sum().backward()
    experts = ours.layers[1].mlp.experts
    both = torch.cat((experts.w_gate_EFD.grad, experts.w_up_EFD.grad), 1)
    for one, its in ((both, "gate_up_proj"), (experts.w_down_EDF.grad, "down_proj")):
        reference = getattr(theirs.model.layers[1].mlp.experts, its).grad
        assert (one - reference).norm() <= 1e-4 * reference.norm()


@widths
@torch.no_grad()
def test_half_precision_is_no_further_off_than_transformers(hidden: int, expert: int, tmp_path: Path) -> None:
    ours = Transformer.create(config(hidden, expert), 1)
    theirs = foreign(ours, tmp_path)
    tokens = torch.randint(37, (2, 150), generator=torch.Generator().manual_seed(0))
    exact = theirs(input_ids=tokens).logits
    off = [
        (half - exact).abs().mean() for half in (ours.bfloat16()(tokens), theirs.bfloat16()(input_ids=tokens).logits)
    ]
    assert 0 < off[0] <= 1.2 * off[1]


@pytest.mark.parametrize("native", [True, False])
def test_the_engine_speaks_with_the_probabilities_of_transformers(native: bool, tmp_path: Path) -> None:
    if native and kernels.native() is None:
        pytest.skip(kernels.unavailable_reason())
    tokenizer = Tokenizer.train(["7 train test 1 2 3\n"] * 4, 300, numbers=10)
    ours = Transformer.create(config(23, 7, vocab_size=tokenizer.vocab_size, max_position_embeddings=64), 1)
    theirs = foreign(ours, tmp_path)
    engine = Engine(ours, tokenizer, backend=None if native else TorchBackend(ours))
    out = engine.generate([[5, 6, 7, 8, 9, 10]], Sampling(max_tokens=24, seed=3, logprobs=True))[0]
    ids = out.prompt_ids + out.token_ids
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(wanted[place - 1, ids[place]]) for place in range(6, len(ids))]
    assert len(expected) >= 8
    assert out.logprobs == pytest.approx(expected, abs=1e-4)
