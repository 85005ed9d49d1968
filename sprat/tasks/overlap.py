"""Which questions of a task stand in a text that was trained on: then an answer may be remembered, not worked out.

Texts are compared by their words, in lower case and without punctuation, so that layout says nothing. An operator
before a number counts as a word, since ``2 + 3`` is not ``2 - 3``; so does each character of Chinese, Japanese and
Korean. A question is found where all of its words follow each other.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from sprat.tasks.base import Problem

MAX_KEY_WORDS = 8  # words by which a question is looked up, before all of it is compared
_EAST_ASIAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_EAST_ASIAN}]|[0-9]+(?:[.,][0-9]+)+|(?:(?![{_EAST_ASIAN}])[^\W_])+|[-+*/^=<>](?=\s*[0-9])")
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=\w)")


def words(text: str) -> list[str]:
    """The words by which texts are compared.

    >>> words("What's  2 + 3.5, dear Well-Known?")
    ['what', 's', '2', '+', '3.5', 'dear', 'well', 'known']
    """
    return _WORD.findall(_HYPHEN.sub(" ", unicodedata.normalize("NFKC", text).casefold()))


class QuestionIndex:
    """Questions of tasks, looked up by their first words.

    Args:
        problems: whose questions; those without a word are never found.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._questions = [words(str(problem.meta.get("asked", problem.question))) for problem in problems]
        self._by_key: dict[int, dict[tuple[str, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, question in enumerate(self._questions):
            if question:
                key = tuple(question[:MAX_KEY_WORDS])
                self._by_key[len(key)][key].append(number)

    def find(self, text: str, min_words: int = 1) -> set[int]:
        """The numbers of the problems whose question stands in ``text``.

        Args:
            min_words: a question of fewer words counts only where it is the whole text.
        """
        text_words, numbers = words(text), set[int]()
        for length, numbers_by_key in self._by_key.items():
            for start in range(len(text_words) - length + 1):
                for number in numbers_by_key.get(tuple(text_words[start : start + length]), ()):
                    question = self._questions[number]
                    is_whole = len(question) == len(text_words)
                    if text_words[start : start + len(question)] == question and (
                        len(question) >= min_words or is_whole
                    ):
                        numbers.add(number)
        return numbers


def overlap(problems: Sequence[Problem], texts: Iterable[str]) -> list[Problem]:
    """Those of ``problems`` whose question stands in one of ``texts``, in the order of ``problems``.

    Time grows with the texts and not with the number of problems.

    >>> asked = [Problem("t", 0, "What is 2 + 3?", "5"), Problem("t", 1, "What is 2 - 3?", "-1")]
    >>> [problem.index for problem in overlap(asked, ["Q: what is 2+3 A: 5"])]
    [0]
    """
    index = QuestionIndex(problems)
    overlapping = {number for text in texts for number in index.find(text)}
    return [problem for number, problem in enumerate(problems) if number in overlapping]
