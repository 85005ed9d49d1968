"""``sprat rl MODEL --environment``: the page's own environment and commands, and what cannot be in one sentence."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from sprat.config.rl import EnvironmentConfig
from sprat.post.rl.environment_pool import EnvironmentPool
from tests.unit.cli.test_rl import PAGE, folder, sprat_command  # noqa: F401

SMALL = ["--set", "steps=2", "--set", "max_tokens=8", "--set", "gate=false", "--set", "held_out.problems=4"]
SECTION = PAGE.read_text(encoding="utf-8").partition("## Several turns and tools")[2].partition("\n## ")[0]
[GAME] = re.findall(r"<!-- environment -->\n```python\n(.*?)```", SECTION, re.DOTALL)
COMMANDS = [shlex.split(line.strip())[1:] for line in SECTION.splitlines() if line.startswith("    sprat rl ")]


def test_the_pages_game_is_won_by_halving(tmp_path: Path) -> None:
    (tmp_path / "games.py").write_text(GAME)
    pool = EnvironmentPool(f"{tmp_path / 'games.py'}:Guess", EnvironmentConfig())
    for seed in range(20):
        game, low, high = pool.open(), 1, 20
        assert "from 1 to 20" in game.reset(None, seed)["content"]
        reply = game.step("well", [], "")
        assert reply == {"messages": [{"role": "user", "content": "A number, please."}]} | {
            "reward": 0.0, "done": False, "errors": 0
        }  # fmt: skip
        while not reply["done"]:
            guess = (low + high) // 2
            reply = game.step(str(guess), [], "")
            low, high = (guess + 1, high) if reply["messages"][0]["content"] == "too low" else (low, guess - 1)
        assert reply["reward"] == 1.0
        game.close()
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[words.index("--environment") + 1])
def test_the_pages_commands_run(words: list[str], folder: Path) -> None:  # noqa: F811
    Path("games.py").write_text(GAME)
    done = sprat_command(*words, *SMALL, "--json")
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["facts"]["last_step"] == 2 and "environment" in record["inputs"]


def test_a_file_of_questions_needs_a_judge_beside_a_tool(folder: Path) -> None:  # noqa: F811
    done = sprat_command("rl", "smol", "--data", "problems.jsonl", "--environment", "calculator", "--out", "r", *SMALL)
    assert done.exit_code == 2 and "nobody says what an episode is worth" in done.stderr
    alone = sprat_command("rl", "smol", "--environment", "calculator", "--out", "r", *SMALL)
    assert alone.exit_code == 3 and "reset asks nothing" in alone.stderr
    road = sprat_command("rl", "--environment", "calculator")
    assert road.exit_code == 2 and "--environment is of a model of yours" in road.stderr
