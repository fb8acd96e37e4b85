"""One line, and all lines, of what was measured on what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pytest_qlab.results import CandidateResult, Results


def subject(results: Results) -> list[tuple[str, str]]:
    """Label and text of the model, evaluation set, calibration set and machine, as far as known."""
    parts = [
        ("Model", _joined(results.model, ("parameters", "dtype", "device"))),
        ("Evaluation", _joined(results.evaluation, ("documents", "windows", "tokens"))),
        ("Calibration", _joined(results.calibration, ("documents", "sequences", "tokens"))),
        ("Machine", machine(results.environment)),
    ]
    return [(label, text) for label, text in parts if text]


def _joined(facts: Mapping[str, Any], counted: tuple[str, ...]) -> str:
    name = facts.get("name") or facts.get("id") or ""
    texts = [", ".join(map(str, name)) if isinstance(name, list | tuple) else str(name)]
    for key in counted:
        value = facts.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            texts.append(f"{value:,} {key}")
        elif isinstance(value, list | tuple | dict):
            texts.append(f"{len(value):,} {key}")
        elif value:
            texts.append(str(value))
    convention = facts.get("convention")
    if convention:
        texts.append(f"convention {convention}")
    return ", ".join(text for text in texts if text)


def machine(environment: Mapping[str, Any]) -> str:
    """The processor or device, its cores and the versions that matter most."""
    texts = []
    for key in ("gpu", "cpu", "processor", "machine"):
        value = environment.get(key)
        if value and isinstance(value, str):
            texts.append(value)
            break
    for key in ("cores", "cpus", "cpu_count"):
        if isinstance(environment.get(key), int):
            texts.append(f"{environment[key]} cores")
            break
    versions = environment.get("versions")
    known = versions if isinstance(versions, Mapping) else environment
    texts += [f"{key} {known[key]}" for key in ("python", "torch") if known.get(key)]
    return ", ".join(texts)


def noise_floor(results: Results) -> str:
    """What the base model gets against itself, or that it is not known; empty without any KL."""
    floor = results.evaluation.get("noise_floor")
    if not isinstance(floor, Mapping):
        return ""
    if not floor.get("path"):
        return "noise floor of KL: not known, the base model runs in one way only"
    return (
        f"noise floor of KL: {floor['mean']:.2g} nats ({floor['path']}, {floor['windows']} windows)"
    )


def additivity(candidate: CandidateResult) -> str:
    """How far the KL of single layers add up, where that was measured."""
    found = candidate.additivity
    if found is None:
        return ""
    share = f", {found.sum / found.total:.0%}" if found.total else ""
    return (
        f"{candidate.id}: all parts by themselves add up to {found.sum:.3g} nats, together they "
        f"cause {found.total:.3g}{share} ({found.tokens:,} tokens of {found.windows} windows)"
    )


def work(results: Results) -> str:
    """How much was computed and how much came from the store."""
    built = sum(results.built.values())
    text = f"{built} artefact{'' if built == 1 else 's'} built, {results.reused} reused"
    text += f", {results.forwards} forward pass{'' if results.forwards == 1 else 'es'}"
    return f"{text}, {results.seconds:.1f} s" if results.seconds else text


def outcome(results: Results) -> str:
    """The tests' outcomes as `3 passed, 1 failed`."""
    order = ("failed", "error", "errors", "passed", "skipped")
    keys = [*(k for k in order if k in results.summary), *(set(results.summary) - set(order))]
    return ", ".join(f"{results.summary[k]} {k}" for k in keys if results.summary[k])


def flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and texts of a nested dictionary."""
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(str, value))
        else:
            yield name, str(value)
