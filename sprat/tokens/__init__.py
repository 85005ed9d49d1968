"""Text to ids and back: the tokenizer adapter and the chat format."""

from sprat.tokens.chat import Answer, Message, demonstration, render, split_reasoning
from sprat.tokens.formats import Specials
from sprat.tokens.tokenizer import Tokenizer

__all__ = ["Answer", "Message", "Specials", "Tokenizer", "demonstration", "render", "split_reasoning"]
