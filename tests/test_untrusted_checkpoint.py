"""A checkpoint's files are data: nothing in them runs, nothing in them is endless, and no name is a traceback."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from listener_reward.card import Card
from listener_reward.cli import app
from listener_reward.datasets import load_pairs
from listener_reward.errors import InputError
from listener_reward.judge import Judge
from listener_reward.models.hub import resolve
from listener_reward.models.templates import check_template

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded judge without a listener."""
    shutil.copytree(resolve("tiny"), tmp_path / "judge")
    Card.amend(tmp_path / "judge", listener=None, aggregate="mean")
    return tmp_path / "judge"


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def trap(folder, monkeypatch):
    """Code in the folder that leaves a mark where it ran, and a user who agrees to everything."""
    mark = folder.parent / "ran"
    names = ("Config", "Model", "Processor", "Tokenizer", "ImageProcessor", "VideoProcessor")
    code = f"open({str(mark)!r}, 'w').close()\n" + "".join(f"class {name}: pass\n" for name in names)
    (folder / "code.py").write_text(code)
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder.parent / "modules"))
    return mark


AUTO_MAP = {
    "AutoConfig": "code.Config",
    "AutoModelForImageTextToText": "code.Model",
    "AutoProcessor": "code.Processor",
    "AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"],
    "AutoImageProcessor": "code.ImageProcessor",
    "AutoVideoProcessor": "code.VideoProcessor",
}


def test_code_of_a_model_that_is_refused_anyway_does_not_run(folder, trap):
    change(folder / "config.json", model_type="evil", auto_map=AUTO_MAP)
    reason = r"is a 'evil' model, which transformers \S+ does not know; the model's code is in the checkpoint, and code"
    with pytest.raises(InputError, match=reason):
        Judge.from_pretrained(folder)
    assert not trap.exists()


@pytest.mark.parametrize("kind", [{}, {"processor_class": "Evil", "tokenizer_class": "Evil"}])
def test_code_of_a_model_that_is_read_does_not_run(folder, trap, kind):
    for file in folder.glob("*config.json"):
        change(file, auto_map=AUTO_MAP, **kind)
    try:
        assert 0 <= Judge.from_pretrained(folder, think=False).compare("a red circle", *[_red()] * 2).p_first <= 1
    except InputError as error:
        assert kind and str(folder) in str(error)
    assert not trap.exists()


def _red():
    from PIL import Image

    return Image.new("RGB", (32, 32), "red")


def test_every_loader_that_could_run_code_is_told_not_to():
    """Whatever begins with Auto reads `auto_map`."""
    found = []
    for package in ("listener_reward", "integrations"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if node.func.attr != "from_pretrained" or not ast.unparse(node.func).startswith("Auto"):
                    continue
                told = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
                if [isinstance(value, ast.Constant) and value.value is False for value in told] != [True]:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


# ---------------------------------------------------------------- chat templates

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FILLS = "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
POWER = "{{ 'a' * (10 ** 10) }}"
COUNTS = "{% for a in range(10 ** 12) %}{% endfor %}"
WRITES = "{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (COUNTS, "counts further than 100,000"),
        (LOOPS, "more than 5 s"),
        (FILLS, "1,024 MiB"),
        (POWER, "1,024 MiB"),
        (WRITES, "1,048,576 characters"),
    ],
)
def test_a_template_without_an_end_is_one_line(folder, template, says):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=rf"^the checkpoint at .*its chat template .*{says}.* for one question|{says}"):
        Judge.from_pretrained(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message.role }}{% break %}{% endfor %}",
        "{% generation %}{{ messages | tojson(indent=1) }}{% endgeneration %}{{ strftime_now('%Y') }}",
        "{{ raise_exception('the roles have to alternate') }}",
        "{{ broken",
    ],
)
def test_templates_within_bounds_pass_whatever_else_they_are(template):
    check_template(template)


# ---------------------------------------------------------------- names

NAMES = ["a\0b", "x" * 5000, "y/" + "x" * 5000, "x" * 5000 + ".jsonl", "a\0b.jsonl", "hpdv2:" + "x" * 5000]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_checkpoint_is_a_traceback(name):
    with pytest.raises(InputError) as caught:
        Judge.from_pretrained(name)
    assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_data_is_a_traceback(name):
    with pytest.raises(InputError) as caught:
        load_pairs(name)
    assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "--judge", "tiny", "--prompt", "x", "NAME", "NAME"),
        ("eval", "--judge", "NAME", "--data", "tiny:id", "--limit", "2"),
        ("eval", "--judge", "tiny", "--data", "NAME"),
        ("data", "check", "NAME"),
        ("calibrate", "--judge", "NAME", "--data", "tiny:id"),
        ("calibrate", "--judge", "tiny", "--data", "NAME", "--out", "NAME"),
    ],
)
def test_no_name_given_to_a_command_is_a_traceback(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["x" * 5000 if word == "NAME" else word for word in arguments])
    assert result.exit_code == 2, result.exception
    assert result.stderr.splitlines()[-1].startswith("Error: ") and "Traceback" not in result.stderr
