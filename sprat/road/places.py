"""Where things are on one road, and how a stage opens its run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sprat.config import Config, ModelConfig, TaskConfig
from sprat.config.sizes import size
from sprat.data.document import folder_name
from sprat.data.pack import Packed
from sprat.errors import DataError
from sprat.road.recipe import ModelRecipe, RoadRecipe
from sprat.tasks import Drawn, Problem, Task, load
from sprat.tokens import Tokenizer
from sprat.trust.ledger import Ledger
from sprat.trust.run import Run, open_run


@dataclass(frozen=True)
class Road:
    """A folder of runs with one ledger and one recipe."""

    folder: Path
    recipe: RoadRecipe

    def open(self, name: str, stage: str, recipe: Config, inputs: Mapping[str, Path | str], seed: int) -> Run:
        """The run ``name`` on this road (see ``sprat.trust.run.open_run``)."""
        return open_run(
            self.folder / name,
            stage=stage,
            recipe=recipe,
            inputs=inputs,
            seed=seed,
            ledger=self.folder / "ledger.jsonl",
            money=self.recipe.money,
        )

    def enter(self, name: str) -> None:
        """Let the ledger answer for the file or folder ``name`` of the road, which belongs to no run."""
        ledger = Ledger(self.folder / "ledger.jsonl")
        ledger.root()
        ledger.enter(self.path(name))

    def path(self, name: str) -> Path:
        """The folder of run ``name``."""
        return self.folder / name

    @property
    def artefacts(self) -> DataArtefact:
        """What the data stage left."""
        return DataArtefact(self.path("data") / "artefact")


@dataclass(frozen=True)
class DataArtefact:
    """The data stage's output: tokenizer, packed text and tasks, held-out text and problems."""

    folder: Path

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was trained on the corpus."""
        return Tokenizer.load(self.folder / "tokenizer")

    def packed(self, name: str) -> Packed:
        """Packed rows: ``text`` or ``tasks``."""
        return Packed.load(self.folder / name)

    def held_out(self, domain: str) -> Packed:
        """Packed rows of the held-out text of ``domain``."""
        return Packed.load(self.folder / "heldout" / folder_name(domain))

    def held_out_domains(self) -> dict[str, int]:
        """Bytes of held-out text for each domain."""
        found: dict[str, int] = json.loads((self.folder / "heldout" / "bytes.json").read_text(encoding="utf-8"))
        return found

    def task(self, config: TaskConfig) -> Drawn:
        """The task of ``config`` with the held-out problems that the data stage kept."""
        return Drawn(load_task(config), tuple(read_problems(self.folder / "problems" / f"{title(config)}.jsonl")))


def model_config(recipe: ModelRecipe, tokenizer: Tokenizer) -> ModelConfig:
    """The model that ``recipe`` names, with the vocabulary and special ids of ``tokenizer``."""
    special = {"bos_token_id": tokenizer.ids.bos, "eos_token_id": tokenizer.ids.eos, "pad_token_id": tokenizer.ids.pad}
    return size(recipe.size, **{"vocab_size": tokenizer.vocab_size, **special, **recipe.changes})


def title(config: TaskConfig) -> str:
    """The name a task goes by in reports and file names."""
    return config.title or config.name.rpartition("/")[2]


def load_task(config: TaskConfig) -> Task:
    """The task of ``config`` under its title."""
    return load(config.replace(title=title(config)))


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """One JSON line for each problem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(problem), ensure_ascii=False, default=list) for problem in problems]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_problems(path: Path) -> list[Problem]:
    """What ``write_problems`` wrote.

    Raises:
        DataError: the file is missing.
    """
    if not path.exists():
        raise DataError("no held-out problems for this task", where=path.name, todo="run the data stage again")
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Problem(**row) for row in rows]
