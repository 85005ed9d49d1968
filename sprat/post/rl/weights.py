"""Versions of the weights: what the trainer publishes after each step, and what a worker takes only if it is whole.

A version is one safetensors file of whatever training moves: all weights, or the adapters alone where the base is
frozen. It is known by its digest, that of the tensors themselves (``train.checkpoint.digest_tensors``) and of the
frozen base under them, which the trainer takes from its own memory. So a worker that has read a file knows by the
digest that it samples with the trainer's very bits, over whatever disk or network they came, and refuses anything else;
nothing of its model has changed by then.

Files are written whole or not at all. The last ``staleness + 2`` stay: those that a group in flight may have begun
with, and one more for a worker that is just reading it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sprat.errors import CheckpointError, MachineError, TrustError
from sprat.files.atomic import replace_file
from sprat.files.digest import of_bytes
from sprat.formats.safetensors import Shards
from sprat.model import Transformer
from sprat.train.checkpoint import digest_tensors, frozen_digest, trained_tensors

WEIGHTS_FOLDER = "weights"  # in the run's checkpoints, with which it goes
CHUNK_BYTES = 1 << 24  # of a file that goes over the wire
_NAME = re.compile(r"version-(\d{8})\.safetensors")


class OtherModelError(CheckpointError):
    """Weights are of another model than they are given to."""


class TrainedWeights:
    """What training moves in ``model``, as versions; its frozen part is digested once, here."""

    def __init__(self, model: Transformer) -> None:
        self.model, self._base = model, frozen_digest(model)

    def digest(self) -> str:
        """SHA-256 (hex) of the weights as they are: of what training moves, and of what is frozen, if anything is."""
        return self._digest(trained_tensors(self.model))

    def _digest(self, tensors: Mapping[str, Tensor]) -> str:
        trained = digest_tensors(tensors)
        return of_bytes(f"{self._base} {trained}".encode()) if self._base else trained

    def save(self, folder: Path, version: int) -> str:
        """Write ``version``, whole or not at all; its digest.

        Raises:
            MachineError: the disk is full or closed to us.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in trained_tensors(self.model).items()}
        path = weights_file(folder, version)
        try:
            with replace_file(path) as temporary:
                save_file(tensors, temporary)
        except SafetensorError as error:
            raise MachineError(f"weights cannot be written: {error}", where=str(path), todo="check the disk") from None
        return self._digest(tensors)

    def load(self, path: Path, expected_digest: str) -> None:
        """Take the version in the file ``path``, in place.

        Raises:
            CheckpointError: the file is missing or torn, or (``OtherModelError``) of another model.
            TrustError: it is not what was published, or the frozen part is another one. Nothing is changed, here and
                above.
        """
        shards = Shards([path])
        tensors = {name: shards.read(name) for name in shards.entries}
        own = trained_tensors(self.model)
        expected = {name: (value.shape, value.dtype) for name, value in own.items()}
        todo = "give the worker the model that the run was started with"
        if expected != {name: (value.shape, value.dtype) for name, value in tensors.items()}:
            raise OtherModelError("weights of another model", where=str(path), todo=todo)
        if (actual := self._digest(tensors)) != expected_digest:
            what = f"weights have the digest {actual[:12]}, and {expected_digest[:12]} was published"
            todo = "check disk and network: the trainer writes them again" + (f"; or {todo}" if self._base else "")
            raise TrustError(what, where=str(path), todo=todo)
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(value)


def weights_file(folder: Path, version: int) -> Path:
    """Where ``version`` lies in ``folder``."""
    return folder / f"version-{version:08d}.safetensors"


def versions(folder: Path) -> list[int]:
    """The versions whose files are in ``folder``, in order."""
    names = (_NAME.fullmatch(name) for name in (os.listdir(folder) if folder.is_dir() else ()))
    return sorted(int(match[1]) for match in names if match)


def prune_weights(folder: Path, last: int, staleness: int) -> None:
    """Remove the versions that no group in flight can need when ``last`` is the newest."""
    for version in versions(folder):
        if version < last - staleness - 1:
            with suppress(OSError):
                weights_file(folder, version).unlink()


def read_chunk(folder: Path, version: int, offset: int, size: int = CHUNK_BYTES) -> tuple[bytes, int]:
    """At most ``size`` bytes of the file of ``version``, for a worker that cannot see it; and the file's size.

    Raises:
        CheckpointError: it is not there.
    """
    path = weights_file(folder, version)
    try:
        with open(path, "rb") as stream:
            total = os.fstat(stream.fileno()).st_size
            stream.seek(offset)
            return stream.read(size), total
    except OSError as error:
        what = f"version {version} of the weights cannot be read: {error.strerror or error}"
        raise CheckpointError(what, where=str(path), todo="ask for the newest version") from None
