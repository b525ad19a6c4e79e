"""The scripts of tests/benchmarks start: they run for minutes and by hand, so that no other test would notice."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_benchmark_says_how_it_is_run(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the tests have it, for a script sets it where it is not
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code
    said = capsys.readouterr().out
    assert said.startswith("usage: ") and f"python tests/benchmarks/{script.name}" in said
