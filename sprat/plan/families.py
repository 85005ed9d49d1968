"""The shape of a model from our config, from a ``config.json`` of a family that we know, or by name.

A foreign file is read for its shape alone, so that what we do not compute (FP8 weights, rotary tables of another kind)
does not matter here; a number that is missing, no number or out of all proportion is refused by its key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sprat.config.model import ModelConfig
from sprat.config.sizes import size, size_names
from sprat.errors import ConfigError
from sprat.files.json import load_json_object
from sprat.plan import blocks
from sprat.plan.config_keys import MOST, ConfigKeys
from sprat.plan.shapes import Layer, ModelShape

MODELS_FILE = Path(__file__).with_name("models.toml")
_MOST_LAYERS = 10_000
_LETTERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}  # of Nemotron's hybrid_override_pattern
_WORDS = {"linear_attention": "mamba", "full_attention": "attention"}


def _gqa(keys: ConfigKeys, **changes: Any) -> Any:
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    kv_heads = keys.size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise keys.fault(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}", "correct one")
    head_dim = keys.size("head_dim", default=hidden // heads or None)
    return blocks.gqa(hidden, heads, kv_heads, head_dim, **changes)


def _windows(keys: ConfigKeys, layers: int, kind: str) -> list[int | None]:
    """The window of each layer."""
    window, types = keys.table.get("sliding_window"), keys.words("layer_types", layers)
    if kind in ("qwen2", "qwen3", "qwen3_moe") and not keys.flag("use_sliding_window"):
        window = None
    if window is None or kind == "llama":
        return [None] * layers
    window = keys.size("sliding_window")
    if types is not None:
        return [window if each == "sliding_attention" else None for each in types]
    if kind == "gpt_oss":
        return [None if layer % 2 else window for layer in range(layers)]
    first = keys.size("max_window_layers", default=28, least=0) if kind.startswith("qwen") else 0
    return [window if layer >= first else None for layer in range(layers)]


def _dense_family(keys: ConfigKeys, kind: str) -> list[Layer]:
    """Llama, Mistral, Qwen2, Qwen3."""
    count = keys.size("num_hidden_layers", most=_MOST_LAYERS)
    bias = kind == "qwen2" or (kind != "mistral" and keys.flag("attention_bias"))
    feed = blocks.dense(keys.size("hidden_size"), keys.size("intermediate_size"), bias=keys.flag("mlp_bias"))
    return [
        (_gqa(keys, bias=bias, out_bias=bias and kind != "qwen2", qk_norm=kind == "qwen3", window=window), feed)
        for window in _windows(keys, count, kind)
    ]


def _qwen3_moe(keys: ConfigKeys, kind: str) -> list[Layer]:
    count, hidden = keys.size("num_hidden_layers", most=_MOST_LAYERS), keys.size("hidden_size")
    bias, dense_layers = keys.flag("attention_bias"), keys.words("mlp_only_layers") or []
    step = keys.size("decoder_sparse_step", default=1)
    experts, top_k = keys.size("num_experts", "num_local_experts"), keys.size("num_experts_per_tok")
    feed = blocks.moe(hidden, experts, _chosen(keys, experts, top_k), keys.size("moe_intermediate_size"))
    layers: list[Layer] = []
    for layer, window in enumerate(_windows(keys, count, kind)):
        attention = _gqa(keys, bias=bias, out_bias=bias, qk_norm=True, window=window)
        is_dense = layer in dense_layers or (layer + 1) % step != 0
        layers.append((attention, blocks.dense(hidden, keys.size("intermediate_size")) if is_dense else feed))
    return layers


def _gpt_oss(keys: ConfigKeys, kind: str) -> list[Layer]:
    count, hidden = keys.size("num_hidden_layers", most=_MOST_LAYERS), keys.size("hidden_size")
    experts, top_k = keys.size("num_local_experts"), keys.size("num_experts_per_tok", "experts_per_token")
    feed = blocks.moe(hidden, experts, _chosen(keys, experts, top_k), keys.size("intermediate_size"), bias=True)
    bias = keys.flag("attention_bias", True)
    windows = _windows(keys, count, kind)
    return [(_gqa(keys, bias=bias, out_bias=bias, window=window, sinks=True), feed) for window in windows]


def _chosen(keys: ConfigKeys, experts: int, top_k: int) -> int:
    if top_k > experts:
        raise keys.fault(f"num_experts_per_tok {top_k} of {experts} experts", f"give at most {experts}")
    return top_k


def _deepseek_moe(keys: ConfigKeys) -> Any:
    experts, width = keys.size("n_routed_experts"), keys.size("moe_intermediate_size")
    return blocks.moe(
        keys.size("hidden_size"),
        experts,
        _chosen(keys, experts, keys.size("num_experts_per_tok")),
        width,
        shared_ffn=width * keys.size("n_shared_experts", default=0, least=0),
        groups=keys.size("n_group", default=1),
        groups_used=keys.size("topk_group", default=1),
    )


def _deepseek(keys: ConfigKeys, kind: str) -> list[Layer]:
    """DeepSeek V2, V3 and V3.2, and Kimi K2: latent attention, and experts from ``first_k_dense_replace`` on."""
    count, hidden = keys.size("num_hidden_layers", most=_MOST_LAYERS), keys.size("hidden_size")
    if keys.size("moe_layer_freq", default=1) != 1:
        raise keys.fault("moe_layer_freq is not 1", "use a model whose later layers all have experts")
    index = (0, 0, 0)
    if kind == "deepseek_v32":
        index = (keys.size("index_n_heads"), keys.size("index_head_dim"), keys.size("index_topk"))
    attention = blocks.mla(
        hidden,
        keys.size("num_attention_heads"),
        None if keys.table.get("q_lora_rank") is None else keys.size("q_lora_rank"),
        keys.size("kv_lora_rank"),
        keys.size("qk_nope_head_dim"),
        keys.size("qk_rope_head_dim"),
        keys.size("v_head_dim"),
        bias=keys.flag("attention_bias"),
        index=index,
    )
    has_experts = keys.size("n_routed_experts", default=0, least=0) > 0
    first = keys.size("first_k_dense_replace", default=0, least=0) if has_experts else count
    extra = keys.size("num_nextn_predict_layers", "num_mtp_layers", default=0, least=0, most=100)
    narrow = blocks.dense(hidden, keys.size("intermediate_size")) if min(first, count) else None
    sparse = _deepseek_moe(keys) if has_experts else None
    feeds = [narrow if layer < first or sparse is None else sparse for layer in range(count + extra)]
    return [(attention, feed) for feed in feeds if feed is not None]


def _deepseek_v4(keys: ConfigKeys, kind: str) -> list[Layer]:
    count, hidden = keys.size("num_hidden_layers", most=_MOST_LAYERS), keys.size("hidden_size")
    extra = keys.size("num_nextn_predict_layers", "num_mtp_layers", default=0, least=0, most=100)
    index = (keys.size("index_n_heads"), keys.size("index_head_dim"), keys.size("index_topk"))
    ratios, rates = keys.words("compress_ratios"), keys.table.get("compress_rates")
    if ratios is None and isinstance(rates, Mapping):  # as transformers 5 writes it: by the kind of each layer
        ratios = [rates.get(each, 0) for each in map(str, keys.words("layer_types", count) or [])]
    if ratios is None or len(ratios) < count or not all(type(ratio) is int and 0 <= ratio < MOST for ratio in ratios):
        raise keys.fault("compress_ratios does not describe the layers", f"give {count} whole numbers")
    ratios = (ratios + [0] * extra)[: count + extra]
    finest = min((ratio for ratio in ratios if ratio), default=0)  # the others see all of their compressed keys
    layers: list[Layer] = []
    for ratio in ratios:
        attention = blocks.compressed(
            hidden,
            keys.size("num_attention_heads"),
            keys.size("head_dim"),
            keys.size("q_lora_rank"),
            keys.size("o_groups"),
            keys.size("o_lora_rank"),
            keys.size("sliding_window"),
            ratio,
            index if ratio == finest else (0, 0, 0),
        )
        layers.append(blocks.with_hyper_connections((attention, _deepseek_moe(keys)), hidden, keys.size("hc_mult")))
    return layers


def _nemotron_h(keys: ConfigKeys, kind: str) -> list[Layer]:
    """Nemotron-H and Nemotron 3: one mixer a layer, by the letters of a pattern."""
    hidden = keys.size("hidden_size")
    names = keys.words("layers_block_type") or keys.words("layer_types") or keys.letters("hybrid_override_pattern")
    extra = _nemotron_mtp(keys)
    kinds = [_WORDS.get(name, _LETTERS.get(name, name)) for name in map(str, (*names, *extra))]
    unknown = [name for name in kinds if name not in _LETTERS.values()]
    if unknown or not names:
        raise keys.fault(f"the pattern has {str(unknown[:1])[:40]}", "use M, E, * and -, one for each layer")
    make: dict[str, Callable[[], Any]] = {
        "mamba": lambda: blocks.mamba2(
            hidden, keys.size("mamba_num_heads"), keys.size("mamba_head_dim"), keys.size("ssm_state_size"),
            keys.size("n_groups"), keys.size("conv_kernel"), keys.size("chunk_size"),
        ),
        "moe": lambda: blocks.moe(
            hidden, keys.size("n_routed_experts"),
            _chosen(keys, keys.size("n_routed_experts"), keys.size("num_experts_per_tok")),
            keys.size("moe_intermediate_size"),
            shared_ffn=keys.size("moe_shared_expert_intermediate_size"), gated=False,
            latent=keys.size("moe_latent_size", default=0, least=0),
        ),
        "attention": lambda: _gqa(keys),
        "mlp": lambda: blocks.dense(hidden, keys.size("intermediate_size"), gated=False),
    }  # fmt: skip
    built = {name: make[name]() for name in set(kinds)}
    layers: list[Layer] = [(built[name],) for name in kinds[: len(names)]]
    return layers + ([tuple(built[name] for name in kinds[len(names) :])] if extra else [])


def _nemotron_mtp(keys: ConfigKeys) -> list[Any]:
    """The blocks of its MTP module; files name them even where there are 0 modules."""
    if keys.size("num_nextn_predict_layers", default=1, least=0) == 0:
        return []
    return keys.words("mtp_layers_block_type") or keys.letters("mtp_hybrid_override_pattern")


_FAMILIES: dict[str, Callable[[ConfigKeys, str], list[Layer]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _dense_family),
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"), _deepseek),
    "deepseek_v4": _deepseek_v4,
    "nemotron_h": _nemotron_h,
}
_BYTES = 2**20  # of a config.json


def from_hf(table: Mapping[str, Any], *, where: str = "config.json", name: str = "") -> ModelShape:
    """The shape that a Hugging Face ``config.json`` describes.

    Raises:
        ConfigError: a family that we do not know, or a key that does not hold.
    """
    kind = table.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        todo, inner = f"use a model of one of these: {', '.join(_FAMILIES)}", table.get("text_config")
        if isinstance(inner, Mapping) and str(inner.get("model_type")) in _FAMILIES:  # with images, or sound
            todo = f"its text_config is {inner['model_type']}: save that table as a config.json, and plan that"
        raise ConfigError(f"model_type {str(kind)[:40]!r} is not known", where=where, todo=todo)
    keys = ConfigKeys(table, where)
    layers = _FAMILIES[kind](keys, kind)
    hidden = keys.size("hidden_size")
    streams = keys.size("hc_mult") if kind == "deepseek_v4" else 0
    count = _count_layers(keys, kind, len(layers))
    return ModelShape(
        name or kind,
        hidden,
        keys.size("vocab_size"),
        keys.flag("tie_word_embeddings"),
        tuple(layers[:count]),
        tuple(layers[count:]),
        end_vectors=hidden + streams * streams * hidden + (streams + 1 if streams else 0),
        context=keys.size("max_position_embeddings", default=0, least=0, most=2**40),
        source=where,
        family=kind,
    )


def _count_layers(keys: ConfigKeys, kind: str, built: int) -> int:
    """Decoder layers; what is built beyond them belongs to MTP modules."""
    if kind != "nemotron_h":
        return keys.size("num_hidden_layers", most=_MOST_LAYERS)
    return built - 1 if _nemotron_mtp(keys) else built


def from_config(config: ModelConfig, *, name: str = "") -> ModelShape:
    """The shape of one of our configs."""
    return from_hf(config.to_hf(), where=name or config.architecture, name=name or config.architecture)


@cache
def _published() -> dict[str, dict[str, Any]]:
    return tomllib.loads(MODELS_FILE.read_text(encoding="utf-8"))


def model_names() -> list[str]:
    """Names that ``load_shape`` knows: sizes of ours and published models."""
    return [*size_names(), *_published()]


def load_shape(model: str | Path) -> ModelShape:
    """The shape of a size (``v3``), a published model by name, a ``config.json`` or a folder that has one.

    Raises:
        ConfigError: there is no such model, or its file does not hold.
    """
    name = str(model)
    if name in size_names():
        return from_config(size(name), name=name)
    by_fold = {_fold(each): each for each in _published()}
    if _fold(name) in by_fold:
        title = by_fold[_fold(name)]
        table = dict(_published()[title])
        source = table.pop("source")
        shape = from_hf(table, where=f"{MODELS_FILE.name}: {title}", name=title)
        return ModelShape(**{**shape.__dict__, "source": source if isinstance(source, str) else "; ".join(source)})
    path = Path(model)
    try:
        path = path / "config.json" if path.is_dir() else path
        is_there, why = path.is_file(), f"no model is called {name[:80]!r}"
    except OSError as error:  # too long a name, a folder that may not be entered
        is_there, why = False, f"{name[:80]!r} is no name of a model, and as a path: {error.strerror}"
    if not is_there:
        todo = f"give a folder, a config.json, or one of {', '.join(model_names())}"
        raise ConfigError(why, where="model", todo=todo)
    if path.stat().st_size > _BYTES:
        raise ConfigError(f"it is larger than {_BYTES} bytes", where=str(path), todo="give the model's config.json")
    table = load_json_object(path, ConfigError, problem="cannot be read", todo="give the model's config.json")
    return from_hf(table, where=str(path), name=path.resolve().parent.name or name)


def _fold(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")
