# SPDX-License-Identifier: LGPL-2.1-or-later
"""The committed FFI module is what the declarations generate, everywhere and every time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import cffi
import pytest

from cdefs import build
from xenaltp2m.abi import releases
from xenaltp2m.abi._ffi import ffi


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the declarations and of the committed module, where they belong."""
    shutil.copytree(build.HERE, tmp_path / "cdefs")
    target = tmp_path / build.TARGET.relative_to(build.HERE.parent)
    target.parent.mkdir(parents=True)
    shutil.copy(build.TARGET, target)
    return tmp_path


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tree / "cdefs" / "build.py"), *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


def test_committed_module_is_current() -> None:
    generated = build.generate()
    assert build.difference(build.TARGET.read_text(), generated) == ""
    assert build.TARGET.read_text() == generated


def test_check_passes_from_anywhere(tree: Path) -> None:
    checked = run(tree, "--check")
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_check_fails_when_a_declaration_changed(tree: Path) -> None:
    header = tree / "cdefs" / "altp2m.h"
    header.write_text(
        header.read_text().replace("XEN_ALTP2M_limited  = 3", "XEN_ALTP2M_limited = 4")
    )
    checked = run(tree, "--check")
    assert checked.returncode == 1
    assert "XEN_ALTP2M_limited" in checked.stdout
    assert "run `python cdefs/build.py`" in checked.stdout
    assert max(map(len, checked.stdout.splitlines())) <= 160
    assert run(tree).returncode == 0
    assert run(tree, "--check").returncode == 0


@pytest.mark.parametrize("damage", ["missing", "edited"])
def test_check_fails_without_the_committed_module(tree: Path, damage: str) -> None:
    target = tree / build.TARGET.relative_to(build.HERE.parent)
    if damage == "missing":
        target.unlink()
    else:
        target.write_text(target.read_text() + "\n")
    assert run(tree, "--check").returncode == 1


def test_nothing_of_the_machine_is_in_it() -> None:
    text = build.TARGET.read_text()
    assert str(build.HERE.parent) not in text
    assert "/tmp" not in text


def test_a_syntax_error_names_file_and_line(tree: Path) -> None:
    header = tree / "cdefs" / "monitor.h"
    lines = header.read_text().splitlines()
    number = lines.index("int xc_vm_event_get_version(xc_interface *xch);")
    lines[number] = "int xc_vm_event_get_version(xc_interface *xch;"
    header.write_text("\n".join(lines) + "\n")
    with pytest.raises(cffi.CDefError, match=rf"monitor\.h:{number + 1}"):
        build.parse(tree / "cdefs")


def test_marks_are_the_release_table_s() -> None:
    assert build.since_marks() == releases.SYMBOL_SINCE


def test_every_mark_is_read() -> None:
    written = sum((build.HERE / name).read_text().count("/* since 4.") for name in build.FILES)
    assert written == len(build.since_marks()) + len(build.other_marks())
    assert build.since_marks()["xc_monitor_io"] == (4, 18)
    assert build.other_marks()["VM_EVENT_REASON_VMEXIT"] == (4, 17)


def test_no_number_is_given_to_the_movable_accesses() -> None:
    for name in ("XENMEM_access_default", "XENMEM_access_r_pw"):
        with pytest.raises((AttributeError, KeyError)):
            ffi.integer_const(name)


def test_every_header_is_listed_and_says_where_it_is_from() -> None:
    assert {path.name for path in build.HERE.glob("*.h")} == set(build.FILES)
    for name in build.FILES:
        head = (build.HERE / name).read_text().split("*/")[0]
        assert head.startswith("/* SPDX-License-Identifier: ")
        assert "\n * Origin: " in head
