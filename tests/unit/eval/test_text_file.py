"""A user's text file has a perplexity and bits per byte, each token predicted once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sprat.errors import DataError
from sprat.eval.text_file import evaluate_text, evaluate_text_file
from sprat.model import Transformer
from sprat.tokens import Tokenizer

TEXT = "7 train test 1 2 3 caf\u00e9\n" * 20


def test_a_model_that_knows_nothing_has_its_vocabulary_as_perplexity(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.head.weight.zero_()
    path = tmp_path / "mine.txt"
    path.write_text(TEXT, encoding="utf-8")
    score = evaluate_text_file(model, tokenizer, path)
    assert score.perplexity == pytest.approx(model.config.vocab_size, rel=1e-4)
    assert score.tokens == len(tokenizer.encode(TEXT)) and score.bytes == len(TEXT.encode()) and score.documents == 1
    assert score.bits_per_byte == pytest.approx(
        math.log2(model.config.vocab_size) * score.tokens / score.bytes, rel=1e-4
    )


def test_the_loss_is_that_of_the_logits(model: Transformer, tokenizer: Tokenizer) -> None:
    text = "7 train 1"
    ids = torch.tensor([[tokenizer.special_ids.bos, *tokenizer.encode(text)]])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids)[0, :-1].double(), -1)
    nats = -float(log_probs.gather(1, ids[0, 1:, None]).mean())
    score = evaluate_text(model, tokenizer, [text])
    assert math.log(score.perplexity) == pytest.approx(nats, rel=1e-4)
    assert str(score).startswith(f"{score.bits_per_byte:.3f} bits per byte")


@pytest.mark.parametrize("window", [1, 7, 128])
def test_windows_predict_each_token_once(window: int, model: Transformer, tokenizer: Tokenizer) -> None:
    texts = [TEXT, TEXT[:50], "7"]
    score = evaluate_text(model, tokenizer, texts, window=window)
    assert score.tokens == sum(len(tokenizer.encode(text)) for text in texts) and score.window == window


def test_nothing_to_predict_is_one_sentence(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for window in (0, 129):
        with pytest.raises(DataError, match="window"):
            evaluate_text(model, tokenizer, [TEXT], window=window)
    for texts in ([], [""]):
        with pytest.raises(DataError):
            evaluate_text(model, tokenizer, texts)
    with pytest.raises(DataError):
        evaluate_text_file(model, tokenizer, tmp_path / "none.txt")
