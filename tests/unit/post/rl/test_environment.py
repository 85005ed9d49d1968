"""Episodes with an environment: tokens are trained as they were sampled, and what the environment says is context."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sprat.config.rl import RLRunConfig
from sprat.engine import Engine, Sampling
from sprat.errors import ConfigError, TrainingError, TrustError
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.post.rl.batch import forward_responses
from sprat.post.rl.environment import EpisodePayer
from sprat.post.rl.environment_episode import Episode
from sprat.post.rl.environment_pool import EnvironmentPool
from sprat.post.rl.environment_task import EnvironmentTask
from sprat.post.rl.ledger import LEDGER_FILE, RolloutLedger
from sprat.post.rl.questions import Questions
from sprat.post.rl.reinforce import reinforce
from sprat.post.rl.replay import replay
from sprat.post.rl.rollout import InProcess, Rollout
from sprat.post.rl.trajectory import digest_rollouts, pack_rollout, unpack_rollout
from sprat.tasks import Problem
from sprat.tokens import Tokenizer
from sprat.train.losses import token_logprob
from sprat.trust.run_record import read_metrics
from sprat.trust.stage_facts import read_samples
from sprat.trust.verify import verify
from tests.lucky import Lucky

AGAIN = '''
"""Whatever is asked, 7 is right; it is asked twice."""
import random


class Again:
    def reset(self, seed):
        self.random, self.left = random.Random(seed), 2
        return f"{self.random.randrange(1000)} train"

    def step(self, action):
        self.left -= 1
        return f"{self.random.randrange(1000)} train", 0.5 * (action.strip() == "7"), self.left == 0
'''
SMALL: dict[str, Any] = {
    "steps": 8,
    "prompts_per_step": 8,
    "group_size": 8,
    "max_tokens": 10,
    "lr": 3e-3,
    "checkpoint_every": 2,
    "gate": False,
    "held_out": {"every": 4, "problems": 20},
}


@pytest.fixture
def folder(guesser: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that guesses a digit, and an environment that wants a 7, twice."""
    save(guesser, tokenizer, tmp_path / "base")
    (tmp_path / "again.py").write_text(AGAIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**changes: Any) -> RLRunConfig:
    return RLRunConfig.model_validate(SMALL | changes)


Play = Callable[..., list[Rollout]]


@pytest.fixture
def play(folder: Path, guesser: Transformer, tokenizer: Tokenizer) -> Iterator[Play]:
    """Episodes of an environment with the guesser: four of each of some problems of its own."""
    pools: list[EnvironmentPool] = []

    def played(source: str = AGAIN, seeds: tuple[int, ...] = (1, 2, 3), **changes: Any) -> list[Rollout]:
        Path("played.py").write_text(source)
        config = settings(**changes)
        pool = EnvironmentPool("played.py:Again", config.environment)
        pools.append(pool)
        payer, engine = EpisodePayer(tokenizer, config, pool), Engine(guesser, tokenizer, max_batch=16)
        problems = [Problem("again", seed, "?", "", {"environment_seed": seed}) for seed in seeds]
        task = Lucky()
        noise = {"temperature": 1.0, "max_tokens": 10, "logprobs": True, "n": 4, "routes": True}
        own = [Sampling(seed=100 + seed, **noise) for seed in seeds]
        rollouts = payer.sample(engine, [(task, problem) for problem in problems], own)
        return [dataclasses.replace(each, versions=[0] * len(each.token_ids)) for each in rollouts]

    yield played
    for pool in pools:
        pool.close()


def test_tokens_of_the_environment_stand_between_the_turns_and_are_not_trained(
    play: Play, guesser: Transformer, tokenizer: Tokenizer
) -> None:
    rollouts = play()
    assert len(rollouts) == 12 and {rollout.outcome for rollout in rollouts} == {"paid"}
    for rollout in rollouts:
        (first, first_count), (second, count) = rollout.trained or []
        assert first == 0 and second + count == len(rollout.token_ids) == len(rollout.logprobs)
        said = tokenizer.decode(rollout.token_ids[first_count:second], skip_special_tokens=False)
        assert said.startswith("<|user|>") and said.endswith(" train<|assistant|>")
        assert rollout.token_ids[first_count - 1] == tokenizer.special_ids.eos
        assert rollout.logprobs[first_count:second] == [0.0] * (second - first_count)
        assert rollout.num_sampled == first_count + count
    # The trainer's log-probabilities at exactly the places that were sampled, against a pass over the whole sequence.
    tokens = forward_responses(guesser, rollouts, torch.zeros(len(rollouts)))
    with torch.no_grad():
        logprob_N, _ = token_logprob(tokens.x_ND, guesser.head.dense_weight(), tokens.targets_N, 1.0)
        expected = []
        for rollout in rollouts:
            ids = torch.tensor([rollout.prompt_ids + rollout.token_ids])
            x_TD = guesser.hidden(ids).x_BTD[0]
            logprobs_TV = torch.log_softmax(x_TD @ guesser.head.dense_weight().T, -1)
            for start, count in rollout.trained or []:
                for place in range(len(rollout.prompt_ids) + start, len(rollout.prompt_ids) + start + count):
                    expected.append(logprobs_TV[place - 1, ids[0, place]])
    assert len(expected) == len(logprob_N) == sum(rollout.num_sampled for rollout in rollouts)
    assert torch.allclose(logprob_N, torch.stack(expected), atol=1e-5)
    assert torch.allclose(logprob_N, tokens.old_N, atol=1e-4)  # what the engine sampled with


def test_experts_of_all_turns_are_trained_again(play: Play, guesser: Transformer) -> None:
    rollouts = play()
    for rollout in rollouts:
        assert rollout.routes is not None and len(rollout.routes) == rollout.length
        ids = torch.tensor([rollout.prompt_ids + rollout.token_ids])
        with torch.no_grad():
            chosen_TK = guesser.hidden(ids).routing[0].index_NK
        same_T = (chosen_TK.sort(-1).values == rollout.routes[:, 0].long().sort(-1).values).all(-1)[:-1]
        assert float(same_T.float().mean()) > 0.95  # but for ties of two experts
    counts = forward_responses(guesser, rollouts, torch.zeros(len(rollouts))).routes
    assert counts.replayed == counts.places > 0


def test_a_place_keeps_the_experts_of_the_turn_that_sampled_it() -> None:
    episode = Episode(Lucky(), Problem("again", 1, "?", ""), Sampling(), 0)
    for turn, places in enumerate((3, 7), 1):  # the first turn's last token is computed in the second
        episode.keep_routes(np.full((places, 1, 2), turn, np.uint8))
    assert episode.routes is not None
    assert episode.routes[:, 0, 0].tolist() == [1, 1, 2, 2, 2, 2, 2]


def test_the_same_seed_is_the_same_episode_whatever_is_played_beside_it(play: Play) -> None:
    alone, among = play(seeds=(2,)), play(seeds=(3, 2, 1))
    assert digest_rollouts(alone) == digest_rollouts(among[4:8])
    assert len({tuple(rollout.token_ids) for rollout in among}) > 6  # and each draws by noise of its own


def test_limits_of_turns_and_tokens_cut_an_episode_and_pay_what_it_had(play: Play) -> None:
    short = play(environment={"max_turns": 1})
    assert {rollout.finish for rollout in short} == {"length"}
    assert {len(rollout.trained or []) for rollout in short} == {1}
    assert {rollout.reward for rollout in short} <= {0.0, 0.5}
    narrow = play(environment={"max_tokens": 6})
    assert all(len(rollout.token_ids) <= 6 and rollout.finish == "length" for rollout in narrow)


def test_a_rollout_of_turns_is_kept_and_one_that_is_torn_is_refused(play: Play) -> None:
    rollout = play(seeds=(1,))[0]
    fields, arrays = pack_rollout(rollout)
    back = unpack_rollout(json.loads(json.dumps(fields)), arrays)
    assert back.trained == rollout.trained and back.environment_seed == 1
    assert digest_rollouts([back]) == digest_rollouts([rollout])
    plain = dataclasses.replace(rollout, trained=None)
    assert "episode" not in pack_rollout(plain)[0]
    for turns in ([[0, 999]], [[2, 2], [0, 1]], [[0]], [[-1, 2]]):
        with pytest.raises(TrustError, match="its turns"):
            unpack_rollout(fields | {"episode": [turns, 0, 0, 0]}, arrays)


def test_it_learns_in_every_turn_and_the_run_proves_itself(folder: Path) -> None:
    run = reinforce("base", Questions(environment="again.py:Again"), "runs/mine", settings(steps=10))
    rows, change = read_metrics(run.folder), run.facts["held_out"]["change"]
    assert change["count"] == 20 and change["difference"] > 0.3 and change["p_value"] < 1e-3
    assert rows[-1]["reward"] > 0.8 > 0.4 > rows[1]["reward"]
    assert {row["turns"] for row in rows[1:]} == {2.0} and rows[1]["mismatch_mean"] < 1e-4
    assert {"environment", "environment/again.py"} <= set(run.record["inputs"])
    assert "<|user|>" in read_samples(run.artifact)[0].answer  # all that was said
    assert replay(run.folder, 3, model="base").is_same
    assert not [finding for finding in verify("runs") if not finding.ok]


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    lora: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, asked = (
        settings(lora=lora, steps=5, held_out={"every": 2, "problems": 6}),
        Questions(environment="again.py:Again"),
    )
    whole = reinforce("base", asked, "whole/run", config)
    groups = InProcess.groups

    def dying(source: InProcess, step: int) -> list[Rollout]:
        if step == 4:
            raise KeyboardInterrupt
        return groups(source, step)

    monkeypatch.setattr(InProcess, "groups", dying)
    with pytest.raises(KeyboardInterrupt):
        reinforce("base", asked, "stopped/run", config)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    run = reinforce("base", asked, "stopped/run", config)
    for name, tensor in load(whole.folder)[0].state_dict().items():
        assert torch.equal(tensor, load(run.folder)[0].state_dict()[name]), name
    digests = [RolloutLedger.read(each.folder / LEDGER_FILE).digest() for each in (whole, run)]
    assert digests[0] == digests[1]


def test_games_that_ask_the_same_each_time_are_held_out_one_by_one(folder: Path) -> None:
    Path("same.py").write_text(
        AGAIN.replace('return f"{self.random.randrange(1000)} train"\n\n', "return '5 train'\n\n", 1)
    )
    run = reinforce(
        "base", Questions(environment="same.py:Again"), "runs/mine", settings(steps=1, held_out={"problems": 6})
    )
    assert run.facts["held_out"]["change"]["count"] == 6
    first = json.loads((run.artifact / "held_out.jsonl").read_text().splitlines()[0])
    assert len({each["key"] for each in first["problems"]}) == 6


def test_a_reward_in_its_place_sees_the_last_turn_alone(folder: Path) -> None:
    Path("judge.py").write_text(
        "def reward(problem, answer):\n    assert 'train' not in answer.text + answer.content\n"
        "    return float(answer.content.strip() == '7') * 3\n"
    )
    asked = Questions(environment="again.py:Again", reward="judge.py:reward")
    run = reinforce("base", asked, "runs/mine", settings(steps=1, held_out={"problems": 4}))
    rollouts = RolloutLedger.read(run.folder / LEDGER_FILE).rollouts(1)
    assert read_metrics(run.folder)[1]["reward_faults"] == 0
    assert {rollout.reward for rollout in rollouts} <= {0.0, 3.0} and all(
        len(each.trained or ()) == 2 for each in rollouts
    )


def test_workers_are_refused_with_what_to_do(folder: Path) -> None:
    with pytest.raises(ConfigError, match="own process") as caught:
        reinforce("base", Questions(environment="again.py:Again"), "runs/x", settings(rollout={"workers": 1}))
    assert "leave rollout.workers out" in str(caught.value) and not Path("runs/x").exists()
    with pytest.raises(ConfigError, match="no such file"):
        reinforce("base", Questions(environment="nowhere.py:Again"), "runs/x", settings())
    with pytest.raises(ConfigError, match="no environment 'again.py'"):
        reinforce("base", Questions(environment="again.py"), "runs/x", settings())


STEP = "class E:\n    def reset(self, seed):\n        self.seed = seed\n        return f'{seed % 1000} train'\n\n"
BROKEN = {
    "raises": (STEP + "    def step(self, action):\n        raise RuntimeError('no')\n", "raised RuntimeError: no"),
    "says NaN": (STEP + "    def step(self, action):\n        return '', float('nan'), True\n", "not finite"),
    "crashes": (STEP + "    def step(self, action):\n        import os\n        os._exit(3)\n", "exit code 3"),
    "sleeps": (STEP + "    def step(self, action):\n        import time\n        time.sleep(9)\n", "longer than 0.2 s"),
    "spins": (
        STEP + "    def step(self, action):\n        while True:\n            pass\n",
        "more than 0.1 CPU seconds",
    ),
    "is of no form": (STEP + "    def step(self, action):\n        return 1\n", "which is not (observation, reward"),
    "cannot say": (STEP + "    def step(self, action):\n        return '', None, True\n", "abstained"),
    "pays all alike": (STEP + "    def step(self, action):\n        return '', 0.5, True\n", "paid each of"),
    "pays by chance": (
        STEP + "    def step(self, action):\n        import os\n        return '', os.urandom(1)[0] % 2, True\n",
        "pays by chance",
    ),
    "begins by chance": (
        "import os\n\nclass E:\n    def reset(self, seed):\n        return f'{os.urandom(2).hex()} train'\n\n"
        "    def step(self, action):\n        return '', action.strip() == '7', True\n",
        "begins otherwise",
    ),
    "answers by chance": (
        STEP.replace("self.seed = seed", "self.n = 0") + "    def step(self, action):\n        import os\n"
        "        self.n += 1\n        return os.urandom(2).hex(), action.strip() in [*'02468'], self.n == 2\n",
        "answered otherwise",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_environment_that_cannot_be_trusted_ends_the_run_with_its_name(fault: str, folder: Path) -> None:
    source, said = BROKEN[fault]
    Path("bad.py").write_text(source)
    limits = {"step_timeout": 0.2 if fault == "sleeps" else 5, "cpu_seconds": 0.1 if fault == "spins" else 5}
    config = settings(gate=True, gate_problems=4, held_out={"problems": 2}, environment=limits)
    with pytest.raises(TrainingError) as caught:
        reinforce("base", Questions(environment="bad.py:E"), "runs/bad", config)
    assert said in str(caught.value) and "environment bad.py:E" in str(caught.value)
    assert not Path("runs/bad/artefact").exists()


def test_what_is_answered_by_chance_is_noticed_beside_a_reward_too(folder: Path) -> None:
    source, _ = BROKEN["answers by chance"]
    Path("bad.py").write_text(source)
    Path("judge.py").write_text(
        "def reward(problem, answer):\n    return float(answer.content.strip() in [*'02468'])\n"
    )
    config = settings(gate=True, gate_problems=4, held_out={"problems": 2})
    with pytest.raises(TrainingError, match="answered otherwise.*environment bad.py:E"):
        reinforce("base", Questions(environment="bad.py:E", reward="judge.py:reward"), "runs/bad", config)


def test_a_fault_now_and_then_costs_its_own_episode(play: Play) -> None:
    source = AGAIN.replace("self.left -= 1", "self.left -= 1\n        assert self.left or action.strip() in '02468'")
    rollouts = play(source)
    failed = [rollout for rollout in rollouts if rollout.outcome == "raised"]
    assert 0 < len(failed) < len(rollouts)
    assert all(rollout.reward is None and "AssertionError" in rollout.detail for rollout in failed)
    assert all(rollout.reward is not None for rollout in rollouts if rollout not in failed)


def test_problems_of_an_environment_are_held_out_by_what_they_ask(folder: Path) -> None:
    config = settings()
    pool = EnvironmentPool("again.py:Again", config.environment)
    task = EnvironmentTask(pool)
    sides = {split: {task.problem(split, n).question for n in range(40)} for split in ("train", "test")}  # type: ignore[arg-type]
    assert not sides["train"] & sides["test"] and len(sides["train"]) > 30
    assert task.problem("train", 3) == task.problem("train", 3)
    pool.close()
    Path("silent.py").write_text(
        AGAIN.replace('return f"{self.random.randrange(1000)} train"\n\n', "return '?'\n\n", 1)
    )
    pool = EnvironmentPool("silent.py:Again", config.environment)
    task = EnvironmentTask(pool)  # a game whose question is always the same is told apart by its seed
    forms = {split: {task.problem(split, n).canonical for n in range(40)} for split in ("train", "test")}  # type: ignore[arg-type]
    assert not forms["train"] & forms["test"] and len(forms["test"]) == 40
    pool.close()
