from __future__ import annotations

import pytest

from tests.plugin.fakes import QUALITY, add_to_conftest, notes_of

OVERRIDE = """
import pytest

@pytest.fixture(scope="session")
def base_model(base_model):
    return "mine, from " + base_model
"""


def test_nothing_is_loaded_that_nobody_overrides(project: pytest.Pytester) -> None:
    project.makepyfile(QUALITY)
    project.runpytest_subprocess("--qlab-methods=alpha").assert_outcomes(passed=1)
    assert "model loaded" not in notes_of(project)


def test_an_override_in_the_root_conftest_reaches_the_lab(project: pytest.Pytester) -> None:
    add_to_conftest(project, OVERRIDE)
    project.makepyfile(
        """
        def test_q(quantized, qlab, base_model):
            assert qlab.overrides == {"model": "mine, from default model"}
            assert base_model == "mine, from default model"
            assert quantized.lab is qlab
        """
    )
    project.runpytest_subprocess("--qlab-methods=alpha,beta").assert_outcomes(passed=2)
    assert notes_of(project).count("model loaded") == 1


def test_an_override_holds_only_where_it_is_visible(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_top="""
        def test_top(quantized, qlab):
            assert qlab.overrides == {} and quantized.lab is qlab
        """
    )
    sub = project.mkdir("sub")
    (sub / "conftest.py").write_text(OVERRIDE, encoding="utf-8")
    (sub / "test_sub.py").write_text(
        """
def test_sub(quantized, qlab):
    assert qlab.overrides == {"model": "mine, from default model"} and quantized.lab is qlab
""",
        encoding="utf-8",
    )
    project.makepyfile(
        test_module="""
        import pytest

        @pytest.fixture(scope="session")
        def eval_data():
            return "my windows"

        class TestMine:
            @pytest.fixture(scope="session")
            def calibration(self):
                return "my sequences"

            def test_class(self, quantized, qlab):
                assert qlab.overrides == {
                    "evaluation": "my windows", "calibration": "my sequences"
                }

        def test_module(quantized, qlab):
            assert qlab.overrides == {"evaluation": "my windows"} and quantized.lab is qlab
        """
    )
    result = project.runpytest_subprocess("--qlab-methods=alpha,beta", "-v")
    result.assert_outcomes(passed=8)
    result.stdout.fnmatch_lines_random(
        ["*test_module.py::TestMine::test_class[[]alpha-w4]*", "*test_sub[[]beta-w4]*"]
    )


def test_an_override_of_narrower_scope_is_explained(project: pytest.Pytester) -> None:
    add_to_conftest(project, OVERRIDE.replace('scope="session"', 'scope="module"'))
    project.makepyfile(QUALITY)
    result = project.runpytest_subprocess("--qlab-methods=alpha")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*'base_model' is overridden*scope 'module'*scope=\"session\"*"])


def test_an_override_in_a_plugin_of_the_user_is_seen(project: pytest.Pytester) -> None:
    project.makepyfile(mine=OVERRIDE)
    project.makepyfile(
        test_it="""
        def test_q(baseline, qlab):
            assert qlab.overrides == {"model": "mine, from default model"}
        """
    )
    add_to_conftest(project, "pytest_plugins = ['mine']")
    project.syspathinsert()
    result = project.runpytest_subprocess()
    result.assert_outcomes(passed=1)


def test_the_defaults_are_the_labs_own_inputs(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        def test_q(base_model, tokenizer, eval_data, calibration):
            assert base_model == "default model"
            assert tokenizer == "default tokenizer"
            assert eval_data == "default windows"
            assert calibration == "default sequences"
        """
    )
    project.runpytest_subprocess().assert_outcomes(passed=1)
    assert notes_of(project)[-1] == "closed"
