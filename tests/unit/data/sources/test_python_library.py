"""The library's text: what it says in docstrings apart from what it does."""

from __future__ import annotations

import ast
from pathlib import Path

from sprat.data.sources import python_library


def test_docstrings_and_code_are_parted_and_both_keep_their_source(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "no.py").write_text('"""Tests are left out of the corpus."""')
    (tmp_path / "broken.py").write_text("def (")
    text = '"""What this module is for."""\n\ndef f(a, *b, c=1):\n    """Say what f does with a."""\n    return a\n'
    (tmp_path / "pkg" / "mod.py").write_text(text)
    found = list(python_library.documents(tmp_path))
    said, code = found
    assert said.text == "pkg.mod\n\nWhat this module is for.\n\nf(a, *b, c)\n\nSay what f does with a.\n"
    assert "Say what" not in code.text
    assert ast.parse(code.text).body[-1].name == "f"  # type: ignore[attr-defined]
    assert said.source == code.source == "python/pkg/mod.py"
    assert said.licence == "PSF-2.0"
