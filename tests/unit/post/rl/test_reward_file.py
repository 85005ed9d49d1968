"""A reward in a file is ordinary Python: what `python file.py` would load and run, loads and runs here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sprat.errors import ConfigError
from sprat.post.rl.losses import advantages, reward_tensor
from sprat.post.rl.reward_sources import reward_inputs
from sprat.post.rl.rewards import Response, Verifier, load_reward
from sprat.post.rl.rollout import Rollout
from sprat.tasks import Problem

PROBLEM, ANSWER = Problem("sums", 0, "q", "1"), Response("", "1", True, True)


def test_a_file_with_a_dataclass_and_a_module_beside_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_the_reward.py").write_text("PAID = 0.5\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport beside_the_reward\n"
        "@dataclass\nclass Paid:\n    value: float\n"
        "def reward(problem, answer):\n    return Paid(beside_the_reward.PAID).value\n"
    )
    assert load_reward(f"{tmp_path / 'mine.py'}:reward")(PROBLEM, ANSWER) == 0.5


@pytest.mark.parametrize("raised", ["raise RuntimeError('no key')", "import sys; sys.exit('no key')"])
def test_a_module_whose_package_cannot_be_imported_is_told_of(
    raised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_judges").mkdir()
    (tmp_path / "broken_judges" / "__init__.py").write_text(f"{raised}\n")
    (tmp_path / "broken_judges" / "one.py").write_text("def f(problem, answer): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="looking for 'broken_judges.one' raised .*no key"):
        reward_inputs("broken_judges.one:f")
    with pytest.raises(ConfigError, match="no module 'json.decoder.one'"):
        reward_inputs("json.decoder.one:f")


def test_a_reward_that_calls_exit_abstains() -> None:
    verifier = Verifier(lambda problem, answer: sys.exit(0))
    assert verifier(PROBLEM, ANSWER) is None
    assert verifier.faults == 1 and "SystemExit" in verifier.last_fault


@pytest.mark.parametrize("zero", [0.0, 1e9, -1e12])
def test_rewards_have_no_preferred_zero(zero: float) -> None:
    paid = [Rollout("sums", [1], [2], [0.0], ANSWER, zero + more, 0.0, 1) for more in (0, 1, 0, 1)]
    assert advantages(reward_tensor([each.reward for each in paid], 4), True).tolist() == [[-1.0, 1.0, -1.0, 1.0]]
