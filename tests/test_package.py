"""The package as a package: what importing it costs, what is installed, and whether its tree tells the truth."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib import resources
from pathlib import Path

import pytest
import yaml

import listener_reward

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
LIGHT = (
    "errors pairs media.images media.storyboards chat trace shaping verdict calibration.fit card ranking conclude "
    "reward evaluate evaluate.protocols evaluate.intervals evaluate.measure evaluate.scores evaluate.leaderboard "
    "report peers"
).split()


HEAVY = {"torch", "transformers", "datasets", "trl", "matplotlib"}


def run_python(code: str, *arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what importing costs


def heavy_after(code: str) -> set[str]:
    """Which of the heavy packages are loaded once `code` has run in a fresh interpreter."""
    return set(run_python(f"{code}\nimport sys\nprint(*({HEAVY} & set(sys.modules)))").split())


@pytest.mark.parametrize("module", ["", *LIGHT, "cli"])
def test_light_modules_load_nothing_heavy(module: str, loaded_by: dict[str, set[str]]):
    assert loaded_by[module] == set()


@pytest.fixture(scope="module")
def loaded_by() -> dict[str, set[str]]:
    """Module to the heavy packages that are loaded after it and those before it, all in one fresh interpreter."""
    modules = ["", *LIGHT, "cli"]
    lines = run_python(
        "import importlib, sys\n"
        f"for module in {modules}:\n"
        "    importlib.import_module('.'.join(['listener_reward', *filter(None, [module])]))\n"
        f"    print(*({HEAVY} & set(sys.modules)))"
    ).splitlines()
    return {module: set(line.split()) for module, line in zip(modules, lines, strict=True)}


def test_help_loads_nothing_heavy():
    code = "import sys\nfrom listener_reward.cli import main\nsys.argv = ['listener-reward', 'train', '-h']\n"
    assert heavy_after(code + "try:\n    main()\nexcept SystemExit:\n    print(end='\\f')").isdisjoint({"torch", "trl"})


def test_the_guard_notices_what_it_guards_against():
    assert heavy_after("import listener_reward, torch") == {"torch"}
    assert {"torch", "transformers"} <= heavy_after("from listener_reward import Judge")


# --- the public names


def test_every_public_name_can_be_imported_and_listed():
    for name in listener_reward.__all__:
        assert getattr(listener_reward, name).__name__ == name
        assert name in dir(listener_reward)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = listener_reward.no_such_name


# --- what is installed


def test_pyproject_names_every_package():
    """An added sub-package works in a checkout and is missing from the wheel, unless it is named by hand."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts).replace("integrations", "listener_reward.integrations")
        for folder in ("listener_reward", "integrations")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == on_disk


def test_installed_files_match_the_checkout():
    try:
        version = importlib.metadata.version("listener-reward")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("listener-reward is not installed")
    assert version == listener_reward.__version__
    installed = {entry.name for entry in resources.files("listener_reward.integrations").iterdir()}
    assert {path.name for path in (ROOT / "integrations").glob("*.py")} <= installed
    assert resources.files("listener_reward").joinpath("py.typed").is_file()


def test_version_is_the_newest_in_the_changelog():
    newest = re.search(r"^## (\S+)", (ROOT / "docs/changelog.md").read_text(encoding="utf-8"), re.M)
    assert newest is not None
    assert newest[1] == listener_reward.__version__


def test_the_citation_is_of_this_version_and_the_readmes_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == listener_reward.__version__
    paper = citation["preferred-citation"]
    authors = re.search(r"author += \{(.*?)\}", README, re.S)
    assert authors is not None
    assert [f"{one['family-names']}, {one['given-names']}" for one in paper["authors"]] == re.split(
        r"\s+and\s+", authors[1]
    )
    assert paper["title"] in README and paper["url"] in README


def test_works_without_torchvision():
    run_python(
        "import sys\n"
        "sys.modules['torchvision'] = None  # what an import of a missing package finds\n"
        "from PIL import Image\n"
        "from listener_reward.tiny.models import build_model, build_processor\n"
        "processor = build_processor()\n"
        "chat = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'which is better ?'}]}]\n"
        "text = processor.apply_chat_template(chat, add_generation_prompt=True)\n"
        "inputs = processor(images=[Image.new('RGB', (64, 64))], text=[text], return_tensors='pt')\n"
        "assert build_model(processor.tokenizer)(**inputs).logits.isfinite().all()\n"
    )


# --- the tree, and YAML that readers copy


def annotated_tree() -> dict[str, str]:
    """Path to comment, of every entry in the contributing guide's annotated tree; a folder's path ends with a slash."""
    match = re.search(r"<!-- tree -->\n```text\n(.*?)```", TREE, re.S)
    assert match is not None
    entries, folders = {}, []
    for line in match[1].splitlines():
        name, _, comment = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        entries["".join(folders)] = comment.strip()
    return entries


def test_tree_names_only_what_exists():
    for path in annotated_tree():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_tree_names_every_file_and_says_what_it_is():
    """A folder listed without its files stands for them; an `__init__.py` needs no line."""
    tree = annotated_tree()
    parents = {f"{Path(path).parent}/" for path in tree}
    for path, comment in tree.items():
        assert comment or path in parents, f"{path} has neither a comment nor files"
    whole = tuple(path for path in tree if path.endswith("/") and path not in parents)
    for folder in ("listener_reward", "integrations", "docs", "tests"):
        for file in (ROOT / folder).rglob("*"):
            path = file.relative_to(ROOT).as_posix()
            if file.suffix in {".py", ".md", ".txt"} and file.name != "__init__.py":
                assert path in tree or path.startswith(whole), f"{path} is not in the tree"


def test_training_examples_have_only_fields_that_exist():
    from trl import ModelConfig

    from listener_reward.cli import train
    from listener_reward.train.config import ListenerGRPOConfig
    from listener_reward.train.run import DataArguments

    known = {field.name for cls in (DataArguments, ListenerGRPOConfig, ModelConfig) for field in fields(cls)}
    for text in (README, inspect.cleandoc(train.__doc__ or "")):
        examples = re.findall(r"^```yaml\n(.*?)^```", text, re.S | re.M)
        assert examples
        for example in map(yaml.safe_load, examples):
            assert example.keys() <= known
