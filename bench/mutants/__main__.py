"""Bugs planted on purpose, one at a time: does a test see each of them?

Every `NAME.toml` beside this file lists mutants of one package: a text of a source file that occurs once, what replaces
it, why a user would mind, and the tests that stand nearest. Each mutant is applied to a copy of the checkout and its
tests are run until the first failure. The nearest tests must pass on the copy without any mutant, otherwise their
failing shows nothing. With `--whole`, what survives there meets the whole suite (slow: for survivors only).
A mutant that makes the tests hang is killed, by the time limit.

    python -m bench.mutants [NAME ...] [--quick] [--whole] [--jobs 2] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[2]
BAR = 0.9  # share of mutants that the suite must kill
QUICK = 2  # mutants of each package with --quick
SECONDS = 600.0  # most for one run of nearest tests
ALL = ("tests",)


@dataclass(frozen=True)
class Mutant:
    """One planted bug: in ``file``, ``old`` becomes ``new``; ``tests`` are the nearest ones."""

    package: str
    why: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def read(names: Sequence[str]) -> list[Mutant]:
    """The mutants of the packages ``names`` (none: of all), each checked against the source as it is now.

    Raises:
        SystemExit: a package has no list, or a text does not occur exactly once.
    """
    files = sorted(Path(__file__).parent.glob("*.toml"))
    known = {file.stem: file for file in files}
    if unknown := set(names) - set(known):
        raise SystemExit(f"no mutants of {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    mutants = []
    for name in names or known:
        for row in tomllib.loads(known[name].read_text(encoding="utf-8"))["mutant"]:
            mutant = Mutant(name, row["why"], row["file"], row["old"], row["new"], tuple(row["tests"].split()))
            count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
            if count != 1 or mutant.old == mutant.new:
                raise SystemExit(
                    f"{name}.toml: {mutant.why!r}: its text occurs {count} times in {mutant.file}, not once"
                )
            mutants.append(mutant)
    return mutants


class Checkout:
    """A copy of the tracked files with the compiled kernels, and an interpreter that imports from it alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        for name in listed.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        from sprat.kernels import native

        if module := native():
            for built in Path(module.__file__).parent.glob("_native_*.so"):
                shutil.copy2(built, folder / "sprat" / "kernels")
        # Folders named in .pth files are searched, but .pth files in them are not read: an editable install of the
        # checkout under test does not come first.
        venv.create(folder / ".venv", symlinks=True, with_pip=False)
        packages = next((folder / ".venv" / "lib").glob("python*")) / "site-packages"
        here = [folder, *(Path(entry) for entry in sys.path if entry.endswith("site-packages"))]
        (packages / "checkout.pth").write_text("".join(f"{entry}\n" for entry in here), encoding="utf-8")
        self.python = folder / ".venv" / "bin" / "python"

    def passes(self, tests: Iterable[str]) -> bool:
        """Whether ``tests`` pass here; too slow is no."""
        command = [str(self.python), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        # In a group of its own: what tests started ends with them.
        process = subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
        )
        limit = SECONDS * (6 if tuple(tests) == ALL else 1)
        try:
            return process.wait(limit) == 0
        except subprocess.TimeoutExpired:
            subprocess.run(["kill", "-9", "--", f"-{process.pid}"], check=False)
            process.wait()
            return False

    def survives(self, mutant: Mutant, tests: Iterable[str]) -> bool:
        """Whether ``tests`` pass although ``mutant`` is planted."""
        file = self.folder / mutant.file
        sound = file.read_text(encoding="utf-8")
        try:
            file.write_text(sound.replace(mutant.old, mutant.new), encoding="utf-8")
            return self.passes(tests)
        finally:
            file.write_text(sound, encoding="utf-8")


def run(mutants: list[Mutant], jobs: int, whole: bool) -> tuple[list[Mutant], list[tuple[str, ...]]]:
    """(mutants that survive, tests that fail without any)."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as base, ThreadPoolExecutor(jobs) as pool:
        free: SimpleQueue[Checkout] = SimpleQueue()
        for number in range(jobs):
            free.put(Checkout(Path(base) / str(number)))

        def alone(mutant: Mutant | None, tests: tuple[str, ...]) -> bool:
            checkout = free.get()
            try:
                began = time.monotonic()
                good = checkout.passes(tests) if mutant is None else checkout.survives(mutant, tests)
                if mutant is not None:
                    word = "SURVIVES" if good else "killed"
                    print(f"{word:9}{time.monotonic() - began:6.1f} s  {mutant.file}: {mutant.why}", file=sys.stderr)
                return good
            finally:
                free.put(checkout)

        nearest = sorted({mutant.tests for mutant in mutants})
        red = [
            tests for tests, good in zip(nearest, pool.map(lambda t: alone(None, t), nearest), strict=True) if not good
        ]
        rest = [mutant for mutant in mutants if mutant.tests not in red]
        left = [m for m, alive in zip(rest, pool.map(lambda m: alone(m, m.tests), rest), strict=True) if alive]
        if whole and left:
            left = [m for m, alive in zip(left, pool.map(lambda m: alone(m, ALL), left), strict=True) if alive]
        return left, red


def main() -> int:
    """Print how many of the planted bugs were seen; 1 where fewer than the bar, or where tests fail without any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="packages: the lists beside this file")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} mutants of each package, drawn by --seed")
    parser.add_argument("--whole", action="store_true", help="the whole suite for what the nearest tests let through")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    mutants = read(asked.names)
    if asked.quick:
        generator = random.Random(asked.seed)
        packages = sorted({mutant.package for mutant in mutants})
        by_package = [[m for m in mutants if m.package == package] for package in packages]
        mutants = [m for group in by_package for m in generator.sample(group, min(QUICK, len(group)))]
    left, red = run(mutants, asked.jobs, asked.whole)
    killed = len(mutants) - len(left) - sum(mutant.tests in red for mutant in mutants)
    good = killed >= BAR * len(mutants) and not red
    packages = {m.package: [sum(o.package == m.package for o in each) for each in (mutants, left)] for m in mutants}
    if asked.json:
        survivors = [{"package": m.package, "file": m.file, "why": m.why} for m in left]
        facts = {"planted": len(mutants), "killed": killed, "bar": BAR, "survivors": survivors, "red": red}
        print(json.dumps({**facts, "packages": packages}))
    else:
        for package, (planted, alive) in packages.items():
            print(f"{package:10} {planted - alive:3} of {planted:3}")
        for tests in red:
            print(f"fails without any mutant: {' '.join(tests)}")
        for mutant in left:
            print(f"survives: {mutant.file}: {mutant.why}")
        verdict = "met" if good else "MISSED"
        print(f"killed {killed} of {len(mutants)} ({killed / len(mutants):.1%}); bar {BAR:.0%}: {verdict}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
