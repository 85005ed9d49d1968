"""Does RL teach a skill, or only bring out what is there? RL over a base that always thinks, seed by seed.

The base has seen 450 steps of the quickstart's mix, none of whose worked examples is terse: it thinks in every answer,
and is often wrong. What RL gains over it is no longer that it thinks. Everything is re-seeded; beside it, from the same
base and for as many CPU seconds: SFT on more worked examples, rejection sampling, and pre-training that goes on.

    python -m bench.skill OUT [--seeds 0 1 2] [--isa avx512 avx2] [--split test] [--controls] [--quick] [--json]

``--split dev`` is for tuning. ``--quick`` is one seed with a tenth of the steps. What is finished under OUT is read, if
it is of the same recipe, seed, split and instruction set; else it is refused. Intervals are over training seeds only,
on fixed test problems, and not corrected for their number: RL over the base is the primary comparison.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bench.pipeline_figures import (
    PipelineResult,
    cpu_second_ratios,
    format_cpu_second_ratios,
    format_gains,
    gains,
    gains_of_pair,
    incomplete,
    read_result,
    table,
)
from bench.pipelines import ISAS, check_folder, environment, write_note
from sprat.errors import ConfigError
from sprat.pipeline.recipe import load_recipe

RECIPE = (
    "data.terse_fraction=0.0", "pretrain.steps=450", "rl.seeds=[0]", "rl.gate=false",
    "rl.steps=150", "rl.lr=1e-4", "rl.kl_weight=0.05", "rl.temperature=0.6",  # chosen on dev
    "sft.steps=1300", "controls.rft.problems=40_000", "controls.rft.steps=1200", "controls.more.steps=1800",
)  # fmt: skip
QUICK = (
    "pretrain.steps=45",
    "rl.steps=15",
    "sft.steps=130",
    "controls.rft.problems=4000",
    "controls.rft.steps=120",
    "controls.more.steps=180",
)
MIN_GAIN, MAX_LOSS = 0.05, 0.02  # of accuracy: what is a gain on a task, and what no task may lose


def overrides(seed: int, split: str, quick: bool) -> tuple[str, ...]:
    """Of the quickstart's recipe."""
    return (*RECIPE, f"seed={seed}", f"eval.split={split}", *(QUICK if quick else ()))


def run_stages(folder: Path, changes: tuple[str, ...], controlled: bool) -> None:
    """Run the stages that are not done."""
    import torch

    from sprat.files import atomic
    from sprat.pipeline import controls, data, training
    from sprat.pipeline.pipeline import Pipeline

    torch.set_num_threads(1)
    pipeline = Pipeline(folder, load_recipe("quickstart", changes))
    atomic.write_text(folder / "recipe.toml", pipeline.recipe.to_toml())
    pipeline.add_file("recipe.toml")
    data.data(pipeline)
    training.pretrain(pipeline)
    training.rl(pipeline, 0)
    if controlled:
        training.sft(pipeline)
        controls.rft(pipeline)
        controls.pretrain_more(pipeline)


def run_seed(folder: Path, seed: int, isa: str, args: argparse.Namespace) -> PipelineResult:
    """Walk one seed in a process of its instruction set, and read it.

    Raises:
        ConfigError: another pipeline is in the folder.
    """
    check_folder(folder, isa, load_recipe("quickstart", overrides(seed, args.split, args.quick)))
    write_note(folder, "isa", isa)
    flags = ["--split", args.split, *(["--controls"] if args.controls else []), *(["--quick"] if args.quick else [])]
    command = [sys.executable, "-m", "bench.skill", str(folder), "--walk", str(seed), *flags]
    subprocess.run(command, env=environment(isa) | {"OMP_NUM_THREADS": "1"}, check=True)
    return read_result(folder, f"{seed}-{isa}")


def judge(gains_by_name: dict[str, dict[str, float]]) -> tuple[list[str], list[str]]:
    """Tasks on which RL is surely up over the base by 5 points, and those on which it is down by more than 2."""
    tasks = {task: gain for task, gain in gains_of_pair(gains_by_name, "RL over base").items() if task != "mean"}
    up = [task for task, gain in tasks.items() if gain["mean"] >= MIN_GAIN and gain["lower"] > 0]
    return up, [task for task, gain in tasks.items() if gain["mean"] < -MAX_LOSS]


def main() -> int:
    """Walk, print, and say whether there is a gain of skill; 1 where there is none, 2 where another is in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--isa", nargs="+", choices=list(ISAS), default=["avx512"])
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--walk", type=int, help=argparse.SUPPRESS)  # one seed, in a process of one instruction set
    args = parser.parse_args()
    if args.walk is not None:
        run_stages(args.out, overrides(args.walk, args.split, args.quick), args.controls)
        return 0
    kinds = [(seed, isa) for seed in args.seeds[: 1 if args.quick else None] for isa in args.isa]
    try:
        results = [run_seed(args.out / f"seed{seed}-{isa}", seed, isa, args) for seed, isa in kinds]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    gains_by_name = gains(results)
    gained_tasks, lost = judge(gains_by_name)
    skill = len(gained_tasks) >= 2 and not lost
    if args.json:
        facts = {"gains": gains_by_name, "cpu_seconds": cpu_second_ratios(results), "incomplete": incomplete(results)}
        print(json.dumps(facts | {"gained": gained_tasks, "lost": lost, "skill": skill}))
        return 0 if skill else 1
    print(table(results, ranges=True), end="\n\n")
    for run, num_results in incomplete(results).items():
        print(f"left out, since only {num_results} of {len(results)} roads have it: {run}")
    print(
        *filter(None, (format_gains(gains_by_name), format_cpu_second_ratios(cpu_second_ratios(results)))),
        sep="\n\n",
        end="\n\n",
    )
    print(
        f"up by 5 points or more: {', '.join(gained_tasks) or 'none'}; down by more than 2: {', '.join(lost) or 'none'}"
    )
    print("a gain of skill" if skill else "no gain of skill")
    return 0 if skill else 1


if __name__ == "__main__":
    raise SystemExit(main())
