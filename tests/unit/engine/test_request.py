"""What a model's folder says of answers holds where the caller says nothing: how they end, how they are sampled."""

from __future__ import annotations

import pytest

from sprat.config.sizes import size
from sprat.engine import Engine, Response, Sampling
from sprat.engine.request import eos_token_ids
from sprat.errors import EngineError
from sprat.model import Transformer
from sprat.tokens import Message, Tokenizer
from sprat.tokens.hf_files import GenerationConfig
from tests.byte_fallback import byte_fallback

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}[assistant]"


def thoughtless() -> tuple[Transformer, Tokenizer]:
    """A tiny model whose template knows no thinking."""
    tokenizer = Tokenizer(byte_fallback(), config={"eos_token": "</s>", "chat_template": TEMPLATE})
    config = size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=200)
    return Transformer.create(config, 3), tokenizer


def test_every_end_that_the_folder_lists_ends_an_answer_and_is_not_shown() -> None:
    text = byte_fallback({"content": "<|end|>", "special": False})
    last = Tokenizer(text, config={"eos_token": "</s>"}).vocab_size - 1
    tokenizer = Tokenizer(
        text, config={"eos_token": "</s>"}, generation_config=GenerationConfig(eos_token_ids=(2, last))
    )
    model = Transformer.create(size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=200), 3)
    assert eos_token_ids(model.config, tokenizer) >= {2, last}
    engine = Engine(model, tokenizer)
    (output,) = engine.generate(["cat"], Sampling(temperature=0, max_tokens=5, logit_bias={last: 100.0}))
    assert (output.token_ids, output.finish_reason, output.text) == ([last], "stop", "")


def test_settings_are_the_folders_where_the_caller_says_none(tokenizer: Tokenizer) -> None:
    told = GenerationConfig(default_sampling={"temperature": 0.0, "top_k": 7, "repetition_penalty": 1.2})
    model = Transformer.create(size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=300), 3)
    engine = Engine(model, Tokenizer(tokenizer._json, generation_config=told))
    assert engine.sampling(top_k=3, top_p=None, max_tokens=9) == Sampling(
        temperature=0.0, top_k=3, repetition_penalty=1.2, max_tokens=9
    )
    unsaid = Sampling(temperature=0.0, top_k=7, repetition_penalty=1.2)
    waiting = engine.submit("the cat")
    assert waiting.sequence.sampling == unsaid
    assert engine.submit("the cat", Sampling()).sequence.sampling == Sampling()


def test_a_model_that_does_not_think_refuses_to_and_answers_at_once_without_tags() -> None:
    model, tokenizer = thoughtless()
    engine = Engine(model, tokenizer)
    with pytest.raises(EngineError, match="does not think"):
        engine.generate(["cat"], Sampling(thinking=True))
    quiet, auto = (
        engine.generate(["cat"], Sampling(temperature=0, max_tokens=4, thinking=how))[0] for how in (False, None)
    )
    assert quiet.prompt_ids == auto.prompt_ids == tokenizer.encode("[user]cat</s>[assistant]", parse_special=True)
    assert quiet.text == auto.text and quiet.reasoning == ""


def test_a_conversation_that_the_format_has_no_place_for_is_refused() -> None:
    engine = Engine(*thoughtless())
    with pytest.raises(EngineError, match="not the first"):
        engine.generate([[Message("user", "cat"), Message("system", "a")]])


@pytest.mark.parametrize("form", ["\n", "return 1;\n", "b\n\n", "<think>a</think>\nb"])
@pytest.mark.parametrize("thinking", [None, False])
def test_the_content_of_a_form_is_the_form(form: str, thinking: bool | None) -> None:
    engine = Engine(*thoughtless())
    how = Sampling(temperature=0, max_tokens=40, thinking=thinking, response=Response.choice([form]))
    (whole,) = engine.generate(["cat"], how)
    *pieces, done = engine.stream("cat", how)
    assert (whole.text, whole.reasoning, whole.finish_reason) == (form, "", "stop")
    assert "".join(piece.text for piece in pieces) == form and done.output == whole


def test_parts_of_an_answer_that_was_cut_join_to_the_whole() -> None:
    model, tokenizer = thoughtless()
    line = tokenizer.encode("\n")[-1]
    engine, many = Engine(model, tokenizer), {"temperature": 2.0, "logit_bias": {line: 12.0}}
    (whole,) = engine.generate(["cat"], Sampling(max_tokens=60, **many))
    assert whole.text.strip("\n").count("\n") > 5
    for cut in range(1, 60):
        (part,) = engine.generate(["cat"], Sampling(max_tokens=cut, **many))
        assert part.text == tokenizer.decode(whole.token_ids[:cut], skip_special_tokens=True)
