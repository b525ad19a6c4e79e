"""A checkpoint's chat template is a program; here it is run once where it can do no harm, before it is run for real.

transformers renders templates in a sandbox, out of which they cannot reach. But a loop in a sandbox loops, and a text
that doubles fills the memory.
"""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys

SECONDS = 5
MEMORY = 2**30
CHARACTERS = 2**20
"""What the rendering of one question may take: seconds of a core, bytes, and characters of its result."""

LONGEST_RANGE = 100_000
"""jinja2's bound of a `range` in a sandbox; beyond it is an `OverflowError`."""

_STARTING = 25
"""Seconds of the clock beyond which a process that has not ended is stuck, on a busy machine as well."""

_PROBE = """
import json, sys
template, messages, seconds, memory, characters = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except (ImportError, OSError, ValueError):
    pass  # not on this system: the clock is left
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def refuse(message):
    raise TemplateError(message)

try:
    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda _: "today"}
    length = 0
    for part in environment.from_string(template).generate(messages=messages, add_generation_prompt=True):
        length += len(part)
        if length > characters:
            sys.exit(3)
except MemoryError:
    sys.exit(4)
except OverflowError:
    sys.exit(5)
except Exception:
    pass  # what else is wrong with it is told when it is rendered for real
"""


@functools.lru_cache(maxsize=32)
def check_template(template: str) -> None:
    """Renders one question by `template` in a process of its own, within bounds of time and memory.

    Raises:
        ValueError: it takes more than `SECONDS`, `MEMORY` or `CHARACTERS`.
    """
    text = [{"type": "image"}, {"type": "text", "text": "which of the two is better? " * 40}]
    messages = [{"role": "system", "content": text[1:]}, {"role": "user", "content": text}]
    asked = json.dumps([template, messages, SECONDS, MEMORY, CHARACTERS])
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-c", _PROBE],
            input=asked,
            capture_output=True,
            text=True,
            timeout=_STARTING,
            check=False,
        )
    except subprocess.TimeoutExpired:
        code = -signal.SIGTERM
    except OSError:  # no process can be started here
        return
    else:
        code = ended.returncode
    if code == 5:
        raise ValueError(f"its chat template counts further than {LONGEST_RANGE:,}, which the sandbox forbids")
    if code == 3:
        raise ValueError(f"its chat template makes more than {CHARACTERS:,} characters of one question")
    if code == 4:
        raise ValueError(f"its chat template takes more than {MEMORY // 2**20:,} MiB for one question")
    if code < 0:  # stopped by a signal
        raise ValueError(f"its chat template takes more than {SECONDS} s for one question")
