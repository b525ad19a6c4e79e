"""Every example, as a user runs it: in a process of its own, for a few steps, in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"

SHORT: dict[str, list[str]] = {
    "ddpo.py": ["--epochs", "1", "--prompts", "2", "--images", "4", "--steps", "3"],
    "best_of_n.py": ["--n", "3", "--steps", "2"],
    "video_rerank.py": ["--frames", "2"],
    "flow_grpo_reward.py": ["--steps", "2"],
    "train_on_your_pairs.py": ["--steps", "1"],
}

SAYS = {
    "ddpo.py": "after ddpo/samples/epoch-00001.png",
    "best_of_n.py": "1. seed",
    "video_rerank.py": "1. clips/",
    "flow_grpo_reward.py": "advantage",
    "train_on_your_pairs.py": "people say",
}


@pytest.fixture(params=sorted(path.name for path in EXAMPLES.glob("*.py")))
def example(request) -> str:
    return request.param


def run(example: str, folder: Path, *more: str) -> str:
    """What the example prints; `more` are arguments beside those that make it short."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *SHORT.get(example, ["--steps", "1"]), *more],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_runs(example, tmp_path):
    assert SAYS.get(example, "") in run(example, tmp_path)
    if example == "best_of_n.py":
        assert Image.open(tmp_path / "best-of-n/sheet.png").width > 2 * 192


def test_the_ddpo_example_trains_the_editor(tmp_path):
    assert SAYS["ddpo.py"] in run("ddpo.py", tmp_path, "--edits", "--images", "2")
    assert Image.open(tmp_path / "ddpo/samples/epoch-00001.png").height == 2 * 64, "results below their sources"


def test_example_is_short_and_its_docstring_says_how_to_run_it(example):
    text = (EXAMPLES / example).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert f"python examples/{example}" in text
