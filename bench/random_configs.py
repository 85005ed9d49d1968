"""Random small models against transformers, both ways, and against our own native engine.

A seeded generator draws a config: DeepSeek-V2 and V3, Llama, Mistral, Qwen2 or Qwen3; groups of experts with each
way of choosing; sliding windows; widths that no register likes; tied heads; biases; YaRN, linear and Llama-3 stretching
of positions. For each, a folder that we save must load in transformers without a word and give the same logits; the
folder that transformers saves must load here with the same logits and without a warning. For every third, the native
engine must give the model's logits, in steps of several lengths over paged memory, and a model rounded to INT4 or INT8
must survive the way through its folder and run natively. Weights have ten times the usual deviation and norms and
biases are random, so that nothing hides in small numbers.

Transformers itself cannot compute some widths: Llama and V2 want hidden sizes of whole heads, V2 even latents.

    python -m bench.random_configs [--count 300] [--quick] [--first 0] [--seed 0] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from sprat.config import QuantConfig
from sprat.config.model import HF_CLASS, ModelConfig
from sprat.engine.backend import BLOCK_SIZE, Batch
from sprat.engine.backends.native import NativeBackend
from sprat.formats import quantized
from sprat.formats.hf import load_folder, save_folder
from sprat.kernels import native
from sprat.model import Transformer
from sprat.quant import quantize_model

BAR = 1e-4  # largest difference of logits
INT_BAR = 0.25  # of a native step whose inputs are rounded to eight bits: a step that is wrong is far beyond
TOKENS = 23
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}  # its other ways want rows of 16 bytes
Draw = random.Random


def draw_config(draw: Draw) -> ModelConfig:
    """One config of any family."""
    family = draw.choice(list(HF_CLASS))
    layers = draw.randint(1, 3)
    table: dict[str, Any] = {
        "architecture": family,
        "vocab_size": draw.randint(11, 60),
        "intermediate_size": draw.choice((5, 7, 16, 23, 33, 40)),
        "num_hidden_layers": layers,
        "rope_theta": draw.choice((100.0, 10000.0, 1e6)),
        "rope_scaling": _scaling(draw, family),
        "rms_norm_eps": draw.choice((1e-6, 1e-5)),
        "tie_word_embeddings": draw.random() < 0.4,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": draw.choice((2, [2, 3])),
    }
    table |= _latent(draw, family, layers) if family.startswith("deepseek") else _grouped(draw, family, layers)
    return ModelConfig(**table)


def _scaling(draw: Draw, family: str) -> dict[str, Any] | None:
    """Stretched positions; the original context is short enough that the tokens reach beyond it."""
    yarn: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    choices: list[dict[str, Any] | None] = [
        None,
        yarn,
        yarn | {"beta_fast": 16, "beta_slow": 2},
        yarn | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
        yarn | {"attention_factor": 1.2},
    ]
    if not family.startswith("deepseek"):
        llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
        choices += [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "llama3", "factor": 8.0, **llama3}]
    return draw.choice(choices)


def _latent(draw: Draw, family: str, layers: int) -> dict[str, Any]:
    """What DeepSeek's models have."""
    three, heads = family == "deepseek_v3", draw.choice((1, 2, 3))
    groups, each = draw.choice((1, 2, 4)), draw.randint(2, 4)
    kept = draw.randint(1, groups)
    return {
        "hidden_size": draw.choice((9, 14, 16, 27, 32)) if three else heads * draw.choice((5, 9, 11, 16)),
        "num_attention_heads": heads,
        "moe_intermediate_size": draw.choice((3, 5, 8, 11, 16)),
        "q_lora_rank": draw.choice((None, 5, 16)),
        "kv_lora_rank": draw.choice((3, 5, 12, 16) if three else (2, 6, 12, 16)),
        "qk_nope_head_dim": draw.choice((3, 4, 6) if three else (2, 4, 6)),
        "qk_rope_head_dim": draw.choice((2, 4, 6)),
        "v_head_dim": draw.choice((3, 5, 8)),
        "rope_interleave": draw.random() < 0.5 if three else True,
        "attention_bias": draw.random() < 0.5,
        "n_routed_experts": groups * each,
        "n_shared_experts": draw.randint(1, 3),
        "num_experts_per_tok": draw.randint(1, min(3, kept * each)),
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": three and draw.random() < 0.5,
        "routed_scaling_factor": draw.choice((1.0, 2.5)),
        "scoring_func": "sigmoid" if three else "softmax",
        "topk_method": "noaux_tc" if three else draw.choice(("greedy", "group_limited_greedy")),
        "first_k_dense_replace": draw.randint(0, layers),
    }


def _grouped(draw: Draw, family: str, layers: int) -> dict[str, Any]:
    """What models with grouped-query attention have."""
    groups, each = draw.randint(1, 3), draw.randint(1, 3)
    width = draw.choice((2, 4, 6, 10, 16))
    table: dict[str, Any] = {
        "num_attention_heads": groups * each,
        "num_key_value_heads": groups,
        "hidden_size": groups * each * (width if family == "qwen2" else draw.choice((3, 5, 7, 8))),
        "head_dim": width,
        "attention_bias": family == "qwen2" or (family != "mistral" and draw.random() < 0.5),
    }
    if family != "llama" and draw.random() < 0.6:
        table["sliding_window"] = draw.choice((1, 3, 8, 19))
        if family != "mistral":
            sliding = {draw.randrange(layers), draw.randrange(layers)}
            kinds = ("full_attention", "sliding_attention")
            table["layer_types"] = [kinds[layer in sliding] for layer in range(layers)]
    return table


def disturb(model: torch.nn.Module, seed: int) -> None:
    """Random values for what starts at zero or one: biases, gains and the router's correction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 and "inv_freq" not in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)


class Disagreement(Exception):
    """Two models that should be one are not."""


def near(what: str, ours: torch.Tensor, theirs: torch.Tensor, bar: float = BAR) -> float:
    """The largest difference; Disagreement where it is beyond ``bar`` or no number."""
    apart = float((ours - theirs).abs().max())
    if not apart <= bar:
        raise Disagreement(f"{what}: logits {apart:.2e} apart, the largest is {float(theirs.abs().max()):.2e}")
    return apart


@torch.no_grad()
def try_one(config: ModelConfig, seed: int, engine: bool) -> float:
    """Compare one config every way; the largest difference to transformers.

    Raises:
        Disagreement: with what disagreed.
    """
    import transformers

    kind = getattr(transformers, HF_CLASS[config.architecture])
    tokens = torch.randint(config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    ours = Transformer.create(config, seed).eval()
    disturb(ours, seed)
    logits = ours(tokens)
    with tempfile.TemporaryDirectory() as folder:
        save_folder(ours, folder)
        theirs, told = kind.from_pretrained(folder, output_loading_info=True, **PLAIN)
    if any(told.values()):
        raise Disagreement(f"what we save, transformers reads with complaints: {told}")
    apart = near("what we save", logits, theirs.eval()(input_ids=tokens).logits.float())
    torch.manual_seed(seed)
    table = {key: value for key, value in config.to_hf().items() if key not in ("architectures", "model_type")}
    theirs = kind(kind.config_class(**table, **PLAIN)).eval()
    disturb(theirs, seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        read, _ = load_folder(folder)
    apart = max(apart, near("what transformers saves", read(tokens), theirs(input_ids=tokens).logits.float()))
    if engine:
        try_engine(ours, tokens, seed)
    return apart


def try_engine(model: Transformer, tokens: torch.Tensor, seed: int) -> None:
    """The native engine against the model, in floats and with rounded weights.

    Raises:
        Disagreement: they are apart, or rounded weights do not survive their folder.
    """
    if native() is not None:
        near("the native engine", native_logits(model, tokens), model(tokens))
    small = quantize_model(model, QuantConfig(bits=4 if seed % 2 else 8))
    with tempfile.TemporaryDirectory() as folder:
        quantized.save(small, folder)
        again = quantized.load(folder)
    if not torch.equal(small(tokens), again(tokens)):
        raise Disagreement("a quantised folder does not come back to the bit")
    if native() is not None and not model.moe_layers():  # rounded inputs may choose another expert
        expected = small(tokens)
        near("the native engine, quantised", native_logits(again, tokens), expected, INT_BAR * float(expected.norm()))


def native_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] by the native engine, both rows in one batch, in three steps."""
    import numpy as np

    backend, rows, time = NativeBackend(model, threads=1), *tokens.shape
    blocks = -(-time // BLOCK_SIZE)
    backend.reserve(rows * blocks)
    tables = np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)
    parts = []
    for first, last in ((0, time // 2), (time // 2, time // 2 + 1), (time // 2 + 1, time)):
        count = last - first
        arrays = (
            tokens[:, first:last].flatten().numpy(), np.tile(np.arange(first, last), rows),
            np.arange(rows + 1) * count, tables, np.arange(rows * count),
        )  # fmt: skip
        batch = Batch(*(np.ascontiguousarray(array, dtype=np.int32) for array in arrays))
        parts.append(backend.run(batch).clone().view(rows, count, -1))
    return torch.cat(parts, 1)


def configs(count: int, seed: int, first: int = 0) -> Iterator[tuple[int, ModelConfig]]:
    """Configs ``first`` … ``first + count - 1`` of ``seed``; each depends on (seed, number) alone."""
    for number in range(first, first + count):
        yield number, draw_config(random.Random(f"{seed}:{number}"))


def run(count: int, seed: int, first: int = 0) -> dict[str, Any]:
    """Try ``count`` configs; what was found."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    faults: list[dict[str, Any]] = []
    worst, families = 0.0, Counter[str]()
    for number, config in configs(count, seed, first):
        families[config.architecture] += 1
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*not understood.*|.*is not used.*")
                worst = max(worst, try_one(config, number, number % 3 == 0))
        except Exception as error:  # whatever it is, the next config is tried too
            what = f"{type(error).__name__}: {str(error)[:300]}"
            faults.append({"number": number, "what": what, "config": config.model_dump(mode="json")})
    return {
        "configs": count, "seed": seed, "families": dict(families), "worst": worst, "bar": BAR, "faults": faults,
        "verdict": "missed" if faults else "held",
    }  # fmt: skip


def main() -> int:
    """Command line; 1 where the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="60 configs")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    found = run(60 if options.quick else options.count, options.seed, options.first)
    found["seconds"] = round(time.monotonic() - began, 1)
    if options.json:
        print(json.dumps(found))
    else:
        for fault in found["faults"]:
            print(f"config {fault['number']}: {fault['what']}\n  {fault['config']}", file=sys.stderr)
        print(
            f"{found['configs']} random configs, both ways: {len(found['faults'])} faults (bar: 0 at {BAR:g}), worst "
            f"{found['worst']:.1e}, {found['seconds']} s: {found['verdict']}"
        )
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
