"""The documentation says what is so: links, options, methods, measures, schema, snippets."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_qlab.methods.configured import Configured
from pytest_qlab.methods.registry import (
    _BUILTIN,
    _PREPROCESSINGS,
    find_method,
    find_preprocessing,
)
from pytest_qlab.options import ACTIONS, OPTIONS, Option
from pytest_qlab.results import Budget, CandidateResult, Change, LayerRow, Measure, Results
from pytest_qlab.specs import DEFAULT_SPECS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINKED = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
RUNS = "<!-- runs -->"
_FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w*)\n(?P<code>.*?)^(?P=fence)$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
# Little enough that a page of snippets runs in seconds.
FEW = (
    "--qlab-max-windows=6",
    "--qlab-calibration-sequences=4",
    "--qlab-threads=1",
    "-q",
    "-p",
    "no:cacheprovider",
)
STOCK_TEST = """
def test_stock(quantized):
    assert quantized.kl.mean < 1
    assert quantized.method.name in quantized.id
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def prose(text: str) -> str:
    return _FENCE.sub("", text)


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every line of every Markdown table."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


# Links


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.+)$", prose(path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_resolve(page: Path) -> None:
    broken = []
    for link in _LINK.finditer(prose(page.read_text(encoding="utf-8"))):
        target, _, anchor = link["target"].partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        found = page if not target else (page.parent / target).resolve()
        # An empty target and a path outside of the repository resolve nowhere on GitHub.
        inside = found.is_relative_to(ROOT) and found.exists()
        if not inside or (anchor and anchor not in anchors(found)):
            broken.append(link["target"])
    assert broken == []


def test_every_page_is_linked_from_the_index() -> None:
    linked = {(DOCS / link["target"].partition("#")[0]).resolve() for link in _links("index.md")}
    assert {page for page in PAGES if page.name != "index.md"} <= linked


def _links(page: str) -> Iterable[re.Match[str]]:
    return _LINK.finditer(read(page))


# Reference


def default_of(option: Option) -> str:
    """An option's default as it would be given on the command line; `none` where it has none."""
    if option.name == "methods":
        return ",".join(DEFAULT_SPECS)
    if option.default is None:
        return "none"
    if isinstance(option.default, bool):
        return str(option.default).lower()
    if isinstance(option.default, tuple):
        return ",".join(option.default) or "none"
    return str(option.default)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_is_documented(option: Option) -> None:
    page = read("reference/options.md")
    (row,) = (row for row in rows(page) if row[0] == f"`{option.flag}`")
    key = "select" if option.key == "methods" else option.key
    assert row[1:3] == ([f"`{option.ini}`", f"`{key}`"] if option.in_files else ["", ""])
    if option.name == "methods":
        assert f"`{default_of(option)}`" in page
    else:
        assert row[4].strip("`") == default_of(option)
    assert all(f"`{choice}`" in row[3] for choice in option.choices)


def test_no_option_is_made_up() -> None:
    known = {option.flag for option in OPTIONS} | set(ACTIONS)
    for page in LINKED:
        # `--qlab-` itself stands for all of them.
        named = set(re.findall(r"--qlab-[a-z][a-z-]*[a-z]", page.read_text(encoding="utf-8")))
        named -= {"--qlab-option"}
        assert named <= known, name_of(page)


@pytest.mark.parametrize("name", sorted([*_BUILTIN, *_PREPROCESSINGS]))
def test_every_method_and_each_of_its_options_is_documented(name: str) -> None:
    page = read("reference/methods.md")
    kind: type[Configured]
    if name in _BUILTIN:
        kind, section = find_method(name), page.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
    else:
        kind, section = find_preprocessing(name), page.split(f"\n### `{name}`\n")[1]
        section = re.split("\n###? ", section)[0]
    documented = {
        row[0].strip("`"): row[2].strip("`")
        for row in rows(section)
        if row[0].startswith("`") and len(row) == 4
    }
    defaults = {
        key: "required" if field.is_required() else str(field.default).lower()
        for key, field in kind.model_fields.items()
    }
    assert documented == defaults


def documented_measures() -> set[str]:
    """Names in the first column of the tables that are headed `measure`."""
    found: set[str] = set()
    inside = False
    for line in read("reference/measures.md").splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.startswith("| measure |"):
            inside = True
        elif inside:
            found.update(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return found


def test_every_measure_is_documented_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_qlab.directions import LATENCY_PHASES
    from pytest_qlab.engines.server import Reply
    from pytest_qlab.measuring import loadtimes
    from pytest_qlab.metrics.latency import PairedLatency, Round
    from pytest_qlab.metrics.serving import Load, ServingRun
    from pytest_qlab.metrics.throughput import GenerationRound, PairedThroughput
    from tests.lab.tiny import tiny_lab

    candidate = tiny_lab(tmp_path).candidate("rtn")
    _ = candidate.kl, candidate.layers, candidate.memory, candidate.size
    measured = set(candidate.fragment().measures) | set(candidate.fidelity.estimates())
    rounds = (Round(baseline=10, candidate=10, cpu=20, wall=20, switches=0),) * 300
    for phase in LATENCY_PHASES:
        measured |= set(PairedLatency(rounds, threads=1, phase=phase).estimates())
    generations = (GenerationRound((10, 10), (10, 10), 20, 20),) * 6
    measured |= set(PairedThroughput(generations, 2, 2).estimates())
    replies = tuple(Reply(n, n, (n + 1.0, n + 2.0), (1, 1)) for n in range(299))
    served, _ = ServingRun(Load(2), 2, replies, 0, 299, "requests").estimates()
    measured |= {name.removesuffix("[2]") for name in served}
    answer = {"load": 1.0, "first": 1.0, "steady": [1.0], "token": 1}
    monkeypatch.setattr(loadtimes, "_loaded", lambda *given: answer)
    monkeypatch.setattr(loadtimes, "make_cold", lambda files: "")
    measured |= set(candidate.load.estimates)
    assert documented_measures() == {*measured, "memory.rss_peak"}


def test_attributes_of_a_candidate_are_there() -> None:
    from pytest_qlab import Candidate

    known = set(dir(Candidate)) | {"id", "method", "lab", "spec"}
    for page in LINKED:
        named = set(re.findall(r"\bquantized\.([a-z]\w*)", page.read_text(encoding="utf-8")))
        assert named <= known, name_of(page)


@pytest.mark.parametrize("model", [Results, CandidateResult, Measure, Budget, Change, LayerRow])
def test_every_field_of_the_results_is_documented(model: type[Results]) -> None:
    page = read("reference/store-and-results.md")
    assert [field for field in model.model_fields if f"`{field}`" not in page] == []


# Architecture


def layers() -> dict[str, int]:
    """The layer of every module and package, from the picture; 0 is the uppermost."""
    picture = snippets(DOCS / "explanation" / "architecture.md")[0].code
    found: dict[str, int] = {}
    layer = -1
    for line in picture.splitlines():
        layer += bool(re.match(r" \w", line))
        found.update(dict.fromkeys(re.findall(r"(\w+)(?:\.py|/)", line), layer))
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Names of the modules imported at run time, inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        yield from imports(node)


def test_imports_go_down_in_the_picture() -> None:
    package, layer = ROOT / "pytest_qlab", layers()
    wrong = []
    for file in package.rglob("*.py"):
        own = file.relative_to(package).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imports(ast.parse(file.read_text(encoding="utf-8"))):
            head, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            upwards = head == "pytest_qlab" and other and layer[own] > layer[other]
            if upwards or (head == "pytest" and layer[own] > 0):
                wrong.append(f"{name_of(file)} imports {name}")
    assert wrong == []


# Snippets


@dataclass(frozen=True)
class Snippet:
    """A fenced block; `file` from its first line if that is a comment with a file's name."""

    page: Path
    language: str
    code: str
    runs: bool

    @property
    def file(self) -> str:
        named = re.match(r"# (\w+\.py)\n", self.code)
        return named[1] if named else ""


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n")[2]
        found.append(Snippet(page, match["language"], match["code"], before == RUNS))
    return found


ALL = [snippet for page in LINKED for snippet in snippets(page)]
RUNNING = [snippet for snippet in ALL if snippet.runs]


def test_snippets_can_be_read() -> None:
    for snippet in ALL:
        if snippet.language == "python":
            compile(textwrap.dedent(snippet.code), name_of(snippet.page), "exec")
        if snippet.language == "toml":
            tomllib.loads(snippet.code)
    assert all(snippet.language == "python" for snippet in RUNNING)


def test_the_page_shows_the_example() -> None:
    example = (ROOT / "examples" / "own_method" / "conftest.py").read_text(encoding="utf-8")
    shown = next(s for s in RUNNING if s.page.name == "own-method.md").code
    assert shown.removeprefix("# conftest.py\n") == example[example.index("from __future__") :]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One store for all snippets, and nothing of the pytest that runs this."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    inherited.pop("QLAB_MACHINE_LOCK", None)
    inherited.pop("GITHUB_STEP_SUMMARY", None)
    inherited.setdefault("QLAB_STORE", str(tmp_path_factory.mktemp("store")))
    return inherited


def run(directory: Path, environment: dict[str, str], *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_pytest(directory: Path, environment: dict[str, str], *arguments: str) -> None:
    run(directory, environment, "-m", "pytest", "--rootdir=.", *FEW, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", sorted({s.page for s in RUNNING if s.file.startswith("test_")}), ids=name_of
)
def test_the_tests_of_a_page_pass(page: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    for snippet in RUNNING:
        if snippet.page == page and snippet.file.startswith("test_"):
            (tmp_path / snippet.file).write_text(snippet.code, encoding="utf-8")
    run_pytest(tmp_path, environment, "--qlab-methods=rtn")


@pytest.mark.slow
@pytest.mark.parametrize(
    "snippet",
    [s for s in RUNNING if s.file == "conftest.py"],
    ids=lambda snippet: snippet.page.stem,
)
def test_a_conftest_works(snippet: Snippet, tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "conftest.py").write_text(snippet.code, encoding="utf-8")
    (tmp_path / "test_stock.py").write_text(STOCK_TEST, encoding="utf-8")
    own = re.search(r'name: ClassVar\[str\] = "(\w+)"', snippet.code)
    run_pytest(tmp_path, environment, f"--qlab-methods={own[1] if own else 'rtn'}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "snippet", [s for s in RUNNING if not s.file], ids=lambda snippet: snippet.page.stem
)
def test_a_script_runs(snippet: Snippet, tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "script.py").write_text(snippet.code, encoding="utf-8")
    run(tmp_path, environment, "script.py")


@pytest.mark.slow
def test_the_example_of_an_own_method_passes(environment: dict[str, str]) -> None:
    run_pytest(ROOT, environment, "examples/own_method", "--qlab-methods=clip_rtn")
