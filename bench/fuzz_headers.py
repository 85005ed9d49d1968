"""Foreign headers, broken on purpose: each must end in one sentence or in a sound header, soon and in little memory.

Small sound files (GGUF of a dense and of a mixture model, safetensors) are changed by a seeded generator: bits
flipped, numbers replaced by ones that overflow, parts cut out, doubled, moved, or taken from another file; or the
file stays well-formed and says absurd things: keys and shapes of other values and types. Each result is read as
`sprat.load` reads it, up to the point where tensors would be decoded: header, config, vocabulary, and the plan that
compares every name and shape. Whatever is raised must be a `CheckpointError` that names the file, within the time
bound, in a process whose address space is bounded. Every input depends on (seed, number) alone, so a finding is
repeated by its number.

    python -m bench.fuzz_headers [--inputs 200000] [--quick] [--first 0] [--seed 0] [--json]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from sprat.config.model import ModelConfig
from sprat.errors import CheckpointError

SECONDS = 2.0  # of CPU time, most for one input; that a busy machine stalls is no fault, a process that hangs is
MEMORY = 4 << 30  # address space of the process; torch alone maps over one GiB
GROWTH_MB = 256  # of resident memory, over all inputs
CHUNK = 20_000  # inputs of one process
NUMBERS = (0, 1, 2, 3, 7, 8, 9, 31, 32, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62)
NUMBERS += ((1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 32)
WORDS = (
    b"llama",
    b"qwen2",
    b"deepseek2",
    b"gpt2",
    b"Q4_0",
    b"null",
    b"-1",
    b"1e99",
    b"[[[[[[[[",
    b'"',
    b"{}",
    b"\xff\xfe",
)


def gguf_bytes(meta: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> bytes:
    """A GGUF file of ``meta`` (str, int, float, bool, lists of str or int) and (shape, type number, bytes) tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(of: Any) -> bytes:
        if isinstance(of, bool):
            return struct.pack("<I?", 7, of)
        if isinstance(of, str):
            return struct.pack("<I", 8) + text(of)
        if isinstance(of, list):
            of = of or [0]
            rows = [text(each) if isinstance(each, str) else struct.pack("<i", each) for each in of]
            return struct.pack("<IIQ", 9, 8 if isinstance(of[0], str) else 5, len(of)) + b"".join(rows)
        return struct.pack("<If", 6, of) if isinstance(of, float) else struct.pack("<II", 4, of)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    head += b"".join(text(key) + value(of) for key, of in meta.items())
    data = b""
    for name, (shape, kind, content) in tensors.items():
        data += bytes(-len(data) % 32)
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += content
    return head + bytes(-len(head) % 32) + data


Meta = dict[str, Any]
Rows = dict[str, tuple[tuple[int, ...], int, bytes]]
Sound = tuple[str, bytes, Meta, Rows]  # kind, bytes, and for a GGUF file what they are made of


def seeds() -> list[Sound]:
    """Sound files."""
    import torch
    from safetensors.torch import save

    from sprat.formats.gguf.names import file_name
    from sprat.model import Transformer

    letters = [chr(97 + n) for n in range(20)]
    words: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|im_end|>", *letters, "ab"], "tokenizer.ggml.token_type": [3, *[1] * 21],
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip
    shape = {"context_length": 64, "embedding_length": 32, "feed_forward_length": 32, "attention.head_count": 2}
    shape |= {"block_count": 1, "attention.layer_norm_rms_epsilon": 1e-5}
    latent = {
        "attention.kv_lora_rank": 8, "attention.key_length": 12, "attention.value_length": 8, "expert_used_count": 2,
        "rope.dimension_count": 4, "expert_count": 4, "expert_shared_count": 1, "expert_feed_forward_length": 8,
        "expert_gating_func": 2, "expert_weights_norm": True, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16, "rope.scaling.yarn_log_multiplier": 0.1,
    }  # fmt: skip
    small = {
        "vocab_size": 22,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    dense = ModelConfig(architecture="llama", tie_word_embeddings=True, **small)
    mixed = ModelConfig(
        kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, moe_intermediate_size=8,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, **small,
    )  # fmt: skip
    found: list[Sound] = []
    for arch, config, more in (("llama", dense, {}), ("deepseek2", mixed, latent)):
        state = Transformer.create(config, 0).state_dict()
        tied = config.tie_word_embeddings
        rows = {
            file_name(name, config): (tuple(tensor.shape), 0, tensor.float().numpy().tobytes())
            for name, tensor in state.items()
            if not (tied and name == "head.weight")
        }
        if arch == "llama":
            rows["blk.0.ffn_up.weight"] = ((32, 32), 2, bytes(18 * 32))  # Q4_0
        keys = {f"{arch}.{key}": value for key, value in {**shape, **more}.items()}
        meta = {"general.architecture": arch, **keys, **words}
        found.append(("gguf", gguf_bytes(meta, rows), meta, rows))
    plain = {"a": torch.zeros(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0)}
    found.append(("safetensors", save(plain), {}, {}))
    return found


def absurd(draw: random.Random, meta: Meta, rows: Rows) -> bytes:
    """A well-formed GGUF file whose keys or shapes say what no model says."""
    meta, rows = dict(meta), dict(rows)
    for _ in range(draw.choice((1, 1, 2, 4))):
        way, key, name = draw.randrange(5), draw.choice(sorted(meta)), draw.choice(sorted(rows))
        number = draw.choice((*NUMBERS, 5, 12, 16, 24, 64)) & 0xFFFFFFFF
        texts = ["", "\x00", "a b", "▁", "<|im_end|>", "x" * 5000, "[1]", "{{ x }}", "yarn", "linear"]
        if way == 0:
            meta[key] = draw.choice(
                (number, float(draw.choice((0, -1, "nan", "inf", 1e-30, 1e30))), draw.choice(texts))
            )
        elif way == 1:
            meta[key] = draw.choice(([number & 0x7FFF] * draw.randrange(1, 9), [draw.choice(texts)] * 3, True, False))
        elif way == 2 and isinstance(meta[key], list):
            meta[key] = [draw.choice((each, meta[key][0])) for each in meta[key]] + meta[key][: draw.randrange(3)]
        elif way == 3:
            meta.pop(key)
        else:
            shape, kind, content = rows.pop(name)
            shape = tuple(draw.choice((size, size * 2, 1, 32, 256)) for size in shape)
            if draw.random() < 0.8:
                kind = draw.choice((0, 0, 1, 2, 3, 8, 12, 14, 30))
                rows[draw.choice((name, draw.choice(sorted(rows)), "rope_freqs.weight", "output.weight"))] = (
                    shape, kind, content.ljust(min(4 * math.prod(shape), 1 << 18), b"\x3c"),
                )  # fmt: skip
    return gguf_bytes(meta, rows)


def mutated(files: list[Sound], seed: int, number: int) -> tuple[str, bytes]:
    """Input ``number`` of ``seed``: (kind, bytes)."""
    draw = random.Random(f"{seed}:{number}")
    kind, content, meta, rows = draw.choice(files)
    if meta and draw.random() < 0.4:
        return kind, absurd(draw, meta, rows)
    data = bytearray(content)
    header = max(64, len(data) - 3000) if draw.random() < 0.9 else len(data)  # most of what matters comes first
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        at = draw.randrange(min(header, max(1, len(data)))) if data else 0
        span = draw.choice((1, 4, 8, 24, draw.randrange(1, 400)))
        way = draw.randrange(8)
        if way == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif way == 1:
            data[at : at + 8] = struct.pack("<Q", draw.choice(NUMBERS))
        elif way == 2:
            data[at : at + 4] = struct.pack("<I", draw.choice(NUMBERS) & 0xFFFFFFFF)
        elif way == 3:
            del data[at : at + span]
        elif way == 4:
            data[at:at] = data[at : at + span]
        elif way == 5:
            other = draw.choice(files)[1]
            start = draw.randrange(len(other))
            data[at : at + span] = other[start : start + span]
        elif way == 6:
            data[at : at + draw.choice((0, 4))] = draw.choice((*WORDS, str(draw.choice(NUMBERS)).encode()))
        else:
            del data[draw.randrange(len(data) + 1) :]
    return kind, bytes(data)


def read(kind: str, path: Path) -> None:
    """Read ``path`` as ``sprat.load`` does, up to the tensors."""
    import torch

    from sprat.formats.gguf import weights
    from sprat.formats.gguf.config import read_config
    from sprat.formats.gguf.header import read_header
    from sprat.formats.gguf.tokenizer import read_tokenizer
    from sprat.formats.safetensors import Shards

    if kind == "safetensors":
        shards = Shards([path])
        for name in shards.entries:
            shards.read(name)
        return
    header = read_header(path)
    config = read_config(header)
    weights.LoadPlan(weights.empty_model(header, config), header, torch.float32)
    read_tokenizer(header)


def work(seed: int, first: int, count: int) -> dict[str, Any]:
    """Try inputs ``first`` … ``first + count - 1`` in this process."""
    files, faults, ends = seeds(), [], Counter[str]()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input"
        for kind, content, *_ in files:
            path.write_bytes(content)
            read(kind, path)  # sound files must be read
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(first, first + count):
            kind, content = mutated(files, seed, number)
            path.write_bytes(content)
            began = time.process_time()
            try:
                read(kind, path)
                ends["sound"] += 1
            except CheckpointError as error:
                ends["refused"] += 1
                if str(path) not in error.where:
                    faults.append([number, f"no file named: {error}"])
            except BaseException as error:  # a panic of a library is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                faults.append([number, f"{type(error).__name__}: {str(error)[:200]}"])
            took = time.process_time() - began
            if number % 200 == 0:
                gc.collect()  # modules are full of cycles; what grows is then what stays
            slowest = max(slowest, took)
            if took > SECONDS:
                faults.append([number, f"{took:.1f} s"])
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > GROWTH_MB:
        faults.append([first, f"memory grew by {grown:.0f} MB"])
    return {**ends, "faults": faults, "slowest_s": round(slowest, 3), "grown_mb": round(grown)}


def run(inputs: int, seed: int, first: int = 0) -> dict[str, Any]:
    """Try ``inputs`` inputs in processes of ``CHUNK`` each; a process that dies or hangs is a fault too."""
    total: Counter[str] = Counter()
    faults: list[Any] = []
    slowest, grown = 0.0, 0
    for start in range(first, first + inputs, CHUNK):
        count = min(CHUNK, first + inputs - start)
        command = [sys.executable, "-m", "bench.fuzz_headers", "--worker", str(seed), str(start), str(count)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600 + count * SECONDS / 10)
            told = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
            how = (
                "hangs"
                if isinstance(error, subprocess.TimeoutExpired)
                else f"ends {done.returncode}: {done.stderr[-300:]}"
            )
            faults.append([start, f"the process of {count} inputs {how}"])
            continue
        total.update({key: told.get(key, 0) for key in ("sound", "refused")})
        faults += told["faults"]
        slowest, grown = max(slowest, told["slowest_s"]), max(grown, told["grown_mb"])
    return {"inputs": inputs, "seed": seed, **total, "slowest_s": slowest, "grown_mb": grown, "faults": faults}


def main() -> int:
    """Command line; 1 where an input was not handled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--quick", action="store_true", help="2,000 inputs")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=3, type=int, metavar=("SEED", "FIRST", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(*options.worker)))
        return 0
    began = time.monotonic()
    found = run(2_000 if options.quick else options.inputs, options.seed, options.first)
    found["seconds"] = round(time.monotonic() - began)
    if options.json:
        print(json.dumps(found))
    else:
        for number, why in found["faults"][:20]:
            print(f"input {number}: {why}")
        verdict = "MISSED" if found["faults"] else "met"
        print(
            f"bar: no crash, no hang, one sentence each: {verdict}; {found['inputs']:,} inputs, "
            f"{found.get('refused', 0):,} refused, {found.get('sound', 0):,} sound, slowest {found['slowest_s']} s, "
            f"memory +{found['grown_mb']} MB, {len(found['faults'])} faults, {found['seconds']} s"
        )
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
