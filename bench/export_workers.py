"""What other runtimes make of our folders: transformers with compressed-tensors, and vLLM on a CPU.

Each runs in an environment of its own (``bench.oracles``) and answers as ``bench.inference.protocol`` says, so nothing
of Sprat is imported here.

    PYTHON -m bench.export_workers transformers|vllm
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from bench.inference.protocol import serve


def _transformers() -> None:
    """Weights and logits of folders, packed ones multiplied out; and a matrix packed by compressed-tensors itself."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()

    def load(path: str, dequantize: bool) -> Any:
        options: dict[str, Any] = {"dtype": torch.float32}
        if dequantize:
            options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
        return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()

    def compare(dense: str, packed: str, tokens: list[int], multiplied_out: bool) -> dict[str, float]:
        """How many weights of two folders differ, of how many, and the largest difference of logits."""
        ids = torch.tensor([tokens])
        one, other = load(dense, False), load(packed, multiplied_out)
        with torch.no_grad():
            logits = [model(ids).logits for model in (one, other)]  # what is packed is unpacked by the first call
        mine, theirs = one.state_dict(), other.state_dict()
        differ = sum(name not in theirs or not torch.equal(mine[name], theirs[name].float()) for name in mine)
        return {"weights": len(mine), "differ": differ, "logits": float((logits[0] - logits[1]).abs().max())}

    def pack(folder: str, bits: int, group: int, symmetric: bool, seed: int) -> None:
        """Replace a Llama folder's matrices by what compressed-tensors makes of them; ``.want`` is what it reads."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
        from safetensors.torch import load_file, save_file

        generator, path = torch.Generator().manual_seed(seed), Path(folder)
        args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=group)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        tensors, want = load_file(path / "model.safetensors"), {}
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight, stem = tensors.pop(name), name.removesuffix("weight")
            shape = (weight.shape[0], weight.shape[1] // group)
            state = {"weight": weight, "weight_scale": (torch.rand(shape, generator=generator) / 8 + 0.01).bfloat16()}
            if not symmetric:
                reach = 1 << (bits - 1) if bits == 4 else 20
                state["weight_zero_point"] = torch.randint(-reach, reach, shape, generator=generator).to(torch.int8)
            packed = compressor.compress(state, scheme)
            wide = {**packed, "weight_scale": packed["weight_scale"].float()}
            want[name] = compressor.decompress(wide, scheme)["weight"].float().contiguous()
            tensors |= {stem + leaf: value.contiguous() for leaf, value in packed.items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        save_file(want, path.with_suffix(".want"))
        how = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"])
        config = transformers.AutoConfig.from_pretrained(path)
        config.quantization_config = {**how.model_dump(mode="json"), "quantization_status": "compressed"}
        config.save_pretrained(path)

    serve({"compare": compare, "pack": pack})


def _vllm() -> None:
    """Log-probs of tokens, by vLLM on this machine's cores."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

    def log_probs(path: str, dtype: str, windows: list[list[int]]) -> list[list[float]]:
        """Of each window's tokens but the first."""
        import vllm

        model = vllm.LLM(path, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=2, seed=0)
        settings = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        prompts = [{"prompt_token_ids": window} for window in windows]
        answers = model.generate(prompts, settings, use_tqdm=False)
        return [
            [place[token].logprob for place, token in zip(answer.prompt_logprobs[1:], window[1:], strict=True)]
            for answer, window in zip(answers, windows, strict=True)
        ]

    serve({"log_probs": log_probs})


if __name__ == "__main__":
    {"transformers": _transformers, "vllm": _vllm}[sys.argv[1]]()
