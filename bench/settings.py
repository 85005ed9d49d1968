"""The whole suite on the arithmetic of other processors: one setting at a time, all of them green.

torch and MKL choose their kernels by processor, so the same sum is rounded differently elsewhere; Sprat's own kernels
are built once for each instruction set and promise equal bits on all of them. A test that expects equal bits where
nobody promises them passes on its author's machine only. These settings make this machine round as others do.

    python -m bench.settings [--only NAME] [--quick] [--json] [-- PYTEST ARGUMENTS]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "torch on AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "torch without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "MKL on AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "kernels on AVX-512": {"SPRAT_ISA": "avx512"},
    "kernels on AVX2": {"SPRAT_ISA": "avx2"},
    "kernels portable": {"SPRAT_ISA": "portable"},
}
QUICK = ("tests/unit/model", "tests/unit/kernels", "tests/parity")  # where arithmetic is


def main() -> int:
    """Print a verdict for each setting; 1 where the suite is red under one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SETTINGS, action="append")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("pytest", nargs="*")
    asked = parser.parse_args()
    verdicts: dict[str, dict[str, object]] = {}
    for name in asked.only or SETTINGS:
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **SETTINGS[name]}
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *asked.pytest]
        began = time.monotonic()
        done = subprocess.run(
            [*command, *(QUICK if asked.quick else ())], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        red = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        words = done.stdout.strip().splitlines()[-1:] if done.returncode in (0, 1) else [done.stderr[-500:]]
        verdicts[name] = {"green": done.returncode == 0, "seconds": round(time.monotonic() - began), "red": red}
        if not asked.json:
            print(f"{name:22} {'green' if done.returncode == 0 else 'RED':6} {''.join(words)}", flush=True)
            for line in red:
                print(f"    {line}", flush=True)
    green = sum(bool(row["green"]) for row in verdicts.values())
    print(json.dumps(verdicts) if asked.json else f"{green} of {len(verdicts)} settings green")
    return 0 if green == len(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
