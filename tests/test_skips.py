"""The plugin that counts skips, run on a few tests of its own."""

from __future__ import annotations

import pytest
import skips

SKIPPED = """
import pytest

@pytest.mark.parametrize("number", range(3))
@pytest.mark.skip(reason="no such package")
def test_skipped(number):
    pass

def test_passed():
    pass
"""


@pytest.fixture
def outcome(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """`outcome(*arguments)` is the run of four tests, three of which are skipped for one reason."""
    monkeypatch.delenv("CI", raising=False)
    pytester.makepyfile(SKIPPED)
    pytester.makeini("[pytest]")
    return lambda *arguments: pytester.runpytest_inprocess("-p", "skips", "-p", "no:cacheprovider", *arguments)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unexpected_skip_fails_where_skips_are_strict(outcome, workers):
    done = outcome("--strict-skips", "-n", workers)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["   3 no such package", "UNEXPECTED: 3 skipped, and 0 expected: no such package"])


def test_an_unexpected_skip_fails_in_ci_and_is_told_elsewhere(outcome, monkeypatch):
    done = outcome()
    assert done.ret == 0
    done.stdout.fnmatch_lines(["UNEXPECTED: *"])
    monkeypatch.setenv("CI", "true")
    assert outcome().ret == pytest.ExitCode.TESTS_FAILED


def test_more_skips_than_expected_are_unexpected(outcome, monkeypatch):
    monkeypatch.setitem(skips.EXPECTED, "no such package", 3)
    done = outcome("--strict-skips")
    assert done.ret == 0
    done.stdout.fnmatch_lines(["   3 no such package"])
    done.stdout.no_fnmatch_line("UNEXPECTED*")
    monkeypatch.setitem(skips.EXPECTED, "no such package", 2)
    assert outcome("--strict-skips").ret == pytest.ExitCode.TESTS_FAILED


def test_without_skips_nothing_is_said(outcome):
    done = outcome("--strict-skips", "-k", "passed")
    assert done.ret == 0
    done.stdout.no_fnmatch_line("*skipped tests*")
