# size: one noun: a model in the form that the compiled step takes, and the calls of it
"""The native back end: the model's weights handed to the compiled step, and a paged KV cache beside them.

It is a second form of ``model``, never a second model: sizes come from its config, rotations from its table, weights
from its own tensors. Float weights are used where they lie, so what a trainer changes is seen at once. Quantised
ones are laid into panels, in the layout that the kernels eat. Latent up-projections (``kv_b_proj``) are applied from
both sides, so they stay floats: float32 as they are, or float16 of what their codes stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sprat.config.model import ModelConfig
from sprat.engine.adapter import Adapter
from sprat.engine.backend import BLOCK_SIZE, Batch
from sprat.engine.backends.weights import (
    DTYPE_CODES,
    GROUP,
    HugePages,
    as_float_weights,
    float_vector,
    float_weights,
    low_rank_pair,
    pack_weights,
    trim_heap,
)
from sprat.errors import MachineError
from sprat.kernels import native, unavailable_reason
from sprat.model import MLP, Block, Embedding, Experts, Gate, Linear, MoE, RMSNorm, Transformer
from sprat.model.gqa import GQA
from sprat.model.layers import linears
from sprat.model.lora import EXPERT_PROJECTIONS
from sprat.model.mla import MLA
from sprat.model.mtp import MTP
from sprat.quant.layers import QuantEmbedding, QuantExperts, QuantizedWeight, QuantLinear

# What a step is made of; other modules, and subclasses of these, may compute anything.
KNOWN = {nn.ModuleList, Transformer, Block, MTP, MLA, GQA, MLP, MoE, Gate, Experts, Linear, Embedding, RMSNorm}
KNOWN |= {QuantizedWeight, QuantLinear, QuantEmbedding, QuantExperts}
FORMATS = ("f32", "f16", "i8")  # of the KV cache, in the order of the C++ side


class NativeBackend:
    """See ``Backend``.

    Args:
        model: on the CPU; float32, bfloat16 or quantised.
        threads: of one step; None: as many as torch uses.
        kv_format: ``f32``, ``f16`` or ``i8``; None: f32 for float32 models, so that training and rollouts agree,
            else f16.
        adapters: see ``Backend``.
        consume: take quantised weights over: ``model`` keeps its shape, but cannot compute any more. Without it the
            codes are in memory twice.

    Raises:
        MachineError: the kernels are not built, or do not take this model (see ``accepts``).
    """

    batch_invariant = True

    def __init__(
        self,
        model: Transformer,
        *,
        threads: int | None = None,
        kv_format: str | None = None,
        consume: bool = False,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        reason = self.accepts(model)
        if reason is not None:
            raise MachineError(f"the native engine cannot run this: {reason}", where="engine", todo="let torch run it")
        self.model, config = model, model.config
        self.vocab, self.num_mtp_modules = config.vocab_size, len(model.mtp)
        self.kv_format = kv_format or ("f32" if isinstance(model.head, Linear) and _is_float32(model) else "f16")
        count = threads or torch.get_num_threads()
        if self.kv_format == "i8" and not _fits_i8(config):
            fault = "memory in bytes needs heads of a multiple of 16 channels (rotary parts: of 4)"
            raise MachineError(fault, where="kv_format", todo="use f16")
        self.adapters = tuple(adapters)
        self._names = {id(linear): name for name, linear in linears(model)}
        self._packed: dict[int, Any] = {}
        self._pages, self._consume = HugePages(), consume
        self._native = native()
        self._decoder = self._native.Decoder(_dims(model, self.adapters), count, FORMATS.index(self.kv_format))
        self._num_positions = 0
        embedding = self._matrix(model.embed_tokens)
        head = embedding if config.tie_word_embeddings else self._matrix(model.head)
        ends = {"embedding": embedding, "head": head, "norm": float_vector(model.norm.weight)}
        self._decoder.set_embedding_and_head(ends | {"freqs_cis": self._table(BLOCK_SIZE)})
        layers: list[Any] = list(model.layers)
        for layer in layers:
            self._decoder.add_layer(self._layer(layer))
        modules: list[Any] = list(model.mtp)
        for module in modules:
            parts = self._layer(module.block)
            gains = {"norm_embedding": module.enorm, "norm_hidden": module.hnorm, "norm_last": module.shared_norm}
            parts |= {name: float_vector(norm.weight) for name, norm in gains.items()}
            self._decoder.add_mtp_module(parts | {"eh_proj": self._matrix(module.eh_proj)})
        self.block_bytes = int(self._decoder.block_bytes)
        if consume:
            trim_heap()

    @staticmethod
    def accepts(model: Transformer) -> str | None:
        """None if ``model`` can run here, else why not."""
        if native() is None:
            return unavailable_reason()
        tensors = list(model.state_dict().values())
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return "its weights are not on the CPU"
        for name, module in model.named_modules():
            if type(module) not in KNOWN:
                return f"{name} is a {type(module).__name__}"
            has_codes = isinstance(module, QuantizedWeight) and module.bits < 16
            if has_codes and module.group % GROUP and module.group < module.width:
                return f"{name} has groups of {module.group}, not a multiple of {GROUP}"
            if isinstance(module, Linear | Embedding) and module.weight.dtype not in DTYPE_CODES:
                return f"{name} is {module.weight.dtype}"
        return None

    @property
    def num_blocks(self) -> int:
        """Blocks that there is memory for."""
        return int(self._decoder.blocks)

    def reserve(self, num_blocks: int) -> None:
        """See ``Backend``."""
        try:
            self._decoder.reserve(num_blocks)
        except MemoryError:
            size = num_blocks * self.block_bytes / 2**30
            fault = f"no memory for {num_blocks} blocks of keys ({size:.1f} GiB)"
            todo = "give the engine fewer blocks or a smaller context"
            raise MachineError(fault, where="engine", todo=todo) from None

    def run(self, batch: Batch) -> Tensor:
        """See ``Backend``."""
        logits_RV = np.empty((len(batch.logits_index_R), self.vocab), np.float32)
        if batch.routes_TLK is not None:
            self._decoder.record_routes(batch.routes_TLK)
        self._call(self._decoder.run, batch, logits_RV)
        return torch.from_numpy(logits_RV)

    def argmax(self, batch: Batch, vocab: int) -> NDArray[np.int64]:
        """See ``Backend``."""
        tokens_R = np.empty(len(batch.logits_index_R), np.int64)
        if batch.routes_TLK is not None:
            self._decoder.record_routes(batch.routes_TLK)
        self._call(self._decoder.run_argmax, batch, vocab, tokens_R)
        return tokens_R

    def logits(self, batch: Batch, index_R: NDArray[np.int32]) -> Tensor:
        """See ``Backend``."""
        logits_RV = np.empty((len(index_R), self.vocab), np.float32)
        self._decoder.logits(index_R, logits_RV)
        return torch.from_numpy(logits_RV)

    def hidden(self, batch: Batch, index_R: NDArray[np.int32]) -> Tensor:
        """See ``Backend``."""
        hidden_RD = np.empty((len(index_R), self.model.config.hidden_size), np.float32)
        self._decoder.hidden(index_R, hidden_RD)
        return torch.from_numpy(hidden_RD)

    def draft(self, batch: Batch, next_T: NDArray[np.int64], vocab: int) -> NDArray[np.int64]:
        """See ``Backend``."""
        drafts_SD = np.empty((len(batch.starts_S) - 1, self.num_mtp_modules), np.int64)
        self._call(self._decoder.draft, batch, next_T, vocab, drafts_SD)
        return drafts_SD

    def copy(self, source: int, target: int) -> None:
        """See ``Backend``."""
        self._decoder.copy(source, target)

    def read(self, block: int) -> bytes:
        """See ``Backend``."""
        return bytes(self._decoder.read(block))

    def write(self, block: int, data: bytes) -> None:
        """See ``Backend``."""
        self._decoder.write(block, data)

    def _call(self, call: Any, batch: Batch, *more: Any) -> None:
        """One call with the arrays of a batch; the table of rotations grows with the longest position."""
        if batch.block_tables_SW.shape[1] * BLOCK_SIZE > self._num_positions:
            self._decoder.set_freqs_cis(self._table(batch.block_tables_SW.shape[1] * BLOCK_SIZE))
        arrays = batch.tokens_T, batch.positions_T, batch.starts_S, batch.block_tables_SW, batch.logits_index_R
        call(*arrays, batch.adapters_S, *more)

    def _table(self, positions: int) -> Tensor:
        """Rotations of at least ``positions`` positions as (cos, sin) pairs, float32 [P, r]."""
        self._num_positions = max(positions, 2 * self._num_positions)
        freqs_cis = self.model.rotary.freqs_cis(self._num_positions, torch.device("cpu"))
        return torch.view_as_real(freqs_cis).flatten(1).contiguous()

    def _layer(self, block: Any) -> dict[str, Any]:
        """What the step needs of one decoder layer, by the names of ``module.cpp``."""
        parts: dict[str, Any] = {"norm_in": float_vector(block.input_layernorm.weight)}
        parts["norm_out"] = float_vector(block.post_attention_layernorm.weight)
        attention: Any = block.self_attn
        if isinstance(attention, MLA):
            parts["kv_down"] = self._matrix(attention.kv_a_proj_with_mqa)
            kv_up = as_float_weights(attention.kv_b_proj, self._consume)
            parts["kv_up"] = self._adapt(kv_up, attention.kv_b_proj)
            parts["latent_norm"] = float_vector(attention.kv_a_layernorm.weight)
            if attention.has_q_lora:
                parts |= {"q_down": self._matrix(attention.q_a_proj), "q": self._matrix(attention.q_b_proj)}
                parts["q_latent_norm"] = float_vector(attention.q_a_layernorm.weight)
            else:
                parts["q"] = self._matrix(attention.q_proj)
        else:
            parts |= {name: self._matrix(getattr(attention, f"{name}_proj")) for name in ("q", "k", "v")}
            if attention.has_qk_norm:
                parts |= {name: float_vector(getattr(attention, name).weight) for name in ("q_norm", "k_norm")}
            if attention.window is not None:
                parts["window"] = attention.window
        parts["o"] = self._matrix(attention.o_proj)
        return parts | self._feed_forward(block.mlp)

    def _feed_forward(self, mlp: Any) -> dict[str, Any]:
        """Experts in order, the shared one last; a dense layer is one expert without a router."""
        if not isinstance(mlp, MoE):
            return {"experts": [self._expert(mlp)], "shared": False}
        config = mlp.gate.config
        experts: list[Any] = self._experts(mlp.experts)
        if mlp.shared_experts is not None:
            experts.append(self._expert(mlp.shared_experts))
        parts = {
            "router": float_weights(mlp.gate.weight.float()),
            "top_k": config.num_experts_per_tok,
            "groups": config.n_group if config.limits_groups else 1,
            "topk_groups": config.topk_group if config.limits_groups else 1,
            "sigmoid": config.scoring_func == "sigmoid",
            "sum_top2": config.topk_method == "noaux_tc",
            "normalize": config.norm_topk_prob and config.architecture == "deepseek_v3",
            "routed_scale": config.routed_scaling_factor,
        }
        if mlp.gate.has_bias:
            parts["router_bias"] = float_vector(mlp.gate.e_score_correction_bias)
        return parts | {"experts": experts, "shared": mlp.shared_experts is not None}

    def _expert(self, mlp: MLP) -> tuple[Any, Any, Any]:
        """Gate, up and down of one dense feed-forward."""
        return self._matrix(mlp.gate_proj), self._matrix(mlp.up_proj), self._matrix(mlp.down_proj)

    def _experts(self, experts: Any) -> list[Any]:
        """Gate, up and down of each routed expert."""
        if isinstance(experts, QuantExperts):
            packed = (experts.gate, experts.up, experts.down)
            matrices = [pack_weights(each, self._pages, consume=self._consume) for each in packed]
        else:
            weights = (experts.w_gate_EFD, experts.w_up_EFD, experts.w_down_EDF)
            matrices = [[float_weights(weight) for weight in weight.detach()] for weight in weights]
        for projection, stack in zip(EXPERT_PROJECTIONS, matrices, strict=True):
            for index, matrix in enumerate(stack):
                self._adapt(matrix, experts, f".{projection}", index)
        return list(zip(*matrices, strict=True))

    def _matrix(self, module: Any) -> Any:
        """A linear map or an embedding, in whatever form it is."""
        bias = getattr(module, "bias", None)
        if isinstance(module, QuantLinear | QuantEmbedding) and module.packed.bits < 16:
            if id(module.packed) not in self._packed or bias is not None:
                matrix = pack_weights(module.packed, self._pages, bias, self._consume)[0]
                self._packed[id(module.packed)] = self._adapt(matrix, module)
            return self._packed[id(module.packed)]
        weight = module.packed.codes if isinstance(module, QuantLinear | QuantEmbedding) else module.weight
        return self._adapt(float_weights(weight, bias), module)

    def _adapt(self, matrix: Any, module: Any, projection: str = "", expert: int | None = None) -> Any:
        """``matrix``, given what each adapter has for ``module`` (for a projection of one expert), if any has."""
        own = [adapter.low_ranks.get(self._names[id(module)] + projection) for adapter in self.adapters]
        if any(own):
            matrix.set_adapters([None if each is None else low_rank_pair(each, expert) for each in own])
        return matrix


def _fits_i8(config: ModelConfig) -> bool:
    """Whether a KV cache in bytes takes heads of these widths."""
    if config.is_mla:
        return config.kv_lora_rank % 16 == 0 and config.qk_rope_head_dim % 4 == 0
    return config.attention_head_dim % 16 == 0


def _dims(model: Transformer, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Sizes of the model, by the names of ``module.cpp``."""
    config, attention = model.config, cast(Any, model.layers[0]).self_attn
    return {
        "is_mla": config.is_mla,
        "interleave": bool(getattr(attention, "interleave", False)),
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
        "heads": config.num_attention_heads,
        "kv_heads": 1 if config.is_mla else config.kv_heads,
        "head_dim": 0 if config.is_mla else config.attention_head_dim,
        "rank": config.kv_lora_rank,
        "nope": config.qk_nope_head_dim,
        "rope": config.qk_rope_head_dim,
        "value": config.v_head_dim,
        "scale": attention.scale,
        "eps": config.rms_norm_eps,
        "adapters": len(adapters),
        "adapter_rank": max((low.config.rank for own in adapters for low in own.low_ranks.values()), default=0),
    }


def _is_float32(model: Transformer) -> bool:
    """Whether all matrices are float32."""
    is_quantized = any(isinstance(module, QuantizedWeight) for module in model.modules())
    return not is_quantized and all(p.dtype == torch.float32 for p in model.parameters())
