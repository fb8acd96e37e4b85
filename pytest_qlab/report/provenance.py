"""Where the numbers come from, as HTML: inputs, versions, keys, and what was built or reused."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from pytest_qlab.report.describe import flat, work
from pytest_qlab.report.table import ABSENT
from pytest_qlab.results import Results


def generator(results: Results) -> str:
    """The program that wrote the document, with its version."""
    return f"{results.generator} {results.version}".strip()


def render_provenance(results: Results) -> str:
    """A closed element that says everything the document knows of the run's inputs."""
    sections: list[tuple[str, list[tuple[str, str]]]] = [
        ("Model", list(flat(results.model))),
        ("Evaluation", list(flat(results.evaluation))),
        ("Calibration", list(flat(results.calibration))),
        ("Environment", list(flat(results.environment))),
        (
            "Run",
            [
                ("generator", generator(results)),
                ("created", results.created or ABSENT),
                ("work", work(results)),
                ("exit status", str(results.exit_status)),
                ("schema version", str(results.schema_version)),
            ],
        ),
    ]
    facts = "".join(_facts(label, rows) for label, rows in sections if rows)
    rows = "".join(
        f'<tr><th scope="row">{escape(row.id)}</th><td class="text">{escape(row.kernel) or ABSENT}'
        f'</td><td class="text wrap">{_codes(row.keys)}</td>'
        f'<td class="text">{_stages(row.seconds)}</td>'
        f"<td>{sum(results.built.get(key, 0) for key in row.keys.values())}</td></tr>"
        for row in results.candidates
    )
    head = "".join(
        f'<th scope="col"{" class=name" if place < 4 else ""}>{label}</th>'
        for place, label in enumerate(("Candidate", "Kernel", "Keys", "Seconds", "Built"))
    )
    artefacts = (
        '<div class="scroll"><table><caption>Content keys of what was computed or read from the '
        f"store.</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        if rows
        else ""
    )
    return (
        f'<details><summary>Provenance</summary><div class="sheets">{facts}</div>'
        f"{artefacts}</details>"
    )


def _facts(label: str, rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td class="text wrap">{escape(value)}</td></tr>'
        for key, value in rows
    )
    return (
        f'<div class="scroll"><table><caption>{label}</caption><tbody>{body}</tbody></table></div>'
    )


def _codes(keys: dict[str, str]) -> str:
    return "<br>".join(f"{escape(k)}: <code>{escape(v)}</code>" for k, v in keys.items()) or ABSENT


def _stages(seconds: dict[str, float]) -> str:
    return "<br>".join(f"{escape(k)}: {v:.2f}" for k, v in seconds.items()) or ABSENT
