"""The user's reward is an input of RL: changed, it is another run; mistyped, it touches nothing."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sprat.errors import ConfigError
from sprat.pipeline import training
from sprat.pipeline.pipeline import Pipeline
from sprat.pipeline.recipe import load_recipe


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A pre-trained pipeline and a package of rewards beside it; the list hears of each run of RL."""
    (tmp_path / "verdicts").mkdir()
    (tmp_path / "verdicts" / "__init__.py").write_text("")
    (tmp_path / "verdicts" / "mine.py").write_text(
        "from verdicts import near\ndef f(problem, answer): return near.FULL\n"
    )
    (tmp_path / "verdicts" / "near.py").write_text("FULL = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "verdicts"]:
        del sys.modules[name]
    heard: list[Any] = []
    monkeypatch.setattr(training, "load", lambda path: (None, None))
    monkeypatch.setattr(training.evaluation, "check_context", lambda *_, **__: None)
    monkeypatch.setattr(training.grpo, "grpo", lambda *_, reward, **__: heard.append(reward))
    monkeypatch.setattr(training, "finish_run", lambda pipeline, run, *_, **__: run.finish())
    for name in ("data", "pretrain"):
        opened = pipeline_of(tmp_path, "verdicts.mine:f").open_run(
            name, name, load_recipe("tiny").data, {}, lambda goes_on: None
        )
        assert opened is not None
        opened[0].finish()
    return heard


def pipeline_of(tmp_path: Path, reward: str) -> Pipeline:
    return Pipeline(tmp_path / "road", load_recipe("tiny", (f'rl.reward="{reward}"', "rl.gate=false")))


@pytest.mark.parametrize("form", ["verdicts.mine:f", "{folder}/verdicts/mine.py:f"])
def test_a_changed_reward_trains_again_and_a_mistyped_one_touches_nothing(
    form: str, trained: list[Any], tmp_path: Path
) -> None:
    pipeline = pipeline_of(tmp_path, form.format(folder=tmp_path))
    run = pipeline.run_folder("rl-seed0")
    training.rl(pipeline, 0)
    training.rl(pipeline, 0)
    assert len(trained) == 1
    inputs = json.loads((run / "run.json").read_text())["inputs"]
    for key, name in (("reward", "mine.py"), ("reward/near.py", "near.py")):
        assert inputs[key]["digest"] == hashlib.sha256((tmp_path / "verdicts" / name).read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match="no function 'g'"):
        training.rl(pipeline_of(tmp_path, form.format(folder=tmp_path).replace(":f", ":g")), 0)
    assert (run / "run.json").is_file() and not list(pipeline.folder.glob("*.old-*"))
    (tmp_path / "verdicts" / "near.py").write_text("FULL = 0.5\n")
    training.rl(pipeline, 0)
    assert len(trained) == 2 and len(list(pipeline.folder.glob("rl-seed0.old-*"))) == 1
