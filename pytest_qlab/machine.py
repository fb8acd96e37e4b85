"""What machine this is, for provenance and for keys of what depends on it; where its store is."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path


def processor_of(device: str) -> str:
    """What runs a model on a device: the processor, and the GPU if it is one, by their names."""
    if device.partition(":")[0] != "cuda":
        return processor_name()
    import torch

    if not torch.cuda.is_available():  # What is asked for is in the store, or nowhere.
        return processor_name()
    return f"{processor_name()}, {torch.cuda.get_device_name(device)}"


def processor_name() -> str:
    """The processor's name, as people know it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_resident_bytes() -> int:
    """The most bytes that this process has had in memory; 0 where the system does not say."""
    try:
        # Linux's ru_maxrss also counts what the parent held when it started this process.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(1024 * int(x.split()[1]) for x in status.splitlines() if "VmHWM" in x)
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def default_store() -> Path:
    """Where artefacts are kept if nobody says otherwise: $QLAB_STORE, or the user's cache."""
    if os.environ.get("QLAB_STORE"):
        return Path(os.environ["QLAB_STORE"]).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "pytest-qlab"


def available_memory() -> int | None:
    """Bytes that this process may still take without being refused or killed; None if unknown.

    The least of what the machine has free, what the control group has left, and what the limits on
    address space and data leave of what the process has.
    """
    found = [_free_memory(), _group_memory(), *_limited_memory()]
    return min((max(0, each) for each in found if each is not None), default=None)


def _free_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _group_memory() -> int | None:
    """What version 2 of control groups leaves; pages of files that can be dropped count as left."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(facts.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


def _limited_memory() -> list[int]:
    """What the soft limits leave of address space and data."""
    try:
        import resource

        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except (ImportError, OSError):
        return []
    page = os.sysconf("SC_PAGE_SIZE")
    limits = ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5]))
    soft = [(resource.getrlimit(which)[0], int(used) * page) for which, used in limits]
    return [limit - used for limit, used in soft if limit != resource.RLIM_INFINITY]
