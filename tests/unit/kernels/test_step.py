"""The native step is the model: logits of every family, however the tokens are cut, whoever else is in the batch."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from sprat.config import QuantConfig
from sprat.config.model import ModelConfig
from sprat.engine.backend import Batch
from sprat.engine.backends import select_backend
from sprat.engine.backends.native import NativeBackend
from sprat.errors import EngineError, MachineError
from sprat.kernels import native, reference, unavailable_reason
from sprat.model import Transformer
from sprat.quant import quantize_model
from sprat.quant.layers import QuantizedWeight, QuantLinear
from tests.unit.engine.mtp import worst_guess

pytestmark = pytest.mark.skipif(native() is None, reason=unavailable_reason())

DENSE = {
    "vocab_size": 203,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
LATENT = {
    "vocab_size": 203, "hidden_size": 100, "intermediate_size": 136, "num_hidden_layers": 3, "num_attention_heads": 4,
    "kv_lora_rank": 48, "qk_nope_head_dim": 20, "qk_rope_head_dim": 8, "v_head_dim": 24, "moe_intermediate_size": 40,
    "n_routed_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SOFT = {"architecture": "deepseek_v2", "scoring_func": "softmax"}
FAMILIES = {
    "llama": DENSE | {"architecture": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": DENSE | {"architecture": "qwen2", "num_key_value_heads": 3, "attention_bias": True},
    "qwen3": DENSE | {"architecture": "qwen3", "num_key_value_heads": 6, "head_dim": 32},
    "v3": LATENT | {"n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "v3-yarn": LATENT | {"q_lora_rank": 52, "rope_scaling": YARN, "routed_scaling_factor": 2.5},
    "v2": LATENT | SOFT | {"n_shared_experts": 2, "topk_method": "greedy"},
    "v2-greedy": LATENT | SOFT | {"topk_method": "greedy", "n_group": 4, "topk_group": 1},
    "v2-groups": LATENT | SOFT | {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "mtp": LATENT | {"num_nextn_predict_layers": 2, "n_shared_experts": 1},
}  # fmt: skip


def model_of(family: str, scale: float = 2.0) -> Transformer:
    model = Transformer(ModelConfig.model_validate(FAMILIES[family]), seed=1).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                tensor.mul_(scale)
            elif "norm" in name or "bias" in name:
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        for buffer in model.buffers():
            buffer.add_(torch.linspace(-0.1, 0.1, len(buffer)))
    return model


def batch_of(*parts: tuple[list[int], int], tables: list[list[int]], wanted: list[int] | None = None) -> Batch:
    """(tokens, position of the first) of each sequence; all logits are asked unless ``wanted`` says otherwise."""
    starts = np.cumsum([0, *(len(tokens) for tokens, _ in parts)])
    tokens = np.concatenate([tokens for tokens, _ in parts])
    positions = np.concatenate([np.arange(len(tokens)) + start for tokens, start in parts])
    rows = np.arange(len(tokens)) if wanted is None else np.asarray(wanted)
    arrays = (tokens, positions, starts, np.asarray(tables), rows)
    return Batch(*(np.ascontiguousarray(array, dtype=np.int32) for array in arrays))


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 203, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def truth(model: Transformer, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens]))[0]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_model(family: str) -> None:
    model = model_of(family)
    backend = NativeBackend(model, threads=2)
    backend.reserve(8)
    long, short = tokens_of(150), tokens_of(70, 1)
    logits = backend.run(batch_of((long, 0), (short, 0), tables=[[3, 1, 7], [0, 5, -1]]))
    assert backend.kv_format == "f32"
    assert torch.allclose(logits[:150], truth(model, long), atol=2e-5)
    assert torch.allclose(logits[150:], truth(model, short), atol=2e-5)


@pytest.mark.parametrize("kv_format", ["f32", "f16", "i8"])
@pytest.mark.parametrize("family", ["qwen3", "v3"])
def test_a_row_depends_on_nothing_but_its_own_tokens(family: str, kv_format: str) -> None:
    """Cut into chunks, in other blocks, beside others, beyond one span of attention: the same bits."""
    model = quantize_model(model_of(family))
    backend = NativeBackend(model, threads=2, kv_format=kv_format)
    backend.reserve(40)
    tokens, others = tokens_of(700), [tokens_of(90, seed) for seed in (1, 2, 3)]
    tables = [list(range(30, 18, -1)), *([[31 + 2 * i, 32 + 2 * i] + [-1] * 10 for i in range(3)])]
    per_row = backend.run(batch_of((tokens, 0), *((other, 0) for other in others), tables=tables))[:700]
    parts, at = [], 0
    for count in (64, 1, 5, 30, 50, 1, 549):
        parts.append(backend.run(batch_of((tokens[at : at + count], at), tables=[list(range(12))])))
        at += count
    assert torch.equal(torch.cat(parts), per_row)


@pytest.mark.parametrize("family", ["llama", "v3", "v2"])
def test_memory_in_halves_and_bytes_is_near(family: str) -> None:
    model, tokens = model_of(family, scale=1.0), tokens_of(600)
    expected = truth(model, tokens)
    for kv_format, limit in (("f16", 1e-3), ("i8", 0.06)):
        backend = NativeBackend(model, threads=1, kv_format=kv_format)
        backend.reserve(10)
        logits = backend.run(batch_of((tokens, 0), tables=[list(range(10))]))
        error = (logits - expected).norm() / expected.norm()
        assert error < limit, (kv_format, float(error))


@pytest.mark.parametrize("bits,group", [(4, 32), (4, 64), (8, 32)])
def test_quantised_weights_meet_rounded_rows(bits: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native step of a quantized dense model is the model whose linear maps see rounded inputs."""
    model = model_of("llama")
    with torch.no_grad():
        for layer in model.layers:  # one channel of each group is often far above the others, and often just not
            layer.mlp.up_proj.weight[5::32] *= 6
    model = quantize_model(model, QuantConfig(bits=bits, group=group, head_bits=8))
    backend = NativeBackend(model, threads=1, kv_format="f32")
    backend.reserve(2)
    plain = QuantLinear.forward

    def rounded(self: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        per_row = self.in_features != model.config.intermediate_size  # what comes out of the gate is rounded in pieces
        return plain(self, reference.fake_quantize_rows(x, per_row=per_row) if self.packed.bits < 16 else x)

    monkeypatch.setattr(QuantLinear, "forward", rounded)
    tokens = tokens_of(100)
    expected = truth(model, tokens)
    logits = backend.run(batch_of((tokens, 0), tables=[[0, 1]]))
    # An input that lies on a half is rounded either way; rows where none does agree to the last digits.
    error = (logits - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.quantile(0.1) < 1e-5 and error.max() < 0.03


def test_each_quantised_expert_has_its_own_scales() -> None:
    """Experts of very different sizes in INT8, against the same weights in torch."""
    model = model_of("v3", scale=1.0)
    for layer in model.moe_layers():
        layer.experts.w_up_EFD.data.mul_(2.0 ** torch.arange(-4.0, 4.0)[:, None, None])
    packed, tokens = quantize_model(model, QuantConfig(bits=8, head_bits=8)), tokens_of(60)
    backend = NativeBackend(packed, threads=1, kv_format="f32")
    backend.reserve(1)
    logits, expected = backend.run(batch_of((tokens, 0), tables=[[0]])), truth(packed, tokens)
    # rounded inputs cost a thousandth; a row whose choice of experts they tip over is far off, and there are few
    assert ((logits - expected).norm(dim=1) / expected.norm(dim=1)).median() < 0.01


def test_weights_that_change_are_seen_at_once() -> None:
    model, tokens = model_of("v3"), tokens_of(20)
    backend = NativeBackend(model, threads=1)
    backend.reserve(1)
    before = backend.run(batch_of((tokens, 0), tables=[[0]])).clone()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(1.1)
    after = backend.run(batch_of((tokens, 0), tables=[[0]]))
    assert not torch.allclose(before, after) and torch.allclose(after, truth(model, tokens), atol=5e-5)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_likeliest_tokens_are_those_of_the_logits(rows: int, quantized: bool) -> None:
    model = model_of("v3")
    with torch.no_grad():
        model.head.weight[150] = model.head.weight[70]  # equals: the first counts
    backend = NativeBackend(quantize_model(model) if quantized else model, threads=2)
    backend.reserve(1)
    for vocab in (203, 150, 17):
        for seed in range(20):
            batch = batch_of((tokens_of(rows, seed), 0), tables=[[0]])
            logits = backend.run(batch).numpy()[:, :vocab]
            assert backend.argmax(batch, vocab).tolist() == logits.argmax(1).tolist()
    with pytest.raises(ValueError):
        backend.argmax(batch, 204)


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
def test_no_token_is_likeliest_where_a_logit_is_not_finite(fault: float) -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.embed_tokens.weight[131, 5] = fault  # the head is tied to it
    backend = NativeBackend(model, threads=2)
    backend.reserve(1)
    batch = batch_of(([7, 8], 0), tables=[[0]])
    assert backend.argmax(batch, 203).tolist() == [-1, -1]
    assert min(backend.argmax(batch, 131).tolist()) >= 0, "nobody asked for that token"


@pytest.mark.parametrize("family", ["qwen2", "v3"])
def test_bits_do_not_depend_on_who_computes_what(family: str) -> None:
    """More threads than cores, and somebody else at work: chunks change hands, sums do not."""
    model, tokens = quantize_model(model_of(family)), tokens_of(60)
    alone, many = NativeBackend(model, threads=1), NativeBackend(model, threads=7)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            sum(range(2000))

    others = [threading.Thread(target=disturb) for _ in range(2)]
    for thread in others:
        thread.start()
    try:
        for backend in (alone, many):
            backend.reserve(1)
        for place in range(60):
            batch = batch_of((tokens[place : place + 1], place), tables=[[0]])
            assert torch.equal(alone.run(batch), many.run(batch))
    finally:
        stop.set()
        for thread in others:
            thread.join()


@pytest.mark.parametrize("family", ["llama", "v3"])
def test_threads_that_share_the_keys_of_a_sequence_change_no_bit(family: str) -> None:
    """With few rows and many keys each thread takes spans of keys; one thread alone walks over all of them."""
    model, tokens = quantize_model(model_of(family)), tokens_of(2640)
    alone, many = (NativeBackend(model, threads=threads, kv_format="i8") for threads in (1, 3))
    for backend in (alone, many):
        backend.reserve(42)
    tables, at = [list(range(41, -1, -1))], 0
    for count in (2555, 1, 3, 1, 2, 1, 40, 1):  # a span ends at 2560; rows of several tokens fill more than one tile
        batch = batch_of((tokens[at : at + count], at), tables=tables, wanted=[count - 1])
        assert torch.equal(alone.run(batch), many.run(batch)), f"{count} tokens from {at} on"
        at += count


def test_drafts_equal_the_model_s_own_prediction_modules() -> None:
    model = model_of("mtp")
    worst, different = worst_guess(model, NativeBackend(model, threads=2), tokens_of(80))
    assert worst < 4e-5 and different > 5


def test_rows_of_the_last_step_are_those_that_were_not_asked_before() -> None:
    model, tokens = model_of("v3"), tokens_of(9)
    backend = NativeBackend(model, threads=1)
    backend.reserve(1)
    batch = batch_of((tokens, 0), tables=[[0]])
    every = backend.run(batch)
    few = replace(batch, logits_index_R=np.array([8], np.int32))
    backend.run(few)
    index_R = np.array([1, 2, 7], np.int32)
    assert torch.equal(backend.logits(few, index_R), every[[1, 2, 7]])
    with torch.no_grad():
        expected = model.hidden(torch.tensor([tokens])).x_BTD[0, [1, 2, 7]]
    torch.testing.assert_close(backend.hidden(few, index_R), expected, atol=1e-5, rtol=1e-4)
    for index in (-1, 9):
        for call in (backend.logits, backend.hidden):
            with pytest.raises(ValueError, match="not there"):
                call(few, np.array([index], np.int32))


def test_drafts_for_another_step_are_refused() -> None:
    backend = NativeBackend(model_of("mtp"), threads=1)
    backend.reserve(1)
    batch = batch_of(([5, 6], 0), tables=[[0]])
    backend.run(batch)
    for next_T, vocab in (([1], 203), ([1, 203], 203), ([1, 2], 204)):
        with pytest.raises(ValueError):
            backend.draft(batch, np.array(next_T), vocab)
    with pytest.raises(ValueError, match="same rows"):
        backend.draft(batch_of(([5], 0), tables=[[0]]), np.array([1]), 203)


def test_blocks_can_be_copied_kept_and_brought_back() -> None:
    model, tokens = model_of("v3"), tokens_of(70)
    backend = NativeBackend(model, threads=1, kv_format="i8")
    backend.reserve(4)
    per_row = backend.run(batch_of((tokens, 0), tables=[[0, 1]]))
    kept = backend.read(0)
    assert len(kept) == backend.block_bytes
    backend.copy(0, 2)
    assert torch.equal(backend.run(batch_of((tokens[64:], 64), tables=[[2, 3]])), per_row[64:])
    backend.run(batch_of((tokens_of(64, 5), 0), tables=[[2]]))
    backend.write(2, kept)
    backend.reserve(2000)  # grows, and keeps what it has
    assert torch.equal(backend.run(batch_of((tokens[64:], 64), tables=[[2, 1999]])), per_row[64:])
    with pytest.raises(ValueError, match="another size"):
        backend.write(0, kept[:-1])


@pytest.mark.parametrize(
    "broken",
    [
        lambda: batch_of(([5], 0), tables=[[9]]),
        lambda: batch_of(([5], 64), tables=[[0]]),
        lambda: batch_of(([203], 0), tables=[[0]]),
        lambda: batch_of(([-1], 0), tables=[[0]]),
        lambda: batch_of(([5], -1), tables=[[0]]),
        lambda: batch_of(([5, 6], 0), tables=[[0]], wanted=[2]),
        lambda: batch_of(([5], 0), ([], 0), tables=[[0], [1]]),
    ],
)
def test_a_batch_that_points_elsewhere_is_refused(broken: object) -> None:
    backend = NativeBackend(model_of("llama"), threads=1)
    backend.reserve(2)
    with pytest.raises(ValueError):
        backend.run(broken())  # type: ignore[operator]


def test_what_it_cannot_run_is_said() -> None:
    model = model_of("llama").to(torch.float64)
    assert "float64" in str(NativeBackend.accepts(model))
    with pytest.raises(MachineError, match="float64"):
        NativeBackend(model)
    backend = NativeBackend(model_of("llama"), threads=1)
    with pytest.raises(MachineError, match="no memory"):
        backend.reserve(1 << 45)


def test_memory_formats_are_chosen_by_name() -> None:
    model = model_of("v3")
    for kv_format in ("f32", "f16", "i8"):
        assert select_backend(model, kv_format).kv_format == kv_format
    with pytest.raises(EngineError, match="no memory format"):
        select_backend(model, "i3")
    with pytest.raises(EngineError, match="leave it out"):
        select_backend(model_of("llama").to(torch.float64), "i8")
    odd = Transformer(ModelConfig.model_validate(FAMILIES["v3"] | {"kv_lora_rank": 40}))
    with pytest.raises(MachineError, match="multiple of 16"):
        select_backend(odd, "i8")


def test_weights_that_are_handed_over_are_in_memory_once() -> None:
    model, kept, tokens = quantize_model(model_of("v3")), quantize_model(model_of("v3")), tokens_of(20)
    took, shared = select_backend(model, consume=True), select_backend(kept)
    for backend in (took, shared):
        backend.reserve(1)
    one = batch_of((tokens, 0), tables=[[0]])
    assert torch.equal(took.run(one), shared.run(one))
    assert sum(m.nbytes for m in model.modules() if isinstance(m, QuantizedWeight)) == 0
    assert all(m.nbytes > 0 for m in kept.modules() if isinstance(m, QuantizedWeight))
