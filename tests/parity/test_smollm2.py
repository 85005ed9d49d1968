"""A real model that anybody can fetch: SmolLM2 here is SmolLM2 in transformers, and it talks sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sprat
from sprat.engine.backend import Batch
from sprat.engine.backends.native import NativeBackend
from sprat.engine.backends.torch import TorchBackend
from sprat.formats.hf import save_folder
from sprat.kernels import native, unavailable_reason
from sprat.model import Transformer
from sprat.quant import quantized_weights
from sprat.tokens import Message, Tokenizer, render
from tests.gguf_files import Reader, gguf
from tests.smol import smol

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
TEXT = "The sprat is a small fish. In 1984 it cost £3.50 a kilo; it's cheap!\n\n\tdef price(n): return 3.5*n — 很便宜"
Loaded = tuple[Transformer, Tokenizer]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """The model and its tokenizer, by its name alone."""
    smol()  # or skip, where it cannot be had
    return sprat.load("smol")


@pytest.fixture(scope="module")
def file() -> Any:
    """The file as the ``gguf`` package reads it."""
    return Reader(smol())


@pytest.fixture(scope="module")
def theirs(loaded: Loaded, file: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' model of the weights that the ``gguf`` package reads from the file."""
    model, _ = loaded
    dense = Transformer(model.config, seed=None)
    held = {tensor.name: tensor for tensor in file.tensors}
    from sprat.formats.gguf.names import file_name

    with torch.no_grad():
        for name, weight in dense.named_parameters():
            found = held[file_name(name, model.config)]
            rows = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
            if (
                ".q_proj." in name or ".k_proj." in name
            ):  # the converter's order of rows, put back as it is undone there
                heads = rows.shape[0] // model.config.attention_head_dim
                rows = rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
            weight.copy_(rows)
    folder = tmp_path_factory.mktemp("smol")
    save_folder(dense, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def test_logits_are_those_of_transformers(loaded: Loaded, theirs: Any) -> None:
    model, words = loaded
    tokens = torch.tensor([words.encode(TEXT)])
    with torch.no_grad():
        difference = (model(tokens) - theirs(input_ids=tokens).logits).abs().max()
    assert difference <= 1e-3


def test_four_bits_stay_four_bits(loaded: Loaded) -> None:
    model, _ = loaded
    bits = [packed.bits for name, packed in quantized_weights(model).items() if name != "embed_tokens.weight"]
    assert set(bits) == {4} and len(bits) == 210
    assert sum(packed.nbytes for packed in quantized_weights(model).values()) < smol().stat().st_size


def test_text_is_cut_as_in_transformers(loaded: Loaded, file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: file)  # which has read the same path already
    foreign = transformers.AutoTokenizer.from_pretrained(smol().parent, gguf_file=smol().name)
    # transformers takes GPT-2's cut for every such vocabulary; SmolLM2's own keeps digits apart, so they are left out
    plain = TEXT.translate(dict.fromkeys(map(ord, "0123456789")))
    assert loaded[1].encode(plain) == foreign.encode(plain, add_special_tokens=False)
    assert [loaded[1].decode([index]) for index in loaded[1].encode("1984")] == list("1984")


@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_a_conversation_is_written_as_its_own_template_writes_it(loaded: Loaded, file: Any, system: str | None) -> None:
    turns = [] if system is None else [Message("system", system)]
    turns += [Message("user", "Hi!"), Message("assistant", "Hello."), Message("user", "What is 2+2?")]
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = file.fields["tokenizer.chat_template"].contents()
    rows = [{"role": turn.role, "content": turn.content} for turn in turns]
    text = ImmutableSandboxedEnvironment().from_string(template).render(messages=rows, add_generation_prompt=True)
    assert render(loaded[1], turns) == loaded[1].encode(text, parse_special=True)


def test_it_knows_the_capital_of_france(loaded: Loaded) -> None:
    """In float32, whose lead of the first word (0.08 nats) is far above any processor's rounding.

    Natively it is a coin: AVX-512 finds Paris, AVX2 a loop in French. What holds there is the divergence below.
    """
    how = sprat.Sampling(temperature=0, max_tokens=24)
    engine = sprat.Engine(*loaded, backend=TorchBackend(loaded[0]))
    answer = engine.generate(["What is the capital of France?"], how)[0]
    assert "Paris" in answer.text and answer.finish_reason == "stop"


@pytest.mark.skipif(native() is None, reason=unavailable_reason())
def test_rounded_inputs_are_near_those_in_float32(loaded: Loaded) -> None:
    """Nats a token from the same weights in float32; 0.0029 before outliers were left out of the scales."""
    model, words = loaded
    ids = words.encode(Path(sprat.__file__).parents[1].joinpath("docs", "engine.md").read_text())[:512]
    backend = NativeBackend(model, threads=1, kv_format="f32")
    backend.reserve(8)
    arrays = (ids, range(512), [0, 512], [list(range(8))], range(512))
    rounded = backend.run(Batch(*(np.array(array, np.int32) for array in arrays))).log_softmax(-1)
    with torch.no_grad():
        exact = model(torch.tensor([ids]))[0].log_softmax(-1)
    divergence = float((exact.exp() * (exact - rounded)).sum(-1).mean())
    assert divergence < 0.0012


def test_the_name_alone_is_enough(loaded: Loaded) -> None:
    assert loaded[0].config.num_hidden_layers == 30
