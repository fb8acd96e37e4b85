"""Which model, evaluation and calibration text a test was about, where one run has several.

A conftest in a subdirectory, a module or a class may override the inputs. What was measured on
other inputs than the rest of the run gets rows of its own, so that no row mixes two of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

SEPARATOR = " @ "
PARTS = ("model", "evaluation", "calibration")
Key = tuple[str, ...]


class Subjects:
    """The inputs of every test of a run.

    Args:
        payloads: by node id, what the tests' reports carry.

    Attributes:
        main: the description of what most tests were about.
    """

    def __init__(self, payloads: Mapping[str, Mapping[str, Any]]) -> None:
        self._keys: dict[str, Key] = {}
        described: dict[Key, Mapping[str, Any]] = {}
        for name, payload in payloads.items():
            description = payload.get("description") or {}
            key = tuple(str(description.get(part, {}).get("id", "")) for part in PARTS)
            if any(key):
                self._keys[name] = key
                described[key] = description  # The last says most: sizes are known by then.
        counts = Counter(self._keys.values())
        main = max(counts, key=lambda key: (counts[key], key), default=None)
        self.main: Mapping[str, Any] = {} if main is None else described[main]
        self._labels = {
            key: "" if key == main else self._label(description, key)
            for key, description in described.items()
        }

    def _label(self, description: Mapping[str, Any], key: Key) -> str:
        """What differs from the main subject, by name, and by hash where the names are the same."""
        labels = []
        for part, identity in zip(PARTS, key, strict=True):
            ours, theirs = self.main.get(part, {}), description.get(part, {})
            if ours.get("id") != theirs.get("id"):
                name = str(theirs.get("name", part))
                same = name == str(ours.get("name"))
                labels.append(f"{part} {name} {identity[:6]}" if same else f"{part} {name}")
        return ", ".join(labels)

    def named(self, test: str, candidate: str) -> str:
        """The row of a candidate in a test: its id, and for other inputs than most, which."""
        key = self._keys.get(test)
        label = "" if key is None else self._labels[key]
        return f"{candidate}{SEPARATOR}{label}" if label else candidate
