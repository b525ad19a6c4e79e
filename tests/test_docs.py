"""The README and docs/: their Python runs, their links lead somewhere, and docstrings name arguments that exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}

NOT_RUN = {"docs/ddpo.md": 1, "docs/edits.md": 1}
"""How many blocks of a page are not run. Each says why, right before it: `<!-- not run: reason -->`."""

needs_tiny = pytest.mark.skipif(
    not (ROOT / "listener_reward/tiny/weights/judge/model.safetensors").exists(),
    reason="the embedded judge has not been made: python -m listener_reward.recipes.pretrain",
)


# --- Python blocks


@dataclass(frozen=True)
class Block:
    code: str
    line: int
    """Of the page, where the code begins; counted from 1."""
    reason: str | None
    """Why it is not run; None if it is."""


def python_blocks(text: str) -> list[Block]:
    found = re.finditer(r"^(?:<!-- not run: (.+?) -->\n\s*)?^```(?:python|py)\b[^\n]*\n(.*?)^```", text, re.S | re.M)
    return [Block(match[2], text.count("\n", 0, match.start(2)) + 1, match[1]) for match in found]


def program(text: str) -> str:
    """What is run of a page: a later block may use what an earlier one made. Lines have the page's numbers."""
    lines: list[str] = []
    for block in python_blocks(text):
        if block.reason is None:
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines)


BLOCKS = {name: python_blocks(path.read_text(encoding="utf-8")) for name, path in PAGES.items()}
RUN = [name for name, blocks in BLOCKS.items() if any(block.reason is None for block in blocks)]


def test_blocks_are_found_with_their_marks_and_lines():
    text = (
        "a\n\n```python\nx = 1\n```\n\n<!-- not run: a GPU -->\n\n```py\ny\n```\n\n<!-- a note -->\n```python\nz\n```\n"
    )
    assert python_blocks(text) == [Block("x = 1\n", 4, None), Block("y\n", 10, "a GPU"), Block("z\n", 15, None)]
    assert program(text).splitlines()[3::11] == ["x = 1", "z"]


def test_only_the_expected_blocks_are_not_run():
    counts = {name: sum(block.reason is not None for block in blocks) for name, blocks in BLOCKS.items()}
    assert {name: count for name, count in counts.items() if count} == NOT_RUN
    assert {"README.md", "docs/judging.md", "docs/integrations.md"} <= set(RUN)


def test_every_block_compiles():
    for name, blocks in BLOCKS.items():
        for block in blocks:
            compile(block.code, f"{name}:{block.line}", "exec")


@needs_tiny
def test_readme_python_runs_in_a_process_of_its_own(tmp_path: Path):
    code = f"import sys\nsys.path.insert(0, sys.argv[1])\n{program(PAGES['README.md'].read_text(encoding='utf-8'))}"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.png").exists()


@needs_tiny
@pytest.mark.parametrize("name", [name for name in RUN if name != "README.md"])
def test_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(program(PAGES[name].read_text(encoding="utf-8")), PAGES[name], "exec"), {"__name__": "__main__"})


# --- links


def test_links_lead_to_files():
    for name, path in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert path.parent.joinpath(target).exists(), f"{name} links to {target}"


def test_documents_hold_no_placeholders():
    for name, path in PAGES.items():
        assert "TODO" not in path.read_text(encoding="utf-8"), f"{name} is not finished"


@pytest.fixture(scope="module")
def links() -> ModuleType:
    """The site's hook, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("site_links", ROOT / "docs/site/links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("place", "link", "on_the_site"),
    [
        ("start.md", "docs/ddpo.md", "ddpo.md"),
        ("start.md", "docs/ddpo-curve.svg", "ddpo-curve.svg"),
        ("start.md", "LICENSE", "source/LICENSE.md"),
        ("ddpo.md", "../README.md", "start.md"),
        ("ddpo.md", "../examples/ddpo.py", "source/examples/ddpo.py.md"),
        ("api/judging.md", "../judging.md", "../judging.md"),
        ("api/judging.md", "../../examples", "../source/examples.md"),
        ("ddpo.md", "no-such-page.md", "no-such-page.md"),
        ("ddpo.md", "../../outside.md", "../../outside.md"),
    ],
)
def test_a_link_is_led_to_its_page_on_the_site(links, place: str, link: str, on_the_site: str):
    assert links.relink(f"[x]({link}#part)", place) == f"[x]({on_the_site}#part)"
    assert links.relink(f'<img alt="x" src="{link}">', place) == f'<img alt="x" src="{on_the_site}">'


def test_other_links_and_code_stay(links):
    text = "[a](https://x.org) [b](#part)\n\n```python\nf[0](../README.md)\n```\n"
    assert links.relink(text, "ddpo.md") == text


def test_the_site_shows_the_files_that_pages_link_to(links):
    assert links.outside("[a](../examples) [b](../README.md) [c](log.md) [d](../LICENSE)", "ddpo.md") == {
        "examples",
        "LICENSE",
    }
    assert "](examples/ddpo.py.md)" in links.source_page("examples")
    assert "DDPOTrainer(" in links.source_page("examples/ddpo.py")


# --- docstrings


def documented(docstring: str) -> set[str]:
    """Names under "Args:"; a line may describe several, "first, second: ..."."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", docstring + "\n", re.M)
    lines = re.findall(r"^    (\S[^:\n]*):", section[1], re.M) if section else []
    return {name.strip().lstrip("*") for line in lines for name in line.split(",")}


def functions() -> Iterator[tuple[str, set[str], str]]:
    """Where each function or class is, what it takes, and its docstring."""
    for folder in ("listener_reward", "integrations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", taken(node), ast.get_docstring(node) or ""


def taken(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    """Names of arguments; those of a class are its constructor's, and a dataclass's fields."""
    if isinstance(node, ast.ClassDef):
        fields = {
            part.target.id
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        }
        made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        return fields.union(*map(taken, made))
    listed = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    return {argument.arg for argument in listed if argument is not None}


def test_docstrings_describe_arguments_that_exist():
    assert documented(
        "Does it.\n\nArgs:\n    first, second: images,\n        or: not a name\n    *rest: more\n\nRaises:\n    E: x"
    ) == {
        "first",
        "second",
        "rest",
    }
    count = 0
    for place, names, docstring in functions():
        assert documented(docstring) <= names, f"{place} describes {documented(docstring) - names}"
        count += bool(documented(docstring))
    assert count > 30
