"""What a step does with what the back end gives."""

from __future__ import annotations

import pytest
import torch

from sprat.config.sizes import size
from sprat.engine import Engine, Sampling
from sprat.engine.backends.torch import TorchBackend
from sprat.engine.speculation import SpeculationMode
from sprat.errors import SpratError
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.unit.engine.fake import Fake


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_ends_with_the_reason_where_logits_cease_to_be_finite(temperature: float) -> None:
    """In plain steps too, where only the likeliest token comes back."""
    tokenizer = Tokenizer.train(["1 + 2 = 3 and so on.\n" * 5], 500)
    model = Transformer.create(size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=256), 0)
    engine = Engine(model, tokenizer, max_batch=2, backend=TorchBackend(model))
    number = engine.add([5, 6, 7], Sampling(temperature=temperature, max_tokens=20))
    handle = engine.core.handles[number]
    for _ in range(3):
        engine.step()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(SpratError, match="finite"):
        while engine.busy:
            engine.step()
        handle.result()


@pytest.mark.parametrize("mode", ["off", "mtp"])
def test_logits_are_read_no_longer_than_a_ban_lasts(mode: SpeculationMode, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.train(["1 + 2 = 3 and so on.\n" * 5], 500)
    model = Transformer.create(size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=256), 0)
    fake, steps = Fake(tokenizer.vocab_size, num_mtp_modules=1), []
    argmax = fake.argmax
    monkeypatch.setattr(fake, "argmax", lambda *given: steps.append(given) or argmax(*given))
    engine = Engine(model, tokenizer, max_batch=2, backend=fake, speculate=mode)
    how = Sampling(temperature=0, max_tokens=40, thinking=True, min_think_tokens=9)
    said = engine.generate([[5, 6, 7]], how)[0].token_ids
    plain = {"off": 1, "mtp": 2}[mode]  # tokens of a step
    assert len(said) == 40 and len(said) - 12 <= plain * len(steps) <= len(said) - 8
