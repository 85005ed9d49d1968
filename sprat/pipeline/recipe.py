"""What the whole pipeline is: one TOML file, a table for each station."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sprat.config import (
    Config,
    DistillConfig,
    GRPOConfig,
    LoopConfig,
    MixTaskConfig,
    MoneyConfig,
    QuantConfig,
    RFTConfig,
    SFTConfig,
    TaskConfig,
    load,
)
from sprat.config.recipe import Count, Seed
from sprat.config.sizes import size
from sprat.errors import ConfigError
from sprat.tasks.base import SPLIT_SALT, Split

EQUAL_TOLERANCE = 1.05  # what is called equal differs by no more


def task_title(config: TaskConfig) -> str:
    """The name a task goes by in reports."""
    return config.title or config.name.rpartition("/")[2]


class ModelRecipe(Config):
    """A named size and the numbers that differ from it."""

    size: str = "pico"
    changes: dict[str, Any] = {}


class DenseRecipe(ModelRecipe):
    """A dense twin of the teacher, the control of its experts, and what the two have in common."""

    equal: Literal["FLOPs", "CPU seconds", "parameters"] = "FLOPs"
    steps: Count | None = None  # of its pre-training; as many as the teacher's if not given

    @property
    def run(self) -> str:
        """The name of its run."""
        return {"FLOPs": "pretrain-dense"}.get(self.equal, f"pretrain-dense-{self.equal.split()[-1]}")


class DataRecipe(Config):
    """Text, tasks and tokenizer."""

    vocab_size: int = Field(2048, ge=300, lt=2**31)
    numbers: int = Field(200, ge=0, lt=2**31)  # 0..numbers-1 are one token each
    seq_len: int = Field(128, ge=8, lt=2**31)
    text_bytes: int = Field(4_000_000, ge=10_000, lt=2**63)
    offline: bool = False
    demonstrations: int = Field(60_000, ge=10, lt=2**31)  # worked examples over all tasks
    terse_fraction: float = Field(0.0, ge=0, le=1)  # share of them that show no chain of thought
    test_problems: int = Field(1000, ge=10, lt=2**31)  # held-out problems for each task
    dev_problems: int = Field(500, ge=10, lt=2**31)  # as many more, for who tunes a recipe
    tasks: tuple[MixTaskConfig, ...] = Field((MixTaskConfig(name="sums"),), min_length=1)
    unseen: tuple[TaskConfig, ...] = ()  # evaluated, never trained

    def count(self, config: TaskConfig, split: Split) -> int:
        """How many problems of a held-out ``split`` of the task ``config`` are kept."""
        return self.dev_problems if split == "dev" else config.test_problems or self.test_problems

    @model_validator(mode="after")
    def _check_titles_differ(self) -> Self:
        titles = [task_title(config) for config in (*self.tasks, *self.unseen)]
        duplicates = sorted({name for name in titles if titles.count(name) > 1})
        if duplicates:
            raise ValueError(f"two tasks are called {duplicates[0]!r}; give one of them another title")
        if not sum(config.weight for config in self.tasks) > 0:
            raise ValueError("no task has a weight above 0")
        return self


class SplitRecipe(Config):
    """What decides, beside the problems themselves, which of them are held out: an input of the data stage."""

    salt: str = SPLIT_SALT


class PretrainRecipe(Config):
    """Pre-training of one model on text and worked examples."""

    model: ModelRecipe = ModelRecipe()
    train: LoopConfig = LoopConfig()
    text_share: float = Field(0.3, ge=0, le=1)  # share of the rows

    @model_validator(mode="after")
    def _share_rows(self) -> Self:
        _check_rows(self.train, [self.text_share, 1 - self.text_share])
        return self


class EvalRecipe(Config):
    """How answers are drawn when they are judged."""

    split: Literal["dev", "test"] = "test"  # dev: while a recipe is tuned
    max_tokens: Count = 120
    batch: Count = 512
    side_problems: Count = 300  # of each task, where thinking is forced or forbidden
    samples: int = Field(4, ge=0, lt=2**31)  # kept for the report, for each task


class EvalScopeRecipe(Config):
    """What one stage is asked, where not all are asked alike: an input of its run."""

    ways: tuple[str, ...]  # evaluation modes, under the key that run.json has for them
    unseen: bool  # the tasks that are never trained, too


class SFTRecipe(Config):
    """Fine-tuning of the pre-trained model on demonstrations: a control of RL, or what RL starts from."""

    sft: SFTConfig = SFTConfig()

    @model_validator(mode="after")
    def _share_rows(self) -> Self:
        _check_rows(self.sft, [1.0])
        return self


class ControlsRecipe(Config):
    """What RL is measured against, from the same start: steps that cost as many CPU seconds as its own.

    And beside distillation what it is not: a student that learns from worked examples in place of a teacher's answers.
    """

    rft: RFTConfig = RFTConfig()
    more: LoopConfig = LoopConfig()  # pre-training that goes on
    student_examples: Count | None = None  # worked examples of that student; None leaves it out

    @model_validator(mode="after")
    def _share_rows(self) -> Self:
        _check_rows(self.rft, [1.0])
        return self


class RLRecipe(Config):
    """GRPO on the trained tasks, the same start, several seeds."""

    rl: GRPOConfig = GRPOConfig()
    start: Literal["pretrain", "sft"] = "pretrain"  # R1-Zero, or R1 (arXiv 2501.12948, sections 2.2 and 2.3)
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice in seeds")
        if self.rl.init_from and len(self.seeds) > 1:
            raise ValueError("init_from is one run's checkpoint; give one seed")
        return self


class DistillRecipe(Config):
    """A student from the teacher's own answers."""

    student: ModelRecipe = ModelRecipe()
    distill: DistillConfig = DistillConfig()
    verified: bool = True  # only right answers are taught; else all, as where nobody knows what is right
    examples: Count | None = None  # worked examples that there are beside the teacher; None: those of pre-training
    text_share: float = Field(0.1, ge=0, le=1)
    task_share: float = Field(0.0, ge=0, lt=1)  # of rows: worked examples
    scratch_steps: Count | None = None  # of the student without a teacher, for the same cost; None: as many

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.text_share + self.task_share >= 1:
            raise ValueError("text_share and task_share leave no rows for the teacher's answers; lower one of them")
        _check_rows(self.distill, [self.text_share, self.task_share, 1 - self.text_share - self.task_share])
        return self


def _check_rows(loop: LoopConfig, shares: Sequence[float]) -> None:
    """Refuse batches that cannot be cut into micro-batches, or have fewer rows than there are kinds of them."""
    if loop.batch_rows % loop.micro_batches:
        raise ValueError(f"{loop.batch_rows} batch_rows cannot be cut into {loop.micro_batches} micro_batches")
    kinds = sum(share > 0 for share in shares)
    if loop.batch_rows < kinds:
        raise ValueError(f"{loop.batch_rows} batch_rows cannot hold {kinds} kinds of rows")


class PipelineRecipe(Config):
    """The pipeline from text and tasks to a served model that reasons."""

    removed_keys: ClassVar[Mapping[str, str]] = {"name": "a recipe goes by the name of its file"}

    seed: Seed = 0
    jobs: Count = 2  # stages that may run side by side, one thread each
    data: DataRecipe = DataRecipe()
    pretrain: PretrainRecipe = PretrainRecipe()
    dense: tuple[DenseRecipe, ...] = ()  # dense twins of the teacher, each equal in something else
    sft: SFTRecipe = SFTRecipe()
    rl: RLRecipe = RLRecipe()
    controls: ControlsRecipe | None = None  # None leaves them out
    distill: DistillRecipe = DistillRecipe()
    quant: QuantConfig = QuantConfig()
    eval: EvalRecipe = EvalRecipe()
    money: MoneyConfig = MoneyConfig()

    @model_validator(mode="after")
    def _check_dense_controls_differ(self) -> Self:
        if len({dense.equal for dense in self.dense}) < len(self.dense):
            raise ValueError("two dense twins are equal to the teacher in the same")
        return self

    @model_validator(mode="after")
    def _check_dense_controls(self) -> Self:
        """Refuse a twin with experts, or one that has not in common with the teacher what it says.

        Raises:
            ConfigError: one of them, or a model that cannot be.
        """
        if not self.dense:
            return self
        from sprat.model import count_parameters, flops_per_token  # with torch, which reading a recipe can do without

        vocab_size, rows = self.data.vocab_size, self.data.seq_len
        teacher = size(self.pretrain.model.size, **{"vocab_size": vocab_size, **self.pretrain.model.changes})
        for index, dense in enumerate(self.dense):
            config = size(dense.size, **{"vocab_size": vocab_size, **dense.changes})
            if config.n_routed_experts:
                todo = "give n_routed_experts = 0 or dense = true"
                raise ConfigError("a dense twin has no experts", where=f"dense.{index}.changes", todo=todo)
            steps = (dense.steps or self.pretrain.train.steps) / self.pretrain.train.steps
            ratio = {
                "FLOPs": steps * flops_per_token(config, rows) / flops_per_token(teacher, rows),
                "CPU seconds": 1.0,  # which only running it shows
                "parameters": count_parameters(config).total / count_parameters(teacher).total,
            }[dense.equal]
            if not 1 / EQUAL_TOLERANCE <= ratio <= EQUAL_TOLERANCE:
                what, todo = f"the twin has {ratio:.2f} times the teacher's {dense.equal}", "change its widths or steps"
                raise ConfigError(what, where=f"dense.{index}", todo=todo)
        return self

    @model_validator(mode="after")
    def _check_models_fit(self) -> Self:
        """Refuse a model that cannot read the tokenizer's ids, or whose context is shorter than rows or answers.

        Raises:
            ConfigError: one of them, or a model that cannot be.
        """
        lengths = {"data.seq_len": self.data.seq_len, "eval.max_tokens": self.eval.max_tokens + 1}  # and a question
        teacher_lengths = {"sft.sft.seq_len": self.sft.sft.seq_len, "rl.rl.max_tokens": self.rl.rl.max_tokens + 1}
        models = {"pretrain.model": self.pretrain.model, "distill.student": self.distill.student}
        models |= {f"dense.{index}": dense for index, dense in enumerate(self.dense)}
        for key, model in models.items():
            config = size(model.size, **{"vocab_size": self.data.vocab_size, **model.changes})
            if config.vocab_size < self.data.vocab_size:
                what = f"{config.vocab_size} ids are fewer than data.vocab_size ({self.data.vocab_size})"
                raise ConfigError(what, where=f"{key}.changes.vocab_size", todo="leave it out")
            for name, tokens in (lengths | (teacher_lengths if key == "pretrain.model" else {})).items():
                if tokens > config.context:
                    what = f"{name} needs a context of {tokens} tokens, the model's is {config.context}"
                    todo = f"raise it, or lower {name}"
                    raise ConfigError(what, where=f"{key}.changes.max_position_embeddings", todo=todo)
        return self


RECIPE_FOLDER = Path(__file__).parent.parent / "recipes"


def load_recipe(name: str, overrides: tuple[str, ...] = ()) -> PipelineRecipe:
    """The recipe in the file ``name``, or the packaged one where no such file is, with ``a.b=c`` overrides.

    Raises:
        ConfigError: no such recipe, an unknown key, a value that does not fit.
    """
    packaged = {path.stem: path for path in RECIPE_FOLDER.glob("*.toml")}
    path = packaged[name] if name in packaged and not Path(name).is_file() else Path(name)
    return load(PipelineRecipe, path, overrides)
