"""Does RL teach a skill, or only bring out what is there? RL over a base that always thinks, seed by seed.

The base has seen 450 steps of the quickstart's mix, none of whose worked examples is terse: it thinks in every answer,
and is often wrong. What RL gains over it is no longer that it thinks. Everything is re-seeded; beside it, from the same
base and for as many CPU seconds: SFT on more worked examples, rejection sampling, and pre-training that goes on.

    python -m bench.skill OUT [--seeds 0 1 2] [--isa avx512 avx2] [--split test] [--controls] [--quick] [--json]

``--split dev`` is for tuning. ``--quick`` is one seed with a tenth of the steps. What is finished under OUT is read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.roads import ISAS, Road, gains, read, table

RECIPE = (
    "data.terse_fraction=0.0", "pretrain.train.steps=450", "rl.seeds=[0]", "rl.rl.gate=false",
    "rl.rl.steps=150", "rl.rl.lr=1e-4", "rl.rl.kl_weight=0.05", "rl.rl.temperature=0.8",
    "sft.sft.steps=1300", "controls.rft.steps=1400", "controls.more.steps=1800",
)  # fmt: skip
QUICK = (
    "pretrain.train.steps=45",
    "rl.rl.steps=15",
    "sft.sft.steps=130",
    "controls.rft.steps=140",
    "controls.more.steps=180",
)
LEAST, MOST_LOST = 0.05, 0.02  # of accuracy: what is a gain on a task, and what no task may lose


def walk(folder: Path, overrides: tuple[str, ...], controlled: bool) -> None:
    """Run the stages that are not done."""
    import torch

    from sprat.road import controls, data, training
    from sprat.road.places import Road as Folder
    from sprat.road.recipe import named

    torch.set_num_threads(1)
    road = Folder(folder, named("quickstart", overrides))
    data.data(road)
    training.pretrain(road)
    training.reinforce(road, 0)
    if controlled:
        training.fine_tune(road)
        controls.rejection_sampling(road)
        controls.more_pretraining(road)


def main() -> int:
    """Walk, print, and say whether there is a gain of skill; 1 where there is none."""
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
        more = (f"seed={asked.walk}", f"eval.split={asked.split}", *(QUICK if asked.quick else ()))
        walk(asked.out, (*RECIPE, *more), asked.controls)
        return 0
    flags = ["--split", asked.split, *(["--controls"] if asked.controls else []), *(["--quick"] if asked.quick else [])]
    roads: list[Road] = []
    for seed in asked.seeds[: 1 if asked.quick else None]:
        for isa in asked.isa:
            folder = asked.out / f"seed{seed}-{isa}"
            command = [sys.executable, "-m", "bench.skill", str(folder), "--walk", str(seed), *flags]
            subprocess.run(command, env=os.environ | ISAS[isa] | {"OMP_NUM_THREADS": "1"}, check=True)
            roads.append(read(folder, f"{seed}-{isa}"))
    found = gains(roads)
    over = {name.partition(": ")[2]: gain for name, gain in found.items() if name.startswith("RL over base")}
    tasks = {task: gain for task, gain in over.items() if task != "mean"}
    gained = [task for task, gain in tasks.items() if gain["mean"] >= LEAST and gain["lower"] > 0]
    lost = [task for task, gain in tasks.items() if gain["mean"] < -MOST_LOST]
    skill = len(gained) >= 2 and not lost
    if asked.json:
        print(json.dumps({"gains": found, "gained": gained, "lost": lost, "skill": skill}))
        return 0 if skill else 1
    print(table(roads, ranges=True), end="\n\n")
    for name, gain in found.items():
        print(f"{name:44} {100 * gain['mean']:+6.1f} points, lower 95 % {100 * gain['lower']:+6.1f}")
    print(f"up by 5 points or more: {', '.join(gained) or 'none'}; down by more than 2: {', '.join(lost) or 'none'}")
    print("a gain of skill" if skill else "no gain of skill")
    return 0 if skill else 1


if __name__ == "__main__":
    raise SystemExit(main())
