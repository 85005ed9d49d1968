"""A rollout worker: takes weights and prompts, gives tokens; it knows neither tasks nor verifiers.

    python -m sprat.post.rl.worker SOCKET PARENT           a child of the run (``children``)
    python -m sprat.post.rl.worker HOST:PORT KEYFILE MODEL  of a run on another machine (``placement``)

Between two batches of groups it takes the newest weights, which it believes by their digest alone. Within a batch the
weights stay as they are, and ``versions`` of an answer's tokens are all the same; with ``rollout.in_flight`` it looks
for newer ones between two steps of the engine, and each token has the version that sampled it
(``Engine.update_weights``). The oldest token of an answer is of the weights that its group was dispatched with, so that
staleness is bounded as ever.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sprat.config.rl import RLRunConfig
from sprat.engine import Engine, Output
from sprat.errors import CheckpointError, MachineError, SpratError, TrustError, pack_error
from sprat.formats.load import load_dense
from sprat.machine import end_with_parent
from sprat.model.lora import add_lora
from sprat.post.rl.connection import Caller, Connection, connect
from sprat.post.rl.merged_copy import plain_copy, write_merged
from sprat.post.rl.rollout_engine import RolloutEngine
from sprat.post.rl.sampled import Request, SampledAnswer, pack_answers, unpack_requests
from sprat.post.rl.weights import OtherModelError, TrainedWeights
from sprat.post.rl.wire import Message

RECONNECT_SECONDS = 600.0  # a run that was killed may come back
_RETRY_SECONDS = 2.0
POLL_SECONDS = 0.1  # between two looks for newer weights
Sample = Callable[[Engine, Sequence[Request], int], list[list[SampledAnswer]]]


def sample(engine: Engine, requests: Sequence[Request], version: int) -> list[list[SampledAnswer]]:
    """The answers to ``requests``, group by group, with weights ``version``."""
    outputs = engine.generate([each.prompt_ids for each in requests], [each.sampling for each in requests])
    answers, start = list[list[SampledAnswer]](), 0
    for request in requests:
        own = outputs[start : start + request.sampling.n]
        answers.append([_as_answer(output, version, place == 0) for place, output in enumerate(own)])
        start += request.sampling.n
    return answers


def _as_answer(output: Output, version: int, is_first: bool) -> SampledAnswer:
    versions = output.versions or [version] * len(output.token_ids)
    prefill = len(output.prompt_ids) if is_first else 0
    return SampledAnswer(
        output.token_ids, output.logprobs or [], versions, output.finish_reason, prefill, output.routes
    )


class Worker:
    """Answers groups until there are none.

    Args:
        model: where this machine has the model; empty: where the run has it.
        sampler: how answers are drawn.
    """

    def __init__(self, caller: Caller, model: str = "", sampler: Sample = sample) -> None:
        self._caller, self._sampler, self._job = caller, sampler, caller.ask("hello", role="worker").body
        self._config = RLRunConfig.model_validate(self._job["config"])
        own, tokenizer = load_dense(model or self._job["model"], dequantize=self._job["dequantize"])
        self._sampled = own  # what the engine computes with: the model, or a copy with adapters merged
        if self._config.lora is not None:
            self._sampled = plain_copy(own)
            add_lora(own, self._config.lora, self._config.seed)
        self._weights, self._digest = TrainedWeights(own), ""
        max_batch = self._job["room"] * self._config.group_size
        self._rollouts = RolloutEngine(self._sampled, tokenizer, self._config, max_batch)
        self._next_look = 0.0

    def work(self) -> None:
        """Take groups and answer them, until told to stop. Raises SpratError: the run has failed or ended."""
        while "stop" not in (reply := self._caller.ask("take", room=self._job["room"])).body:
            version = reply.integer("version")
            try:
                self._take_weights(reply)
            except OtherModelError:
                raise
            except SpratError as error:
                self._caller.ask("refuse", version=version, reason=str(error))
                continue
            requests = unpack_requests(reply)
            engine = self._rollouts.engine
            engine.update_weights(lambda: None, version)  # what they are called; nothing runs
            if self._config.rollout.in_flight:
                engine.before_step = partial(self._take_newer_weights, reply.integer("rollbacks"))
            for request, answers in zip(requests, self._sampler(engine, requests, version), strict=True):
                body, arrays = pack_answers(answers)
                self._caller.ask("answer", arrays, group=request.group, rollbacks=reply.body["rollbacks"], **body)

    def _take_newer_weights(self, rollbacks: int) -> None:
        """Go on with newer weights, if there are any, unless the run was sent back since its groups were asked.

        What cannot be read now is left for a later look, or for the end of the batch, where it is refused.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + POLL_SECONDS
        reply = self._caller.ask("newest")
        if reply.body.get("rollbacks") != rollbacks or reply.text("digest") == self._digest:
            return
        try:
            self._take_weights(reply)
        except (CheckpointError, TrustError):
            self._next_look += 10 * POLL_SECONDS
            return
        self._rollouts.engine.update_weights(lambda: None, reply.integer("version"))  # nothing stepped in between

    def _take_weights(self, reply: Message) -> None:
        """Compute with the version that ``reply`` names. Raises SpratError: it is not to be had, or not whole."""
        version, digest, file = reply.integer("version"), reply.text("digest"), Path(reply.text("file"))
        if digest == self._digest:
            return
        try:
            self._weights.load(file, digest)
        except (CheckpointError, TrustError) as error:
            if isinstance(error, OtherModelError):
                raise
            with tempfile.TemporaryDirectory(prefix="sprat-rl-") as folder:  # another machine's, or just removed
                path = Path(folder, file.name)
                self._download(version, path)
                self._weights.load(path, digest)
        if self._sampled is not self._weights.model:
            write_merged(self._weights.model, self._sampled)
        self._rollouts.take_over()
        self._digest = digest

    def _download(self, version: int, path: Path) -> None:
        """The file of ``version``, over the wire."""
        with open(path, "wb") as stream:
            while True:
                reply: Message = self._caller.ask("weights", version=version, offset=stream.tell())
                piece = reply.array("bytes", "|u1")
                stream.write(piece.data)
                if stream.tell() >= reply.integer("size"):
                    return
                if not len(piece):
                    raise CheckpointError("weights ended early", where=path.name, todo="ask again")


def work_at(address: str, key: bytes, model: str, sampler: Sample = sample) -> None:
    """Work for the run that listens at ``address``, until it ends; one that is killed is waited for.

    Raises:
        SpratError: the run has failed, or does not come back.
    """
    deadline = time.monotonic() + RECONNECT_SECONDS
    while True:
        try:
            caller = Caller(connect(address, key), lambda: None)
            deadline = time.monotonic() + RECONNECT_SECONDS
            Worker(caller, model, sampler).work()
            return
        except MachineError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_SECONDS)


def serve_parent(work: Callable[[Caller], Any]) -> None:
    """Be a child (``children``): ``work`` for the parent at the socket that the command line names.

    It leaves with 0 when that is done, 130 when it was interrupted, and at once when the parent has ended.
    """
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    end_with_parent(parent)
    caller = Caller(Connection(socket.socket(fileno=descriptor), "orchestrator"), lambda: os._exit(1))
    code = 0
    try:
        work(caller)
    except KeyboardInterrupt:
        code = 130
    except SpratError as error:
        caller.ask("failed", error=pack_error(error))
        code = error.exit_code
    sys.stderr.flush()
    os._exit(code)  # its threads are not waited for


def main(sampler: Sample = sample) -> None:
    """See the module's text."""
    if len(sys.argv) > 3:
        address, key_file, model = sys.argv[1:4]
        try:
            work_at(address, bytes.fromhex(Path(key_file).read_text(encoding="ascii")), model, sampler)
        except SpratError as error:
            print(f"sprat: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve_parent(lambda caller: Worker(caller, "", sampler).work())


if __name__ == "__main__":
    main()
