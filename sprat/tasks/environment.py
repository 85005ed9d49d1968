"""What an environment is: something that a model talks with over several turns, and that may pay it.

``reset`` begins an episode, ``step`` takes what the model said and answers. The names are Gymnasium's; classes written
for Gymnasium, OpenEnv and TRL's ``environment_factory`` are taken as they are (``environment_forms``).

    class Game:
        tools = [look_up]                        # optional: functions, or JSON schemas of them

        def reset(self, problem, seed):          # what it takes decides what it is given
            return "Guess a number from 1 to 9." # or None: the problem's own question stands

        def step(self, action):
            return "too low", 0.0, False         # observation, reward (None: cannot say), done
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self


@dataclass(frozen=True)
class Call:
    """A tool that the model calls; ``id`` is what its result names.

    ``arguments`` are those of the call's JSON object; the text itself where a model wrote none.
    """

    name: str
    arguments: Mapping[str, Any] | str
    id: str = ""


class Action(str):
    """What the model said in one turn: the text itself, with what it called and thought beside.

    Attributes:
        tool_calls: in the order of the turn; text around them is the action's.
        reasoning: what it thought before.

    >>> Action("left") == "left", Action("", tool_calls=[Call("look", {})]).tool_calls[0].name
    (True, 'look')
    """

    tool_calls: Sequence[Call]
    reasoning: str

    def __new__(cls, content: str, tool_calls: Sequence[Call] = (), reasoning: str = "") -> Self:
        """The action that says ``content``."""
        action = super().__new__(cls, content)
        action.tool_calls, action.reasoning = tuple(tool_calls), reasoning
        return action


class Environment(Protocol):
    """One episode at a time; each has an object of its own, made without arguments, in a process of its own.

    The same seed and the same actions must give the same observations and rewards.
    """

    def reset(self, problem: Any, seed: int) -> Any:
        """Begin the episode: the question (text or messages), or None where the problem's own stands."""
        ...

    def step(self, action: Action) -> tuple[Any, float | None, bool]:
        """Take a turn: what the model sees next, what it is paid for this turn, and whether the episode is over.

        A reward of None says nothing before the end; at the end it is "cannot say", and the episode is not trained.
        """
        ...
