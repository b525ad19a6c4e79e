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


def test_example_runs(example, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *SHORT.get(example, ["--steps", "1"])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert SAYS.get(example, "") in done.stdout
    if example == "best_of_n.py":
        assert Image.open(tmp_path / "best-of-n/sheet.png").width > 2 * 192


def test_example_is_short_and_its_docstring_says_how_to_run_it(example):
    text = (EXAMPLES / example).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert f"python examples/{example}" in text
