"""The errors that Sprat raises: each says what was wrong, where, and what to do.

A user never sees a traceback for bad input: the command line prints one sentence and leaves with
``exit_code``; ``--debug`` shows the traceback.
"""

from __future__ import annotations


class SpratError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
        what: what was wrong, one clause, no full stop.
        where: file, key, line, field or address.
        todo: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        self.what, self.where, self.todo = what, where, todo
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        advice = f"; {self.todo}" if self.todo else ""
        return f"{self.what}{place}{advice}."


class ConfigError(SpratError):
    """A recipe, an override or a config.json does not hold."""

    exit_code = 2


class DataError(SpratError):
    """A text, a task or a dataset cannot be used."""

    exit_code = 3


class CheckpointError(SpratError):
    """Weights or state on disk are missing, torn or of the wrong shape."""

    exit_code = 4


class TrainingError(SpratError):
    """Training cannot go on: the loss is not finite, or the policy is not ready for RL."""

    exit_code = 5


class EngineError(SpratError):
    """A request asks for what the engine cannot do."""

    exit_code = 6


class ServeError(SpratError):
    """The server cannot start or answer."""

    exit_code = 7


class TrustError(SpratError):
    """A digest, a ledger or a signature does not match."""

    exit_code = 8


class MachineError(SpratError):
    """The machine lacks something: disk, Python version, a package, a compiler."""

    exit_code = 9


class EngineDeadError(SpratError):
    """The engines of a server died again and again, and are not started any more."""

    exit_code = 10
