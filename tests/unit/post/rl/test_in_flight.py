"""A worker takes newer weights in the middle of an answer, unless they are of another attempt or cannot be read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from sprat.config.rl import RLRunConfig
from sprat.engine import Sampling
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.post.rl import worker
from sprat.post.rl.sampled import Request, SampledAnswer, pack_requests, unpack_answers
from sprat.post.rl.weights import TrainedWeights, weights_file
from sprat.post.rl.wire import Message
from sprat.tokens import Tokenizer

SETTINGS: dict[str, Any] = {"group_size": 3, "prompts_per_step": 1, "max_tokens": 30, "gate": False}
PROMPT = [40, 41, 42, 43]


class Orchestrator:
    """Gives one group with version 3, and newer weights one after the other; keeps what is answered."""

    def __init__(self, folder: Path, config: RLRunConfig, newer: list[dict[str, Any]]) -> None:
        self._folder, self._config, self._newer = folder, config, newer
        self.digests: dict[int, str] = {}
        self.answers: list[SampledAnswer] = []
        self.looks = 0

    def publish(self, model: Transformer, version: int) -> None:
        self.digests[version] = TrainedWeights(model).save(self._folder, version)

    def ask(self, kind: str, arrays: Any = None, **content: Any) -> Message:
        if kind == "hello":
            job = {"config": self._config.model_dump(mode="json"), "model": str(self._folder / "model"), "room": 1}
            return Message(job | {"dequantize": False})
        if kind == "take" and not self.answers:
            rows, ids = pack_requests(
                [Request(0, PROMPT, Sampling(n=3, logprobs=True, routes=True, max_tokens=30, ignore_eos=True))]
            )
            return Message({**self._weights(3), "requests": rows}, dict(ids))
        if kind == "newest":
            self.looks += 1
            changes = self._newer.pop(0) if self.looks % 6 == 0 and self._newer else {}
            self.current = {**self._weights(changes["version"]), **changes} if changes else self.current
            return Message(self.current)
        if kind == "answer":
            body = {name: value for name, value in content.items() if name == "finishes"}
            self.answers = unpack_answers(Message(body, dict(arrays)), len(PROMPT), 3)
            return Message({})
        if kind == "take":
            return Message({"stop": True})
        raise AssertionError(f"{kind}: {content}")

    current: dict[str, Any] = {}

    def _weights(self, version: int) -> dict[str, Any]:
        file = str(weights_file(self._folder, version))
        return {"version": version, "digest": self.digests[version], "file": file, "rollbacks": 0}


@pytest.fixture
def versions(guesser: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> dict[int, Transformer]:
    """Versions 3 to 6 of a policy, each far from the others; the model itself is in a folder."""
    save(guesser, tokenizer, tmp_path / "model")
    made, generator = {3: copy.deepcopy(guesser)}, torch.Generator().manual_seed(0)
    for version in (4, 5, 6):
        made[version] = copy.deepcopy(made[version - 1])
        with torch.no_grad():
            for weight in made[version].parameters():
                weight.add_(0.3 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator))
    return made


def answers_of(
    versions: dict[int, Transformer],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    newer: list[dict[str, Any]],
    **rollout: Any,
) -> list[SampledAnswer]:
    """What a worker answers while ``newer`` weights come; each token is held to the weights that it names."""
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.0)
    whole = {"workers": 1, "staleness": 4, "in_flight": True} | rollout
    config = RLRunConfig.model_validate(SETTINGS | {"rollout": whole, "importance_cap": 2.0, "max_mismatch": 1.0})
    orchestrator = Orchestrator(folder, config, newer)
    for version, model in versions.items():
        orchestrator.publish(model, version)
    caller: Any = orchestrator
    worker.Worker(caller).work()
    exact = rollout.get("precision") is None
    for answer in orchestrator.answers:
        tokens = torch.tensor([PROMPT + answer.token_ids])
        for version in set(answer.versions):
            with torch.no_grad():
                logprob_TV = versions[version](tokens)[0].log_softmax(-1)
            for place, (token, own) in enumerate(zip(answer.token_ids, answer.versions, strict=True)):
                if own == version:
                    expected = float(logprob_TV[len(PROMPT) + place - 1, token])
                    assert answer.logprobs[place] == pytest.approx(expected, abs=1e-4 if exact else 0.3)
        assert answer.routes is not None and len(answer.routes) == len(PROMPT) + len(answer.token_ids)
    return orchestrator.answers


def test_each_token_is_of_the_version_that_it_names(
    versions: dict[int, Transformer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = [{"version": 4}, {"version": 5}, {"version": 6}]
    answers = answers_of(versions, tmp_path, monkeypatch, newer)
    assert all(answer.versions == sorted(answer.versions) for answer in answers)
    assert all(set(answer.versions) == {3, 4, 5, 6} for answer in answers)


def test_in_bfloat16_too(versions: dict[int, Transformer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = answers_of(versions, tmp_path, monkeypatch, [{"version": 4}, {"version": 6}], precision="bfloat16")
    assert all(set(answer.versions) == {3, 4, 6} for answer in answers)


def test_weights_of_another_attempt_and_those_that_cannot_be_read_are_left(
    versions: dict[int, Transformer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"torn")
    newer = [{"version": 4, "rollbacks": 1}, {"version": 5, "digest": "0" * 64}, {"version": 6}]
    monkeypatch.setattr(worker.Worker, "_download", lambda *given: torn.read_bytes())
    answers = answers_of(versions, tmp_path, monkeypatch, newer)
    assert all(set(answer.versions) == {3, 6} for answer in answers)


def test_off_by_default(versions: dict[int, Transformer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = answers_of(versions, tmp_path, monkeypatch, [{"version": 4}], in_flight=False)
    assert all(set(answer.versions) == {3} for answer in answers)
    assert not RLRunConfig().rollout.in_flight


@pytest.mark.parametrize(
    ("rollout", "what"),
    [({"workers": 2}, "set rollout.staleness"), ({"workers": 2, "staleness": 1, "precision": "int4"}, "bfloat16")],
)
def test_what_cannot_be_is_refused(rollout: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        RLRunConfig.model_validate({"rollout": rollout | {"in_flight": True}, "importance_cap": 2.0})
