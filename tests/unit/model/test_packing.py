"""What users get: a document computes, learns and is counted in a packed row as it would be alone, in every head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sprat.kernels import native_library, ops
from sprat.model import Transformer
from sprat.model.forward_context import mtp_segments

from .conftest import tiny, tiny_dense

LENGTHS = (7, 1, 5, 2, 4)  # the rest of a row of 24 is padding


@pytest.fixture(params=["varlen", "masked", "half-split", "gqa"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """A model for each way to keep documents apart; two MTP modules where the family has them."""
    if request.param == "gqa":
        return Transformer.create(tiny_dense(), 1)
    if request.param == "varlen" and native_library() is None:
        pytest.skip("no C++ compiler: attention is masked")
    if request.param == "masked":
        monkeypatch.setattr(ops, "varlen_metadata", lambda *_: None)
    changes = {"num_nextn_predict_layers": 2, "rope_interleave": request.param != "half-split"}
    return Transformer.create(tiny(**changes), 1)


def documents(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(37, (1, length), generator=generator) for length in LENGTHS]


def packed(texts: list[Tensor], numbers: tuple[int, ...] = (1, 2, 3, 4, 5)) -> tuple[Tensor, Tensor]:
    """(tokens, segments) of one row of 24."""
    segments = [torch.full_like(text, number) for text, number in zip(texts, numbers, strict=True)]
    rest = 24 - sum(LENGTHS)
    return F.pad(torch.cat(texts, 1), (0, rest)), F.pad(torch.cat(segments, 1), (0, rest))


def heads(model: Transformer, tokens: Tensor, segments: Tensor | None = None) -> list[tuple[Tensor, list[Tensor]]]:
    """Of the stack and each MTP depth: hidden states, and the loads of its expert layers."""
    out = model.hidden(tokens, segments_BT=segments)
    found = [(out.x_BTD[0], [each.load_E for each in out.routing])]
    for depth in range(1, min(len(model.mtp), tokens.shape[1] - 1) + 1):
        out = model.mtp_hidden(out, tokens, segments_BT=segments, depth=depth)
        found.append((out.x_BTD[0], [each.load_E for each in out.routing]))
    return found


@torch.no_grad()
def test_every_head_computes_and_counts_a_packed_document_as_if_alone(model: Transformer) -> None:
    texts = documents(0)
    tokens, segments = packed(texts)
    together, alone = heads(model, tokens, segments), [heads(model, text) for text in texts]
    assert len(together) == 1 + len(model.mtp)
    for depth, (states, loads) in enumerate(together):
        start = 0
        for text, length in zip(alone, LENGTHS, strict=True):
            if length > depth:
                torch.testing.assert_close(states[start : start + length - depth], text[depth][0], rtol=0, atol=2e-5)
            start += length
        counts = [text[depth][1] for text, length in zip(alone, LENGTHS, strict=True) if length > depth]
        assert [load.tolist() for load in loads] == [sum(each).tolist() for each in zip(*counts, strict=True)]


@torch.no_grad()
def test_what_stands_before_a_document_changes_nothing_in_it(model: Transformer) -> None:
    """The last hidden state of the text before is no key of the next one, at any depth."""
    texts, other = documents(0), documents(1)
    one = heads(model, *packed(texts))
    two = heads(model, *packed([*other[:2], *texts[2:]]))
    for depth, ((mine, _), (theirs, _)) in enumerate(zip(one, two, strict=True)):
        assert (mine[:6] - theirs[:6]).abs().max() > 0.1  # the first document is another
        torch.testing.assert_close(mine[8 : 13 - depth], theirs[8 : 13 - depth], rtol=0, atol=2e-5)


def test_packed_gradients_are_the_sum_of_those_alone(model: Transformer) -> None:
    texts = documents(0)
    tokens, segments = packed(texts)
    parameters = list(model.parameters())

    def summed(tokens: Tensor, segments: Tensor) -> Tensor:
        """Cross-entropy of each head, summed over the pairs that lie in one document."""
        total = torch.zeros(())
        for depth, (states, _) in enumerate(heads(model, tokens, segments)):
            inside = [
                len(set(segments[0, i : i + depth + 2].tolist()) | {0}) == 2 and segments[0, i + depth + 1] > 0
                for i in range(tokens.shape[1] - depth - 1)
            ]
            chosen = torch.tensor(inside, dtype=torch.bool)
            wanted = tokens[0, depth + 1 :][chosen]
            total = total + F.cross_entropy(model.head(states[: len(chosen)][chosen]), wanted, reduction="sum")
        return total

    mine = torch.autograd.grad(summed(tokens, segments), parameters, allow_unused=True)
    alone = sum(summed(text, torch.ones_like(text)) for text in texts if text.shape[1] > 1)
    for one, other in zip(mine, torch.autograd.grad(alone, parameters, allow_unused=True), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


@torch.no_grad()
def test_a_number_used_twice_in_a_row_names_two_documents(model: Transformer) -> None:
    """Both ways of attention take runs of equal segments as documents."""
    texts = documents(0)
    once, again = heads(model, *packed(texts)), heads(model, *packed(texts, (1, 2, 1, 2, 1)))
    for (mine, _), (theirs, _) in zip(once, again, strict=True):
        torch.testing.assert_close(mine[:19], theirs[:19], rtol=0, atol=2e-5)


def test_pairs_across_a_border_belong_to_no_document() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 1, 0, 0]])
    assert mtp_segments(segments, 1).tolist() == [[1, 1, 0, 2, 0, 0, 0]]
    assert mtp_segments(segments, 2).tolist() == [[1, 0, 0, 0, 0, 0]]
