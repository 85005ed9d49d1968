"""What a trainer's bits depend on beside its inputs, kept in the ledger, so that a replay can say what differs."""

from __future__ import annotations

import os
from typing import Any

import torch

from sprat.machine import processor_name
from sprat.post.rl.ledger_file import LedgerFile
from sprat.trust.run_record import versions

_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "SPRAT_ISA",
)  # of a product's bits


def this_machine() -> dict[str, Any]:
    """Processor, its instructions as torch uses them, threads, and the versions of packages."""
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    capability = torch.backends.cpu.get_cpu_capability()
    return {"processor": processor_name(), "instructions": capability, **versions(), **variables}


def note_machine(ledger: LedgerFile, machine: dict[str, Any]) -> None:
    """Note where the trainer ran, once for each place."""
    known = ledger.meta("machines") or []
    if machine not in known:
        ledger.set_meta("machines", [*known, machine])


def differences(ledger: LedgerFile) -> dict[str, tuple[Any, Any]]:
    """What differs between here and where the run was last trained: by name, there and here."""
    known, here = (ledger.meta("machines") or [{}])[-1], this_machine()
    names = sorted(known.keys() | here.keys())
    return {name: (known.get(name), here.get(name)) for name in names if known.get(name) != here.get(name)}
