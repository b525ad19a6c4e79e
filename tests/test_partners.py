"""What the projects pin that a judge works for: one file, from which the tables of the documentation are made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PARTNERS: dict[str, list[dict[str, Any]]] = tomllib.loads((ROOT / "docs" / "partners.toml").read_text(encoding="utf-8"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]

ENVIRONMENTS = {
    "shared": "shared",
    "either": "shared, or a server",
    "server": "a server",
}
PINS = ("transformers", "torch", "diffusers", "trl", "python")


def ours(package: str) -> SpecifierSet:
    """The versions that this package's extras take."""
    stated = [Requirement(line) for extra in EXTRAS.values() for line in extra]
    (found,) = {each.specifier for each in stated if each.name == package and each.specifier}
    return found


def pinned(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def table(*rows: tuple[str, ...]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def of_versions() -> str:
    rows = [(each["version"], each["which"], each["result"]) for each in PARTNERS["transformers"]]
    return table(("transformers", "which", "result"), *rows)


def of_hosts() -> str:
    def row(host: dict[str, Any]) -> tuple[str, ...]:
        pins = ", ".join(f"{name} {host[name]}" for name in PINS if name in host)
        return host["name"], pins, ENVIRONMENTS[host["environment"]], host.get("tried", "")

    return table(("host", "pins", "the judge's environment", "tried as"), *map(row, PARTNERS["hosts"]))


@pytest.mark.parametrize("made", [of_versions, of_hosts], ids=["versions", "hosts"])
def test_the_tables_of_the_documentation_are_made_from_the_file(made):
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert made() in page, f"docs/index.md has to have:\n{made()}"


def test_a_host_shares_its_environment_where_the_versions_allow_it():
    versions = [each["version"] for each in PARTNERS["transformers"]]
    for host in PARTNERS["hosts"]:
        allowed = SpecifierSet(host["transformers"])
        exact = re.fullmatch(r"==([\d.]+)", host["transformers"])
        tried = [exact[1]] if exact else versions
        meet = [version for version in tried if version in allowed and version in ours("transformers")]
        assert host["environment"] == "server" or meet, f"{host['name']} has no transformers that a judge takes"
        if "tried" in host:
            assert host["tried"] in versions and host["tried"] in allowed, host["name"]


def test_the_ends_are_those_of_the_constraints():
    oldest, today = pinned("constraints-oldest.txt"), pinned("constraints.txt")
    versions = [each["version"] for each in PARTNERS["transformers"]]
    assert versions[0] == oldest["transformers"] and today["transformers"] in versions
    for package in ("transformers", "trl", "peft", "accelerate", "diffusers", "datasets"):
        (least,) = (each.version for each in ours(package) if each.operator == ">=")
        assert Version(oldest[package]).release[: least.count(".") + 1] == Version(least).release, package
        assert today[package] in ours(package), package
