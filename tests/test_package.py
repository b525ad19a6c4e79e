"""The package as a package: what importing it costs, what is installed, and whether its tree tells the truth."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

import listener_reward
from listener_reward.errors import EXTRAS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
LIGHT = (
    "errors pairs media.images media.storyboards chat trace shaping verdict calibration.fit card ranking conclude "
    "batching reward remote evaluate evaluate.protocols evaluate.intervals evaluate.judged evaluate.scores "
    "evaluate.leaderboard report peers"
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


# --- what runs without an extra

ABSENT = sorted({*sum(EXTRAS.values(), ()), *"huggingface_hub pyarrow pandas yaml tqdm av matplotlib requests".split()})
"""What `pip install listener-reward` does not bring, and a trainer's environment may lack."""

WITHOUT = """
import sys

absent = sys.argv[1:]

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *where):
        return None if name in absent else self.finder.find_spec(name, *where)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
"""In front of a script: the packages that are its arguments are not found, as if they were not installed."""

NEEDS = {
    "data": "datasets scoring",
    "judge": "bench formats judge listener models.auto_processing models.backends models.bradley_terry "
    "models.endpoint_vlm "
    "models.families models.head models.memory models.older_transformers models.placement models.plain "
    "models.processing models.transformers_vlm models.turns models.video_processing models.vision "
    "models.vlm peers.scorers plan prefix tiny.models",
    "openai": "models.openai_client peers.endpoint",
    "vllm": "models.vllm_vlm",
    "train": "recipes train",
    "diffusers": "integrations.ddpo tiny.diffusion tiny.editing tiny.generated",
    "serve": "integrations.serving.app integrations.serving.auth integrations.serving.metrics "
    "integrations.serving.protocol integrations.serving.replies integrations.serving.schemas "
    "integrations.serving.server integrations.serving.service",
    "plot": "evaluate.plotting",
}
"""The modules that need an extra, a folder for all of its own; every other one can be imported without any."""


def test_a_module_can_be_imported_without_an_extra_or_says_which_one_it_needs():
    script = """
import importlib, json, pkgutil
from listener_reward.errors import MissingExtraError

found = {}
for folder in ("listener_reward", "listener_reward.integrations"):  # which an editable installation keeps elsewhere
    path = importlib.import_module(folder).__path__
    for module in pkgutil.walk_packages(path, folder + ".", onerror=lambda name: None):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except MissingExtraError as error:
                found[module.name.removeprefix("listener_reward.")] = str(error)
print(json.dumps(found))
"""
    found = json.loads(run_python(WITHOUT + script, *ABSENT))
    assert "Flow-Factory's classes" in found.pop("integrations.flow_factory")  # which a host brings, and no extra
    assert found.keys() == set(" ".join(NEEDS.values()).split())
    for extra, modules in NEEDS.items():
        for module in modules.split():
            assert found[module].endswith(f': pip install "listener-reward[{extra}]"'), module
            assert "\n" not in found[module]


def test_the_client_and_the_adapters_by_url_need_no_extra():
    script = """
import listener_reward
from listener_reward.integrations.contract import as_reward

assert listener_reward.RemoteReward is type(as_reward("http://127.0.0.1:1", {}, scheme="group"))
for name in listener_reward.__all__:
    try:
        getattr(listener_reward, name)
    except ImportError as error:
        print(name, error)
"""
    needs = run_python(WITHOUT + script, *ABSENT).splitlines()
    assert needs == ['Judge a judge in this process needs torch: pip install "listener-reward[judge]"']


COMMANDS = {
    "compare --judge tiny -p fox a.png b.png": "judge",
    "rank --judge tiny -p fox a.png b.png": "judge",
    "rank-videos --judge tiny -p fox a.gif b.gif": "judge",
    "card tiny": "judge",
    "serve --judge tiny": "serve",
    "bench rank": "judge",
    "anchors --judge tiny --pipeline tiny --prompts README.md --out anchors": "diffusers",
    "eval --judge tiny --data tiny:id": "data",
    "calibrate --judge tiny --data tiny:id": "data",
    "data check pairs.jsonl": "data",
    "demo": "train",
    "bench grpo": "train",
    "study --config study.yaml": "train",
    "train --config train.yaml": "train",
    "plan --config train.yaml": "train",
    "plan eval --judge tiny --data tiny:id": "judge",
    "launch-config ddp": None,
    "train -h": None,
}
"""Commands and the extra that each misses first."""


def test_a_command_without_its_extra_is_one_line_and_exit_code_two():
    script = """
import contextlib, io, json
from listener_reward.cli import main

def run(command):
    sys.argv, out, code = ["listener-reward", *command.split()], io.StringIO(), 0
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
    return code, out.getvalue()

print(json.dumps({command: run(command) for command in json.loads(sys.argv[-1])}))
"""
    ended: dict[str, Any] = json.loads(run_python(WITHOUT + script, *ABSENT, json.dumps([*COMMANDS])))
    for command, extra in COMMANDS.items():
        code, said = ended[command]
        assert code == (2 if extra else 0), command
        assert len(said.splitlines()) == (1 if extra else 0), command
        assert extra is None or said.endswith(f'pip install "listener-reward[{extra}]"\n'), command


def test_a_judge_is_planned_without_trl():
    script = """
from listener_reward.cli import main

sys.argv = "listener-reward plan eval --judge tiny --image-size 64x64".split()
main()
"""
    assert "tokens of a pair" in run_python(WITHOUT + script, "trl")


def test_the_extras_that_are_asked_for_bring_what_is_missed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]

    def brought(requirements: list[str]) -> set[str]:
        names: set[str] = set()
        for requirement in requirements:
            own = re.fullmatch(r"listener-reward\[(.+)\]", requirement)
            names |= (
                set().union(*(brought(extras[extra]) for extra in own[1].split(",")))
                if own
                else set(re.findall(r"^[\w-]+", requirement))
            )
        return names

    for extra, packages in EXTRAS.items():
        assert set(packages) <= brought(extras[extra]), extra
    assert brought(extras["judge"]) <= brought(extras["train"]) & brought(extras["diffusers"]) & brought(
        extras["serve"]
    )
    assert brought(project["dependencies"]).isdisjoint(ABSENT)


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


def test_embedded_weights_are_installed():
    """How large they may be is a test of `test_tiny_edits.py`."""
    folder = ROOT / "listener_reward/tiny/weights"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.parent.relative_to(folder).parts[0] for path in files if path.parent != folder} >= {
        *("base", "listener", "judge", "edit-base", "edit-listener", "diffusion", "editor")
    }
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    matched = {path for pattern in data["listener_reward.tiny"] for path in folder.parent.glob(pattern)}
    assert matched >= {*files}


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
