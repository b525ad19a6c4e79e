"""Every skip is counted, and in CI a skip that nobody expects fails the run: a plugin of pytest.

A test that is skipped by mistake, because a package or a file is no longer there, looks like one that passed. The
summary says how many tests each reason skipped. Where the environment has `CI` set, or with `--strict-skips`, the run
fails if a reason is not in `EXPECTED`, or skips more tests than stands there.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

EXPECTED = {
    "DeepSpeed is not installed: pip install deepspeed": 16,
    "FlexAttention has a backward pass on CUDA alone": 2,
    "Ray is not installed": 11,  # a step of .ci/run has it
    "this transformers cuts a video's patches only where torchvision is": 2,  # before 5.17
    "torchvision is not installed": 7,  # CI runs them by themselves
    "TRL_DDPO_PYTHON names no interpreter with trl<=0.23.1": 2,
    "Qwen's vocabulary is not here: QWEN_VOCABULARY names no wheel of dashscope": 15,  # a step of .ci/run has it
    "this transformers has no Qwen3.5": 1,
    "needs vLLM": 2,
    "no Chromium: apt-get install chromium, or playwright install chromium, or name one in CHROMIUM": 1,
    # Public data, which is not in the repository.
    "GenAI-Bench's votes are not on this machine": 2,
    "HPDv2's gallery is not there": 4,
    "ImageReward's labels are not on this machine": 4,
    "VideoAlign's examples are not on this machine": 1,
    "the HPDv2 gallery is not on this machine": 4,
    "the clips of VideoAlign are not here": 4,
    "no file system may be mounted here": 4,
    "the published votes are not on this machine": 8,
}
"""Reason: how many tests it may skip at the most, in an environment of the README's test command."""


def unexpected(skipped: Counter[str]) -> list[str]:
    """What of these skips, tests by reason, is not as expected: one line each."""
    return [
        f"{count} skipped, and {EXPECTED.get(reason, 0)} expected: {reason}"
        for reason, count in sorted(skipped.items())
        if count > EXPECTED.get(reason, 0)
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail on a skip that tests/skips.py does not expect")


def pytest_sessionfinish(session: pytest.Session) -> None:
    strict = session.config.getoption("--strict-skips") or os.environ.get("CI")
    if strict and session.exitstatus == pytest.ExitCode.OK and unexpected(_skipped(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    skipped = _skipped(config)
    if skipped:
        terminalreporter.section("skipped tests")
    for reason, count in skipped.most_common():
        terminalreporter.write_line(f"{count:4d} {reason}")
    for line in unexpected(skipped):
        terminalreporter.write_line(f"UNEXPECTED: {line}", red=True)


def _skipped(config: pytest.Config) -> Counter[str]:
    """Tests by reason. A worker of pytest-xdist has no terminal, and none to report: the controller has them all."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = [] if reporter is None else reporter.stats.get("skipped", [])
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
