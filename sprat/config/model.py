"""What is this model? One frozen config for DeepSeek-V2/V3 and for dense Llama, Mistral, Qwen2 and Qwen3 decoders.

Field names are DeepSeek's and Hugging Face's own, so that ``config.json`` goes in and out unchanged:
``ModelConfig.from_hf`` reads both the classic form (``rope_theta`` beside ``rope_scaling``) and the newer
one (``rope_parameters``); ``to_hf`` writes the classic form, which every engine reads.

A dense twin of a DeepSeek model is the same model with ``n_routed_experts=0``: same attention, and a
feed-forward as wide as what one token activates.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sprat.config.base import Config, parse
from sprat.config.hf_config import SLIDING, check_keys, parse_rope, parse_window, window_to_hf
from sprat.errors import ConfigError

Architecture = Literal["deepseek_v3", "deepseek_v2", "llama", "mistral", "qwen2", "qwen3"]
LayerType = Literal["full_attention", "sliding_attention"]

HF_CLASS: dict[str, str] = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# fmt: off
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rope_theta", "rope_scaling", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
)
_DEEPSEEK = (
    "moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
    "routed_scaling_factor", "scoring_func", "topk_method", "first_k_dense_replace", "num_nextn_predict_layers",
    "rope_interleave",
)
# fmt: on


class LoRAConfig(Config):
    """Adapters of a model (arXiv 2106.09685; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353): see ``model/lora.py``.

    PEFT calls these keys ``r``, ``lora_alpha``, ``use_rslora``, ``use_dora`` and ``target_modules``.
    """

    rank: int = Field(16, ge=1, le=2**16)
    alpha: float = Field(32.0, gt=0, le=1e9)  # what an adapter adds is multiplied by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank)
    dora: bool = False  # learn the length of each output row apart from its direction
    targets: tuple[str, ...] = Field(
        ("all-linear",), min_length=1
    )  # ends of names; all-linear: not the head and routers

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if not all(self.targets):
            raise ValueError("a target has no name")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError("a target stands twice")
        if "all-linear" in self.targets and len(self.targets) > 1:
            raise ValueError("all-linear stands alone, since it names all targets")
        return self


class ModelConfig(Config):
    """Shape of one decoder. Sizes are in elements, ``max_position_embeddings`` in tokens."""

    architecture: Architecture = "deepseek_v3"
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    # dense grouped-query attention
    num_key_value_heads: int = Field(0, ge=0)  # 0: as many as query heads
    head_dim: int = Field(0, ge=0)  # 0: hidden_size / num_attention_heads; MLA does not read it
    attention_bias: bool = False
    sliding_window: int | None = Field(None, ge=1)  # keys that a token of a sliding layer sees, its own included
    layer_types: tuple[LayerType, ...] | None = None  # of each layer; None: with a window, all of them slide
    # multi-head latent attention
    q_lora_rank: int | None = Field(None, ge=1)
    kv_lora_rank: int = Field(0, ge=0)
    qk_nope_head_dim: int = Field(0, ge=0)
    qk_rope_head_dim: int = Field(0, ge=0)
    v_head_dim: int = Field(0, ge=0)
    rope_interleave: bool = True
    # mixture of experts; n_routed_experts = 0 makes every layer dense
    moe_intermediate_size: int = Field(0, ge=0)
    n_routed_experts: int = Field(0, ge=0)
    n_shared_experts: int = Field(0, ge=0)
    num_experts_per_tok: int = Field(0, ge=0)
    n_group: int = Field(1, ge=1)
    topk_group: int = Field(1, ge=1)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(1.0, gt=0)
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    first_k_dense_replace: int = Field(0, ge=0)
    num_nextn_predict_layers: int = Field(0, ge=0)
    # positions, norms, vocabulary
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = Field(4096, ge=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    tie_word_embeddings: bool = False
    initializer_range: float = Field(0.02, gt=0)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def is_mla(self) -> bool:
        """Whether attention is multi-head latent attention."""
        return self.architecture in ("deepseek_v2", "deepseek_v3")

    @property
    def kv_heads(self) -> int:
        """Key and value heads of grouped-query attention."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        """Width of one grouped-query attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def qk_head_dim(self) -> int:
        """Width of one MLA query or key head: the part without and the part with positions."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (0-based; MTP layers count on) has routed experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    @property
    def context(self) -> int:
        """Tokens that positions reach: YaRN stretches its original context by ``factor``, whatever else is written.

        Qwen's recipe adds the scaling and leaves ``max_position_embeddings`` as it was (vLLM derives the same).
        """
        scaling = self.rope_scaling or {}
        if scaling.get("rope_type") != "yarn" or not scaling.get("original_max_position_embeddings"):
            return self.max_position_embeddings
        stretched = float(scaling.get("factor", 1)) * int(scaling["original_max_position_embeddings"])
        return max(self.max_position_embeddings, round(stretched) if math.isfinite(stretched) else 0)

    def window(self, layer: int) -> int | None:
        """Keys that a token of decoder layer ``layer`` sees, its own included; None: all before it."""
        return None if self.layer_types and self.layer_types[layer] != SLIDING else self.sliding_window

    @property
    def limits_groups(self) -> bool:
        """Whether a token may go to the experts of its best groups only; ``greedy`` never looks at groups."""
        return self.topk_group < self.n_group and self.topk_method != "greedy"

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        """Refuse shapes that no model can have."""
        if self.is_mla:
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} must be at least 1 for {self.architecture}")
            if self.qk_rope_head_dim % 2:
                raise ValueError("qk_rope_head_dim must be even")
        else:
            if self.n_routed_experts or self.num_nextn_predict_layers:
                what = "n_routed_experts and num_nextn_predict_layers must be 0"
                raise ValueError(f"{self.architecture} is dense: {what}")
            if self.num_attention_heads % self.kv_heads:
                raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
            if self.attention_head_dim % 2 or not self.attention_head_dim:
                raise ValueError("head_dim must be even, and not 0")
        if self.sliding_window and self.architecture not in ("mistral", "qwen2", "qwen3"):
            raise ValueError(f"{self.architecture} has no sliding_window")
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError("layer_types must name each layer")
        if self.n_routed_experts:
            self._experts_hold_together()
        return self

    def _experts_hold_together(self) -> None:
        """Refuse routers that cannot choose."""
        if self.moe_intermediate_size < 1:
            raise ValueError("moe_intermediate_size must be at least 1")
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError("num_experts_per_tok must lie between 1 and n_routed_experts")
        if self.topk_method == "greedy":
            return
        if self.n_routed_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError("n_group must divide n_routed_experts, and topk_group must not exceed n_group")
        if self.num_experts_per_tok > self.n_routed_experts // self.n_group * self.topk_group:
            raise ValueError("the chosen groups hold fewer experts than num_experts_per_tok")
        if self.topk_method == "noaux_tc" and self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError("noaux_tc needs groups of at least two experts")

    @classmethod
    def from_hf(cls, table: dict[str, Any], *, where: str = "config.json") -> ModelConfig:
        """The config of a Hugging Face ``config.json``.

        Raises:
            ConfigError: the architecture is unknown, or the file asks for what this code does not compute.
        """
        kind = table.get("model_type")
        choices = ", ".join(HF_CLASS)
        if kind not in HF_CLASS:
            raise ConfigError(f"model_type {kind!r} is not known", where=where, todo=f"use one of {choices}")
        dense = kind in ("llama", "mistral", "qwen2", "qwen3")
        fields = [*_SHARED, "head_dim", *(() if dense else _DEEPSEEK)]
        check_keys(table, fields, where)
        known_fields = {key: table[key] for key in fields if table.get(key) is not None}
        if "num_mtp_layers" in table and not dense:
            known_fields.setdefault("num_nextn_predict_layers", table["num_mtp_layers"])
        theta, scaling = parse_rope(table, where)
        known_fields |= {"architecture": kind, "rope_theta": theta, "rope_scaling": scaling}
        if kind in ("qwen2", "mistral"):  # always, and never
            known_fields["attention_bias"] = kind == "qwen2"
        if type(layers := table.get("num_hidden_layers")) is int:
            known_fields |= parse_window(table, layers, where)
        if not dense:
            for key in ("num_key_value_heads", "head_dim"):
                known_fields.pop(key, None)
            known_fields.setdefault("q_lora_rank", None)
        if kind == "deepseek_v2":
            known_fields.setdefault("scoring_func", "softmax")
            known_fields.setdefault("topk_method", "greedy")
            known_fields.setdefault("norm_topk_prob", False)
        return parse(cls, known_fields, where=where, lenient=True)

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face ``config.json`` of this model, in the classic form that every engine reads.

        One form and no second: transformers 5 and vLLM make ``rope_parameters`` of ``rope_theta`` and ``rope_scaling``,
        and of two that differ would choose one. Where only a key's name changed (``dtype``, ``type``), both stand.
        """
        names = [*_SHARED, *(_DEEPSEEK if self.is_mla else ["head_dim"])]
        values = self.model_dump(mode="json")
        table: dict[str, Any] = {
            "architectures": [HF_CLASS[self.architecture]],
            "model_type": self.architecture,
            "hidden_act": "silu",
            "torch_dtype": "float32",
            "dtype": "float32",
            "use_cache": True,
            "attention_dropout": 0.0,
            **{name: values[name] for name in names},
        }
        table["num_key_value_heads"] = self.num_attention_heads if self.is_mla else self.kv_heads
        if not self.is_mla:
            table["head_dim"] = self.attention_head_dim
        else:
            table |= {"moe_layer_freq": 1, "num_mtp_layers": self.num_nextn_predict_layers}
            table |= {"ep_size": 1, "pretraining_tp": 1}
        if self.is_mla and not self.n_routed_experts:
            table["first_k_dense_replace"] = self.num_hidden_layers
        if self.architecture in ("qwen2", "mistral"):
            del table["attention_bias"]
        if self.rope_scaling is not None and "rope_type" in self.rope_scaling:
            table["rope_scaling"] = {**self.rope_scaling, "type": self.rope_scaling["rope_type"]}
        return table | window_to_hf(self.architecture, self.sliding_window, self.layer_types, self.num_hidden_layers)
