# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each layer imports only from those below it, and importing the package opens nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs.pictures.layers import PACKAGE, TREE, arrows_up, circle, graph_of, layers, modules


@pytest.fixture(scope="module")
def package() -> dict[str, ast.Module]:
    return modules(TREE / PACKAGE)


def test_no_arrow_points_up_and_there_is_no_circle(package: dict[str, ast.Module]) -> None:
    graph = graph_of(package)
    assert sum(map(len, graph.values())) > 300
    assert arrows_up(graph) == []
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("types", "from xenaltp2m.handles.view import View"),
        ("errors", "def f():\n    import xenaltp2m.abi.ring"),
        ("abi.releases", "from xenaltp2m.backend import Backend"),
        ("values.events", "if TYPE_CHECKING:\n    from xenaltp2m.handles.monitor import Monitor"),
        ("backend.mock", "import xenaltp2m as xa"),
        ("handles.view", "try:\n    import xenaltp2m.cli\nexcept ImportError:\n    pass"),
        (
            "handles.domain",
            "class D:\n    def f(self):\n        from xenaltp2m.tools import tracing",
        ),
        ("tools.tracing", "from xenaltp2m.cli import main"),
        ("", "from xenaltp2m.cli import main"),
    ],
)
def test_an_arrow_up_is_found(package: dict[str, ast.Module], source: str, text: str) -> None:
    assert len(arrows_up(graph_of(package | {source: ast.parse(text)}))) == 1


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("handles.context", "from xenaltp2m.handles.domain import Domain"),
        ("handles.view", "if TYPE_CHECKING:\n    from xenaltp2m.handles.altp2m import Altp2m"),
        ("backend.protocol", "def f():\n    from xenaltp2m.backend import open_backend"),
    ],
)
def test_a_circle_is_found(package: dict[str, ast.Module], source: str, text: str) -> None:
    package = package | {source: ast.Module([*package[source].body, *ast.parse(text).body], [])}
    assert circle(graph_of(package))


@pytest.mark.parametrize(
    ("folder", "foreign", "but"),
    [
        ("", "abi._ffi", "backend.libxc"),
        ("handles", "backend.libxc", ""),
        ("handles", "backend.mock", ""),
        ("tools", "backend.mock", ""),
        ("backend.mock", "backend.libxc", ""),
        ("backend.libxc", "backend.mock", ""),
    ],
)
def test_only_who_must_knows_a_backend_or_c(
    package: dict[str, ast.Module], folder: str, foreign: str, but: str
) -> None:
    def inside(module: str, of: str) -> bool:
        return not of or module == of or module.startswith(f"{of}.")

    for source, targets in graph_of(package).items():
        if inside(source, folder) and not (but and inside(source, but)):
            assert not any(inside(target, foreign) for target in targets), source


def test_the_picture_is_of_these_imports() -> None:
    assert layers() == (TREE / "docs" / "pictures" / "layers.svg").read_text(), "make pictures"


def test_a_module_without_a_place_is_found(package: dict[str, ast.Module]) -> None:
    with pytest.raises(LookupError, match="where helpers belongs"):
        arrows_up(graph_of(package | {"helpers": ast.parse("import xenaltp2m")}))


# What an import does.

WATCHED = """
import sys

events = []
sys.addaudithook(lambda event, arguments: events.append((event, arguments)))
{code}
OPENS = {{"ctypes.dlopen", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
         "socket.connect", "socket.bind"}}
for event, arguments in events:
    assert event not in OPENS, (event, arguments)
    if event == "open" and isinstance(arguments[0], str):
        assert not arguments[0].startswith(("/dev/", "/proc/xen", "/sys/hypervisor")), arguments
for module in ("_cffi_backend", "cffi", "ctypes", "elftools", "rich", "xenaltp2m.abi._ffi"):
    assert module not in sys.modules, module
mapped = open("/proc/self/maps").read()
assert "libxen" not in mapped
assert "_cffi_backend" not in mapped
print("nothing opened")
"""

SESSION = """
import xenaltp2m as xa
with xa.connect("mock") as xen, xen.domain("guest") as dom, dom.altp2m() as altp2m:
    view = altp2m.create_view(label="hooks")
    view.set_access(range(16), xa.Access.RX)
    view.remap(5, dom.add_pages()[0], access=xa.Access.X)
    altp2m.switch_to_view(view)
    assert view.verify() == []
    dom.memory.write(0, b"mock")
"""


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": str(TREE)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code", ["import xenaltp2m", "from xenaltp2m import *", SESSION], ids=["import", "*", "mock"]
)
def test_nothing_is_opened(code: str) -> None:
    assert python(WATCHED.format(code=code)) == "nothing opened\n"


@pytest.mark.parametrize(
    "code",
    [
        "import ctypes; ctypes.CDLL(None)",
        "import _cffi_backend",
        "import xenaltp2m.abi._ffi",
        "import subprocess; subprocess.run(['true'])",
        "open('/dev/null').close()",
    ],
)
def test_something_opened_is_found(code: str) -> None:
    with pytest.raises(AssertionError):
        python(WATCHED.format(code=code))


def test_the_mock_needs_no_cffi() -> None:
    python("import sys; sys.modules['_cffi_backend'] = sys.modules['cffi'] = None\n" + SESSION)


def test_importing_is_as_cheap_as_cffi(tmp_path: Path) -> None:
    """By processor time, the least; ``import cffi`` alone puts its work off to the first FFI."""
    timed = "import time; start = time.process_time()\n{}\nprint(time.process_time() - start)"
    statements = {"cffi": "import cffi; cffi.FFI()", "ours": "import xenaltp2m"}
    took: dict[str, list[float]] = {name: [] for name in statements}
    cache = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    for _ in range(6):
        for name, statement in statements.items():
            took[name].append(float(python(timed.format(statement), **cache)))
    ours, cffi = (min(took[name][1:]) for name in ("ours", "cffi"))
    print(f"{ours / cffi:.2f}")
    assert ours < 3 * cffi
