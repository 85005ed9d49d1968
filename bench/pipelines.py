"""Whole pipelines, each with a seed of its own and on several instruction sets: mean, range, and which bars hold where.

Data order, weights, RL, the controls and the student are re-seeded. ``avx2`` makes torch, MKL and Sprat's kernels round
as on a processor without AVX-512. A bar holds where it holds on five pipelines of six; one that a pipeline says nothing
of is not held there. With more than one seed, the two claims of learning (RL over the base by 20 points on four tasks,
the student over its twin without a teacher) also need the lower end of the 95 % interval above 0, RL on each of the
four.

The interval (Student's t) is over training seeds only, on fixed test problems: it says what another seed would give,
not what other problems would. Many intervals are printed, and none is corrected for their number: the bars name the
primary comparisons, the others are for reading.

    python -m bench.pipelines OUT [--seeds 0 1 2] [--isa avx512 avx2] [--recipe quickstart] [--set a.b=c] [--twins]
                              [--quick] [--json]

Roads that are finished under OUT are read, not walked again, if they are of the same recipe, seed and instruction set;
else they are refused. Minutes count only where this recipe was walked in one go. ``--twins`` adds to each what a
quickstart has no time for: two dense twins of the teacher, at equal CPU seconds and at equal parameters, and a student
without a teacher that has as many worked examples as the teacher answered. ``--quick`` walks one pipeline.
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

from bench.pipeline_figures import (
    Criterion,
    PipelineResult,
    cpu_second_ratios,
    format_cpu_second_ratios,
    format_gains,
    format_range,
    gains,
    incomplete,
    judge_criteria,
    read_result,
    table,
)
from sprat.config.recipe import PipelineRecipe
from sprat.errors import ConfigError
from sprat.pipeline.recipe import load_recipe
from sprat.trust.ledger import Ledger

ISAS = {
    "avx512": {},
    "avx2": {"SPRAT_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
_DENSE_CONTROL = (
    "{{equal='{equal}',{more},size='micro',changes={{num_hidden_layers=2,first_k_dense_replace=2,n_routed_experts=0,"
    "n_shared_experts=0,num_experts_per_tok=0,moe_intermediate_size=0,intermediate_size={width}}}}}"
)
EXTRA_CONTROLS = (
    "dense=[" + ",".join((
        _DENSE_CONTROL.format(equal="FLOPs", more="steps=1600", width=288),
        # Dense products are faster at equal FLOPs.
        _DENSE_CONTROL.format(equal="CPU seconds", more="steps=2100", width=288),
        _DENSE_CONTROL.format(equal="parameters", more="steps=1600", width=864),  # those of all experts
    )) + "]",
    "controls.student_examples=12000",  # as many worked examples as the teacher answers: distill.problems
)  # fmt: skip
EXTRA_RUNS = ("pretrain-dense-parameters", "student-examples")
IGNORED_KEYS = ("jobs", "money")  # keys of a recipe that change no result
NESTED_TABLES = ("pretrain.train", "sft.sft", "rl.rl", "distill.distill")  # of recipes before tables were flat
EXTRA_KEYS = ("dense", "controls.student_examples")


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a table with their dotted keys; an entry of a list goes by its number."""
    parts = value.items() if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else ()
    if not parts:
        yield key, value
    for name, part in parts:
        yield from flatten(part, f"{key}.{name}" if key else str(name))


def check_folder(folder: Path, isa: str, recipe: PipelineRecipe, left_out: Sequence[str] = ()) -> None:
    """Refuse a folder in which another pipeline was walked, or begun.

    Args:
        recipe: what is asked for, with its seed.
        left_out: keys that may differ, beside those that change no result.

    Raises:
        ConfigError: says which folder, which key, and what to do.
    """

    def refuse(what: str) -> ConfigError:
        return ConfigError(f"another road is here: {what}", where=str(folder), todo="give another OUT, or remove it")

    recipe_file, isa_file = folder / "recipe.toml", folder / "isa"
    if not recipe_file.is_file():
        if any(folder.glob("*/run.json")) or any(folder.glob("*/open.json")) or (folder / "report.html").exists():
            raise refuse("it has runs, and no recipe.toml")
        return
    try:
        found_values = dict(flatten(tomllib.loads(recipe_file.read_text(encoding="utf-8"))))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise refuse("its recipe.toml cannot be read") from None
    for nested in NESTED_TABLES:
        if any(key.startswith(f"{nested}.") for key in found_values):
            raise refuse(f"its recipe has the table [{nested}], as before tables were flat")
    wanted_values = dict(flatten(tomllib.loads(recipe.to_toml())))
    for key in sorted(found_values.keys() | wanted_values.keys()):
        ignored = any(key == prefix or key.startswith(f"{prefix}.") for prefix in (*IGNORED_KEYS, *left_out))
        if not ignored and (
            key not in found_values or key not in wanted_values or found_values[key] != wanted_values[key]
        ):
            raise refuse(
                f"{key} is {found_values.get(key, 'not set')} there and {wanted_values.get(key, 'not set')} here"
            )
    if isa_file.is_file():
        found_isa = isa_file.read_text(encoding="utf-8").strip()
        if found_isa != isa:
            raise refuse(f"isa is {found_isa} there and {isa} here")
    elif folder.name != f"seed{recipe.seed}-{isa}":  # walked before there were notes: the name must say it
        raise refuse(f"isa is noted nowhere, and {isa} is asked")


def is_finished(folder: Path) -> bool:
    """Whether a walk ended here after the last one that began: it writes its recipe first, its report last."""
    recipe, report = folder / "recipe.toml", folder / "report.html"
    return recipe.is_file() and report.is_file() and report.stat().st_mtime_ns >= recipe.stat().st_mtime_ns


def write_note(folder: Path, name: str, text: str) -> None:
    """Write a small file of the pipeline, for which its ledger answers."""
    folder.mkdir(parents=True, exist_ok=True)
    path, ledger = folder / name, Ledger(folder / "ledger.jsonl")
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    ledger.root_hash()
    ledger.add_file(path)


def environment(isa: str) -> dict[str, str]:
    """The environment of a process of one instruction set, whatever this one has."""
    ours = {name for setting in ISAS.values() for name in setting}
    return {name: value for name, value in os.environ.items() if name not in ours} | ISAS[isa]


def run_pipeline(
    folder: Path, seed: int, isa: str, recipe: str, overrides: Sequence[str], extra_controls: bool = False
) -> PipelineResult:
    """Walk a pipeline where it is not finished, then what ``extra_controls`` adds where it is wanted, and read it.

    Raises:
        ConfigError: another pipeline is in the folder.
    """
    loaded = load_recipe(recipe, (*overrides, f"seed={seed}"))
    check_folder(folder, isa, loaded, EXTRA_KEYS if extra_controls else ())
    minutes_file, digest = folder / "minutes", hashlib.sha256(loaded.to_toml().encode()).hexdigest()
    command = [sys.executable, "-m", "sprat", "quickstart", "--out", str(folder), "--seed", str(seed), "--no-serve"]
    command += ["--recipe", recipe]

    def go(*extra: str) -> None:
        flags = [word for override in (*overrides, *extra) for word in ("--set", override)]
        subprocess.run([*command, *flags], env=environment(isa), check=True, stdout=subprocess.DEVNULL)

    if not is_finished(folder):
        in_one_go = not folder.exists() or not any(folder.iterdir())
        write_note(folder, "isa", isa)  # from here on the folder is not empty: a new start is told
        started = time.monotonic()
        go()
        if in_one_go:
            write_note(folder, minutes_file.name, f"{(time.monotonic() - started) / 60:.2f} {digest}")
    if extra_controls and not all((folder / run / "run.json").is_file() for run in EXTRA_RUNS):
        go(*EXTRA_CONTROLS)
    noted = minutes_file.read_text(encoding="utf-8").split() if minutes_file.is_file() else []
    return read_result(folder, f"{seed}-{isa}", float(noted[0]) if noted[1:] == [digest] else None)


def format_criterion(name: str, criterion: Criterion) -> str:
    """Figure, count of pipelines and verdict of a bar."""
    present = [outcome for outcome in criterion.values if outcome is not None]
    figure = format_range([value for value, _ in present], ".3g", True) if present else ""
    missing = f", missing on {len(criterion.values) - len(present)}" if len(present) < len(criterion.values) else ""
    count = f"{sum(fine for _, fine in present)} of {len(criterion.values)}{missing}"
    verdict = "met" if criterion.passed else "MISSED"
    return f"{name:60} {figure:28} {count}: {verdict}{f' ({criterion.note})' if criterion.note else ''}"


def print_results(results: Sequence[PipelineResult], criteria: dict[str, Criterion]) -> None:
    """Print tables, gains, CPU seconds and bars."""
    print(table(results, ranges=False), table(results, ranges=True), sep="\n\n", end="\n\n")
    for run, num_results in incomplete(results).items():
        print(f"left out, since only {num_results} of {len(results)} roads have it: {run}")
    print("\nGains, intervals over training seeds, uncorrected:", format_gains(gains(results)), sep="\n", end="\n\n")
    print(format_cpu_second_ratios(cpu_second_ratios(results)), end="\n\n")
    print("\n".join(format_criterion(name, bar) for name, bar in criteria.items()))


def main() -> int:
    """Walk, print, and say which bars hold; 1 where one does not, 2 where another pipeline is in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--isa", nargs="+", choices=list(ISAS), default=list(ISAS))
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--twins", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    kinds = [(seed, isa) for seed in args.seeds for isa in args.isa][: 1 if args.quick else None]
    options = (args.recipe, args.overrides, args.twins)
    try:
        results = [run_pipeline(args.out / f"seed{seed}-{isa}", seed, isa, *options) for seed, isa in kinds]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    criteria = judge_criteria(results)
    if args.json:
        facts = {
            "roads": [result.name for result in results], "bars": {name: bar.values for name, bar in criteria.items()},
            "good": {name: bar.passed for name, bar in criteria.items()},
            "notes": {name: bar.note for name, bar in criteria.items() if bar.note},
            "gains": gains(results), "cpu_seconds": cpu_second_ratios(results), "incomplete": incomplete(results),
        }  # fmt: skip
        print(json.dumps(facts))
    else:
        print_results(results, criteria)
    return 0 if all(bar.passed for bar in criteria.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
