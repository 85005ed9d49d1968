"""Environments of every form that people have, and those that are built in, with their real parts."""

from __future__ import annotations

import dataclasses
import enum
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from sprat.config.rl import EnvironmentConfig
from sprat.errors import ConfigError, MachineError
from sprat.post.rl.environment_pool import EnvironmentPool, EpisodeProcess, FaultError
from sprat.tasks import Problem
from sprat.tasks.environment import Action, Call
from sprat.tasks.environment_forms import Episode
from sprat.tasks.environments import calculate, load_environment
from sprat.tasks.sandbox import sandbox_facts
from sprat.tasks.tool_schema import function_schema

PROBLEM = Problem("sums", 3, "2 + 2?", "4", {"id": "a", "row": {"prompt": "2 + 2?", "level": 1}})


class Gymnasiums:
    """https://gymnasium.farama.org/api/env: reset(seed=, options=), five values from step."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        self.seed, self.options = seed, options
        return f"level {options['level']}, seed {seed}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return f"you said {action}", 0.25, False, action == "stop", {}


@dataclasses.dataclass
class StepResult:
    observation: Any
    reward: float | None
    done: bool


class OpenEnvs:
    """An object with observation, reward and done."""

    def reset(self) -> StepResult:
        return StepResult("begin", None, False)

    def step(self, action: str) -> StepResult:
        return StepResult({"board": [1, 2]}, 1.0, action == "end")


class Trls:
    """``environment_factory``: reset gets the columns, public methods are tools, get_reward pays."""

    def reset(self, **row: Any) -> str:
        self.found, self.row = 0, row
        return f" (level {row['level']}, answer {row['answer']})"

    def look_up(self, key: str, limit: int = 1) -> dict[str, int]:
        """Look a word up.

        Args:
            key: the word
                that is sought.
            limit: how many.
        """
        self.found += 1
        return {key: limit}

    def fail(self) -> str:
        """It cannot."""
        raise RuntimeError("no luck")

    def get_reward(self) -> float:
        return self.found / 2

    def _private(self) -> None: ...


class Ours:
    """All three by name, messages as the question, None where it cannot say."""

    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]

    def reset(self, problem: Problem, seed: int) -> list[dict[str, str]]:
        return [{"role": "system", "content": f"seed {seed}"}, {"role": "user", "content": problem.question}]

    def step(self, action: Action) -> tuple[Any, float | None, bool]:
        if action.tool_calls:
            return [f"{call.name} {dict(call.arguments)}" for call in action.tool_calls], None, False
        return "", None, True


def test_gymnasiums_form_has_five_values() -> None:
    episode = Episode(Gymnasiums, "here")
    assert episode.pays and episode.has_step and episode.schemas == [] and not episode.takes_problem
    assert episode.reset(PROBLEM, 5)["content"] == "level 1, seed 5"
    assert episode.step(Action("go")) == {
        "messages": [{"role": "user", "content": "you said go"}], "reward": 0.25, "done": False, "errors": 0
    }  # fmt: skip
    assert episode.step(Action("stop"))["done"] is True


def test_openenvs_form_is_an_object() -> None:
    episode = Episode(OpenEnvs, "here")
    assert episode.reset(None, 0)["content"] == "begin"
    first, last = episode.step(Action("go")), episode.step(Action("end"))
    assert first["messages"] == [{"role": "user", "content": '{"board": [1, 2]}'}]
    assert (first["reward"], first["done"], last["done"]) == (1.0, False, True)


def test_trls_form_has_its_methods_as_tools() -> None:
    episode = Episode(Trls, "here")
    assert [each["function"]["name"] for each in episode.schemas] == ["fail", "look_up"]
    assert episode.reset(PROBLEM, 0)["content"] == " (level 1, answer 4)"
    calls = [Call("look_up", {"key": "a"}, "1"), Call("look_up", {"kee": 1}, "2"), Call("fail", {}, "3")]
    found = episode.step(Action("", [*calls, Call("_private", {}, "4"), Call("look_up", "no json", "5")]))
    texts = [row["content"] for row in found["messages"]]
    assert texts[0] == '{"a": 1}' and all(text.startswith("error: ") for text in texts[1:])
    assert "RuntimeError: no luck" in texts[2] and "no JSON object" in texts[4]
    assert [row["tool_call_id"] for row in found["messages"]] == ["1", "2", "3", "4", "5"]
    assert (found["errors"], found["done"], found["reward"]) == (4, False, None)
    assert episode.reward() == 0.5
    assert episode.step(Action("4")) == {"messages": [], "reward": 0.5, "done": True, "errors": 0}


def test_our_own_form_gets_the_problem_and_says_messages() -> None:
    episode = Episode(Ours, "here")
    assert episode.takes_problem and episode.schemas == Ours.tools
    assert episode.reset(PROBLEM, 7)["messages"] == [
        {"role": "system", "content": "seed 7"}, {"role": "user", "content": "2 + 2?"}
    ]  # fmt: skip
    found = episode.step(Action("", [Call("now", {"a": 1}, "x"), Call("now", {}, "y")]))
    assert [row["content"] for row in found["messages"]] == ["now {'a': 1}", "now {}"]
    assert episode.step(Action("4"))["reward"] is None


@pytest.mark.parametrize("returned", ["3", "('', float('nan'), True)", "('', 'much', True)", "('', 1.0)"])
def test_what_is_no_step_is_an_error(returned: str) -> None:
    space: dict[str, Any] = {"reset": lambda self: "q", "step": lambda self, action: value}
    value = {"3": 3, "('', 1.0)": ("", 1.0)}.get(returned, ("", float("nan") if "nan" in returned else "much", True))
    with pytest.raises(ValueError, match="returned"):
        Episode(type("E", (), space), "here").step(Action("go"))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"step": lambda self, action: None}, "no method reset"),
        ({"reset": lambda self: None}, "neither step nor a method"),
        ({"reset": lambda self: None, "tools": ["now"]}, "a tool is 'now'"),
        ({"__init__": lambda self, size: None}, "making it raised TypeError"),
        ({"reset": lambda self: None, "run": lambda self, *words: None}, r"it takes \*words"),
    ],
)
def test_what_is_no_environment_is_refused(space: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Episode(type("E", (), space), "environment here")


class Color(enum.Enum):
    RED = "red"


def test_a_schema_says_what_the_hints_and_the_docstring_say() -> None:
    def tool(
        key: Annotated[str, "what"],
        sizes: list[int],
        mode: Literal["a", "b"],
        color: Color,
        rate: float | None = None,
        both: int | str = 1,
        table: dict[str, int] | None = None,
        free=None,  # type: ignore[no-untyped-def]
    ) -> None:
        """Do it,
        and well.

        Args:
            key: the key (of all)
                that counts.
            rate (float): how fast: 1 is slow.

        Returns:
            nothing: at all.
        """

    function = function_schema(tool)["function"]
    table = function["parameters"]
    assert function["description"] == "Do it, and well." and table["required"] == ["key", "sizes", "mode", "color"]
    assert table["properties"] == {
        "key": {"type": "string", "description": "the key (of all) that counts."},
        "sizes": {"type": "array", "items": {"type": "integer"}},
        "mode": {"enum": ["a", "b"]},
        "color": {"enum": ["red"]},
        "rate": {"type": "number", "description": "how fast: 1 is slow."},
        "both": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "table": {"type": "object"},
        "free": {},
    }


Opened = Callable[[str], EpisodeProcess]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """An episode of a named environment, in a process of its own."""
    pools: list[EnvironmentPool] = []

    def open_one(name: str) -> EpisodeProcess:
        pools.append(EnvironmentPool(name, EnvironmentConfig(step_timeout=60, cpu_seconds=30)))
        return pools[-1].open()

    yield open_one
    for pool in pools:
        pool.close()


def test_the_calculator_computes_and_says_what_it_cannot(opened: Opened) -> None:
    episode = opened("calculator")
    reply = episode.reset(PROBLEM, 0)
    assert reply["content"] is None and reply["tools"][0]["function"]["name"] == "calculator"
    expressions = ["3847 * 9182", "2**100", "1/0", "9**9**9", "__import__('os')", "(1 + 2", "7 // 2 - -1.5"]
    calls = [{"name": "calculator", "arguments": {"expression": text}, "id": text} for text in expressions]
    texts = [row["content"] for row in episode.step("", calls, "")["messages"]]
    assert texts[:2] == ["35323154", "1267650600228229401496703205376"] and texts[-1] == "4.5"
    assert all(text.startswith("error: ") for text in texts[2:-1])


@pytest.mark.parametrize("text", ["10**400 * 10**400 * 10**400 * 10**400", "(-8)**0.5", "'a' * 9", "1 if 1 else 2", ""])
def test_the_calculator_is_bounded(text: str) -> None:
    with pytest.raises(ValueError):
        calculate(text)


def test_reasoning_gyms_questions_are_an_environment_of_one_step(opened: Opened) -> None:
    pytest.importorskip("reasoning_gym")
    episode = opened("reasoning-gym/chain_sum")
    first, again = episode.reset(None, 12), episode.reset(None, 12)
    assert first == again and first["content"] and first["answer"].lstrip("-").isdigit()
    numbers = first["content"].partition(":")[2].split("=")[0].strip()
    assert str(eval(numbers)) == first["answer"]
    right = episode.step(f" {first['answer']} ", [], "")
    assert (right["reward"], right["done"]) == (1.0, True)
    episode.reset(None, 12)
    assert episode.step("no", [], "")["reward"] == 0.0


@pytest.mark.skipif(not sandbox_facts()["ready"], reason="no sandbox here")
def test_python_runs_in_the_sandbox(opened: Opened, tmp_path: Path) -> None:
    episode = opened("python")
    episode.reset(PROBLEM, 0)
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    programs = ["print(sum(range(10)))", "1/0", f"print(open({str(secret)!r}).read())", "while True: print('x' * 1000)"]
    calls = [{"name": "python", "arguments": {"code": code}, "id": ""} for code in programs]
    texts = [row["content"] for row in episode.step("", calls, "")["messages"]]
    assert texts[0] == "45\n" and "exit code 1" in texts[1] and "hidden" not in texts[2]
    assert "it printed too much" in texts[3] and len(texts[3]) < 5000


def test_python_is_refused_where_it_cannot_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MachineError, match="bubblewrap is not installed") as caught:
        EnvironmentPool("python", EnvironmentConfig())
    assert "environment 'python'" in str(caught.value)


def is_running(pid: int) -> bool:
    """Whether a process is there, and no corpse that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_each_episode_is_a_process_that_dies_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import os, subprocess\n\nclass E:\n    def reset(self, seed):\n"
        "        child = subprocess.Popen(['sleep', '60'])\n        return f'{os.getpid()} {child.pid}'\n\n"
        "    def step(self, action):\n        os._exit(3) if action == 'die' else None\n        return '', 1.0, True\n"
    )
    pool = EnvironmentPool(f"{path}:E", EnvironmentConfig())
    first, second = pool.open(), pool.open()
    pids = [int(pid) for each in (first, second) for pid in each.reset(None, 0)["content"].split()]
    assert len(set(pids)) == 4
    with pytest.raises(FaultError) as caught:
        first.step("die", [], "")
    assert (caught.value.outcome, caught.value.detail) == ("crashed", "left with exit code 3")
    assert second.step("live", [], "")["reward"] == 1.0
    second.close()
    third = pool.open()
    third.reset(None, 0)
    pool.close()
    for pid in pids:  # with all that they started
        assert not is_running(pid)


ORPHANS = """
import sys
from sprat.config.rl import EnvironmentConfig
from sprat.post.rl.environment_pool import EnvironmentPool

pool = EnvironmentPool(sys.argv[1], EnvironmentConfig())
episodes = [pool.open() for _ in range(2)]
print(*[episode.reset(None, 0)["content"] for episode in episodes], flush=True)
episodes[0].step("hang", [], "")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_episodes_end_with_the_run_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, time\n\nclass E:\n    def reset(self, seed):\n        return str(os.getpid())\n\n"
        "    def step(self, action):\n        time.sleep(60)\n"
    )
    command = [sys.executable, "-c", ORPHANS, f"{tmp_path / 'mine.py'}:E"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_running, pids))
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def test_an_environment_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class E:\n    pass\n\nclass F:\n    reset = 1\n")
    for name, said in (("mine", "no environment"), (f"{tmp_path}/none.py:E", "no such file")):
        with pytest.raises(ConfigError, match=said):
            load_environment(name)
    with pytest.raises(ConfigError, match="no method reset"):
        EnvironmentPool(f"{tmp_path}/mine.py:E", EnvironmentConfig())
    with pytest.raises(ConfigError, match="has no 'G'"):
        EnvironmentPool(f"{tmp_path}/mine.py:G", EnvironmentConfig())
