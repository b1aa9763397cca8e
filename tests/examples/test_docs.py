# SPDX-License-Identifier: LGPL-2.1-or-later
"""The code in README and docs runs as it stands, and their links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*TREE.glob("*.md"), *(TREE / "docs").glob("*.md")])
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def test_there_is_code_to_run() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TREE)
    exec(compile(block, "docs", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_support_page_is_up_to_date() -> None:
    """As far as it needs no lab: what each release has, and the recorded answers."""
    command = [sys.executable, "tests/lab/support.py", "--check"]
    environment = os.environ | {"PYTHONPATH": str(TREE)}
    subprocess.run(command, cwd=TREE, env=environment, check=True)
