"""Files out of the page cache, so that reading them is reading the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def drop_from_cache(path: Path) -> None:
    """Ask the system to forget the pages of a file that are in memory; nothing where it cannot.

    Pages that a process has mapped, or that are not written to disk yet, stay; the latter are
    written first.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cached_share(path: Path) -> float | None:
    """Share of a file's pages that are in the page cache; None where the system does not tell."""
    size = path.stat().st_size
    if size == 0:
        return 0.0
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError, TypeError):
        return None
    pages = -(-size // mmap.PAGESIZE)
    seen = (ctypes.c_ubyte * pages)()
    # A private mapping that may be written, because ctypes takes no address of another.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        anchor = ctypes.c_char.from_buffer(view)
        try:
            failed = mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), seen)
        finally:
            del anchor  # An address that is still taken would keep the mapping open.
    return None if failed else sum(1 for page in seen if page & 1) / pages
