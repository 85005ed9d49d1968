"""The log of a run as TensorBoard's event files, for those who watch there. Nothing of ours reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sprat.errors import MachineError

FOLDER = "tensorboard"  # in the run's


def load_summary_writer() -> Callable[..., Any]:
    """``torch.utils.tensorboard.SummaryWriter``.

    Raises:
        MachineError: the package ``tensorboard`` is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        todo = "pip install 'sprat[tensorboard]', or leave it out: metrics.jsonl holds the same"
        raise MachineError("TensorBoard is not installed", where="--tensorboard", todo=todo) from None
    return SummaryWriter


class TensorBoardLog:
    """Writes the numbers of each row under ``train/`` and, of evaluations, ``eval/``.

    Args:
        make_writer: from ``load_summary_writer``.
        run: the run's folder. A session that goes on takes the place of what an earlier one wrote of the same steps.
    """

    def __init__(self, make_writer: Callable[..., Any], run: Path) -> None:
        self.folder = run / FOLDER
        self._make_writer, self._writer = make_writer, None

    def add_row(self, step: int, row: Mapping[str, Any]) -> None:
        """Write ``row``; see ``Run.on_log``."""
        if self._writer is None:
            self._writer = self._make_writer(str(self.folder), purge_step=step)
        writer: Any = self._writer
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                is_score = name.startswith("eval_")
                writer.add_scalar(f"eval/{name[5:]}" if is_score else f"train/{name}", value, step)
        writer.flush()

    def close(self) -> None:
        """End the file; no row may follow."""
        self.folder.mkdir(exist_ok=True)
        if self._writer is not None:
            self._writer.close()
