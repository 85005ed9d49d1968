"""A road of the user's: a list of stages in one TOML file, each of which ``uses`` a station.

A stage's own keys name what goes in, a stage before it, a file or a model, and are those of the verb's options. What
the station's run is set to stands in its table ``set``, whose keys are those of the verb's ``--set``.

A road may be of any model and data: its ``inputs`` are named on the command line (``--model smol``), and a value
``"{model}"`` stands for what was named there. A key whose input was not named, and has no default, is left out, and so
is a stage that says ``unless`` it was.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from sprat.config.base import Config
from sprat.config.sample import HeldOutOfConfig

InputName = Literal["model", "data", "reward", "lora", "examples", "general", "teacher"]


class InputConfig(Config):
    """Something that is named on the command line, by the option of the same name."""

    default: str = ""  # what it is where nobody names it: a value, a stage, or another input as "{model}"
    optional: bool = False  # keys with it are left out where nobody names it


class RoadConfig(Config):
    """The file as it stands; each of ``stages`` is read by the class of its station."""

    jobs: int | None = Field(None, ge=1, le=1024)  # stages side by side; None: as many as ever could
    inputs: dict[InputName, InputConfig] = {}
    stages: tuple[dict[str, Any], ...] = Field(min_length=1)


class StageConfig(Config):
    """What every stage has.

    ``references`` are keys that name another stage, or a model; ``files`` those that name files, one or a list, a
    dotted one in a table; ``examples`` those of ``files`` that may name a stage that wrote examples; ``rewards`` those
    that name a verifier; ``drawn`` those of ``files`` that may name a generator of problems.
    """

    references: ClassVar[tuple[str, ...]] = ("model",)
    files: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ()
    rewards: ClassVar[tuple[str, ...]] = ()
    drawn: ClassVar[tuple[str, ...]] = ()

    name: str
    uses: str
    model: str
    set: dict[str, Any] = {}


class TrainStage(StageConfig):
    """``sprat train``."""

    references: ClassVar[tuple[str, ...]] = ("model", "tokenizer", "init_from")
    files: ClassVar[tuple[str, ...]] = ("data",)

    model: str = ""
    data: str
    tokenizer: str = ""
    init_from: str = ""
    dequantize: bool = False


class FinetuneStage(StageConfig):
    """``sprat sft`` and ``sprat dpo``."""

    references: ClassVar[tuple[str, ...]] = ("model", "init_from")
    files: ClassVar[tuple[str, ...]] = ("data", "replay", "eval_tasks", "held_out.data")
    examples: ClassVar[tuple[str, ...]] = ("data",)

    data: str
    init_from: str = ""
    replay: str = ""
    eval_tasks: tuple[str, ...] = ()
    held_out: HeldOutOfConfig = HeldOutOfConfig()
    lora: int | None = Field(None, ge=1, lt=2**31)
    map: dict[str, str] = {}
    dequantize: bool = False


class QuestionsStage(StageConfig):
    """A stage that asks the user's questions and has the answers judged."""

    files: ClassVar[tuple[str, ...]] = ("data", "tasks")
    rewards: ClassVar[tuple[str, ...]] = ("reward",)
    drawn: ClassVar[tuple[str, ...]] = ("tasks",)

    data: str = ""
    tasks: tuple[str, ...] = ()
    reward: str = ""
    map: dict[str, str] = {}


class RLStage(QuestionsStage):
    """``sprat rl``."""

    references: ClassVar[tuple[str, ...]] = ("model", "init_from")
    rewards: ClassVar[tuple[str, ...]] = ("reward", "second_reward")

    second_reward: str = ""
    init_from: str = ""
    lora: int | None = Field(None, ge=1, lt=2**31)
    dequantize: bool = False


class SampleStage(QuestionsStage):
    """``sprat sample``."""

    files: ClassVar[tuple[str, ...]] = ("data", "tasks", "mix")

    mix: str = ""


class DistillStage(StageConfig):
    """``sprat distill``; ``model`` is the teacher, and may be the URL of a server."""

    references: ClassVar[tuple[str, ...]] = ("model", "student", "tokenizer")
    files: ClassVar[tuple[str, ...]] = ("data", "task", "held_out")

    student: str
    data: str = ""
    task: str = ""
    held_out: tuple[str, ...] = ()
    tokenizer: str = ""
    lora: int | None = Field(None, ge=1, lt=2**31)
    map: dict[str, str] = {}
    dequantize: bool = False


class QuantizeStage(StageConfig):
    """``sprat quantize``."""

    files: ClassVar[tuple[str, ...]] = ("calibrate",)

    method: str = ""  # nearest, gptq, awq; gptq where there is text
    calibrate: str = ""


class MergeStage(StageConfig):
    """``sprat merge``."""

    references: ClassVar[tuple[str, ...]] = ("model", "adapter")

    adapter: str


class EvalStage(StageConfig):
    """``sprat eval``: tasks, a text, or the held-out part of ``data``, which ``reward`` judges."""

    files: ClassVar[tuple[str, ...]] = ("tasks", "text", "data")
    rewards: ClassVar[tuple[str, ...]] = ("reward",)

    tasks: tuple[str, ...] = ()
    text: str = ""
    data: str = ""
    reward: str = ""
    map: dict[str, str] = {}


class ExportConfig(Config):
    """What is written."""

    format: Literal["gguf", "hf", "pack-quantized", "fp8"] = "gguf"  # all but gguf are Hugging Face folders
    kind: Literal["f32", "f16", "q8_0", "q4_0"] = "q8_0"  # of a GGUF file's matrices
    pre: str = ""  # how llama.cpp shall cut text, where it does not know the tokenizer


class MergeConfig(Config):
    """There is nothing to set."""


class EvalConfig(Config):
    """How answers are drawn."""

    count: int | None = Field(None, ge=1, lt=2**31)  # problems of each task; None: all
    samples: int = Field(1, ge=1, le=10_000)  # answers of each, for pass@k
    temperature: float = Field(0.0, ge=0, le=100)
    max_tokens: int = Field(512, ge=1, lt=2**31)
    think: bool | None = None
