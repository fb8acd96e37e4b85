"""What machine this is, for provenance and for keys of what depends on it; where its store is."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path


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
