"""Adapters beside one model: each request is answered as by its merged model, and who has none is not touched."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sprat
from sprat.config.model import LoRAConfig
from sprat.engine import Engine, Sampling
from sprat.engine.adapter import load_adapters
from sprat.engine.backend import Backend
from sprat.engine.backends.native import NativeBackend
from sprat.engine.backends.torch import TorchBackend
from sprat.errors import CheckpointError, ConfigError, EngineError, SpratError
from sprat.formats.hf import load_folder
from sprat.formats.peft import load_peft, save_peft
from sprat.kernels import native
from sprat.model import Transformer
from sprat.model.lora import adapters, add_lora, merge_lora
from sprat.quant import quantize_model
from sprat.quant.layers import dequantize_model
from sprat.tokens import Tokenizer
from tests.unit.kernels.test_step import batch_of, model_of, tokens_of, truth

BACKENDS = ["torch", *(["native"] if native() is not None else [])]
GREEDY = Sampling(temperature=0, max_tokens=12)
PLAIN, FIRST, SECOND = -1, 0, 1


def backend_of(kind: str, model: Transformer, folders: dict[str, Path] | None = None, blocks: int = 8) -> Backend:
    own = load_adapters(model, folders or {})
    backend: Backend = TorchBackend(model, own) if kind == "torch" else NativeBackend(model, threads=2, adapters=own)
    backend.reserve(blocks)
    return backend


def save_adapter(model: Transformer, folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter of all linears of ``model`` that changes a lot."""
    model = copy.deepcopy(model)
    add_lora(model, LoRAConfig(**{"rank": 4, "alpha": 12, **settings}), seed)
    generator = torch.Generator().manual_seed(seed)
    for low_rank in adapters(model).values():
        low_rank.lora_B.data.copy_(torch.randn(low_rank.lora_B.shape, generator=generator) * 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT would not read
        save_peft(model, folder)
    return folder


def save_two(model: Transformer, folder: Path) -> dict[str, Path]:
    """Two adapters of different rank, scale and targets."""
    second = save_adapter(model, folder / "second", 2, rank=7, rslora=True, targets=("o_proj", "down_proj", "up_proj"))
    return {"first": save_adapter(model, folder / "first", 1), "second": second}


def merged(model: Transformer, folder: Path) -> Transformer:
    model = copy.deepcopy(model)
    load_peft(model, folder)
    merge_lora(model)
    return model


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("family", ["qwen2", "v3-yarn"])
def test_each_row_of_a_batch_is_its_own_model(family: str, bits: int, kind: str, tmp_path: Path) -> None:
    """Plain rows to the bit as without adapters; the others as the merged model, as near as the base is to itself."""
    model = model_of(family)
    folders = save_two(model, tmp_path)
    if bits == 4:
        model = quantize_model(model)
    dense = dequantize_model(model) if bits == 4 else model
    texts, tables = [tokens_of(70, seed) for seed in range(4)], [[0, 5], [2, 3], [4, 1], [6, 7]]
    mixed = batch_of(*((text, 0) for text in texts), tables=tables)
    mixed = replace(mixed, adapters_S=np.array([PLAIN, FIRST, SECOND, PLAIN], np.int32))
    logits = backend_of(kind, model, folders).run(mixed).split(70)
    alone = backend_of(kind, model).run(batch_of((texts[0], 0), (texts[3], 0), tables=[tables[0], tables[3]]))
    assert torch.equal(torch.cat((logits[0], logits[3])), alone)

    def error(row: int, oracle: Transformer) -> float:
        expected = truth(oracle, texts[row])
        return float(((logits[row] - expected).norm(dim=1) / expected.norm(dim=1)).median())

    near = 1e-5 if bits == 32 or kind == "torch" else 2 * max(error(0, dense), error(3, dense))
    assert near < 0.1
    for row, name in ((1, "first"), (2, "second")):
        assert error(row, merged(dense, folders[name])) < near
        assert error(row, dense) > 5 * near, "the adapter changes what is said"


@pytest.mark.skipif(native() is None, reason="bits are promised natively only")
@pytest.mark.parametrize("family", ["llama", "v3"])
def test_a_row_with_an_adapter_depends_on_nothing_else(family: str, tmp_path: Path) -> None:
    """However it is cut into steps, and whoever is beside it."""
    model = quantize_model(model_of(family))
    backend = backend_of("native", model, save_two(model_of(family), tmp_path), blocks=30)
    text, other = tokens_of(600), tokens_of(90, 1)
    tables = [list(range(10)), [*range(10, 12), *[-1] * 8], [*range(12, 14), *[-1] * 8]]
    company = batch_of((text, 0), (other, 0), (other, 0), tables=tables)
    whole = backend.run(replace(company, adapters_S=np.array([FIRST, SECOND, PLAIN], np.int32)))[:600]
    parts, at = [], 0
    for count in (64, 1, 1, 5, 300, 229):
        cut = batch_of((text[at : at + count], at), tables=[list(range(14, 24))])
        parts.append(backend.run(replace(cut, adapters_S=np.array([FIRST], np.int32))))
        at += count
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", BACKENDS)
def test_prediction_modules_draft_as_those_of_the_merged_model(kind: str, tmp_path: Path) -> None:
    model = model_of("mtp")
    folders = save_two(model, tmp_path)
    backend, texts = backend_of(kind, model, folders), [tokens_of(20, seed) for seed in range(3)]
    ends = [19, 39, 59]
    mixed = batch_of(*((text, 0) for text in texts), tables=[[0], [1], [2]], wanted=ends)
    mixed = replace(mixed, adapters_S=np.array([FIRST, PLAIN, SECOND], np.int32))
    following = np.array([*(token for text in texts for token in [*text[1:], 7])], np.int64)
    backend.argmax(mixed, 203)
    drafts = backend.draft(mixed, following, 203)
    for row, oracle in enumerate((merged(model, folders["first"]), model, merged(model, folders["second"]))):
        single, own = backend_of(kind, oracle), batch_of((texts[row], 0), tables=[[0]], wanted=[19])
        single.argmax(own, 203)
        assert single.draft(own, following[20 * row : 20 * row + 20], 203).tolist() == drafts[row : row + 1].tolist()


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("speculate", ["off", "ngram", "mtp"])
def test_requests_choose_their_adapter_by_name(
    kind: str, speculate: Any, drafter: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """One prompt, asked of all at once and twice over: everyone answers as its own merged model."""
    folders = save_two(drafter, tmp_path)
    engine = Engine(drafter, tokenizer, backend=backend_of(kind, drafter, folders), frozen=True, speculate=speculate)
    prompt = tokenizer.encode("the cat sat on the mat; " * 6)
    names = [None, "first", "second", "first", None]
    outputs = [engine.generate([prompt] * 5, GREEDY, adapter=names) for _ in range(2)][1]
    answers: dict[str | None, list[int]] = {}
    for name in (None, "first", "second"):
        oracle = drafter if name is None else merged(drafter, folders[name])
        answers[name] = (
            Engine(oracle, tokenizer, backend=backend_of(kind, oracle)).generate([prompt], GREEDY)[0].token_ids
        )
    assert [output.token_ids for output in outputs] == [answers[name] for name in names]
    assert len({tuple(answer) for answer in answers.values()}) == 3
    assert list(engine.stream(prompt, GREEDY, adapter="second"))[-1].output == outputs[2]
    assert engine.check() == []


def test_nobody_finds_blocks_of_another_adapter(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folders = save_two(model, tmp_path)
    engine = Engine(model, tokenizer, adapters={**folders, "again": folders["first"]}, frozen=True)
    prompt = [7 + place % 90 for place in range(140)]

    def hits(adapter: str | None) -> int:
        return engine.generate([prompt], GREEDY, adapter=adapter)[0].usage.cache_hit_tokens

    assert [hits(name) for name in (None, "first", "second", None, "first", "again")] == [0, 0, 0, 139, 139, 139]


def test_siblings_and_seeds_are_those_of_the_adapter(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A plain request draws what it draws alone, though others ask the same with an adapter."""
    prompt, sampling = tokenizer.encode("what is it?"), Sampling(max_tokens=8, seed=3, n=2)
    engine = Engine(model, tokenizer, adapters=save_two(model, tmp_path))
    alone = Engine(model, tokenizer).generate([prompt], sampling)
    outputs = engine.generate([prompt, prompt, prompt], sampling, adapter=["first", None, "second"])
    assert [output.token_ids for output in outputs[2:4]] == [output.token_ids for output in alone]


def edited(folder: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an adapter with another config or other tensors."""
    table = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(table, tensors)
    other = folder.with_name("edited")
    other.mkdir(exist_ok=True)
    (other / "adapter_config.json").write_text(json.dumps(table))
    save_file(tensors, other / "adapter_model.safetensors")
    return other


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "edit, fault",
    [
        (lambda table, tensors: table.update(use_dora=True), "lora_magnitude_vector.* is missing"),
        (lambda table, tensors: table.update(r=0), "rank"),
        (lambda table, tensors: table.update(r=5), "not \\(5, 96\\)"),
        (lambda table, tensors: tensors.pop(f"{Q}.lora_A.weight"), "is missing"),
        (lambda table, tensors: tensors.update({f"{Q}x.lora_A.weight": torch.zeros(4, 96)}), "has no place"),
        (
            lambda table, tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(4, 95)}),
            "not \\(4, 96\\)",
        ),
        (lambda table, tensors: tensors.update({f"{Q}.lora_A.weight": torch.full((4, 96), torch.nan)}), "not finite"),
        (lambda table, tensors: table.update(base_model_name_or_path="Qwen/Qwen3-8B"), "the model is llama"),
        (lambda table, tensors: table.update(target_modules=["q_proj"]), "adapted by the tensors alone"),
    ],
)
def test_an_adapter_of_something_else_is_refused(
    edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], fault: str, tmp_path: Path
) -> None:
    model = model_of("llama")
    folder = edited(save_adapter(model, tmp_path / "good", 1), edit)
    with pytest.raises((ConfigError, CheckpointError), match=fault) as refusal:
        load_adapters(quantize_model(model), {"bad": folder})
    assert refusal.value.todo


def test_what_cannot_be_is_said(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folders = save_two(model, tmp_path)
    engine = Engine(model, tokenizer, adapters=folders)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: engine.generate([[5]], GREEDY, adapter="third"), "no adapter 'third'.*'first', 'second'"),
        (lambda: engine.submit([5], GREEDY, adapter=""), "no adapter ''"),
        (lambda: Engine(model, tokenizer).add([5], GREEDY, adapter="first"), "no adapter 'first'.*leave it out"),
        (lambda: engine.generate([[5], [6]], GREEDY, adapter=["first"]), "differ in number"),
        (lambda: Engine(model, tokenizer, adapters={"": folders["first"]}), "cannot be called ''"),
        (lambda: Engine(model, tokenizer, adapters={"none": tmp_path / "none"}), "none"),
        (lambda: Engine(model, tokenizer, adapters={"d": save_adapter(model, tmp_path / "d", 3, dora=True)}), "DoRA"),
        (lambda: Engine(model, tokenizer, backend=TorchBackend(model), adapters=folders), "back end of its own"),
    ]
    for attempt, fault in cases:
        with pytest.raises(SpratError, match=fault):
            attempt()
    adapted = copy.deepcopy(model)
    add_lora(adapted, LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match="has an adapter in it already"):
        Engine(adapted, tokenizer, adapters=folders)
    with pytest.raises(EngineError):
        engine.generate([[5]], GREEDY, adapter="third")
    assert not engine.busy


def test_the_example_of_the_documentation_runs(
    model: Transformer,
    tokenizer: Tokenizer,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (root / "docs" / "engine.md").read_text(encoding="utf-8")
    code = page.partition("## Adapters")[2].partition("<!-- run -->\n```python\n")[2].partition("```")[0]
    sprat.save(model, tokenizer, tmp_path / "base")
    save_adapter(model, tmp_path / "runs" / "mine" / "artefact" / "adapter", 1)
    save_adapter(model, tmp_path / "yours", 2)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "engine.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BACKENDS)
def test_answers_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    foreign = transformers.LlamaForCausalLM(config).eval()
    foreign.save_pretrained(tmp_path / "base")
    model, _ = load_folder(tmp_path / "base")
    folders, theirs = {}, peft.get_peft_model(foreign, peft.LoraConfig(r=4, target_modules="all-linear"), "first")
    theirs.add_adapter("second", peft.LoraConfig(r=2, use_rslora=True, target_modules=["q_proj", "down_proj"]))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    folders = {name: tmp_path / name for name in ("first", "second")}
    text = [token % 64 for token in tokens_of(30)]
    mixed = batch_of((text, 0), (text, 0), (text, 0), tables=[[0], [1], [2]])
    mixed = replace(mixed, adapters_S=np.array([SECOND, PLAIN, FIRST], np.int32))
    rows = backend_of(kind, model, folders).run(mixed).split(30)
    with torch.no_grad():
        for row, name in ((0, "second"), (2, "first")):
            theirs.set_adapter(name)
            assert (theirs(torch.tensor([text])).logits[0] - rows[row]).abs().max() < 1e-5
        with theirs.disable_adapter():
            assert (theirs(torch.tensor([text])).logits[0] - rows[1]).abs().max() < 1e-5
