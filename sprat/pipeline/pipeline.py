"""Where things are on one pipeline, and how a stage opens its run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sprat.config import Config, GRPOConfig, LoopConfig, ModelConfig, TaskConfig
from sprat.config.recipe import ModelRecipe, PipelineRecipe, task_title
from sprat.config.sizes import size
from sprat.data.document import safe_name
from sprat.data.pack import PackedDataset
from sprat.errors import CheckpointError, ConfigError, DataError
from sprat.files import atomic
from sprat.model import Transformer
from sprat.pipeline.executor import notify
from sprat.tasks import HeldOutTask, Problem, Split, Task, load
from sprat.tokens import Tokenizer
from sprat.train import checkpoint
from sprat.trust import run_record
from sprat.trust.ledger import Ledger
from sprat.trust.run import Run, open_run

Prepared = TypeVar("Prepared")
# The CLI verb that runs each stage.
STAGE_COMMANDS = {"data": "data", "pretrain": "train", "sft": "sft", "rl": "rl", "distill": "distill"}


@dataclass(frozen=True)
class Pipeline:
    """A folder of runs with one ledger and one recipe."""

    folder: Path
    recipe: PipelineRecipe

    def open_run(
        self,
        name: str,
        stage: str,
        recipe: Config,
        inputs: Mapping[str, run_record.Input],
        prepare: Callable[[bool], Prepared],
        check_start: Callable[[checkpoint.Checkpoint, Transformer, Any], None] | None = None,
        seed: int | None = None,
    ) -> tuple[Run, Prepared] | None:
        """The run ``name`` on this pipeline and what ``prepare`` made for it; None where it is done already.

        Args:
            inputs, prepare: see ``sprat.trust.run.open_run``.
            check_start: ``check_start(start, model, recipe)`` refuses the checkpoint of the recipe's ``init_from``,
                which becomes an input, if the model that was prepared first cannot go on from it; None: a run without.
            seed: the pipeline's if left out.
        """
        self.require_finished(*(path for path in inputs.values() if isinstance(path, Path)))
        prepared: list[Any] = []
        init_from = recipe.init_from if check_start and isinstance(recipe, LoopConfig | GRPOConfig) else ""
        init_from_input = checkpoint.start_input(init_from, self.run_folder(name), recipe.digest())

        def prepare_and_check(resuming: bool) -> None:
            prepared.append(prepare(resuming))
            if check_start and init_from_input and not resuming:
                expected_digest = run_record.describe_input(init_from_input["init_from"], self.folder)["digest"]
                start = checkpoint.find_start(init_from, self.run_folder(name), expected_digest)
                check_start(start, prepared[0][0], recipe)

        run = open_run(
            self.run_folder(name),
            stage=stage,
            recipe=recipe,
            inputs={**inputs, **init_from_input},
            seed=self.recipe.seed if seed is None else seed,
            ledger=self.folder / "ledger.jsonl",
            money=self.recipe.money,
            prepare=prepare_and_check,
        )
        if run.set_aside is not None:
            notify(name, f"has another recipe or input than the run that was there; that one is now {run.set_aside}")
        return None if run.done else (run, prepared[0])

    def require_finished(self, *paths: Path) -> None:
        """Refuse those of ``paths`` that are runs of this pipeline and not finished, the first of the pipeline first.

        Raises:
            DataError, CheckpointError: one of them; says which verb makes it.
        """
        runs = {path: path.name.partition("-seed")[0] for path in paths if path.parent == self.folder}
        for stage, verb in STAGE_COMMANDS.items():
            for run in [run for run in runs if runs[run] == stage and not (run / "run.json").is_file()]:
                what = f"{stage} is not finished" if (run / "open.json").is_file() else f"{stage} was not run yet"
                todo = f"run `sprat {verb} --out {self.folder}` first"
                raise (DataError if stage == "data" else CheckpointError)(what, where=str(run), todo=todo)

    def add_file(self, name: str) -> None:
        """Let the ledger answer for the file or folder ``name`` of the pipeline, which belongs to no run."""
        ledger = Ledger(self.folder / "ledger.jsonl")
        ledger.root_hash()
        ledger.add_file(self.folder / name)

    def run_folder(self, name: str) -> Path:
        """The folder of run ``name``.

        Raises:
            ConfigError: the name is no plain name of a folder.
        """
        if not name or safe_name(name) != name:
            raise ConfigError("this cannot name a run", where=repr(name), todo="use letters, digits, - and _")
        return self.folder / name

    @property
    def data_artifact(self) -> DataArtifact:
        """What the data stage left."""
        return DataArtifact(self.run_folder("data") / "artefact")


@dataclass(frozen=True)
class DataArtifact:
    """The data stage's output: tokenizer, packed text and tasks, held-out text and problems."""

    folder: Path

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was trained on the corpus."""
        return Tokenizer.load(self.folder / "tokenizer")

    def packed(self, name: str) -> PackedDataset:
        """Packed rows: ``text`` or ``tasks``."""
        return PackedDataset.load(self.folder / name)

    def held_out(self, domain: str) -> PackedDataset:
        """Packed rows of the held-out text of ``domain``."""
        return PackedDataset.load(self.folder / "heldout" / safe_name(domain))

    def held_out_domains(self) -> dict[str, int]:
        """Bytes of held-out text for each domain."""
        sizes: dict[str, int] = json.loads((self.folder / "heldout" / "bytes.json").read_text(encoding="utf-8"))
        return sizes

    def problems_file(self, config: TaskConfig, split: Split) -> Path:
        """Where the problems of a held-out split are kept."""
        return self.folder / "problems" / split / f"{safe_name(task_title(config))}.jsonl"

    def task(self, config: TaskConfig, split: Split = "test") -> HeldOutTask:
        """The task of ``config`` with the problems of a held-out ``split`` that the data stage kept."""
        return HeldOutTask(load_task(config), tuple(read_problems(self.problems_file(config, split))), split)


def model_config(recipe: ModelRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """The model that ``recipe`` names, with the vocabulary and special ids of ``tokenizer``.

    Raises:
        ConfigError: it cannot be, or has fewer ids than the tokenizer.
    """
    ids = tokenizer.special_ids
    special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    config = size(recipe.size, **{"vocab_size": tokenizer.vocab_size, **special, **recipe.changes})
    if config.vocab_size < tokenizer.vocab_size:
        what = f"{config.vocab_size} ids are fewer than the tokenizer's {tokenizer.vocab_size}"
        raise ConfigError(what, where="changes.vocab_size", todo="leave it out")
    return config


def load_task(config: TaskConfig) -> Task:
    """The task of ``config`` under its title."""
    return load(config.replace(title=task_title(config)))


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """One JSON line for each problem."""
    lines = [json.dumps(asdict(problem), ensure_ascii=False, default=list) for problem in problems]
    atomic.write_text(path, "".join(line + "\n" for line in lines))


def read_problems(path: Path) -> list[Problem]:
    """What ``write_problems`` wrote.

    Raises:
        DataError: the file is missing.
    """
    if not path.exists():
        raise DataError("no held-out problems for this task", where=path.name, todo="run the data stage again")
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Problem(**row) for row in rows]
