# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the documentation as a site: ``make docs``.

The pages are the tree's Markdown, which reads the same on a code-hosting site. They are copied,
with their links, to a directory that Sphinx is run on; what is written there besides is what has
no page in the tree: the contents, the examples' sources, and the reference, from the docstrings.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_origin

from sphinx.cmd.build import build_main
from sphinx.pycode import ModuleAnalyzer

import xenaltp2m

HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent
EXAMPLES = TREE / "examples"
HOME = TREE / "README.md"

CONTENTS = {
    "Begin": ("start", "concepts"),
    "How to": ("howto/first-hook", "howto/self-*", "howto/several-vcpus", "howto/*"),
    "Use": ("cli", "events", "breakpoints", "state", "hazards", "doctor", "rescue", "errors"),
    "Without Xen": ("testing", "mock", "simulator", "recording", "lab"),
    "Facts": (
        "semantics",
        "support",
        "performance",
        "performance-report",
        "security",
        "comparison",
        "architecture",
    ),
}
"""The pages of docs/ under each heading, in order, of those that are there; others follow them."""
ROOT_PAGES = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")

PUBLIC = (
    "backend",
    "backend.mock",
    "backend.protocol",
    "errors",
    "handles.altp2m",
    "handles.base",
    "handles.domain",
    "handles.hazards",
    "handles.journal",
    "handles.memory",
    "handles.monitor.monitor",
    "handles.pages",
    "handles.vcpu",
    "handles.view",
    "handles.view_resets",
    "handles.xen",
    "testing",
    "tools.breakpoints.hooks",
    "tools.breakpoints.manager",
    "tools.doctor",
    "tools.doctor.finding",
    "tools.migration",
    "tools.rescue",
    "tools.state.capture",
    "tools.state.layout",
    "tools.state.svg",
    "tools.state.terminal",
    "tools.symbols.prototypes",
    "tools.symbols.symbol",
    "tools.symbols.tables",
    "tools.tracing.calls",
    "tools.tracing.options",
    "tools.tracing.trace",
    "types",
    "values.events.base",
    "values.events.kinds",
    "values.registers",
    "values.responses",
    "values.state",
    "values.view_model",
)
"""The modules of the reference; the others are internal."""
EXPORTED_ONLY = ("altp2m", "domain", "pages", "vm_event", "view", "xen")
"""Modules of which ``xenaltp2m.__all__`` is all that is public, but for type aliases."""
SHOWN = ("abi.releases", "abi.vm_event")
"""Internal modules that public names refer to."""

LANGUAGES = {".py": "python", ".c": "c", ".S": "text", ".cfg": "python"}

LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """List the tree's pages."""
    return [*(TREE / name for name in ROOT_PAGES), *sorted((TREE / "docs").rglob("*.md"))]


def files() -> list[Path]:
    """List what pages show, or offer, that is no page."""
    docs = TREE / "docs"
    return sorted([*(docs / "pictures").glob("*.svg"), *docs.glob("*.json")])


def staged(page: Path) -> Path:
    """Tell where a page of the tree lies on the site, relative to its root."""
    return Path("index.md") if page == HOME else page.relative_to(TREE)


def destination(page: Path, link: str) -> str:
    """Turn a page's link to something in the tree into one to where that is on the site.

    Raises:
        ValueError: The site does not have it.
    """
    path, mark, anchor = link.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link
    file = (page.parent / path).resolve()
    if file.is_relative_to(EXAMPLES):
        place = (file / "index.md" if file.is_dir() else file.with_suffix(".md")).relative_to(TREE)
    elif file in pages():
        place = staged(file)
    elif file in files():
        place = file.relative_to(TREE)
    else:
        raise ValueError(f"{page.relative_to(TREE)}: the site has no {link}")
    return f"{os.path.relpath(place, staged(page).parent)}{mark}{anchor}"


def text_of(page: Path) -> str:
    """Return a page as it is on the site; what is in fenced blocks stays as it is."""
    text, parts, end = page.read_text(encoding="utf-8"), [], 0

    def adapt(prose: str) -> str:
        return LINK.sub(lambda link: link[1] + destination(page, link[2]) + link[3], prose)

    for fence in FENCE.finditer(text):
        parts += [adapt(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, adapt(text[end:])])


def contents() -> str:
    """List all pages, under headings, for the site's navigation."""
    left = [page.relative_to(TREE / "docs").with_suffix("") for page in pages()[len(ROOT_PAGES) :]]
    blocks = []
    for caption, patterns in CONTENTS.items():
        found = []
        for pattern in patterns:
            found += [page for page in left if page.match(pattern)]
            left = [page for page in left if page not in found]
        blocks.append((caption, [f"docs/{page}" for page in found]))
    blocks[-1][1].extend(f"docs/{page}" for page in left)
    blocks.append(("Reference", ["api/index", "examples/index"]))
    blocks.append(("Project", [Path(name).stem for name in ROOT_PAGES[1:]]))
    return "".join(toctree(names, f":caption: {caption}\n:hidden:") for caption, names in blocks)


def toctree(names: list[str], options: str) -> str:
    """Write a list of pages as Sphinx wants it."""
    listed = "\n".join(names)
    return f"\n```{{toctree}}\n{options}\n\n{listed}\n```\n"


def first_sentence(docstring: str | None) -> str:
    """Return what a docstring begins with."""
    return (docstring or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")


def examples(target: Path) -> None:
    """Write a page for each example and for each guest, with its source."""
    for directory, title in (
        (EXAMPLES, "Examples"),
        (EXAMPLES / "agent", "An agent with its tests"),
        (EXAMPLES / "guest", "Guests to try an agent on"),
    ):
        place = target / directory.relative_to(TREE)
        place.mkdir(parents=True)
        sources = [
            file
            for kind in LANGUAGES
            for file in (*directory.iterdir(), *directory.glob("tests/*"))
            if file.suffix == kind
        ]
        stems = sorted({source.stem for source in sources})
        for stem in stems:
            text = f"# {stem}\n"
            for source in (source for source in sources if source.stem == stem):
                shutil.copy(source, place)
                text += f"\n```{{literalinclude}} {source.name}\n"
                text += f":language: {LANGUAGES[source.suffix]}\n"
                text += f":caption: {source.relative_to(TREE)}\n```\n"
            (place / f"{stem}.md").write_text(text, encoding="utf-8")
        more = ["agent/index", "guest/index"] if directory == EXAMPLES else []
        (place / "index.md").write_text(
            f"# {title}\n{toctree([*stems, *more], ':maxdepth: 1')}", encoding="utf-8"
        )


def modules() -> Iterator[str]:
    """Name the modules that the reference has."""
    for name in sorted((*PUBLIC, *SHOWN)):
        yield f"xenaltp2m.{name}"


def public_names(name: str) -> tuple[list[str], list[str]]:
    """Return what a module has for users: what the package exports, and what it has itself."""
    module = importlib.import_module(name)
    exported = {
        export: getattr(xenaltp2m, export)
        for export in xenaltp2m.__all__
        if getattr(getattr(xenaltp2m, export), "__module__", "xenaltp2m.types") == name
    }
    constants = ModuleAnalyzer.for_module(name).find_attr_docs()
    defined = {
        member
        for member, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__ == name
    }
    defined |= {member for scope, member in constants if not scope}
    own = getattr(module, "__all__", None) or [
        member for member in vars(module) if member in defined
    ]
    if name.rpartition(".")[2] in EXPORTED_ONLY:
        own = [member for member in own if get_origin(vars(module)[member])]
    return list(exported), [name for name in own if name not in exported and name[0] != "_"]


def reference(target: Path) -> None:
    """Write a page for each public module, for autodoc to fill."""
    target.mkdir()
    listed = []
    for name in modules():
        exported, own = public_names(name)
        if not exported and not own:
            continue
        listed.append(name)
        text = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :no-members:\n\n"
        for prefix, members in (("xenaltp2m", exported), (name, own)):
            for member in members:
                text += directive(f"{prefix}.{member}", getattr(sys.modules[prefix], member))
        (target / f"{name}.rst").write_text(text, encoding="utf-8")
    rows = "".join(
        f"| [{name}]({name}.rst) | {first_sentence(sys.modules[name].__doc__)} |\n"
        for name in listed
    )
    (target / "index.md").write_text(
        "# Reference\n\nWhat `xenaltp2m.__all__` names is documented under that name, with the "
        "module that defines it.\n\n| module | what it has |\n|---|---|\n"
        f"{rows}{toctree(listed, ':hidden:')}",
        encoding="utf-8",
    )


def directive(path: str, value: object) -> str:
    """Write what lets autodoc describe one name."""
    if inspect.isclass(value) and not get_origin(value):
        options = ["members"]
        if any(base.__name__.startswith("_") for base in value.__bases__):
            options.append("inherited-members")
        elif value.__bases__ != (object,):
            options.append("show-inheritance")
        is_bare = is_dataclass(value) and "Attributes:" not in (value.__doc__ or "")
        if is_bare or issubclass(value, enum.Enum):
            options.append("undoc-members")
        listed = "".join(f"   :{option}:\n" for option in options)
        return f".. autoclass:: {path}\n{listed}\n"
    return f".. auto{'function' if inspect.isroutine(value) else 'data'}:: {path}\n\n"


def build(target: Path) -> int:
    """Build the site below a directory; warnings are errors.

    Returns:
        0, or Sphinx's status.
    """
    source, html = target / "source", target / "html"
    shutil.rmtree(target, ignore_errors=True)
    for page in pages():
        place = source / staged(page)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text_of(page), encoding="utf-8")
    with (source / "index.md").open("a", encoding="utf-8") as index:
        index.write(contents())
    for file in files():
        place = source / file.relative_to(TREE)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    examples(source)
    reference(source / "api")
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--nitpicky", "-c", str(HERE)]
    return build_main([*options, "-d", str(target / "doctrees"), str(source), str(html)])


def main() -> int:
    """Build it, and say where it is."""
    parser = argparse.ArgumentParser(description="Build the documentation as a site.")
    parser.add_argument("target", type=Path, nargs="?", default=TREE / "build" / "docs")
    target = parser.parse_args().target.resolve()
    status = build(target)
    if status == 0:
        print(target / "html" / "index.html")
    return status


if __name__ == "__main__":
    sys.exit(main())
