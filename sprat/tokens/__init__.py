"""Text to ids and back: the tokenizer adapter and the chat format."""

from sprat.tokens.chat import (
    Answer,
    Message,
    encode_conversation,
    encode_demonstration,
    render,
    split_reasoning,
)
from sprat.tokens.chat_formats import SpecialTokenIds
from sprat.tokens.tokenizer import Tokenizer

__all__ = [
    "Answer",
    "Message",
    "SpecialTokenIds",
    "Tokenizer",
    "encode_conversation",
    "encode_demonstration",
    "render",
    "split_reasoning",
]
