"""Whole roads, each with a seed of its own and on several instruction sets: mean, range, and which bars hold where.

Data order, weights, RL, the controls and the student are re-seeded. ``avx2`` makes torch, MKL and Sprat's kernels round
as on a processor without AVX-512. A bar holds where it holds on five roads of six; one that a road says nothing of is
not held there. With more than one seed, the two claims of learning (RL over the base by 20 points on four tasks, the
student over its twin without a teacher) also need the lower end of the 95 % interval above 0, RL on each of the four.

The interval (Student's t) is over training seeds only, on fixed test problems: it says what another seed would give,
not what other problems would. Many intervals are printed, and none is corrected for their number: the bars name the
primary comparisons, the others are for reading.

    python -m bench.roads OUT [--seeds 0 1 2] [--isa avx512 avx2] [--recipe quickstart] [--set a.b=c] [--twins]
                              [--quick] [--json]

Roads that are finished under OUT are read, not walked again, if they are of the same recipe, seed and instruction set;
else they are refused. Minutes count only where this recipe was walked in one go. ``--twins`` adds to each what a
quickstart has no time for: two dense twins of the teacher, at equal CPU seconds and at equal parameters, and a student
without a teacher that has as many worked examples as the teacher answered. ``--quick`` walks one road.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.road_figures import (
    Bar,
    Road,
    gain_lines,
    gains,
    incomplete,
    judge,
    read,
    seconds,
    seconds_lines,
    shown,
    table,
)
from sprat.errors import ConfigError
from sprat.road.recipe import RoadRecipe, named
from sprat.trust.ledger import Ledger

ISAS = {
    "avx512": {},
    "avx2": {"SPRAT_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
_TWIN = (
    "{{equal='{equal}',{more},size='micro',changes={{num_hidden_layers=2,first_k_dense_replace=2,n_routed_experts=0,"
    "n_shared_experts=0,num_experts_per_tok=0,moe_intermediate_size=0,intermediate_size={width}}}}}"
)
TWINS = (
    "dense=[" + ",".join((
        _TWIN.format(equal="FLOPs", more="steps=1600", width=288),
        _TWIN.format(equal="CPU seconds", more="steps=2100", width=288),  # dense products are faster at equal FLOPs
        _TWIN.format(equal="parameters", more="steps=1600", width=864),  # those of all experts
    )) + "]",
    "controls.student_examples=12000",  # as many worked examples as the teacher answers: distill.distill.problems
)  # fmt: skip
TWIN_RUNS = ("pretrain-dense-parameters", "student-examples")
NO_MATTER = ("jobs", "money")  # keys of a recipe that change no result
TWIN_KEYS = ("dense", "controls.student_examples")


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a table with their dotted keys; an entry of a list goes by its number."""
    parts = value.items() if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else ()
    if not parts:
        yield key, value
    for name, part in parts:
        yield from leaves(part, f"{key}.{name}" if key else str(name))


def check(folder: Path, isa: str, recipe: RoadRecipe, left_out: Sequence[str] = ()) -> None:
    """Refuse a folder in which another road was walked, or begun.

    Args:
        recipe: what is asked for, with its seed.
        left_out: keys that may differ, beside those that change no result.

    Raises:
        ConfigError: says which folder, which key, and what to do.
    """

    def refuse(what: str) -> ConfigError:
        return ConfigError(f"another road is here: {what}", where=str(folder), todo="give another OUT, or remove it")

    kept, told = folder / "recipe.toml", folder / "isa"
    if not kept.is_file():
        if any(folder.glob("*/run.json")) or any(folder.glob("*/open.json")) or (folder / "report.html").exists():
            raise refuse("it has runs, and no recipe.toml")
        return
    try:
        there = dict(leaves(tomllib.loads(kept.read_text(encoding="utf-8"))))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise refuse("its recipe.toml cannot be read") from None
    asked = dict(leaves(tomllib.loads(recipe.to_toml())))
    for key in sorted(there.keys() | asked.keys()):
        free = any(key == one or key.startswith(f"{one}.") for one in (*NO_MATTER, *left_out))
        if not free and (key not in there or key not in asked or there[key] != asked[key]):
            raise refuse(f"{key} is {there.get(key, 'not set')} there and {asked.get(key, 'not set')} here")
    if told.is_file():
        walked = told.read_text(encoding="utf-8").strip()
        if walked != isa:
            raise refuse(f"isa is {walked} there and {isa} here")
    elif folder.name != f"seed{recipe.seed}-{isa}":  # walked before there were notes: the name must say it
        raise refuse(f"isa is noted nowhere, and {isa} is asked")


def finished(folder: Path) -> bool:
    """Whether a walk ended here after the last one that began: it writes its recipe first, its report last."""
    recipe, report = folder / "recipe.toml", folder / "report.html"
    return recipe.is_file() and report.is_file() and report.stat().st_mtime_ns >= recipe.stat().st_mtime_ns


def note(folder: Path, name: str, text: str) -> None:
    """Write a small file of the road, for which its ledger answers."""
    folder.mkdir(parents=True, exist_ok=True)
    path, ledger = folder / name, Ledger(folder / "ledger.jsonl")
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    ledger.root()
    ledger.enter(path)


def environment(isa: str) -> dict[str, str]:
    """The environment of a process of one instruction set, whatever this one has."""
    ours = {name for setting in ISAS.values() for name in setting}
    return {name: value for name, value in os.environ.items() if name not in ours} | ISAS[isa]


def walk(folder: Path, seed: int, isa: str, recipe: str, overrides: Sequence[str], twins: bool = False) -> Road:
    """Walk a road where it is not finished, then what ``twins`` adds where it is wanted, and read it.

    Raises:
        ConfigError: another road is in the folder.
    """
    chosen = named(recipe, (*overrides, f"seed={seed}"))
    check(folder, isa, chosen, TWIN_KEYS if twins else ())
    told, digest = folder / "minutes", hashlib.sha256(chosen.to_toml().encode()).hexdigest()
    command = [sys.executable, "-m", "sprat", "quickstart", "--out", str(folder), "--seed", str(seed), "--no-serve"]
    command += ["--recipe", recipe]

    def go(*more: str) -> None:
        words = [word for each in (*overrides, *more) for word in ("--set", each)]
        subprocess.run([*command, *words], env=environment(isa), check=True, stdout=subprocess.DEVNULL)

    if not finished(folder):
        in_one_go = not folder.exists() or not any(folder.iterdir())
        note(folder, "isa", isa)  # from here on the folder is not empty: a new start is told
        began = time.monotonic()
        go()
        if in_one_go:
            note(folder, told.name, f"{(time.monotonic() - began) / 60:.2f} {digest}")
    if twins and not all((folder / run / "run.json").is_file() for run in TWIN_RUNS):
        go(*TWINS)
    noted = told.read_text(encoding="utf-8").split() if told.is_file() else []
    return read(folder, f"{seed}-{isa}", float(noted[0]) if noted[1:] == [digest] else None)


def bar_line(name: str, bar: Bar) -> str:
    """Figure, count of roads and verdict of a bar."""
    there = [one for one in bar.found if one is not None]
    figure = shown([value for value, _ in there], ".3g", True) if there else ""
    missing = f", missing on {len(bar.found) - len(there)}" if len(there) < len(bar.found) else ""
    count = f"{sum(fine for _, fine in there)} of {len(bar.found)}{missing}"
    verdict = "met" if bar.met else "MISSED"
    return f"{name:60} {figure:28} {count}: {verdict}{f' ({bar.note})' if bar.note else ''}"


def tell(roads: Sequence[Road], judged: dict[str, Bar]) -> None:
    """Print tables, gains, CPU seconds and bars."""
    print(table(roads, ranges=False), table(roads, ranges=True), sep="\n\n", end="\n\n")
    for run, there in incomplete(roads).items():
        print(f"left out, since only {there} of {len(roads)} roads have it: {run}")
    print("\nGains, intervals over training seeds, uncorrected:", gain_lines(gains(roads)), sep="\n", end="\n\n")
    print(seconds_lines(seconds(roads)), end="\n\n")
    print("\n".join(bar_line(name, bar) for name, bar in judged.items()))


def main() -> int:
    """Walk, print, and say which bars hold; 1 where one does not, 2 where another road is in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--isa", nargs="+", choices=list(ISAS), default=list(ISAS))
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--twins", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    kinds = [(seed, isa) for seed in asked.seeds for isa in asked.isa][: 1 if asked.quick else None]
    way = (asked.recipe, asked.overrides, asked.twins)
    try:
        roads = [walk(asked.out / f"seed{seed}-{isa}", seed, isa, *way) for seed, isa in kinds]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    judged = judge(roads)
    if asked.json:
        facts = {
            "roads": [road.name for road in roads], "bars": {name: bar.found for name, bar in judged.items()},
            "good": {name: bar.met for name, bar in judged.items()},
            "notes": {name: bar.note for name, bar in judged.items() if bar.note},
            "gains": gains(roads), "cpu_seconds": seconds(roads), "incomplete": incomplete(roads),
        }  # fmt: skip
        print(json.dumps(facts))
    else:
        tell(roads, judged)
    return 0 if all(bar.met for bar in judged.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
