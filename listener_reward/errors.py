"""What can go wrong, by whose fault: the caller's input, the judge, or a missing optional install."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "data": ("datasets",),
    "judge": ("torch", "transformers", "tokenizers", "safetensors"),
    "openai": ("httpx",),
    "vllm": ("torch", "transformers", "vllm"),
    "train": ("torch", "transformers", "datasets", "trl", "peft", "accelerate"),
    "ray": ("ray",),
    "diffusers": ("torch", "transformers", "diffusers", "peft", "accelerate"),
    "large": ("accelerate", "bitsandbytes"),
    "plot": ("matplotlib",),
    "serve": ("torch", "transformers", "fastapi", "uvicorn", "prometheus_client"),
}
"""What has to be importable for each extra, in the order in which a missing package is named."""


class InputError(ValueError):
    """What the caller gave cannot be used. The message names the field, the value and the fix."""


class JudgeError(RuntimeError):
    """A judge or a listener broke. It is raised, or masked by a named policy; it never becomes a score."""


class UnreachableError(JudgeError):
    """No server takes a connection at a judge's address, after several tries. Whatever else is asked of it now fails
    too: a batch is given up whole, and not asked about pair by pair."""


class FormatError(JudgeError):
    """A strict judge's answers are not in its format, so that none of its verdicts would mean anything; see
    `misfits`. No policy masks it."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed. The message holds the pip line that installs it."""


def check_choice(field: str, value: object, allowed: Collection[object]) -> None:
    """Refuses a value that is none of those allowed.

    Raises:
        InputError: names the field, the value and the choices.
    """
    if value not in allowed:
        raise InputError(f"{field} is {value!r}; choose one of {', '.join(map(repr, allowed))}")


def meant(name: object, known: Iterable[str]) -> str:
    """The end of an error about a name that is not known: `; is 'x' meant?` of the nearest one, or nothing."""
    near = get_close_matches(str(name), known, 1)
    return f"; is {near[0]!r} meant?" if near else ""


def missing(extra: str, what: str, *packages: str) -> MissingExtraError | None:
    """The error that `what` cannot be had, in one line, where a package of `extra` is not installed; else None.

    `packages` are those of the extra that `what` needs; without any it needs all. A module raises the error before it
    imports those packages. One that is installed and broken still shows its own error.
    """
    for package in packages or EXTRAS[extra]:
        if find_spec(package) is None:
            return MissingExtraError(f'{what} needs {package}: pip install "listener-reward[{extra}]"')
    return None


class UnknownWordsWarning(UserWarning):
    """A judge's tokenizer does not know words of a prompt, and the judge reads a placeholder in their place."""


class FormatWarning(UserWarning):
    """A model's answers are not in the format that they are read by; see `misfits`."""
