"""What is written in a file's place: whole, by whoever writes, however the writing ends."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from listener_reward.card import CARD, Card
from listener_reward.cli import app
from listener_reward.files import disk_error, folder_made_whole, replace_file, write_bytes, write_text
from listener_reward.report import write_report

ROOT = Path(__file__).parents[1]


def test_a_file_is_written_and_written_again(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one\n\N{SNOWMAN}")
    assert path.read_bytes() == b"one\n\xe2\x98\x83"
    write_bytes(str(path), b"two\r\n")
    assert path.read_bytes() == b"two\r\n" and os.listdir(tmp_path) == ["a.txt"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half(beside: Path) -> None:
        beside.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name == "nt", reason="links and access rights of POSIX")
def test_links_and_access_rights_stay(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link.txt"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to("a.txt")
    write_text(link, "new")
    assert link.is_symlink() and path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "b.txt", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "b.txt").stat().st_mode & 0o777 == 0o640
    write_text("/dev/null", "x")
    assert not Path("/dev/null").is_file()


def test_concurrent_writers_each_leave_a_whole_file(tmp_path):
    path, wrong = tmp_path / "a.json", []
    write_text(path, json.dumps([0] * 10_000))
    stop = threading.Event()

    def writes(number: int) -> None:
        for _ in range(20):
            write_text(path, json.dumps([number] * 10_000))

    def reads() -> None:
        while not stop.is_set():
            found = json.loads(path.read_text())
            if len(found) != 10_000 or len(set(found)) != 1:
                wrong.append(found)

    reader = threading.Thread(target=reads)
    writers = [threading.Thread(target=writes, args=(number,)) for number in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not wrong and os.listdir(tmp_path) == ["a.json"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
{imports}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))  # a disk that is full after so many bytes
try:
    {write}
except OSError as error:
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
@pytest.mark.parametrize("what", ["card", "report"])
def test_on_a_full_disk_the_old_file_stays(tmp_path, what):
    if what == "card":
        Card().save(tmp_path)
        name, imports, write = (
            CARD,
            "from listener_reward.card import Card",
            f"Card(thoughts=3).save({str(tmp_path)!r})",
        )
    else:
        name, imports = "a.html", "from listener_reward.report import write_report"
        write_report(tmp_path / name, {"title": "old"})
        write = f"write_report(Path({str(tmp_path / name)!r}), {{'title': 'new'}})"
    before = (tmp_path / name).read_bytes()
    assert len(before) > 512
    ended = subprocess.run([sys.executable, "-c", FULL_DISK.format(imports=imports, write=write)], check=False)
    assert ended.returncode == 7
    assert (tmp_path / name).read_bytes() == before and os.listdir(tmp_path) == [name]


def test_a_full_disk_is_known_whoever_says_so(small_disk):
    """safetensors, PyTorch, `shutil` and Python each say it in another way."""
    place, zeros = small_disk("1m"), torch.zeros(2**19)  # 2 MiB
    large = place.parent / "large"
    large.mkdir()
    (large / "a").write_bytes(bytes(2**21))
    writes = [
        lambda: save_file({"a": zeros}, place / "a.safetensors"),
        lambda: torch.save(zeros, place / "a.pt"),
        lambda: torch.save([torch.zeros(1000)] * 3 + [torch.ones(k) for k in range(900)], place / "b.pt"),
        lambda: shutil.copytree(large, place / "copy"),
        lambda: (place / "a.bin").write_bytes(bytes(2**21)),
    ]
    for number, write in enumerate(writes):
        with pytest.raises(Exception) as raised:
            write()
        assert disk_error(raised.value) == errno.ENOSPC, (number, raised.value)
        for path in place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError) as raised:
        try:
            writes[0]()
        except Exception as error:
            raise ValueError("no checkpoint") from error
    assert disk_error(raised.value) == errno.ENOSPC
    for error in (ValueError("28"), RuntimeError("shapes"), OSError(errno.ENOENT, "no such file"), None):
        assert disk_error(error) is None


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    place = tmp_path / "new" / "judge"
    for text in ("one", "two"):
        with pytest.raises(KeyboardInterrupt), folder_made_whole(place) as beside:
            (beside / "a").write_text("half")
            raise KeyboardInterrupt
        assert place.exists() == (text == "two")
        with folder_made_whole(place) as beside:
            (beside / "a").write_text(text)
            (beside / text).mkdir()
        assert (place / "a").read_text() == text and os.listdir(place.parent) == ["judge"]
    assert sorted(os.listdir(place)) == ["a", "one", "two"]


def test_a_calibration_that_the_disk_has_no_room_for_is_one_line(small_disk):
    place = small_disk("1m")
    line = ["calibrate", "--judge", "tiny", "--no-think", "--data", "tiny:id", "--limit", "60"]
    done = CliRunner().invoke(app, [*line, "--out", str(place / "judge")])
    assert done.exit_code == 2, done.stderr
    told = f"Error: {place / 'judge'} cannot be written (No space left on device); make room"
    assert done.stderr.splitlines()[-1].startswith(told)
    assert os.listdir(place) == []


IN_PLACE = {"write_text", "write_bytes"}


def test_nothing_else_writes_in_place():
    """A method `write_text` or `write_bytes` of a path is a file that a kill would cut; `files` has the functions."""
    found = []
    for folder in ("listener_reward", "integrations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name == "listener_reward/files.py":
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            inside = {id(node) for call in ast.walk(tree) if _replaces(call) for node in ast.walk(call)}
            found += [
                f"{name}:{node.lineno}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in IN_PLACE
                and id(node) not in inside
            ]
    assert found == []


def _replaces(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "replace_file"
