"""Log-probabilities and hidden states of prompts are those of the model's plain forward pass, however they were cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import sprat
from sprat.config import QuantConfig
from sprat.config.sizes import size
from sprat.engine import Engine, Output, Sampling
from sprat.engine.adapter import load_adapters
from sprat.engine.backend import Backend, Batch
from sprat.engine.backends.native import NativeBackend
from sprat.engine.backends.torch import TorchBackend
from sprat.engine.scoring import ROWS
from sprat.errors import EngineError
from sprat.kernels import native
from sprat.model import Transformer
from sprat.quant import quantize_model
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake, scores
from tests.unit.engine.test_adapter import merged, save_adapter

LONG = [(17 * place) % 400 + 5 for place in range(150)]
PROMPTS = [LONG, [7], LONG[:64], LONG[3:99], [9, 8]]
ONLY_PROMPT = Sampling(temperature=0, max_tokens=0, prompt_logprobs=True, top_logprobs=3)
BACKENDS = ["torch", *(["native"] if native() is not None else [])]


def backend_of(name: str, model: Transformer) -> Backend:
    """A back end by its name."""
    return TorchBackend(model) if name == "torch" else NativeBackend(model, threads=1)


def compare(output: Output, logprobs_TV: Tensor, top: int) -> None:
    """Hold an answer's prompt to the log-probabilities [T, V] of a plain forward pass."""
    ids, given, tops = output.prompt_ids, output.prompt_logprobs, output.prompt_top_logprobs
    assert given is not None and given[0] is None and len(given) == len(ids)
    expected = logprobs_TV[:-1].gather(1, torch.tensor(ids[1:], dtype=torch.long)[:, None])[:, 0].tolist()
    assert given[1:] == pytest.approx(expected, abs=1e-4)
    if not top:
        assert tops is None
        return
    assert tops is not None and tops[0] is None and len(tops) == len(ids)
    for row, likeliest in zip(logprobs_TV[:-1], tops[1:], strict=True):
        assert likeliest is not None and len({index for index, _ in likeliest}) == top
        assert [value for _, value in likeliest] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
        assert [value for _, value in likeliest] == pytest.approx([row[i].item() for i, _ in likeliest], abs=1e-4)
        assert row[likeliest[0][0]] >= row.max() - 1e-4


def plain(model: Transformer, ids: list[int]) -> Tensor:
    """Log-probabilities [T, V] by the model itself."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].log_softmax(-1)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("step_tokens", [512, 40])
def test_log_probabilities_of_a_prompt_are_the_models(
    model: Transformer, tokenizer: Tokenizer, name: str, step_tokens: int
) -> None:
    engine = Engine(
        model, tokenizer, backend=backend_of(name, model), step_tokens=step_tokens, max_batch=3, frozen=True
    )
    running = engine.submit(LONG, Sampling(temperature=0, max_tokens=40))
    engine.step()
    for how, top in ((ONLY_PROMPT, 3), (Sampling(max_tokens=5, prompt_logprobs=True), 0)):
        for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, how), strict=True):
            compare(output, plain(model, prompt), top)
            assert output.usage.cache_hit_tokens == 0 and output.usage.prompt_tokens == len(prompt)
            assert len(output.token_ids) == output.usage.completion_tokens <= (how.max_tokens or 0)
            assert output.logprobs is None and output.top_logprobs is None
    alone = Engine(model, tokenizer, backend=backend_of(name, model)).generate(
        [LONG], Sampling(temperature=0, max_tokens=40)
    )
    assert running.result().token_ids == alone[0].token_ids and engine.check() == []


def test_only_the_prompt_is_scored_where_no_answer_is_wanted(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    how = Sampling(max_tokens=0, logprobs=True, top_logprobs=1, prompt_logprobs=True)
    (output,) = engine.generate([LONG], how)
    assert (output.token_ids, output.logprobs, output.top_logprobs) == ([], [], [])
    assert (output.text, output.reasoning, output.finish_reason) == ("", "", "length")
    (done,) = engine.stream(LONG, how)
    assert done.kind == "done" and done.output == output
    full = LONG + LONG[:50]
    assert len(full) == model.config.context
    compare(engine.generate([full], ONLY_PROMPT)[0], plain(model, full), 3)
    assert engine.stats().sampled_tokens == 0 and engine.check() == [] and not engine.busy
    with pytest.raises(EngineError, match="max_tokens cannot be 0"):
        Sampling(max_tokens=0)


@pytest.mark.parametrize("mode", ["off", "mtp", "ngram"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("step_tokens", [30, 300])
def test_scores_are_right_whoever_makes_way(
    model: Transformer, tokenizer: Tokenizer, frozen: bool, mode: str, step_tokens: int
) -> None:
    """Beside answers, with drafts, cached prefixes and so few blocks that requests are preempted."""
    vocab, preemptions = model.config.vocab_size, 0
    fake = Fake(vocab, num_mtp_modules=1)
    engine = Engine(
        model,
        tokenizer,
        backend=fake,
        max_batch=4,
        step_tokens=step_tokens,
        cache_bytes=6 * fake.block_bytes,
        frozen=frozen,
        speculate=mode,  # type: ignore[arg-type]
    )
    asks = [
        Sampling(max_tokens=30 * (row % 3), prompt_logprobs=True, seed=row, top_logprobs=row % 2)
        if row % 4
        else Sampling(max_tokens=45)
        for row in range(12)
    ]
    prompts = [LONG[: 70 + 20 * (row % 3)] for row in range(12)]
    outputs = engine.generate(prompts, asks)
    preemptions = engine.stats().preemptions
    for output, how in zip(outputs, asks, strict=True):
        if how.prompt_logprobs:
            ids = np.array(output.prompt_ids, np.int32)
            rows = [torch.from_numpy(scores(ids[: end + 1].tobytes(), vocab)) for end in range(len(ids))]
            compare(output, torch.stack(rows).log_softmax(-1), how.top_logprobs)
        else:
            assert output.prompt_logprobs is None
    assert engine.check() == [] and preemptions > 0


def test_answers_of_one_prompt_are_scored_each_by_itself(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_batch=8)
    scored = Sampling(max_tokens=3, prompt_logprobs=True, n=2)
    outputs = engine.generate([LONG] * 3, [Sampling(max_tokens=3), scored, scored])
    assert outputs[0].prompt_logprobs is None and len(outputs) == 5
    for output in outputs[1:]:
        compare(output, plain(model, LONG), 0)


def test_a_prompt_that_fills_the_memory_is_scored(model: Transformer, tokenizer: Tokenizer) -> None:
    fake = Fake(model.config.vocab_size)
    engine = Engine(model, tokenizer, backend=fake, cache_bytes=2 * fake.block_bytes)
    (output,) = engine.generate([LONG[:128]], ONLY_PROMPT)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 128
    assert len(engine.embed([LONG[:128]])) == 1 and engine.check() == []


def test_logits_of_a_long_prompt_are_never_held_at_once(model: Transformer, tokenizer: Tokenizer) -> None:
    class Counting(TorchBackend):
        most = 0

        def run(self, batch: Batch) -> Tensor:
            Counting.most = max(Counting.most, len(batch.logits_index_R))
            return super().run(batch)

        def logits(self, batch: Batch, index_R: NDArray[np.int32]) -> Tensor:
            Counting.most = max(Counting.most, len(index_R))
            return super().logits(batch, index_R)

    Engine(model, tokenizer, backend=Counting(model)).generate([LONG], ONLY_PROMPT)
    assert Counting.most == ROWS < len(LONG)


def test_a_model_that_broke_scores_nothing(model: Transformer, tokenizer: Tokenizer) -> None:
    broken = Transformer.create(model.config, 3)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    engine = Engine(broken, tokenizer)
    with pytest.raises(EngineError, match="not finite"):
        engine.generate([LONG], ONLY_PROMPT)
    with pytest.raises(EngineError, match="not finite"):
        engine.embed([LONG])


def mean_hidden(model: Transformer, ids: list[int]) -> list[float]:
    """The mean of the last norm's output at length 1, by the model itself."""
    with torch.no_grad():
        mean = model.hidden(torch.tensor([ids])).x_BTD[0].mean(0)
    return (mean / mean.norm()).tolist()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("step_tokens", [512, 40])
def test_an_embedding_is_the_mean_hidden_state(
    model: Transformer, tokenizer: Tokenizer, name: str, step_tokens: int
) -> None:
    engine = Engine(
        model, tokenizer, backend=backend_of(name, model), step_tokens=step_tokens, max_batch=2, frozen=True
    )
    engine.generate([LONG], Sampling(max_tokens=1))
    vectors = engine.embed([*PROMPTS, *PROMPTS[:1]])
    for vector, prompt in zip(vectors, [*PROMPTS, *PROMPTS[:1]], strict=True):
        assert vector == pytest.approx(mean_hidden(model, prompt), abs=1e-5)
        assert np.linalg.norm(vector) == pytest.approx(1)
    assert vectors[0] == vectors[-1] and vectors[0] != vectors[2]
    assert engine.check() == [] and engine.stats().sampled_tokens == 1
    for prompt, words in (([], "empty"), ([10**6], "no token"), ([1] * 201, "exceed the context")):
        with pytest.raises(EngineError, match=words):
            engine.embed([prompt])
    with pytest.raises(EngineError, match="no adapter"):
        engine.embed([LONG], adapter="mine")


def test_a_quantised_model_embeds_and_scores(tokenizer: Tokenizer) -> None:
    config = size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=200)
    model = quantize_model(Transformer.create(config, 4), QuantConfig(bits=8, group=32))
    logprobs_TV, vector = plain(model, LONG), mean_hidden(model, LONG)
    engine = Engine(model, tokenizer, consume=True)
    (output,) = engine.generate([LONG], ONLY_PROMPT)
    expected = logprobs_TV[:-1].gather(1, torch.tensor(LONG[1:])[:, None])[:, 0].tolist()
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[1:] == pytest.approx(expected, abs=0.1)  # inputs are rounded to bytes natively
    assert float(np.dot(engine.embed([LONG])[0], vector)) > 0.99


def test_answers_go_on_while_a_prompt_is_embedded(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, backend=Fake(model.config.vocab_size), step_tokens=10, speculate="off")
    bias = {tokenizer.special_ids.eos: -100.0}
    running = engine.submit(LONG[:20], Sampling(temperature=0, max_tokens=150, logit_bias=bias))
    engine.step()
    before = len(running.sequence.output_ids)
    engine.embed([LONG])
    assert len(running.sequence.output_ids) - before == 3, "one token for each piece of 64"


def test_an_embedding_that_is_cut_short_is_an_error(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, step_tokens=64)
    step = engine.step
    engine.step = lambda: [handle.cancel() for handle in list(engine.core.handles.values())] and step()  # type: ignore
    with pytest.raises(EngineError, match="stopped while it embedded"):
        engine.embed([LONG])
    assert engine.check() == []


@pytest.mark.parametrize("name", BACKENDS)
def test_prompts_are_scored_and_embedded_with_the_adapter_that_is_named(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    own = load_adapters(model, {"mine": save_adapter(model, tmp_path / "mine", 1)})
    backend = TorchBackend(model, own) if name == "torch" else NativeBackend(model, threads=1, adapters=own)
    engine, other = Engine(model, tokenizer, backend=backend), merged(model, tmp_path / "mine")
    with_mine, without = engine.generate([LONG, LONG], ONLY_PROMPT, adapter=["mine", None])
    compare(with_mine, plain(other, LONG), 3)
    compare(without, plain(model, LONG), 3)
    assert engine.embed([LONG], adapter="mine")[0] == pytest.approx(mean_hidden(other, LONG), abs=1e-5)
    assert engine.embed([LONG])[0] == pytest.approx(mean_hidden(model, LONG), abs=1e-5)


def test_the_example_of_the_documentation_runs(
    model: Transformer,
    tokenizer: Tokenizer,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (root / "docs" / "engine.md").read_text(encoding="utf-8")
    code = page.partition("## Prompts that are scored")[2].partition("<!-- run -->\n```python\n")[2].partition("```")[0]
    sprat.save(model, tokenizer, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "engine.md", "exec"), {})
    scored, width = capsys.readouterr().out.splitlines()
    assert scored.startswith("[None, -") and int(width) == model.config.hidden_size
