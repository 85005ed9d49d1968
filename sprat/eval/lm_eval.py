"""EleutherAI's lm-evaluation-harness over Sprat's engine: the model ``sprat`` of ``lm_eval``.

The harness asks a model three things: how likely a continuation is, how likely a text is, and what it says until a stop
string. The first two read logits from the back end that serves, the third asks the engine. Whatever the harness knows
by itself (where a context ends and a continuation begins, few-shot prompts, metrics) stays its own. Nothing is fetched
by us; a task that names a data set of a hub is fetched by the harness, one with a local file is not.

``sprat eval MODEL --lm-eval TASK`` asks for tasks. ``python -m sprat.eval.lm_eval`` is the command ``lm_eval`` with
all of its options, and with this model known to it:

    python -m sprat.eval.lm_eval --model sprat --model_args path=runs/mine --include_path tasks --tasks mine

Left out: batching of log-likelihoods (each request is one call of the back end), and windows of a rolling text that
share more than one token.
"""

# R rows whose logits are asked, V vocabulary

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sprat.engine import Engine, Sampling
from sprat.errors import ConfigError, DataError, MachineError
from sprat.eval.divergence import logits
from sprat.files.atomic import as_machine_error
from sprat.files.json import to_json_value
from sprat.formats.load import load
from sprat.tokens import Message, render

MAX_GEN_TOKS = 256  # where a task does not say, as for the harness's own models
MODEL_NAME = "sprat"
_REPORTED = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")


class HarnessModel:
    """What the harness's ``TemplateLM`` leaves to a model; ``harness_class`` joins the two.

    Args:
        path: whatever ``sprat.load`` takes.
        dtype: of weights that are not quantized: float32, bfloat16 or auto.
        max_length: tokens that the model sees at most; the context if not given.
        add_bos_token: put a begin token before each text, as for models whose tokenizer does so.
        think: True forces a think in a chat, False forbids it.
        batch_size: answers that are written at once; "auto" is 64.

    Raises:
        CheckpointError, ConfigError, DataError, MachineError: see ``sprat.load``.
    """

    def __init__(
        self,
        path: str,
        dtype: Any = "float32",
        max_length: int | None = None,
        add_bos_token: bool = False,
        think: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,  # the harness says it to every model
        device: str | None = None,
    ) -> None:
        super().__init__()
        if device not in (None, "cpu"):
            raise ConfigError(f"no device {device!r}", where="device", todo="leave it out: Sprat computes on the CPU")
        model, self._tokenizer = load(path, dtype=dtype)
        self.path, self.add_bos_token, self.think = str(path), add_bos_token, think
        self.max_length = min(max_length or model.config.context, model.config.context)
        numeric = isinstance(batch_size, int) or (batch_size or "").isdecimal()
        self._engine = Engine(model, self._tokenizer, max_batch=int(batch_size or 64) if numeric else 64)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._tokenizer.special_ids.eos

    @property
    def prefix_token_id(self) -> int:
        """The id in front of a text without a context: the begin token that config.json names, else the end token.

        A model whose chats begin without one may have one all the same; the harness's own models take it then.
        """
        bos = self._engine.model.config.bos_token_id
        return bos if bos is not None and bos >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Part of the names of the harness's caches."""
        return self._tokenizer.digest

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the harness notes of the chat format; another than the model's own cannot be chosen."""
        return "" if chat_template is False else f"sprat/{self._tokenizer.digest}"

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's own format writes it.

        Raises:
            DataError: a role has no place in that format.
        """
        turns = [Message(**turn) for turn in chat_history]
        ids = render(self._tokenizer, turns, thinking=self.think, add_generation_prompt=add_generation_prompt)
        return self._tokenizer.decode(ids)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, in which special tokens may stand by name."""
        ids = self._tokenizer.encode(string, parse_special=True)
        wanted = self.add_bos_token and add_special_tokens is not False
        return [self.prefix_token_id, *ids] if wanted and ids[:1] != [self.prefix_token_id] else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each (key, context ids, continuation ids): nats of the continuation, and whether greedy would say it."""
        results = []
        for key, context, continuation in requests:
            ids = [*context, *continuation][-(self.max_length + 1) :]
            continuation = continuation[-(len(ids) - 1) :]
            rows_RV = logits(self._engine.backend, ids[:-1], last=len(continuation)).double().log_softmax(-1)
            targets_R = torch.tensor(continuation)
            nats = float(rows_RV.gather(1, targets_R[:, None]).sum())
            results.append((nats, bool((rows_RV.argmax(-1) == targets_R).all())))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[-1])  # type: ignore[attr-defined]
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text, in windows that share one token, so that each token is predicted once."""
        results = []
        for (text,) in (request.args for request in requests):
            ids = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
            starts = range(0, len(ids) - 1, self.max_length)
            windows = [ids[start : start + self.max_length + 1] for start in starts]
            parts = self._loglikelihood_tokens([(None, window[:1], window[1:]) for window in windows])
            results.append(sum(nats for nats, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])  # type: ignore[attr-defined]
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says to each (text, settings), up to a stop string; its thinking is left out."""
        settings = [generation_sampling(request.args[1]) for request in requests]
        prompts = []
        for request, sampling in zip(requests, settings, strict=True):
            room = self.max_length - (sampling.max_tokens or MAX_GEN_TOKS)
            prompts.append(self.tok_encode(request.args[0])[-max(1, room) :])
        texts = [output.text for output in self._engine.generate(prompts, settings)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)  # type: ignore[attr-defined]
        return texts


def generation_sampling(kwargs: Mapping[str, Any]) -> Sampling:
    """A task's ``generation_kwargs`` as settings of ours: greedy unless a temperature is given, or ``do_sample``.

    Raises:
        ConfigError: a setting that we do not know. EngineError: a value out of range.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    until = given.pop("until", ())
    lengths = [given.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    max_tokens = next((int(length) for length in lengths if length is not None), MAX_GEN_TOKS)
    temperature = float(given.pop("temperature", 1.0 if given.get("do_sample") else 0.0))
    if given.pop("do_sample", True) is False:
        temperature = 0.0
    names = {"top_p", "top_k", "min_p", "repetition_penalty", "seed"}
    if unknown := sorted(set(given) - names):
        todo = f"it may hold until, max_gen_toks, do_sample, temperature, {', '.join(sorted(names))}"
        raise ConfigError(f"no setting {unknown[0]!r}", where="generation_kwargs", todo=todo)
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    return Sampling(temperature=temperature, max_tokens=max_tokens, stop=stops, fit=True, **given)


@functools.cache
def harness_class() -> type[Any]:
    """The harness's model class, registered with it under the name ``sprat``.

    Raises:
        MachineError: lm-eval is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401  (its own models first: it loads them only where none is registered)
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        todo = "pip install 'sprat[lm-eval]'"
        raise MachineError(f"lm-eval cannot be imported: {error}", where="eval", todo=todo) from None
    model_class: type[Any] = register_model(MODEL_NAME)(type("SpratLM", (HarnessModel, TemplateLM), {}))
    return model_class


@dataclass(frozen=True)
class HarnessReport:
    """What the harness found.

    Attributes:
        results: JSON values by the harness's own names: results, versions, n-shot, n-samples and so on.
        table: its table for a person, with standard errors.
    """

    results: dict[str, Any]
    table: str


def evaluate_harness_tasks(
    path: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    think: bool | None = None,
) -> HarnessReport:
    """What the harness says of the model at ``path``.

    Args:
        tasks: names of the harness's tasks, groups and tags, or of those in ``include_path``; ``*`` is any text.
        include_path: a folder of task files (YAML) of the user's.
        limit: documents of each task at most.
        num_fewshot: examples before each question; None for the task's own number.
        chat: put questions through the model's chat format.
        think: True forces a think in a chat, False forbids it.

    Raises:
        MachineError: lm-eval is not installed. ConfigError: no such task or folder. DataError: a task's data cannot be
            read or fetched.
    """
    model_class = harness_class()
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError("no such folder of task files", where=f"--include-path {include_path}", todo="give a folder")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if not manager.match_tasks([name]):
            todo = "see `python -m lm_eval ls tasks`, or give the folder of your own task files: --include-path DIR"
            raise ConfigError(f"the harness has no task {name!r}", where="--lm-eval", todo=todo)
    model = model_class(path=str(path), think=think)
    try:
        evaluated = lm_eval.simple_evaluate(
            model=model,
            tasks=manager.match_tasks(list(tasks)),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except OSError as error:  # also a data set that is not on the hub, and a hub that cannot be reached
        if (machine_error := as_machine_error(error, "the cache of data sets")) is not None:
            raise machine_error from None
        todo = "a task that names a data set of a hub is fetched by the harness: look whether it can be reached"
        raise DataError(f"the harness cannot read a task's data: {error}", where="--lm-eval", todo=todo) from None
    tables = [make_table(evaluated), *([make_table(evaluated, "groups")] if evaluated.get("groups") else [])]
    results = {name: evaluated[name] for name in _REPORTED if name in evaluated}
    return HarnessReport(to_json_value(results | {"lm_eval_version": version("lm_eval")}), "\n".join(tables).strip())


def main() -> None:
    """The command ``lm_eval``, which knows the model ``sprat`` here."""
    harness_class()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
