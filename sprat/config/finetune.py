"""Fine-tuning on the user's own examples: what differs from the quickstart's SFT."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from sprat.config.base import Config, load, merge_tables, parse
from sprat.config.model import LoRAConfig
from sprat.config.recipe import OptimConfig, TrainConfig


class FinetuneOptimConfig(OptimConfig):
    """AdamW: Muon wants a schedule of its own for weights that another optimizer made."""

    name: Literal["muon", "adamw"] = "adamw"
    adam_lr: float = Field(1e-4, gt=0, le=1e9)
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["wsd", "cosine", "constant"] = "cosine"
    warmup_steps: int = Field(10, ge=0, lt=2**31)


class ExamplesConfig(Config):
    """How a file of examples becomes rows."""

    on_bad: Literal["skip", "refuse"] = "skip"  # a record that breaks a rule: left out and counted, or an error
    too_long: Literal["drop", "cut", "split"] = "drop"  # an example longer than a row: out, its end off, or in pieces
    reasoning: Literal["keep", "drop"] = "keep"
    validation: float = Field(0.05, ge=0, lt=1)  # share of the examples, by a hash of what they say
    replay_share: float = Field(0.25, gt=0, lt=1)  # of a step's rows, where there is text to be replayed
    overlap: Literal["drop", "keep", "refuse"] = "drop"  # examples that say a question of an evaluation task
    template: Literal["refuse", "accept"] = "refuse"  # a chat template of the model's that cannot be followed


class EvaluationConfig(Config):
    """What is asked of the model while it is trained."""

    problems: int = Field(100, ge=1, lt=2**31)  # of each task at most
    max_tokens: int = Field(128, ge=1, lt=2**31)  # of an answer
    samples: int = Field(3, ge=0, le=1000)  # questions of kept-back examples whose answers are kept, to be read
    prompts: tuple[str, ...] = ()  # the same for questions of the user's


class ColumnMapConfig(Config):
    """What columns of the data are called here, as a run names it among its inputs."""

    columns: dict[str, str]  # ours to theirs


class FinetuneConfig(TrainConfig):
    """SFT of any model on examples in a file; only what the assistant says carries loss."""

    lora_lr: ClassVar[float] = 5e-4  # optim.adam_lr of adapters where nobody says: several times that of whole weights

    steps: int = Field(0, ge=0, lt=2**31)  # 0: as many as ``epochs`` take
    epochs: float = Field(3.0, gt=0, le=1e6)
    batch_rows: int = Field(4, ge=1, lt=2**31)
    seq_len: int = Field(512, ge=8, lt=2**31)
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    lora: LoRAConfig | None = None  # train adapters instead of all weights
    examples: ExamplesConfig = ExamplesConfig()
    eval_every: int = Field(0, ge=0, lt=2**31)  # steps between two evaluations; 0: one for each epoch
    eval: EvaluationConfig = EvaluationConfig()
    keep_best: bool = False  # the artefact is the best evaluation's model, not the last step's
    best_metric: str = "loss"  # on what was kept back (less is better), or a task (the share of right answers)
    patience: int = Field(0, ge=0, lt=2**31)  # evaluations without improvement after which training ends; 0: never
    min_delta: float = Field(0.0, ge=0, le=1e9)  # by how much is an improvement
    init_state: Literal["fresh", "continue"] = "fresh"  # with init_from: the weights alone, or the optimizer as well
    keep_checkpoint: bool = False  # the artefact holds weights and optimizer to start from; adapters' always
    activation_checkpointing: bool = False  # compute layers twice and hold little in between
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    # Of matrix products; weights stay float32. auto: bfloat16 where the device multiplies it, as a run then records.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    log_every: int = Field(1, ge=1, lt=2**31)
    balance_weight: float = Field(0.0, ge=0, le=1e9)
    bias_update_speed: float = Field(0.0, ge=0, le=0)  # a narrow mix must not move what pre-training has balanced

    @model_validator(mode="before")
    @classmethod
    def _set_lora_rate(cls, table: Any) -> Any:
        """Give adapters their own rate, however they were asked for."""
        if not isinstance(table, dict) or table.get("lora") is None:
            return table
        optim = table.get("optim", {})
        stated = optim.model_dump(include=optim.model_fields_set) if isinstance(optim, Config) else optim
        return table | {"optim": {"adam_lr": cls.lora_lr} | stated} if isinstance(stated, dict) else table

    @model_validator(mode="after")
    def _check_init_state(self) -> Self:
        if self.init_state == "continue" and not self.init_from:
            raise ValueError("init_state=continue is for a run that starts from another's checkpoint (init_from)")
        return self


class DPOOptimConfig(FinetuneOptimConfig):
    """As for fine-tuning, and gentler."""

    adam_lr: float = Field(5e-6, gt=0, le=1e9)


class DPOConfig(FinetuneConfig):
    """Preference pairs (see ``post.dpo``); a row holds both answers of one, each with its prompt."""

    lora_lr: ClassVar[float] = 5e-5

    loss: Literal["sigmoid", "sigmoid_norm", "ipo"] = "sigmoid"
    beta: float = Field(0.1, gt=0, le=1e6)
    epochs: float = Field(1.0, gt=0, le=1e6)
    seq_len: int = Field(1024, ge=8, lt=2**31)
    optim: DPOOptimConfig = DPOOptimConfig()


def load_finetune_config(
    stage: str,
    *,
    lora: int | None = None,
    recipe: str | Path | None = None,
    table: dict[str, Any] | None = None,
    overrides: Iterable[str] = (),
    where: str = "",
) -> FinetuneConfig:
    """The config of one run of ``sprat sft MODEL`` or ``sprat dpo MODEL``.

    Args:
        stage: ``sft`` or ``dpo``.
        lora: rank of adapters.
        recipe: a TOML file.
        table: keys as a recipe has them, instead of one.
        overrides: ``a.b=value``.
        where: what a fault in ``table`` is said to be in.

    Raises:
        ConfigError: the file is missing, a key is unknown, or a value does not fit.
    """
    config_class: type[FinetuneConfig] = DPOConfig if stage == "dpo" else FinetuneConfig
    return load_with_rank(config_class, lora, recipe, table, overrides, where or stage)


_C = TypeVar("_C", bound=Config)


def load_with_rank(
    config_class: type[_C],
    lora: int | None,
    recipe: str | Path | None,
    table: dict[str, Any] | None,
    overrides: Iterable[str],
    where: str,
) -> _C:
    """The config of a stage from its ``recipe``, or from a ``table`` of keys; with adapters of rank ``lora``.

    Raises:
        ConfigError: see ``load_finetune_config``.
    """
    if recipe is not None:
        rank = [] if lora is None else [f"lora.rank={lora}"]
        return load(config_class, recipe, (*rank, *overrides))
    adapters: dict[str, Any] = {} if lora is None else {"lora": {"rank": lora}}
    return parse(config_class, merge_tables(adapters, table or {}), where=where, overrides=overrides)
