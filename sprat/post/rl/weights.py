"""Versions of the weights: what the trainer publishes after each step, and what a worker takes only if it is whole.

A version is one safetensors file of whatever training moves: all weights, or the adapters alone where the base is
frozen. It is known by its digest, that of the tensors themselves (``train.checkpoint.digest_tensors``), which the
trainer takes from its own memory before it writes. So a worker that has read a file knows by the digest that it has the
trainer's very bits, over whatever disk or network they came, and refuses anything else; nothing of its model has
changed by then. A frozen base is compared by its digest as well: adapters mean nothing over another one.

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
from sprat.formats.safetensors import Shards
from sprat.model import Transformer
from sprat.train.checkpoint import digest_tensors, trained_tensors

WEIGHTS_FOLDER = "weights"  # in the run's checkpoints, with which it goes
CHUNK_BYTES = 1 << 24  # of a file that goes over the wire
_NAME = re.compile(r"version-(\d{8})\.safetensors")


def digest_weights(model: Transformer) -> str:
    """SHA-256 (hex) of all that training moves in ``model``."""
    return digest_tensors(trained_tensors(model))


def weights_file(folder: Path, version: int) -> Path:
    """Where ``version`` lies in ``folder``."""
    return folder / f"version-{version:08d}.safetensors"


def versions(folder: Path) -> list[int]:
    """The versions whose files are in ``folder``, in order."""
    names = (_NAME.fullmatch(name) for name in (os.listdir(folder) if folder.is_dir() else ()))
    return sorted(int(match[1]) for match in names if match)


def save_weights(model: Transformer, folder: Path, version: int) -> str:
    """Write ``version``, whole or not at all; its digest.

    Raises:
        MachineError: the disk is full or closed to us.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in trained_tensors(model).items()}
    path = weights_file(folder, version)
    try:
        with replace_file(path) as temporary:
            save_file(tensors, temporary)
    except SafetensorError as error:
        raise MachineError(f"weights cannot be written: {error}", where=str(path), todo="check the disk") from None
    return digest_tensors(tensors)


def prune_weights(folder: Path, last: int, staleness: int) -> None:
    """Remove the versions that no group in flight can need when ``last`` is the newest."""
    for version in versions(folder):
        if version < last - staleness - 1:
            with suppress(OSError):
                weights_file(folder, version).unlink()


def load_weights(model: Transformer, path: Path, expected_digest: str) -> None:
    """Put the version in the file ``path`` into ``model``, in place.

    Raises:
        CheckpointError: the file is missing or torn. TrustError: it is whole, but not what was published, or of another
            model. Nothing is changed in either case.
    """
    shards = Shards([path])
    tensors = {name: shards.read(name) for name in shards.entries}
    check_weights(model, tensors, expected_digest, str(path))
    own = trained_tensors(model)
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def check_weights(model: Transformer, tensors: Mapping[str, Tensor], expected_digest: str, where: str) -> None:
    """Refuse ``tensors`` that are not those of ``expected_digest``, or not those that training moves in ``model``.

    Raises:
        TrustError: they are not.
    """
    if (actual := digest_tensors(tensors)) != expected_digest:
        what = f"weights have the digest {actual[:12]}, and {expected_digest[:12]} was published"
        raise TrustError(what, where=where, todo="check the disk and the network; the trainer writes them again")
    own = {name: (value.shape, value.dtype) for name, value in trained_tensors(model).items()}
    if own != {name: (value.shape, value.dtype) for name, value in tensors.items()}:
        todo = "give the worker the model that the run was started with"
        raise TrustError("weights of another model", where=where, todo=todo)


def check_base(own: str, expected: str, where: str) -> None:
    """Refuse a frozen base of another digest than the trainer's.

    Raises:
        CheckpointError: it is another one.
    """
    if own != expected:
        todo = "give the worker the model that the run was started with"
        raise CheckpointError("adapters would lie over another base than the trainer's", where=where, todo=todo)


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
