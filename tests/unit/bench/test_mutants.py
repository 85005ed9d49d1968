"""The lists of planted bugs fit the source as it is: otherwise a mutation run measures nothing."""

from __future__ import annotations

import ast
from functools import cache

from bench.mutants.__main__ import ROOT, read


def test_every_planted_bug_is_python_in_one_place() -> None:
    @cache
    def sound(file: str) -> tuple[str, str]:
        source = (ROOT / file).read_text(encoding="utf-8")
        return source, ast.dump(ast.parse(source))

    for mutant in read(()):  # raises where a text does not occur exactly once
        source, tree = sound(mutant.file)
        assert ast.dump(ast.parse(source.replace(mutant.old, mutant.new))) != tree, mutant
        assert all((ROOT / test.partition("::")[0]).exists() for test in mutant.tests), mutant
