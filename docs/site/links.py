"""An mkdocs hook: the README and the source files that pages link to become pages of the site, too.

On GitHub a link such as `../examples/ddpo.py` leads to the file. mkdocs knows only what is in docs/, so each such file
gets a page here, and its link goes there. The site needs no address of a repository, and a strict build finds every
broken link.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[2]
START = "start.md"
"""The README's place on the site."""

_FENCED = re.compile(r"^( *)(`{3,}|~{3,})[^\n]*\n.*?^\1\2 *$", re.S | re.M)
_LINK = re.compile(r"""(\]\(|\b(?:src|href)=")(?!https?:|mailto:|#|/)([^\s)"#]+)""")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".html": "html", ".md": "markdown", ".cff": "yaml"}


def map_links(markdown: str, change: Callable[[str], str]) -> str:
    """The page with every relative link, in Markdown or HTML, replaced by `change(link)`; code blocks stay."""

    def in_prose(text: str) -> str:
        return _LINK.sub(lambda found: found[1] + change(found[2]), text)

    parts, end = [], 0
    for block in _FENCED.finditer(markdown):
        parts += [in_prose(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join(parts) + in_prose(markdown[end:])


def place_of(path: str) -> str:
    """Where on the site (relative to docs/) a file or folder of the repository is shown."""
    if path == "README.md":
        return START
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def source_of(place: str) -> str:
    """The path in the repository of what the site shows at `place`, a page of docs/ or the README."""
    return "README.md" if place == START else f"docs/{place}"


def follow(link: str, place: str) -> str | None:
    """The path in the repository that `link` leads to, on the page that the site shows at `place`; None for none."""
    path = os.path.normpath(PurePosixPath(source_of(place)).parent / link)
    return path if (ROOT / path).exists() and not path.startswith("..") else None


def relink(markdown: str, place: str) -> str:
    """The page as the site needs it: links to files of the repository lead to their pages. Broken ones stay broken."""

    def change(link: str) -> str:
        path = follow(link, place)
        return link if path is None else os.path.relpath(place_of(path), PurePosixPath(place).parent)

    return map_links(markdown, change)


def outside(markdown: str, place: str) -> set[str]:
    """Paths in the repository, outside docs/ and beside the README, that the page links to."""
    found: set[str] = set()

    def collect(link: str) -> str:
        path = follow(link, place)
        if path and place_of(path).startswith("source/"):
            found.add(path)
        return link

    map_links(markdown, collect)
    return found


def source_page(path: str) -> str:
    """A page that shows a file, or lists the files of a folder."""
    head = f"---\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n\n# `{path}`\n\n"
    if (ROOT / path).is_dir():
        return head + "".join(f"- [`{name}`]({PurePosixPath(path).name}/{name}.md)\n" for name in files_in(path))
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"{head}~~~~~ {{ .{_LANGUAGES.get(Path(path).suffix, 'text')} }}\n{text}\n~~~~~\n"


def files_in(folder: str) -> list[str]:
    return sorted(path.name for path in (ROOT / folder).iterdir() if path.suffix in _LANGUAGES)


# --- what mkdocs calls


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File, InclusionLevel

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, START, content=f"---\nhide: [navigation]\n---\n\n{readme}"))
    pages = [file for file in files if file.is_documentation_page() and file.inclusion.is_included()]
    wanted: set[str] = set().union(*(outside(file.content_string, file.src_uri) for file in pages))
    for folder in [path for path in wanted if (ROOT / path).is_dir()]:
        wanted |= {f"{folder}/{name}" for name in files_in(folder)}
    for path in sorted(wanted):
        content = source_page(path)
        files.append(File.generated(config, place_of(path), content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return markdown if page.file.src_uri.startswith("source/") else relink(markdown, page.file.src_uri)
