# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the docs have typed on a dom0 does on one what they say: here with the guests they bring.

``tests/examples/test_docs.py`` types all such blocks, on a mock host.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
DOM0 = "# on a dom0\n"


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page in one language."""
    text = (TREE / "docs" / page).read_text(encoding="utf-8")
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


def typed(commands: str) -> str:
    """Type commands into a shell, in the tree."""
    done = subprocess.run(
        ["sh", "-ec", commands], cwd=TREE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def no_guest() -> Iterator[None]:
    """The guests that the pages make are gone afterwards."""
    yield
    for name in ("checker", "insider"):
        subprocess.run(["xl", "destroy", name], capture_output=True, check=False)


@pytest.mark.usefixtures("no_guest")
def test_the_hook_of_the_start_page() -> None:
    [hook] = blocks("start.md", "python")
    [commands] = [block for block in blocks("start.md", "sh") if block.startswith(DOM0)]
    shown = next(block for block in blocks("start.md", "text") if "noticed:" in block)
    script = TREE / "hook.py"
    script.write_text(hook)
    try:
        printed = typed(commands).splitlines()
    finally:
        script.unlink()
    first, second, dots, *last = shown.splitlines()
    assert dots == "..."
    assert (printed[:2], printed[-2:]) == ([first, second], last)
    assert len(printed) == 51


@pytest.mark.usefixtures("no_guest")
def test_the_guest_that_watches_itself() -> None:
    [commands] = [block for block in blocks("howto/ve-inside.md", "sh") if block.startswith(DOM0)]
    typed(commands)
    assert "insider" in typed("xenaltp2m --connect libxc list")
