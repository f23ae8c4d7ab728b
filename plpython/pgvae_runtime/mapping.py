"""One read-only memory map per version: a hundred connections share one copy of the weights.

The map is a file among PostgreSQL's own temporary files: on the server's disk, readable by its account alone, left out
of base backups and removed when the server starts. Its name holds the digest of the weights, so a file can
be outdated but never wrong.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# A backend runs in the data directory. PostgreSQL cleans up in this folder what has this prefix.
_FOLDER = Path("base/pgsql_tmp")
_PREFIX = "pgsql_tmp_pgvae"
_MAGIC = b"pgvae-1\n"
_ALIGNMENT = 64


def file_of(database: int, version_id: int, digest: str) -> Path:
    """Gives the path of a version's map."""
    return _FOLDER / f"{_PREFIX}_{database}_{version_id}_{digest[:32]}"


def read_map(path: Path, digest: str) -> dict[str, Any] | None:
    """Gives the tensors of a map as read-only arrays; None where there is none, or not one that this server wrote."""
    try:
        # A link could lead to a file that somebody else chose.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return None
        if found.st_size < 16:
            return None
        memory = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    return _arrays(memory, digest)


def _arrays(memory: mmap.mmap, digest: str) -> dict[str, Any] | None:
    begin = 16 + int.from_bytes(memory[8:16], "little")
    if memory[:8] != _MAGIC or begin > len(memory):
        return None
    try:
        header = json.loads(memory[16:begin])
    except ValueError:
        return None
    if header["digest"] != digest or header["size"] != len(memory):
        return None
    return {
        name: np.frombuffer(memory, dtype=dtype, count=int(np.prod(shape)), offset=offset).reshape(shape)
        for name, (dtype, shape, offset) in header["tensors"].items()
    }


def write_map(path: Path, digest: str, tensors: Mapping[str, Any]) -> None:
    """Writes the tensors as a map; OSError where the disk does not take it, and then nothing is left of it."""
    header, size = _header(digest, tensors)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            for _, offset, array in _layout(tensors, 16 + len(header)):
                file.write(bytes(offset - file.tell()))
                file.write(array.data)
            file.write(bytes(size - file.tell()))
        # Whoever reads sees the whole file or none.
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_maps(database: int, keep: Collection[int]) -> None:
    """Removes the maps of a database's versions except those to keep; who has one mapped keeps it."""
    for path in _FOLDER.glob(f"{_PREFIX}_{database}_*"):
        version_id = path.name.removeprefix(_PREFIX).split("_")[2]
        if version_id.isdigit() and int(version_id) not in keep:
            path.unlink(missing_ok=True)


def _header(digest: str, tensors: Mapping[str, Any]) -> tuple[bytes, int]:
    # The offsets depend on the header's length, which depends on the offsets: room for the longest is enough.
    room = 256 + 128 * len(tensors)
    layout = _layout(tensors, 16 + room)
    size = max((offset + array.nbytes for _, offset, array in layout), default=16 + room)
    entries = {name: [array.dtype.str, list(array.shape), offset] for name, offset, array in layout}
    header = json.dumps({"digest": digest, "size": size, "tensors": entries}).encode()
    assert len(header) <= room
    return header.ljust(room), size


def _layout(tensors: Mapping[str, Any], begin: int) -> list[tuple[str, int, Any]]:
    placed = []
    for name, tensor in tensors.items():
        begin = -(-begin // _ALIGNMENT) * _ALIGNMENT
        placed.append((name, begin, np.ascontiguousarray(tensor)))
        begin += tensor.nbytes
    return placed
