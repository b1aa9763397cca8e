# SPDX-License-Identifier: LGPL-2.1-or-later
"""The linter of prose finds sentences of the old kind, wherever they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LINTER = Path(__file__).resolve().parents[1] / "lint" / "prose.py"


def lint(path: Path, text: str) -> subprocess.CompletedProcess[str]:
    path.write_text(text, encoding="utf-8")
    return subprocess.run(
        [sys.executable, LINTER, path], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("page.md", "# Views\n\nThe agent is told of it.\n", 3),
        ("module.py", '"""Set it up anew."""\n', 1),
        ("module.py", "x = 1  # whoever looks there\n", 1),
        ("module.py", 'raise ValueError(f"{1}: nobody hears of it")\n', 1),
    ],
    ids=["page", "docstring", "comment", "message"],
)
def test_a_sentence_of_the_old_kind_is_found(
    tmp_path: Path, name: str, text: str, line: int
) -> None:
    done = lint(tmp_path / name, text)
    assert done.returncode == 1
    assert f"{name}:{line}: " in done.stdout


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.md", "Xen reports it.\n\n```text\nis told of it\n```\n\nSee `anew`.\n"),
        ("module.py", '"""Report an event."""\n\nanew = "anew"\n'),
    ],
)
def test_code_and_plain_prose_pass(tmp_path: Path, name: str, text: str) -> None:
    done = lint(tmp_path / name, text)
    assert (done.returncode, done.stderr) == (0, "")
