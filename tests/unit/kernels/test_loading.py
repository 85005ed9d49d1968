"""Which kernels are loaded: the best that were built and that the processor runs, or none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sprat import kernels
from sprat.errors import MachineError


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The choice has not been made yet, and is made anew afterwards."""
    kernels.native.cache_clear()
    kernels.native_library.cache_clear()
    yield
    kernels.native.cache_clear()
    kernels.native_library.cache_clear()


needs_kernels = pytest.mark.skipif(kernels.native() is None, reason=kernels.unavailable_reason())


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRAT_NATIVE", "0")
    assert kernels.native() is None and kernels.native_library() is None
    assert "SPRAT_NATIVE" in kernels.unavailable_reason()


@needs_kernels
@pytest.mark.parametrize("setting", ["os.environ['SPRAT_ISA'] = 'portable'", "kernels._features = set"])
def test_the_plain_ones_run_everywhere(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, or because the processor can nothing else; in a process of their own."""
    monkeypatch.delenv("SPRAT_ISA", raising=False)
    code = f"import os; from sprat import kernels; {setting}; print(kernels.native().isa)"
    env = {name: value for name, value in os.environ.items() if name != "SPRAT_ISA"}  # these tests may run under one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() in ("portable", "neon-dotprod")


def test_asking_for_what_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRAT_ISA", "mmx")
    with pytest.raises(MachineError, match="mmx"):
        kernels.native()


def test_without_built_modules_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPRAT_ISA", raising=False)

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(kernels.importlib, "import_module", missing)
    assert kernels.native() is None and "compiler" in kernels.unavailable_reason()
