"""Questions of one length, none of which begins as another does: no cache helps, in the server or out of it."""

from __future__ import annotations

WORDS = ("river", "window", "letter", "garden", "engine", "winter", "market", "silver")


def prompts(count: int, number: int) -> list[str]:
    """``count`` questions; another ``number``, other questions."""
    return [
        f"{(number * 1009 + index) % 9973} {WORDS[index % 8]}: tell me a long story about a {WORDS[(index // 8) % 8]}."
        for index in range(count)
    ]
