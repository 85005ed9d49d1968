"""The bench against other engines: a figure that it prints is what was measured, and a miss is called a miss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import train_speed
from bench.inference import bars, cores, quality
from bench.inference.harness import Reading, Series, WorkerError, best, rounds
from bench.inference.models import bytes_per_token
from bench.oracles import ROOT, python_of
from sprat import quant
from sprat.config.sizes import size
from sprat.formats import quantized
from sprat.model import Transformer

QUIET, BUSY = {"stolen": 0.0, "others": 0.0}, {"stolen": 0.1, "others": 0.2}


def _reading(rate: float, share: dict[str, float] = QUIET) -> Reading:
    return Reading({"tokens": rate, "seconds": 1.0, "processor": 1.0, "outside": 0.1}, share)


def _series(**rates: list[float]) -> Series:
    return Series({engine: [_reading(rate) for rate in values] for engine, values in rates.items()})


def test_ratios_are_taken_within_a_round_not_between_medians() -> None:
    series = _series(sprat=[300, 30, 200], llama=[100, 10, 200])
    assert series.ratio("sprat", "llama") == 3.0
    assert series.rate("sprat") == 200


def test_disturbed_rounds_are_left_out_while_enough_others_remain() -> None:
    quiet = [_reading(100) for _ in range(3)]
    series = Series({"sprat": [*quiet, _reading(10, BUSY), _reading(10, BUSY), _reading(10, BUSY), _reading(10, BUSY)]})
    assert series.rate("sprat") == 100
    assert series.lost == (4, 7)
    few = Series({"sprat": [_reading(100), *[_reading(10, BUSY) for _ in range(4)]]})
    assert few.rate("sprat") == 10


def test_every_engine_runs_in_every_round_and_no_one_always_goes_first() -> None:
    order: list[str] = []

    def turn(name: str):  # type: ignore[no-untyped-def]
        return lambda number: order.append(name) or _reading(1.0)

    series = rounds(3, {"decode": {"a": turn("a"), "b": turn("b")}}, lambda text: None)["decode"]
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert len(series.readings["a"]) == len(series.readings["b"]) == 3


def test_the_best_setting_wins_and_a_broken_one_is_out() -> None:
    def measure(setting: int) -> Reading:
        if setting == 3:
            raise WorkerError("does not load")
        return _reading(setting)

    assert best([1, 3, 2], measure) == 2
    with pytest.raises(WorkerError, match="does not load"):
        best([3], measure)


def test_divergence_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 100, 50, generator=generator) * 3
    tokens = torch.randint(0, 50, (100,), generator=generator)
    found = quality.compare(p.numpy(), q.numpy(), tokens.tolist())
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum")
    loss = torch.nn.functional.cross_entropy(q[:-1], tokens[1:], reduction="sum")
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert found["same"] == int((p.argmax(-1) == q.argmax(-1)).sum())
    assert quality.compare(p.numpy(), p.numpy(), tokens.tolist())["kl"] == pytest.approx(0, abs=1e-4)


def test_a_missed_bar_says_by_how_much_and_an_unmeasured_one_is_missed() -> None:
    assert bars.Verdict("x", 1.5, 3.0, 4.0).word == "MISSED by 50%"
    assert bars.Verdict("x", 3.0, 3.0, 4.0).word == "passed"
    assert bars.Verdict("x", 5.0, 3.0, 4.0).word == "stretch reached"
    assert bars.Verdict("x", 0.2, 0.1, kind="at most").word == "MISSED by 100%"
    assert not bars.Verdict("x", None, 1.0).passed
    lines = bars.verdicts({}, {}, [1, 2])
    assert not any(line.passed for line in lines)
    assert len(lines) == 21


def test_falling_throughput_under_load_is_seen() -> None:
    loads = {f"load {count}": _series(sprat=[rate] * 3) for count, rate in ((1, 100), (4, 300), (16, 290), (64, 400))}
    verdict = bars._load(loads)
    assert not verdict.passed
    assert verdict.figure == pytest.approx(290 / 300)


def test_bytes_of_a_token_count_the_experts_at_work_and_one_row_of_the_embedding(tmp_path: Path) -> None:
    model = quant.quantize_model(Transformer.create(size("pico", n_routed_experts=8, num_experts_per_tok=2), 0))
    quantized.save(model, tmp_path / "sprat")
    tensors = model.state_dict()
    experts = sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    table = sum(t.nbytes for name, t in tensors.items() if name.startswith("embed_tokens."))
    rest = sum(t.nbytes for t in tensors.values()) - experts - table
    config = model.config
    width = (config.kv_lora_rank + config.qk_rope_head_dim) * 2 * config.num_hidden_layers
    expected = rest + experts / 4 + table / config.vocab_size
    assert bytes_per_token(tmp_path, 0) == pytest.approx(expected, abs=1)
    assert bytes_per_token(tmp_path, 100) - bytes_per_token(tmp_path, 0) == 100 * width


def test_a_neighbour_on_our_core_is_noticed() -> None:
    core = cores.choose(1)
    watch = cores.Watch(core)
    code = f"import os, time; os.sched_setaffinity(0, {core}); end = time.time() + 0.5\nwhile time.time() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert cores.disturbed(watch.read(processor=0.0))


def _written(folder: Path, name: str) -> Transformer:
    """A small model of the bench's kind, written as it writes the large one: ``model.gguf``."""
    from bench.inference import gguf_out

    if name == "moe":
        config = size("pico", vocab_size=320, n_routed_experts=8, num_experts_per_tok=2, initializer_range=0.1)
    else:
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = size("pico").__class__(architecture="llama", vocab_size=320, num_key_value_heads=2, **shape)
    model = Transformer.create(config, 0)
    tokens = [*map(chr, range(0x100, 0x200)), *(f"<{i}>" for i in range(64))]
    vocabulary = {"tokens": tokens, "types": [1] * 256 + [3] * 64, "merges": ["Ā ā"], "pre": "smollm", "eos": 256}
    gguf_out.write(model, vocabulary, folder / "model.gguf")
    return model


WINDOW = torch.randint(0, 320, (48,), generator=torch.Generator().manual_seed(1))


def test_the_file_for_the_other_engine_holds_our_model(tmp_path: Path) -> None:
    """Runs everywhere: transformers with what the ``gguf`` package finds in llama.cpp's file gives our logits."""
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    model = _written(tmp_path, "dense")
    c, held = model.config, {one.name: one.data.copy() for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    shape = {"num_key_value_heads": c.kv_heads, "vocab_size": c.vocab_size, "tie_word_embeddings": False}
    shape |= {"rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{n: getattr(c, n) for n in names}, **shape))
    renamed = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
               "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
               "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
               "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
               "model.layers": "blk"}  # fmt: skip
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            for old, new in renamed.items():
                name = name.replace(old, new)
            rows = torch.from_numpy(held[name if name in held else "token_embd.weight"])
            if "attn_q" in name or "attn_k" in name:  # llama.cpp turns neighbours, transformers halves
                rows = rows.view(-1, c.attention_head_dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
            weight.copy_(rows)
        difference = (theirs(input_ids=WINDOW[None]).logits - model(WINDOW[None])).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_llama_cpp_computes_our_logits_from_the_file_that_we_write(tmp_path: Path, name: str) -> None:
    """What is compared runs the same model: float32 logits agree, absorbed attention and routing included.

    Only where ``python -m bench.oracles`` has compiled llama.cpp, as it is before every run of the bench; ``make test``
    does not.
    """
    pytest.importorskip("gguf")
    python = python_of("llama")
    if not python.is_file():
        pytest.skip("llama.cpp is not built (python -m bench.oracles)")
    model = _written(tmp_path, name)
    window = WINDOW
    with torch.no_grad():
        np.save(tmp_path / "reference.npy", model(window[None])[0].numpy())
    command = {"do": "agree", "setting": [False, False, False, 1], "tokens": window.tolist()}
    command["reference"] = str(tmp_path / "reference.npy")
    worker = [str(python), "-m", "bench.inference.llama_worker", str(cores.choose(1)[0]), str(tmp_path / "model.gguf")]
    done = subprocess.run(
        worker, input=json.dumps(command), capture_output=True, text=True, env={**os.environ}, check=True,
        cwd=ROOT,
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["largest"] < 1e-3, answer


def test_what_the_training_bench_needs_is_said_by_name() -> None:
    """Not by a traceback out of transformers' Trainer."""
    code = """
import importlib.util, sys
known = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "accelerate" else known(name, *rest)
from bench import train_speed
sys.argv = ["train_speed", "--quick"]
sys.exit(train_speed.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 9 and "pip install accelerate" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("seconds", "a_step", "steps"), [(60, 0.5, 5), (60, 3.0, 3), (20, 3.0, 1), (-222, 3.0, 1)])
def test_a_slow_machine_measures_fewer_steps_of_training(seconds: float, a_step: float, steps: int) -> None:
    """Four competitors, each with two steps to warm up: what is measured fits into the time, but for one step each."""
    assert train_speed.steps_within(seconds, a_step, 4, 5) == steps
    assert steps == 1 or 4 * (steps + 2) * a_step <= seconds
