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

from bench.road_figures import Road, gain_lines, gains, incomplete, of_pair, read, seconds, seconds_lines, table
from bench.roads import ISAS, check, environment, note
from sprat.errors import ConfigError
from sprat.road.recipe import named

RECIPE = (
    "data.terse_fraction=0.0", "pretrain.train.steps=450", "rl.seeds=[0]", "rl.rl.gate=false",
    "rl.rl.steps=150", "rl.rl.lr=1e-4", "rl.rl.kl_weight=0.05", "rl.rl.temperature=0.6",  # chosen on dev
    "sft.sft.steps=1300", "controls.rft.problems=40_000", "controls.rft.steps=1200", "controls.more.steps=1800",
)  # fmt: skip
QUICK = (
    "pretrain.train.steps=45",
    "rl.rl.steps=15",
    "sft.sft.steps=130",
    "controls.rft.problems=4000",
    "controls.rft.steps=120",
    "controls.more.steps=180",
)
LEAST, MOST_LOST = 0.05, 0.02  # of accuracy: what is a gain on a task, and what no task may lose


def overrides(seed: int, split: str, quick: bool) -> tuple[str, ...]:
    """Of the quickstart's recipe."""
    return (*RECIPE, f"seed={seed}", f"eval.split={split}", *(QUICK if quick else ()))


def walk(folder: Path, changes: tuple[str, ...], controlled: bool) -> None:
    """Run the stages that are not done."""
    import torch

    from sprat.road import controls, data, training
    from sprat.road.places import Road as Folder
    from sprat.trust import atomic

    torch.set_num_threads(1)
    road = Folder(folder, named("quickstart", changes))
    atomic.write_text(folder / "recipe.toml", road.recipe.to_toml())
    road.enter("recipe.toml")
    data.data(road)
    training.pretrain(road)
    training.reinforce(road, 0)
    if controlled:
        training.fine_tune(road)
        controls.rejection_sampling(road)
        controls.more_pretraining(road)


def one(folder: Path, seed: int, isa: str, asked: argparse.Namespace) -> Road:
    """Walk one seed in a process of its instruction set, and read it.

    Raises:
        ConfigError: another road is in the folder.
    """
    check(folder, isa, named("quickstart", overrides(seed, asked.split, asked.quick)))
    note(folder, "isa", isa)
    flags = ["--split", asked.split, *(["--controls"] if asked.controls else []), *(["--quick"] if asked.quick else [])]
    command = [sys.executable, "-m", "bench.skill", str(folder), "--walk", str(seed), *flags]
    subprocess.run(command, env=environment(isa) | {"OMP_NUM_THREADS": "1"}, check=True)
    return read(folder, f"{seed}-{isa}")


def judge(gained: dict[str, dict[str, float]]) -> tuple[list[str], list[str]]:
    """Tasks on which RL is surely up over the base by 5 points, and those on which it is down by more than 2."""
    tasks = {task: gain for task, gain in of_pair(gained, "RL over base").items() if task != "mean"}
    up = [task for task, gain in tasks.items() if gain["mean"] >= LEAST and gain["lower"] > 0]
    return up, [task for task, gain in tasks.items() if gain["mean"] < -MOST_LOST]


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
    asked = parser.parse_args()
    if asked.walk is not None:
        walk(asked.out, overrides(asked.walk, asked.split, asked.quick), asked.controls)
        return 0
    kinds = [(seed, isa) for seed in asked.seeds[: 1 if asked.quick else None] for isa in asked.isa]
    try:
        roads = [one(asked.out / f"seed{seed}-{isa}", seed, isa, asked) for seed, isa in kinds]
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    found = gains(roads)
    gained, lost = judge(found)
    skill = len(gained) >= 2 and not lost
    if asked.json:
        facts = {"gains": found, "cpu_seconds": seconds(roads), "incomplete": incomplete(roads)}
        print(json.dumps(facts | {"gained": gained, "lost": lost, "skill": skill}))
        return 0 if skill else 1
    print(table(roads, ranges=True), end="\n\n")
    for run, there in incomplete(roads).items():
        print(f"left out, since only {there} of {len(roads)} roads have it: {run}")
    print(*filter(None, (gain_lines(found), seconds_lines(seconds(roads)))), sep="\n\n", end="\n\n")
    print(f"up by 5 points or more: {', '.join(gained) or 'none'}; down by more than 2: {', '.join(lost) or 'none'}")
    print("a gain of skill" if skill else "no gain of skill")
    return 0 if skill else 1


if __name__ == "__main__":
    raise SystemExit(main())
