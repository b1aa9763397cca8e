# SPDX-License-Identifier: LGPL-2.1-or-later
"""What several files say of the package is the same: versions, packages, dependencies."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import xenaltp2m as xa

ROOT = Path(__file__).resolve().parents[2]


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_debians_changelog_has_the_version() -> None:
    newest = (ROOT / "debian/changelog").read_text().partition("\n")[0]
    match = re.fullmatch(r"xenaltp2m \((.+)-[^-]+\) [\w-]+; urgency=\w+", newest)
    assert match is not None
    # Debian sorts 1.0~rc1 before 1.0, as Python does 1.0rc1.
    assert match[1].replace("~", "") == xa.__version__


def test_the_changelog_begins_with_what_is_next_or_with_the_version() -> None:
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Unreleased" or heads[0].startswith(f"{xa.__version__} - ")


def test_every_package_is_packed() -> None:
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "xenaltp2m").rglob("__init__.py")
    }
    assert set(project()["tool"]["setuptools"]["packages"]) == there


def test_debian_asks_for_what_the_extras_ask_for() -> None:
    extras = project()["project"]["optional-dependencies"]
    wanted = {text for extra in extras.values() for text in extra}
    control = (ROOT / "debian/control").read_text()
    optional = "".join(re.findall(r"^(?:Recommends|Suggests): (.+)$", control, re.MULTILINE))
    found = re.findall(r"python3-([\w-]+) \((>=) ([\d.]+)\)", optional)
    assert {"".join(parts) for parts in found} == wanted


def run_by_debian() -> list[Path]:
    """The tests that debian/rules runs."""
    rules = (ROOT / "debian/rules").read_text()
    match = re.search(r"^TESTS := ((?:.*\\\n)*.*)$", rules, re.MULTILINE)
    assert match is not None
    names = match[1].replace("\\", "").split()
    return [ROOT / f"tests/unit/test_{name}.py" for name in names]


def test_debian_builds_with_what_its_tests_import() -> None:
    group = {re.split(r"[<>=]", text)[0] for text in project()["dependency-groups"]["test"]}
    imported = {
        name.partition(".")[0]
        for path in run_by_debian()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }
    control = (ROOT / "debian/control").read_text()
    built = re.findall(r"^ python3-([\w-]+)\b.* <!nocheck>,$", control, re.MULTILINE)
    # pytest-timeout is asked for by pyproject.toml.
    assert {"pytest", "hypothesis", "pytest-timeout"} | group & imported <= set(built)


def test_the_tests_that_debian_runs_are_there() -> None:
    assert [path.name for path in run_by_debian() if not path.exists()] == []


def test_fault_29_mypy_finds_the_package_and_its_types_from_elsewhere(tmp_path: Path) -> None:
    """In the environment that make sets up, where the package is installed as editable."""
    (tmp_path / "user.py").write_text(
        "import xenaltp2m as xa\nfrom xenaltp2m.backend.mock import MockBackend\n\n"
        "with xa.connect(MockBackend()) as xen:\n    reveal_type(xen)\n"
    )
    kept = {name: value for name, value in os.environ.items() if "PYTHONPATH" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "user.py"],
        cwd=tmp_path, env=kept, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 'Revealed type is "xenaltp2m.handles.xen.Xen"' in done.stdout
    assert done.returncode == 0, done.stdout
