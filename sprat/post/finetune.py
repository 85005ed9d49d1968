"""Fine-tune any model on examples of the user's, as a run that can be resumed and proves itself: SFT and DPO.

The quickstart's ``sft`` trains a model of its own pipeline on worked examples; this is the same loop for a model and
data from anywhere: a Hugging Face folder, a GGUF file, a run. The model comes in float32, whatever its file holds. A
GGUF file's quantised weights are multiplied out, since that is all a GGUF of a small model ever is; other quantised
models only where that is asked for, because there a dense original exists that would be the better start.

A part of the examples, chosen by what they say and not by where they stand, is kept from training; its loss is
measured before the first step, in between, and at the end, so that a run shows whether it learned more than by heart.

A model forgets what it is not shown. Text of any kind can be *replayed* beside the examples (Rolnick et al. 2019, arXiv
1811.11682; Ibrahim et al. 2024, arXiv 2403.08763): some rows of every step are of that text.

The user's own tasks are asked at the same moments, and the answers to a few questions are kept (``post.evaluation``).
By option the artefact is the model of the best evaluation, and training ends where none gets better.

The artefact is the whole model, adapters merged, so that every other verb takes the run's folder as it is. Adapters
stand beside it in ``adapter/``, in PEFT's layout, and in ``checkpoint/`` what another run starts from.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sprat.config import LoopConfig
from sprat.config.finetune import ColumnMapConfig, DPOConfig, FinetuneConfig
from sprat.config.sample import HeldOutOfConfig, SplitConfig
from sprat.data import loader
from sprat.data.pack import PackedDataset
from sprat.errors import ConfigError, DataError
from sprat.eval.bits_per_byte import mean_loss
from sprat.formats import peft
from sprat.formats.load import load_dense, locate, save
from sprat.model import Transformer
from sprat.model.lora import merge_lora
from sprat.post import dpo, evaluation
from sprat.post.preparation import OnPrepared, Prepared, prepare, resolve_dtype
from sprat.post.rl.asking import held_out_questions
from sprat.post.rl.rejection import EXAMPLES_FILE
from sprat.post.tensorboard import TensorBoardLog, load_summary_writer
from sprat.tasks import UserClassTask, UserTask
from sprat.train import checkpoint, loop, losses
from sprat.trust import run_record
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.run import Run, open_run
from sprat.trust.stage_facts import SAMPLES_FILE

log = logging.getLogger(__name__)


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    config: FinetuneConfig,
    *,
    column_map: Mapping[str, str] | None = None,
    replay: str | Path | None = None,
    dequantize: bool = False,
    eval_tasks: Sequence[str] = (),
    held_out: HeldOutOfConfig | None = None,
    tensorboard: bool = False,
    on_prepared: OnPrepared = lambda tokenizer, encoded: None,
) -> Run:
    """SFT of ``model`` on ``data``, or with a ``DPOConfig`` DPO; the finished run, also where it was finished before.

    Args:
        model: as ``sprat.load`` takes it.
        data: a file or folder of conversations or texts (of preference pairs for DPO), see ``data.conversations``; or a
            run of ``sprat sample``.
        out: the run's folder; its ledger lies in the folder above it.
        column_map: our names of columns to those of ``data``.
        replay: text, as ``data.ingest.read_texts`` takes it, that is mixed in (``examples.replay_share``); SFT only.
        dequantize: train a quantised model as the dense one that its codes stand for.
        eval_tasks: tasks of the user's that are asked at each evaluation; see ``tasks.load_user_task``.
        held_out: a file of questions for RL; examples and replayed text that ask one of its held-out part are left out.
        tensorboard: write the log as TensorBoard's events as well, into ``tensorboard/`` of the run.
        on_prepared: is shown what will be trained, before it is.

    Raises:
        SpratError: a model, data or recipe that cannot be, before anything was touched; or see ``train.loop.train``.
    """
    out, prepared, config = Path(out), list[Prepared](), resolve_dtype(config)
    model_path, data = locate(model), Path(data)
    for path in (data, *([] if held_out is None else [Path(held_out.data)])):
        if not path.exists():
            raise DataError("no such file or folder of examples", where=str(path), todo="give the path of one")
    examples, tasks = examples_file(data), evaluation.load_tasks(eval_tasks)
    make_writer = load_summary_writer() if tensorboard else None
    start_input = checkpoint.start_input(config.init_from, out, config.digest())
    if replay is not None and isinstance(config, DPOConfig):
        raise ConfigError("DPO replays no text", where="replay", todo="leave it out")
    inputs = {"model": model_path, **examples_inputs(data, column_map, replay, tasks, held_out)}

    def check(resuming: bool) -> None:
        load_model = partial(load_dense, model_path, dequantize=dequantize)
        options: dict[str, Any] = {"replay": replay, "tasks": tasks, "start": _find_start(start_input, config, out)}
        options["test_questions"] = () if held_out is None else held_out_questions(held_out)
        prepared.append(prepare(load_model, examples, config, column_map or {}, on_prepared, **options))
        if columns := prepared[0].facts.get("unread_columns"):
            log.warning("columns of %s that are not read (see --map): %s", data, ", ".join(columns))

    stage, ledger = "dpo" if isinstance(config, DPOConfig) else "sft", out.parent / LEDGER_NAME
    inputs |= start_input
    run = open_run(out, stage=stage, recipe=config, inputs=inputs, seed=config.seed, ledger=ledger, prepare=check)
    if not run.done:
        writer = None if make_writer is None else TensorBoardLog(make_writer, run.folder)
        train(run, prepared[0], str(model), tensorboard=writer)
    return run


def examples_inputs(
    data: Path,
    column_map: Mapping[str, str] | None,
    replay: str | Path | None,
    tasks: Sequence[UserTask | UserClassTask],
    held_out: HeldOutOfConfig | None,
) -> dict[str, run_record.Input]:
    """What a run of fine-tuning is made of, beside its model and where it starts."""
    inputs: dict[str, run_record.Input] = {"data": data}
    inputs |= {"map": ColumnMapConfig(columns=dict(column_map))} if column_map else {}
    inputs |= {"replay": Path(replay)} if replay is not None else {}
    inputs |= {f"task:{task.name}": task.digest for task in tasks}
    if held_out is not None:
        split = SplitConfig(share=held_out.share, problems=held_out.problems)
        inputs |= {"held_out": Path(held_out.data), "held_out_split": split}
    return inputs


def examples_file(data: Path) -> Path:
    """Where the examples of ``data`` are: of a run of ``sprat sample`` in its artefact.

    Raises:
        DataError: a run that holds none.
    """
    if not (data / "run.json").is_file():
        return data
    if not (path := data / "artefact" / EXAMPLES_FILE).is_file():
        todo = "give a run of sprat sample, or a file of examples"
        raise DataError("a run that holds no examples", where=str(data), todo=todo)
    return path


def _find_start(
    start_input: Mapping[str, Path | str], config: FinetuneConfig, out: Path
) -> checkpoint.Checkpoint | None:
    """The checkpoint that ``start_input`` names, checked; None where there is none."""
    if not start_input:
        return None
    expected_digest = run_record.describe_input(start_input["init_from"], out.parent)["digest"]
    return checkpoint.find_start(config.init_from, out, expected_digest)


def train(
    run: Run,
    ready: Prepared,
    base_model: str,
    loss_fn: losses.LossFn | None = None,
    *,
    tensorboard: TensorBoardLog | None = None,
) -> None:
    """Train, measure, save, finish.

    Args:
        base_model: what PEFT shall take an adapter's base to be.
        loss_fn: what is minimized, where it is not what ``ready.config`` says.
        tensorboard: is given every row of the log.

    Raises:
        TrainingError, CheckpointError, MachineError: see ``train.loop.train``.
    """
    model, config, held_out = ready.model, ready.config, ready.held_out
    run.add_facts(steps=config.steps, batch_rows=config.batch_rows, **ready.facts)
    own_loss_fn, measure_loss = _objective(model, config, ready.rows, held_out)  # its reference is the model as it came
    if ready.start is not None and config.init_from:
        checkpoint.restore_weights(ready.start, model)
    measure = _evaluation(run, ready, measure_loss)
    if tensorboard is not None:
        run.on_log.append(tensorboard.add_row)
    if measure and "validation_before" not in run.facts:
        before = loop.evaluate_now(model, measure)
        run.truncate_metrics(-1)
        run.log(0, **before)
        run.add_facts(validation_before=_scores_of(before))
    every, selection = config.eval_every if measure else 0, ready.selection
    result = loop.train(
        model,
        ready.source,
        config,
        run,
        loss_fn=loss_fn or own_loss_fn,
        evaluate=measure,
        eval_every=every,
        selection=selection,
    )
    chosen = _choose(run, ready)
    if measure:
        rows = run_record.read_metrics(run.folder)
        run.add_facts(validation_after=_scores_of(next(row for row in rows if chosen and row["step"] == chosen.step)))
    run.add_facts(loss=result.loss, tokens_per_second=result.tokens_per_second, last_step=result.steps)
    _save(run, ready, base_model, chosen)
    if tensorboard is not None:
        tensorboard.close()
        run.ledger.add_file(tensorboard.folder)
    run.finish(flops=result.flops, tokens=result.tokens)


def _evaluation(run: Run, ready: Prepared, measure_loss: loop.Evaluate | None) -> evaluation.Evaluation | None:
    """What is measured while the model is trained; None where there is nothing to ask."""
    if not (measure_loss or ready.tasks or ready.prompts):
        return None
    measure = evaluation.Evaluation(
        ready.tokenizer,
        ready.config.eval,
        loss=measure_loss,
        tasks=ready.tasks,
        prompts=ready.prompts,
        seed=ready.config.seed,
        folder=run.checkpoints,
    )
    run.on_log.append(measure.write_samples)
    return measure


def _choose(run: Run, ready: Prepared) -> checkpoint.Checkpoint | None:
    """The checkpoint whose model the artefact will hold: the last, or by option the best, which is put back."""
    config, selection = ready.config, ready.selection
    if config.keep_best and selection.step and (best := checkpoint.at_step(run.checkpoints, selection.step)):
        checkpoint.restore_weights(best, ready.model)
        run.add_facts(best={"step": best.step, "metric": config.best_metric, "value": selection.value})
        before = run.facts.get("validation_before", {}).get(selection.metric)
        if before is not None and not selection.is_better_than(before):
            what = "no evaluation was better than before the first step: %s %.3f then, %.3f at best"
            log.warning(what, config.best_metric, before, selection.value)
        return best
    return checkpoint.latest(run.checkpoints)


def _scores_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of a logged evaluation, as ``Evaluation`` calls them."""
    return {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}


def _save(run: Run, ready: Prepared, base_model: str, chosen: checkpoint.Checkpoint | None) -> None:
    """The artefact: adapters by themselves, the whole model, samples, and the checkpoint ``chosen``."""
    model, config = ready.model.to("cpu"), ready.config
    if config.lora is not None or config.keep_checkpoint:
        checkpoint.copy_to_artefact(chosen, run.artifact)
    if config.lora is not None:
        peft.save_peft(model, run.artifact / "adapter", base_model=base_model)
        merge_lora(model)
    if (samples := run.checkpoints / SAMPLES_FILE).is_file():
        shutil.copyfile(samples, run.artifact / samples.name)
    save(model, ready.tokenizer, run.artifact)


def _objective(
    model: Transformer, config: FinetuneConfig, rows: PackedDataset, held_out: PackedDataset | None
) -> tuple[losses.LossFn, loop.Evaluate | None]:
    """What is minimized, and what is measured on the examples that are kept from training."""
    if not isinstance(config, DPOConfig):
        loss_fn = _with_dtype(losses.next_token_loss, config)
        return loss_fn, None if held_out is None else lambda model: {"loss": mean_loss(model, held_out)}
    loss_fn = _with_dtype(dpo.preference_loss(config, dpo.reference_logprobs(model, rows)), config)
    if held_out is None:
        return loss_fn, None
    measured = dpo.preference_loss(config, dpo.reference_logprobs(model, held_out))
    return loss_fn, lambda model: dpo.mean_metrics(model, measured, held_out, config)


def _with_dtype(loss_fn: losses.LossFn, config: FinetuneConfig) -> losses.LossFn:
    """``loss_fn`` with products in ``config.dtype``; on a CPU the model itself sees to that (``set_compute_dtype``)."""
    device = torch.device(config.device).type
    if device == "cpu":
        return loss_fn

    def loss(
        model: Transformer, batch: loader.Batch, settings: LoopConfig, whole: loader.Batch | None = None
    ) -> losses.Loss:
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            return loss_fn(model, batch, settings, whole)

    return loss
