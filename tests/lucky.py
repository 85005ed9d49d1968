"""A tiny task, its tokenizer and the shape of a model for it, shared by the tests of post-training and evaluation."""

from __future__ import annotations

from sprat.config.model import ModelConfig
from sprat.config.sizes import size
from sprat.tasks import Problem, Split
from sprat.tokens import Tokenizer


class Lucky:
    """Whatever the question, the answer is 7: the smallest thing that a policy can learn from rewards."""

    name = "lucky"

    def problem(self, split: Split, index: int) -> Problem:
        """Question ``index``; the number of terms is 1 or 2."""
        return Problem(self.name, index, f"{index % 100} {split}", "7", {"num_terms": 1 + index % 2})

    def score(self, problem: Problem, answer: str | None) -> float:
        """1.0 for 7."""
        return float(answer is not None and answer.strip() == problem.answer)

    def chain_of_thought(self, problem: Problem) -> str:
        """The chain of thought."""
        return f"{problem.question} 7"


def lucky_tokenizer() -> Tokenizer:
    """Bytes, digits and the special tokens, and next to no merges."""
    return Tokenizer.train(["7 train test 1 2 3\n"] * 4, 300, numbers=10)


def lucky_shape(tokenizer: Tokenizer) -> ModelConfig:
    """A mixture of experts of some 40,000 parameters."""
    return size(
        "pico",
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=2,
        n_routed_experts=4,
        moe_intermediate_size=32,
        intermediate_size=64,
        max_position_embeddings=128,
        num_nextn_predict_layers=0,
    )
