"""What a stage of a user's road may use: its own keys, its settings, and the function that the verb of its name calls.

A station whose function makes a run (``train``, ``sft``, ``dpo``) makes the very run that the verb makes: same recipe,
inputs and seed, so either finds the other's. Of those whose verbs write plain files (``quantize``, ``merge``,
``export``, ``eval``) the road makes a run with those files as its artefact, so that it can tell what is done and prove
it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.config import Config
from sprat.config.base import parse
from sprat.config.finetune import DPOConfig, FinetuneConfig, load_finetune_config
from sprat.config.pretrain import ContinuedPretrainConfig, ScratchConfig, load_pretrain_config
from sprat.config.quant import QuantizeConfig, load_quantize_config
from sprat.config.rl import RLRunConfig
from sprat.config.road import (
    DistillStage,
    EvalConfig,
    EvalStage,
    ExportConfig,
    FinetuneStage,
    MergeConfig,
    MergeStage,
    QuantizeStage,
    RLStage,
    SampleStage,
    StageConfig,
    TrainStage,
)
from sprat.config.sample import AskConfig, SampleConfig
from sprat.config.teach import TeachConfig, load_teach_config
from sprat.engine import Engine
from sprat.errors import ConfigError
from sprat.eval.task_files import evaluate_task_files
from sprat.eval.text_file import evaluate_text_file
from sprat.files.json import write_json
from sprat.formats import gguf
from sprat.formats.export import Form, write_form
from sprat.formats.load import GGUF_FILE, load, locate, save
from sprat.formats.peft import load_peft
from sprat.model import Transformer
from sprat.model.lora import merge_lora
from sprat.pipeline import asking_stations
from sprat.post import teach
from sprat.post.collect import collect_traces
from sprat.post.evaluation import load_tasks
from sprat.post.finetune import examples_inputs, finetune
from sprat.post.preparation import resolve_dtype
from sprat.post.quantize import quantize_model
from sprat.tasks import task_input
from sprat.tokens import Tokenizer
from sprat.train.pretrain import find_beginning, pretrain
from sprat.trust import run_record
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.run import Run, open_run

KEY_VARIABLE = "SPRAT_TEACHER_KEY"  # of the environment: the key of a teacher's server


@dataclass(frozen=True)
class Station:
    """One entry of the table.

    Attributes:
        stage: the class of a stage's own keys.
        settings: the classes that ``settings_of`` may give, whose keys stand in ``set``.
        settings_of: ``settings_of(stage, where)`` is the config of the run; a fault is said to be in ``where``.
        run: ``run(stage, settings, out)`` makes the run in the folder ``out``, or finds it done.
        inputs: what the run notes as its inputs, but for models; None where the keys of the stage are called as those.
    """

    stage: type[StageConfig]
    settings: tuple[type[Config], ...]
    settings_of: Callable[[Any, str], Config]
    run: Callable[[Any, Any, Path], Run]
    inputs: Callable[[Any], dict[str, run_record.Input]] | None = None


def _train_settings(stage: TrainStage, where: str) -> Config:
    size, _ = find_beginning(stage.model or None, stage.init_from)
    return load_pretrain_config(size=size, init_from=stage.init_from, table=stage.set, where=where)


def _train(stage: TrainStage, settings: Any, out: Path) -> Run:
    _, model = find_beginning(stage.model or None, stage.init_from)
    tokenizer = stage.tokenizer or None
    return pretrain(model, stage.data, out, settings, tokenizer=tokenizer, dequantize=stage.dequantize)


def _finetune_settings(stage: FinetuneStage, where: str) -> Config:
    if stage.replay and stage.uses == "dpo":
        raise ConfigError("DPO replays no text", where=where, todo="leave replay out")
    table = stage.set | ({"init_from": stage.init_from} if stage.init_from else {})
    return resolve_dtype(load_finetune_config(stage.uses, lora=stage.lora, table=table, where=where))


def _finetune(stage: FinetuneStage, settings: FinetuneConfig, out: Path) -> Run:
    return finetune(
        stage.model,
        stage.data,
        out,
        settings,
        column_map=stage.map or None,
        replay=stage.replay or None,
        dequantize=stage.dequantize,
        eval_tasks=stage.eval_tasks,
        held_out=stage.held_out if stage.held_out.data else None,
    )


def _finetune_inputs(stage: FinetuneStage) -> dict[str, run_record.Input]:
    tasks, held_out = load_tasks(stage.eval_tasks), stage.held_out if stage.held_out.data else None
    return examples_inputs(Path(stage.data), stage.map or None, stage.replay or None, tasks, held_out)


def _distill_settings(stage: DistillStage, where: str) -> Config:
    return resolve_dtype(load_teach_config(stage.student, lora=stage.lora, table=stage.set, where=where))


def _distill(stage: DistillStage, settings: TeachConfig, out: Path) -> Run:
    tokenizer = stage.tokenizer or None
    teach.check_student(stage.model, stage.student, settings, tokenizer)
    traces_run = collect_traces(
        stage.model,
        teach.traces_folder(out),
        settings.traces,
        data=stage.data or None,
        task=stage.task or None,
        held_out=stage.held_out,
        column_map=stage.map or None,
        key=os.environ.get(KEY_VARIABLE, ""),
    )
    dequantize = stage.dequantize
    return teach.distill(
        stage.model, stage.student, out, settings, traces_run, tokenizer=tokenizer, dequantize=dequantize
    )


def _quantize_settings(stage: QuantizeStage, where: str) -> Config:
    has_text = bool(stage.calibrate)
    settings = load_quantize_config(stage.method or None, has_text=has_text, table=stage.set, where=where)
    if settings.needs_text and not has_text:
        todo = "give calibrate = TEXT, or round to the nearest"
        raise ConfigError("GPTQ and AWQ need text to calibrate on", where=where, todo=todo)
    return settings


def _quantize(stage: QuantizeStage, settings: QuantizeConfig, out: Path) -> Run:
    model, text = locate(stage.model), Path(stage.calibrate) if stage.calibrate else None
    inputs: dict[str, run_record.Input] = {"model": model}
    if text is not None:
        inputs["calibrate"] = text
    return _run_of_files(stage, settings, inputs, out, lambda folder: quantize_model(model, folder, settings, text))


def _merge(stage: MergeStage, settings: MergeConfig, out: Path) -> Run:
    path, adapter = locate(stage.model), Path(stage.adapter)

    def produce(folder: Path) -> dict[str, Any]:
        model, tokenizer = load(path, dequantize=gguf.is_gguf(path))
        load_peft(model, adapter)
        merge_lora(model)
        save(model, tokenizer, folder)
        return {}

    return _run_of_files(stage, settings, {"model": path, "adapter": adapter}, out, produce)


def _export(stage: StageConfig, settings: ExportConfig, out: Path) -> Run:
    path = locate(stage.model)

    def produce(folder: Path) -> dict[str, Any]:
        model, tokenizer = load(path, dequantize=settings.format in ("hf", "fp8"))
        if settings.format == "gguf":
            form = Form("gguf", settings.kind, settings.pre or None)
            write_form(model, tokenizer, folder / GGUF_FILE, form)
        else:
            form = Form("dense" if settings.format == "hf" else settings.format)
            write_form(model, tokenizer, folder, form, where=out)
        return {"size_bytes": sum(file.stat().st_size for file in folder.iterdir())}

    return _run_of_files(stage, settings, {"model": path}, out, produce)


def _eval_settings(stage: EvalStage, where: str) -> Config:
    if [bool(stage.tasks), bool(stage.text), bool(stage.data)].count(True) != 1:
        todo = 'give tasks = ["…"], text = "…", or data = "…" with a reward'
        raise ConfigError("an eval asks tasks, or scores a text", where=where, todo=todo)
    if stage.data:
        asking_stations.questions_of(stage).check()
    return parse(AskConfig if stage.data else EvalConfig, stage.set, where=where)


def _eval(stage: EvalStage, settings: Any, out: Path) -> Run:
    if stage.data:
        return asking_stations.held_out_score(stage, settings, out)
    path = locate(stage.model)
    inputs: dict[str, run_record.Input] = {"model": path, **_eval_inputs(stage)}

    def produce(folder: Path) -> dict[str, Any]:
        model, tokenizer = load(path)
        facts = _scores(stage, settings, model, tokenizer)
        write_json(folder / "scores.json", facts)
        return {"eval": facts}

    return _run_of_files(stage, settings, inputs, out, produce)


def _eval_inputs(stage: EvalStage) -> dict[str, run_record.Input]:
    if stage.data:
        return asking_stations.inputs_of(stage)
    text: dict[str, run_record.Input] = {"text": Path(stage.text)} if stage.text else {}
    return text | {f"asked-{number}": task_input(task) for number, task in enumerate(stage.tasks)}


def _scores(stage: EvalStage, settings: EvalConfig, model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """What ``sprat eval --json`` prints, without the model's path."""
    if stage.text:
        return {"text": evaluate_text_file(model, tokenizer, stage.text).to_dict()}
    scores = evaluate_task_files(
        Engine(model, tokenizer),
        stage.tasks,
        samples=settings.samples,
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        thinking=settings.think,
        count=settings.count,
    )
    return {"scores": [score.to_dict() for score in scores]}


def _run_of_files(
    stage: StageConfig,
    settings: Config,
    inputs: Mapping[str, run_record.Input],
    out: Path,
    produce: Callable[[Path], dict[str, Any]],
) -> Run:
    """The run in ``out`` whose artefact ``produce(folder)`` writes; it returns the run's facts."""
    ledger = out.parent / LEDGER_NAME
    run = open_run(out, stage=stage.uses, recipe=settings, inputs=inputs, seed=0, ledger=ledger)
    if not run.done:
        run.add_facts(**produce(run.artifact))
        run.finish()
    return run


def _plain_settings(config_class: type[Config]) -> Callable[[StageConfig, str], Config]:
    return lambda stage, where: parse(config_class, stage.set, where=where)


STATIONS = {
    "train": Station(TrainStage, (ScratchConfig, ContinuedPretrainConfig), _train_settings, _train),
    "sft": Station(FinetuneStage, (FinetuneConfig,), _finetune_settings, _finetune, _finetune_inputs),
    "dpo": Station(FinetuneStage, (DPOConfig,), _finetune_settings, _finetune, _finetune_inputs),
    "distill": Station(DistillStage, (TeachConfig,), _distill_settings, _distill),
    "quantize": Station(QuantizeStage, (QuantizeConfig,), _quantize_settings, _quantize),
    "merge": Station(MergeStage, (MergeConfig,), _plain_settings(MergeConfig), _merge),
    "export": Station(StageConfig, (ExportConfig,), _plain_settings(ExportConfig), _export),
    "eval": Station(EvalStage, (EvalConfig, AskConfig), _eval_settings, _eval, _eval_inputs),
    "rl": Station(RLStage, (RLRunConfig,), asking_stations.rl_settings, asking_stations.rl, asking_stations.inputs_of),
    "sample": Station(
        SampleStage, (SampleConfig,), asking_stations.sample_settings, asking_stations.sample, asking_stations.inputs_of
    ),
}
