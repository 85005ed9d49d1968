"""A road of the user's own: stages from one TOML file, each a run in a folder of its name, under one ledger.

The file is checked whole before anything starts: stations, keys, names, what waits for what, and every file that is
named. Paths in it are relative to it; ``model = "base"`` means the run of the stage ``base``. Stages run by the graph
that the quickstart runs by, side by side where they do not wait for each other, and the same line again goes on where
it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from sprat.config.road import StageConfig
from sprat.errors import CheckpointError, ConfigError
from sprat.files import atomic
from sprat.files.lock import lock_folder
from sprat.pipeline.executor import LocalExecutor, notify
from sprat.pipeline.graph import OnProgress, Stage, run_stages
from sprat.pipeline.quickstart import check_folder
from sprat.pipeline.road_checks import check_inputs
from sprat.pipeline.road_file import RoadFile, open_road
from sprat.pipeline.road_stages import RoadStage, read_road
from sprat.pipeline.stations import STATIONS
from sprat.trust.ledger import LEDGER_NAME, Ledger

__all__ = ["RoadStage", "open_road", "read_road", "road", "select", "states"]

RECIPE_FILE = "road.toml"  # in the road's folder: the file as it was given


def road(
    stages: Sequence[RoadStage],
    file: str | Path | RoadFile,
    out: str | Path,
    *,
    jobs: int | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> None:
    """Run ``stages`` of ``file`` in the folder ``out``; what is done is found and not run again.

    Args:
        stages: of ``read_road``, or some of them (``select``).
        jobs: stages that may run side by side, and share the cores; if not given what the file says, or as many as ever
            could.
        on_progress: hears ``(stage, "starts", "runs" or "done", seconds)``.

    Raises:
        SpratError: a stage that failed, a full disk, a second road in the same folder.
    """
    import torch

    out, file = Path(out), file if isinstance(file, RoadFile) else open_road(file)
    check_folder(out)
    check_inputs(stages)
    jobs = jobs or file.jobs or _width(stages)
    names = {stage.name for stage in stages}
    graph = [
        Stage(stage.name, _run, (stage.config, stage.folder), tuple(name for name in stage.depends_on if name in names))
        for stage in stages
    ]
    with lock_folder(out):
        _keep_recipe(file, out)
        with LocalExecutor(jobs, max(1, torch.get_num_threads() // jobs)) as executor:
            run_stages(graph, executor, jobs, on_progress)


def states(stages: Sequence[RoadStage]) -> list[str]:
    """``RoadStage.state`` of each; what takes something from a stage that is to be made is made after it."""
    by_name: dict[str, str] = {}
    for stage in stages:  # what is waited for comes first
        state = stage.state()
        is_waiting = any(by_name.get(name, "done") != "done" for name in stage.depends_on)
        by_name[stage.name] = "runs again" if state == "done" and is_waiting else state
    return list(by_name.values())


def select(stages: Sequence[RoadStage], *, only: str = "", start: str = "") -> list[RoadStage]:
    """The stage ``only``, or ``start`` with all that takes something from it; all where neither is given.

    Raises:
        ConfigError: there is no such stage.
        CheckpointError: a stage before them, that they take something from, is not finished.
    """
    wanted = only or start
    if not wanted:
        return list(stages)
    if wanted not in [stage.name for stage in stages]:
        option = "--only" if only else "--from"
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(f"no stage {wanted!r}", where=option, todo=f"there are {names}")
    chosen_names = {wanted}
    for stage in stages:  # in an order in which what is waited for comes first
        if start and chosen_names.intersection(stage.depends_on):
            chosen_names.add(stage.name)
    chosen = [stage for stage in stages if stage.name in chosen_names]
    for stage in stages:
        needed = any(stage.name in each.depends_on for each in chosen)
        if needed and stage.name not in chosen_names and not (stage.folder / "run.json").is_file():
            todo = f"run it first: --only {stage.name}"
            raise CheckpointError(f"the stage {stage.name!r} is not finished", where=str(stage.folder), todo=todo)
    return chosen


def _run(config: StageConfig, folder: Path) -> None:
    """One stage, in its worker. Its settings are made here: some are read from a run that was not there before."""
    station = STATIONS[config.uses]
    run = station.run(config, station.settings_of(config, config.name), folder)
    if run.set_aside is not None:
        notify(config.name, f"has other settings or inputs than the run that was there; that is now {run.set_aside}")


def _width(stages: Sequence[RoadStage]) -> int:
    """How many of ``stages`` may be at work at once: the most that lie equally deep; at most the cores."""
    depth: dict[str, int] = {}
    for stage in stages:
        depth[stage.name] = 1 + max((depth.get(name, 0) for name in stage.depends_on), default=0)
    depths = list(depth.values())
    return min(max(map(depths.count, depths)), os.cpu_count() or 1)


def _keep_recipe(file: RoadFile, out: Path) -> None:
    """Put a copy of the file into the road's folder, for which the ledger answers; with inputs, what it says with them.

    What was gone from that copy itself, with other settings, stands there from now on.
    """
    copy = out / RECIPE_FILE
    if file.is_changed:
        atomic.write_text(copy, file.to_toml(out.resolve()))
    elif file.path.resolve() != copy.resolve():
        with atomic.replace_file(copy) as temporary:
            shutil.copyfile(file.path, temporary)
    ledger = Ledger(out / LEDGER_NAME)
    ledger.root_hash()
    ledger.add_file(copy)
