"""The real model of the tests: fetched once into the user's cache; skips with the reason where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.errors import SpratError
from sprat.formats.fetch import download_model


def smol() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    try:
        return download_model("smol")
    except SpratError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")
