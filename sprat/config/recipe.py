# size: what a run is, from one station's keys to the whole recipe, is one noun
"""What a run is: one frozen config for each station, and the recipe of a whole pipeline, a flat table for each.

What a trainer reads is a station's config (``DistillConfig``); a table that says more (which student, what shares of
the rows) inherits from it (``DistillRecipe``), so that all keys of a station stand side by side. They stood in a table
of their own inside it before, which is one of its ``moved_keys``. Units are in the names
or the comments; a rate without a unit is per step. Defaults are those that the quickstart measured (docs/log.md), so
that an empty recipe already works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sprat.config.base import Config
from sprat.config.sizes import size
from sprat.errors import ConfigError

Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what TOML and the generators hold


class OptimConfig(Config):
    """Muon for hidden matrices, AdamW for the rest (Jordan et al. 2024; Loshchilov and Hutter 2019)."""

    name: Literal["muon", "adamw"] = "muon"
    muon_lr: float = Field(0.012, gt=0, le=1e9)
    adam_lr: float = Field(0.003, gt=0, le=1e9)
    weight_decay: float = Field(0.0, ge=0, le=1e9)
    momentum: float = Field(0.95, ge=0, lt=1)
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    grad_clip: float = Field(1.0, gt=0, le=1e9)
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = Field(20, ge=0, lt=2**31)
    decay_fraction: float = Field(0.3, ge=0, le=1)
    final_lr_fraction: float = Field(0.0, ge=0, le=1)


class LoopConfig(Config):
    """One training loop: ``steps`` batches of ``batch_rows`` rows; how long a row is, its source decides."""

    removed_keys: ClassVar[Mapping[str, str]] = {
        "compile": "it never did anything",
        "seq_len": "rows are as long as the data's (data.seq_len)",
        "seed": "the seed of the whole recipe counts (seed)",
    }

    steps: Count = 400
    batch_rows: Count = 32
    micro_batches: Count = 1
    optim: OptimConfig = OptimConfig()
    init_from: str = ""  # RUN or RUN@STEP: start from that run's checkpoint instead of fresh weights at step 0
    checkpoint_every: Count = 100
    log_every: Count = 10
    mtp_weight: float = Field(0.1, ge=0, le=1e9)
    balance_weight: float = Field(1e-4, ge=0, le=1e9)
    bias_update_speed: float = Field(0.001, ge=0, le=1e9)

    @model_validator(mode="after")
    def _check_micro_batches(self) -> Self:
        if self.batch_rows % self.micro_batches:
            raise ValueError(f"{self.batch_rows} batch_rows cannot be cut into {self.micro_batches} micro_batches")
        return self

    def check_kinds_of_rows(self, shares: Sequence[float]) -> None:
        """Refuse batches that have fewer rows than there are kinds of them, of which each has its share.

        Raises:
            ValueError: they have.
        """
        kinds = sum(share > 0 for share in shares)
        if self.batch_rows < kinds:
            raise ValueError(f"{self.batch_rows} batch_rows cannot hold {kinds} kinds of rows")


class TrainConfig(LoopConfig):
    """A training loop that makes its rows itself: ``seq_len`` tokens each, in an order by ``seed``."""

    removed_keys: ClassVar[Mapping[str, str]] = {"compile": "it never did anything"}

    seq_len: int = Field(128, ge=8, lt=2**31)
    seed: Seed = 0


class SFTConfig(TrainConfig):
    """Supervised fine-tuning: only the assistant's tokens carry loss."""

    moved_keys: ClassVar[Mapping[str, str]] = {"sft": ""}

    demonstrations: Count = 4000
    terse_fraction: float = Field(0.0, ge=0, le=1)  # share of demonstrations with an empty think
    bias_update_speed: float = Field(0.0, ge=0, le=0)  # a narrow mix must not move what pre-training has balanced


class RFTConfig(TrainConfig):
    """Rejection-sampling fine-tuning: SFT on the model's own right answers (RAFT, arXiv 2304.06767)."""

    problems: Count = 4000
    samples: Count = 4  # answers of each problem
    temperature: float = Field(1.0, ge=0.01, le=100)
    thinking: bool = False  # the think tag is opened for every answer; else the model decides
    max_tokens: Count = 96
    bias_update_speed: float = Field(0.0, ge=0, le=0)  # as in SFT


class GRPOConfig(Config):
    """GRPO with rule rewards (DeepSeekMath, arXiv 2402.03300, section 4.1), whatever the seed."""

    removed_keys: ClassVar[Mapping[str, str]] = {"seed": "each of rl.seeds is a run of its own (rl.seeds)"}
    moved_keys: ClassVar[Mapping[str, str]] = {"normalise_std": "normalize_std"}

    steps: Count = 20
    prompts_per_step: Count = 32
    group_size: int = Field(16, ge=2, lt=2**31)
    max_tokens: Count = 96
    temperature: float = Field(1.0, ge=0.01, le=100)
    lr: float = Field(2e-4, gt=0, le=1e9)
    decay_fraction: float = Field(0.0, ge=0, le=1)  # share of the steps over which the rate falls to 0, at the end
    optim: Literal["adamw", "muon"] = "adamw"
    clip_low: float = Field(0.2, gt=0, le=1e9)
    clip_high: float = Field(0.28, gt=0, le=1e9)
    kl_weight: float = Field(0.0, ge=0, le=1e9)
    kl_bias_correction: bool = False  # weigh k3 by the ratio, so that its gradient is that of KL(policy || start)
    max_mismatch: float = Field(1e-3, gt=0, le=1e9)  # nats: mean gap of trainer and sampler that stops RL
    importance_cap: float | None = Field(None, gt=0, le=1e9)  # truncated importance weights for that gap (2 is usual)
    epochs: Count = 1
    minibatch: Count = 256  # sequences per optimiser step
    format_weight: float = Field(0.1, ge=0, le=1e9)
    reward: str = ""  # the user's own verifier, "module:function" or "file.py:function", paid instead of the judges
    reward_timeout: float = Field(10.0, gt=0, le=1e6)  # seconds for one answer
    normalize_std: bool = True
    init_from: str = ""  # RUN or RUN@STEP: go on from that run's checkpoint
    checkpoint_every: Count = 5
    grad_clip: float = Field(1.0, gt=0, le=1e9)
    gate: bool = True  # check that the policy is ready for RL before it starts
    gate_pass_at_8: float = Field(0.5, ge=0, le=1)


class RLConfig(GRPOConfig):
    """GRPO with its seed."""

    removed_keys: ClassVar[Mapping[str, str]] = {}

    seed: Seed = 0


class DistillConfig(LoopConfig):
    """Teacher to student: ``traces`` (cross-entropy on sampled text), ``logits`` (KL), or both."""

    mode: Literal["traces", "logits", "both"] = "both"
    logits_weight: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(1.0, ge=0.01, le=100)
    problems: Count = 8000
    qat_fraction: float = Field(0.0, ge=0, le=1)  # share of the steps, at the end, with weights rounded as [quant] does


Rounding = Literal["nearest", "gptq"]


class QuantConfig(Config):
    """INT4 or INT8, symmetric, one f16 scale per ``group`` input channels."""

    rounding: Rounding = "nearest"  # "gptq" fits the codes to calibration text (arXiv 2210.17323)
    bits: Literal[4, 8] = 4
    group: Literal[32, 64, 128] = 32
    head_bits: Literal[4, 8, 16] = 8  # embedding and head


class TaskConfig(Config):
    """One task: ``source:name`` with its generator's settings."""

    removed_keys: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("weight", "distinct"), "a task that is only tested has no share of what is trained (data.tasks)"
    )

    name: str  # e.g. "sums" (own) or "reasoning-gym/chain_sum"
    title: str = ""  # unique label in reports; the name when empty
    settings: dict[str, int | float | str | bool | list[str] | list[float]] = {}
    test_problems: Count | None = None  # held-out problems, where they differ from the mix's number


class MixTaskConfig(TaskConfig):
    """One task of the mix that is trained."""

    removed_keys: ClassVar[Mapping[str, str]] = {}

    weight: float = Field(1.0, ge=0, le=1e9)
    distinct: Count | None = None  # worked examples drawn before they repeat; for slow generators


class MoneyConfig(Config):
    """What a core-hour costs and draws. Both are statements of the user's, not measurements."""

    yuan_per_core_hour: float = Field(0.1, ge=0, le=1e9)
    watts_per_core: float = Field(10.0, ge=0, le=1e9)


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

    def count(self, config: TaskConfig, split: str) -> int:
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

    salt: str


class PretrainRecipe(LoopConfig):
    """Pre-training of one model on text and worked examples."""

    moved_keys: ClassVar[Mapping[str, str]] = {"train": ""}

    model: ModelRecipe = ModelRecipe()
    text_share: float = Field(0.3, ge=0, le=1)  # share of the rows

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        self.check_kinds_of_rows([self.text_share, 1 - self.text_share])
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


class ControlsRecipe(Config):
    """What RL is measured against, from the same start: steps that cost as many CPU seconds as its own.

    And beside distillation what it is not: a student that learns from worked examples in place of a teacher's answers.
    """

    rft: RFTConfig = RFTConfig()
    more: LoopConfig = LoopConfig()  # pre-training that goes on
    student_examples: Count | None = None  # worked examples of that student; None leaves it out


class RLRecipe(GRPOConfig):
    """GRPO on the trained tasks, the same start, several seeds."""

    moved_keys: ClassVar[Mapping[str, str]] = {**GRPOConfig.moved_keys, "rl": ""}

    start: Literal["pretrain", "sft"] = "pretrain"  # R1-Zero, or R1 (arXiv 2501.12948, sections 2.2 and 2.3)
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice in seeds")
        if self.init_from and len(self.seeds) > 1:
            raise ValueError("init_from is one run's checkpoint; give one seed")
        return self

    def with_seed(self, seed: int) -> RLConfig:
        """What one run of it is, with its own ``seed``."""
        return RLConfig(**self.model_dump(exclude={"start", "seeds"}), seed=seed)


class DistillRecipe(DistillConfig):
    """A student from the teacher's own answers."""

    moved_keys: ClassVar[Mapping[str, str]] = {"distill": ""}

    student: ModelRecipe = ModelRecipe()
    verified: bool = True  # only right answers are taught; else all, as where nobody knows what is right
    examples: Count | None = None  # worked examples that there are beside the teacher; None: those of pre-training
    text_share: float = Field(0.1, ge=0, le=1)
    task_share: float = Field(0.0, ge=0, lt=1)  # of rows: worked examples
    scratch_steps: Count | None = None  # of the student without a teacher, for the same cost; None: as many

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.text_share + self.task_share >= 1:
            raise ValueError("text_share and task_share leave no rows for the teacher's answers; lower one of them")
        self.check_kinds_of_rows([self.text_share, self.task_share, 1 - self.text_share - self.task_share])
        return self


class PipelineRecipe(Config):
    """The pipeline from text and tasks to a served model that reasons."""

    removed_keys: ClassVar[Mapping[str, str]] = {"name": "a recipe goes by the name of its file"}

    seed: Seed = 0
    jobs: Count = 2  # stages that may run side by side, one thread each
    data: DataRecipe = DataRecipe()
    pretrain: PretrainRecipe = PretrainRecipe()
    dense: tuple[DenseRecipe, ...] = ()  # dense twins of the teacher, each equal in something else
    sft: SFTConfig = SFTConfig()
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
    def _check_models_fit(self) -> Self:
        """Refuse a model that cannot read the tokenizer's ids, or whose context is shorter than rows or answers.

        Raises:
            ConfigError: one of them, or a model that cannot be.
        """
        lengths = {"data.seq_len": self.data.seq_len, "eval.max_tokens": self.eval.max_tokens + 1}  # and a question
        teacher_lengths = {"sft.seq_len": self.sft.seq_len, "rl.max_tokens": self.rl.max_tokens + 1}
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
