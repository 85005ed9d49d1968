"""Blocks that outlive the KV cache, and the process: a bounded folder of files, one for each block.

A file is named after its block's key and holds magic bytes, the SHA-256 of what follows, and the block. It is written
under another name and then renamed, so it is there wholly or not at all; and as disks lie, a file whose checksum does
not hold is a miss and goes. Nothing here may ever fail or delay a request: writing is done by a thread that has a short
queue (what does not fit into the queue is dropped), and a disk that refuses once, because it is full or closed to us,
is not written to again by this process. What is least recently used goes first.

Keys hold the tenant's secret and the digest of the model (see ``prefix``), so a folder may be shared by models.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections import OrderedDict
from pathlib import Path

from sprat.errors import SpratError
from sprat.files import atomic

MAGIC = b"sprat-kv"
HEADER = len(MAGIC) + hashlib.sha256().digest_size
SUFFIX = ".kv"
QUEUE = 32  # blocks that wait to be written at most


class DiskCache:
    """The blocks in ``folder``, of ``max_bytes`` together at most.

    Attributes:
        disabled: the disk refused, and nothing is written any more.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder, self.max_bytes, self.disabled = Path(folder), max_bytes, False
        self._sizes: OrderedDict[bytes, int] = OrderedDict()  # by key, least recently used first
        self._lock = threading.Lock()
        self._queue: queue.Queue[tuple[bytes, bytes]] = queue.Queue(QUEUE)
        self._queued: set[bytes] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._scan()
        except OSError:
            self.disabled = True
        threading.Thread(target=self._write_loop, name="sprat-disk", daemon=True).start()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(self._sizes.values())

    def accepts(self, key: bytes) -> bool:
        """Whether ``write`` would do anything."""
        with self._lock:
            return not self.disabled and key not in self._sizes and key not in self._queued

    def write(self, key: bytes, data: bytes, *, wait: bool = False) -> None:
        """Store ``data``, soon; dropped if much is waiting already, unless ``wait``."""
        with self._lock:
            self._queued.add(key)
        try:
            self._queue.put((key, data), block=wait)
        except queue.Full:
            with self._lock:
                self._queued.discard(key)

    def read(self, key: bytes) -> bytes | None:
        """What was stored under ``key``; None if it is not there or no longer whole."""
        with self._lock:
            if key not in self._sizes:
                return None
            self._sizes.move_to_end(key)
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)  # so that the order survives a restart
        except OSError:
            content = b""
        data = content[HEADER:]
        if content[:HEADER] == MAGIC + hashlib.sha256(data).digest():
            return data
        self._evict(key)
        return None

    def flush(self) -> None:
        """Wait until all that was handed over is written."""
        self._queue.join()

    def _scan(self) -> None:
        """Find what an earlier process left, oldest first, and clear away what it did not finish."""
        existing = []
        for path in self.folder.iterdir():
            if path.suffix == SUFFIX:
                with contextlib.suppress(ValueError):
                    status = path.stat()
                    existing.append((status.st_mtime_ns, bytes.fromhex(path.stem), status.st_size))
            elif path.name.startswith(".") and f"{SUFFIX}.tmp-" in path.name:
                path.unlink(missing_ok=True)
        self._sizes.update((key, size) for _, key, size in sorted(existing))
        self._trim()

    def _write_loop(self) -> None:
        """The writing thread."""
        while True:
            key, data = self._queue.get()
            try:
                if not self.disabled and HEADER + len(data) <= self.max_bytes:
                    self._store(key, MAGIC + hashlib.sha256(data).digest() + data)
            except (OSError, SpratError):
                self.disabled = True
            finally:
                with self._lock:
                    self._queued.discard(key)
                self._queue.task_done()

    def _store(self, key: bytes, content: bytes) -> None:
        """Write one file and make room for it."""
        atomic.write_bytes(self._path(key), content, durable=False)
        with self._lock:
            self._sizes[key] = len(content)
        self._trim()

    def _trim(self) -> None:
        """Remove what was not used for longest until the rest is within the limit."""
        while self.nbytes > self.max_bytes:
            with self._lock:
                key = next(iter(self._sizes))
            self._evict(key)

    def _evict(self, key: bytes) -> None:
        """Forget ``key`` and its file."""
        with self._lock:
            self._sizes.pop(key, None)
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        """The file of ``key``."""
        return self.folder / f"{key.hex()}{SUFFIX}"
