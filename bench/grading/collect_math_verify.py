"""Prints which texts math-verify's own tests compare, and what they expect. Run with the folder of its source.

Each of its tests is called twice, with a comparison that says yes and with one that says no: the one that the test
passes with is what it expects. What is compared, and by which options, is written down on the way.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = {"LatexExtractionConfig": "latex", "ExprExtractionConfig": "expr", "StringExtractionConfig": "string"}


class Text:
    """What ``parse`` would have read, unread."""

    def __init__(self, text: str, extraction_config: Any = None, **options: Any) -> None:
        options.pop("parsing_timeout", None)
        self.text, self.options = text, options
        if extraction_config is not None:
            self.options["targets"] = [target(config) for config in extraction_config]


def target(config: Any) -> list[Any]:
    """A configuration as its kind and the fields that are not as they are by default."""
    default = type(config)()
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    }
    return [KINDS[type(config).__name__], json.loads(json.dumps(changed))]


class Comparison:
    """Stands in for ``verify``: says what it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.says, self.asked = True, list[dict[str, Any]]()

    def __call__(self, gold: Any, answer: Any, **options: Any) -> bool:
        if not isinstance(gold, Text) or not isinstance(answer, Text):
            raise TypeError("no texts")
        options.pop("timeout_seconds", None)
        source = {"gold": gold.text, "gold_reader": gold.options, "answer_reader": answer.options, "verify": options}
        self.asked.append({"gold": gold.text, "answer": answer.text, "source": json.dumps(source)})
        return self.says


def parameters(function: Any) -> Iterator[dict[str, Any]]:
    """The arguments of each case of a test."""
    sets = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names = (
                [name.strip() for name in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
            )
            rows = [row if len(names) > 1 else (row,) for row in mark.args[1]]
            sets.append([dict(zip(names, row, strict=True)) for row in rows])
    for combination in itertools.product(*sets):
        yield {name: value for part in combination for name, value in part.items()}


def expectation(function: Any, arguments: dict[str, Any], comparison: Comparison) -> dict[str, Any] | None:
    """The pair that one case compares, with what it expects; None where it does something else."""
    passed = []
    for says in (True, False):
        comparison.says, comparison.asked = says, []
        try:
            function(**arguments)
        except AssertionError:
            continue
        except Exception:
            return None
        passed.append((says, list(comparison.asked)))
    if len(passed) != 1 or len(passed[0][1]) != 1:
        return None
    return {**passed[0][1][0], "expected": passed[0][0]}


def main(folder: Path) -> None:
    """Print ``{"cases": [...], "others": [...]}``."""
    logging.disable(logging.CRITICAL)
    sys.path.insert(0, str(folder))
    modules = [importlib.import_module(f"tests.{path.stem}") for path in sorted((folder / "tests").glob("test_*.py"))]
    comparison = Comparison()
    for module in modules:
        for name, stand_in in (("parse", Text), ("verify", comparison)):
            if hasattr(module, name):
                setattr(module, name, stand_in)
    cases, others = list[dict[str, Any]](), list[str]()
    for module in modules:
        for name, function in vars(module).items():
            if not name.startswith("test_") or getattr(function, "__module__", "") != module.__name__:
                continue
            for number, arguments in enumerate(parameters(function)):
                found = expectation(function, arguments, comparison)
                title = f"{module.__name__.removeprefix('tests.')}::{name}[{number}]"
                if found is None:
                    others.append(title)
                else:
                    cases.append({"name": title, **found})
    print(json.dumps({"cases": cases, "others": others}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
