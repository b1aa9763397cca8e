# SPDX-License-Identifier: LGPL-2.1-or-later
"""How Sphinx makes the site; build.py runs it."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import xenaltp2m

project = "xenaltp2m"
author = "the xenaltp2m developers"
release = xenaltp2m.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_heading_anchors = 4
highlight_language = "text"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"xenaltp2m {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

STANDARD = sys.stdlib_module_names | set(vars(builtins))


def swap_colons(
    app: Sphinx, kind: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Hide colons from napoleon, which takes what is before one for an attribute's type."""
    del app, name, value, options
    if kind in {"attribute", "data", "property"}:
        lines[:1] = [line.translate({ord(":"): "\0", 0: ":"}) for line in lines[:1]]


def readable_defaults(
    app: Sphinx,
    kind: str,
    name: str,
    value: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Write a default that a dataclass makes anew as Python can read it."""
    del app, kind, name, value, options
    return signature and signature.replace("<factory>", "..."), returns


@functools.cache
def names_of(module: str) -> dict[str, str]:
    """Map the names in a module to the places that define them, imports for types included."""
    source = Path(importlib.import_module(module).__file__ or "").read_text(encoding="utf-8")
    tree = ast.parse(source)
    imported = {
        name.asname or name.name: f"{node.module}.{name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    own = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return imported | {name: f"{module}.{name}" for name in own}


def spell_out(app: Sphinx, tree: nodes.document) -> None:
    """Give references the names that things are documented under.

    Annotations and docstrings name them as their module does. What is of Python's own library, or
    private, stays as it is: neither is on this site.
    """
    page = app.env.current_document.docname
    if not page.startswith("api/xenaltp2m"):
        return
    module = page.removeprefix("api/")
    for node in list(tree.findall(pending_xref)):
        head, dot, rest = node.get("reftarget", "").partition(".")
        parts = (names_of(module).get(head, head) + dot + rest).split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts))]
        modules = [name for name in prefixes if name in sys.modules]
        if parts[0] == "xenaltp2m" and parts[len(modules)] in xenaltp2m.__all__:
            del parts[1 : len(modules)]
            modules = modules[:1]
        shown = all(f"api/{name}" in app.env.found_docs for name in modules[-1:] if "." in name)
        if parts[0] in STANDARD or not shown or any(part.startswith("_") for part in parts):
            node.replace_self(node.children)
            continue
        node["reftarget"] = ".".join(parts)
        if len(parts) > 1:
            node["refspecific"] = False


def setup(app: Sphinx) -> None:
    """Register the above."""
    for before_and_after in (400, 600):
        app.connect("autodoc-process-docstring", swap_colons, priority=before_and_after)
    app.connect("autodoc-process-signature", readable_defaults)
    app.connect("doctree-read", spell_out)
