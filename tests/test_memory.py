"""What ranking many large pictures takes beyond the pictures and the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("memory_of_ranking.py")


def test_ranking_64_large_pictures_copies_none_of_them():
    """A copy of each would be 256 MiB, and one for each pair and order 15 GiB."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["comparisons"] == 64 * 63 // 2 and found["decoded"] == 64 * 4 * 1024**2
    assert found["bytes"] < 0.1e9
