"""Collecting imports thousands of modules, none of which is garbage: Python need not look through them for any."""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """No rounds of the garbage collector while tests are collected; later ones leave out what was there by then."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
