# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each layer imports only from those below it, and importing the package opens nothing."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "xenaltp2m"
ROOT = Path(__file__).resolve().parents[2]

LAYERS: list[set[str]] = [
    {"types", "errors", "jsontext"},
    {"abi", "arguments"},
    {"backend", "backend.arguments", "backend.loader", "backend.mapping"},
    {"backend.libxc", "backend.mock"},
    {
        "handle", "signals", "runs", "view", "altp2m", "responses", "events", "monitor", "vcpu",
        "domain", "memory", "xen", "journal", "viewstate", "answers",
    },
    {
        "breakpoints", "executions", "hooks", "shadows", "instructions", "placement", "repetitions",
        "patches", "tracing", "prototypes", "capturing", "viewaxis", "viewpicture", "viewstrips",
        "rescue", "carrying", "hazards", "doctor", "symbols", "locations",
        "elf", "dwarf", "fingerprint",
    },
    {""},  # the package itself: what users import
    {"cli", "__main__", "testing"},
]  # fmt: skip
"""Lowest first. A package stands for its modules, unless they are named themselves."""

HANDLES, TOOLS = 4, 5
CONCRETE = {"backend.libxc", "backend.mock"}
OPENS_BACKENDS = {("backend", concrete) for concrete in CONCRETE}
"""An upward arrow, within a function: :func:`xenaltp2m.backend.open_backend`."""
OFFERS_TOOLS = {
    ("domain", "tracing"), ("domain", "carrying"), ("domain", "hazards"), ("altp2m", "hazards"),
    ("altp2m", "capturing"),
}  # fmt: skip
"""The others: ``Domain.trace``, ``Domain.carried``, ``Domain.hazards``, ``Altp2m.capture``, for
those who have such a handle; and what opening an altp2m refuses."""


@dataclass(frozen=True)
class Arrow:
    """One module imports another: at import, within a function, or for types only."""

    source: str
    target: str
    when: str


def place(module: str) -> str:
    """Return the entry of LAYERS that a module belongs to."""
    name = module
    while name and not any(name in layer for layer in LAYERS):
        name = name.rpartition(".")[0]
    if not name and module:
        raise LookupError(f"say in LAYERS where {module} belongs")
    return name


def rank(module: str) -> int:
    return next(at for at, layer in enumerate(LAYERS) if place(module) in layer)


def modules(root: Path) -> dict[str, ast.Module]:
    """Every module of a package by its name within it; the package itself is ''."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports(tree: ast.AST, when: str = "import") -> Iterator[tuple[ast.stmt, str]]:
    """Yield the import statements, with when they happen."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, when
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, "call")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for inner in node.body:
                yield from imports(ast.Module([inner], []), "types")
            for inner in node.orelse:
                yield from imports(ast.Module([inner], []), when)
        else:
            yield from imports(node, when)


def arrows(found: dict[str, ast.Module]) -> Iterator[Arrow]:
    """Yield who imports whom, within the package."""
    for source, tree in found.items():
        for node, when in imports(tree):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{source}: relative imports are not our way"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    known = inner.removeprefix(f"{PACKAGE}.") in found
                    named.append(inner if known else str(node.module))
            for name in named:
                if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                    yield Arrow(source, name.removeprefix(PACKAGE).removeprefix("."), when)


def forbidden(arrow: Arrow) -> str | None:
    """Say what is wrong with an arrow."""
    source, target = place(arrow.source), place(arrow.target)
    if arrow.target == "abi._ffi" and source != "backend.libxc":
        return "only the libxc backend calls C"
    if rank(arrow.source) == 0:
        return "types and errors import nothing of ours"
    if target in CONCRETE and source != target:
        if (source, target) in OPENS_BACKENDS and arrow.when == "call":
            return None
        if rank(arrow.source) in (HANDLES, TOOLS):
            return "handles and tools know no backend"
        if source in CONCRETE:
            return "backends do not know each other"
    if (source, target) in OFFERS_TOOLS and arrow.when != "import":
        return None
    if rank(arrow.target) > rank(arrow.source):
        return "it is above"
    return None


def wrong(found: dict[str, ast.Module]) -> list[str]:
    return [f"{arrow}: {why}" for arrow in arrows(found) if (why := forbidden(arrow))]


@pytest.fixture(scope="module")
def package() -> dict[str, ast.Module]:
    return modules(ROOT / PACKAGE)


def test_no_arrow_points_up(package: dict[str, ast.Module]) -> None:
    assert {"types", "view", "backend.libxc", "backend.mock", "abi._ffi", ""} <= package.keys()
    assert len(list(arrows(package))) > 50
    assert wrong(package) == []


def test_modules_do_not_import_each_other_in_circles(package: dict[str, ast.Module]) -> None:
    graph: dict[str, set[str]] = {name: set() for name in package}
    for arrow in arrows(package):
        if arrow.when == "import" and arrow.source != arrow.target:
            graph[arrow.source].add(arrow.target)
    for name, targets in graph.items():  # a package's module needs the package's __init__, too
        targets -= {parent for parent in targets if parent and name.startswith(f"{parent}.")}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("types", "from xenaltp2m import errors"),
        ("types", "from xenaltp2m.errors import XenError"),
        ("errors", "import xenaltp2m.types"),
        ("errors", "def f():\n    import xenaltp2m.types"),
        ("abi.releases", "from xenaltp2m.backend import Backend"),
        ("backend", "from xenaltp2m.backend import mock"),
        ("backend", "from xenaltp2m.backend.mock import MockBackend"),
        ("backend.arguments", "def f():\n    from xenaltp2m.backend.mock import MockBackend"),
        ("backend.mock.machine", "from xenaltp2m.abi._ffi import ffi"),
        ("backend.mock.machine", "from xenaltp2m.abi import _ffi"),
        ("backend.mock", "from xenaltp2m.backend.libxc import LibxcBackend"),
        ("backend.mock", "import xenaltp2m as xa"),
        ("backend.libxc.clib", "from xenaltp2m.view import BATCH"),
        ("view", "from xenaltp2m.backend.mock import MockBackend"),
        ("view", "class V:\n    def f(self):\n        from xenaltp2m.backend import libxc"),
        ("view", "from xenaltp2m.abi import _ffi"),
        ("view", "import xenaltp2m"),
        ("view", "from xenaltp2m.symbols import Image"),
        ("view", "if TYPE_CHECKING:\n    from xenaltp2m.symbols import Image"),
        ("view", "try:\n    import xenaltp2m.cli\nexcept ImportError:\n    pass"),
        ("symbols", "from xenaltp2m.backend.mock import MockBackend"),
        ("symbols", "from xenaltp2m.cli import main"),
        ("", "from xenaltp2m.cli import main"),
    ],
)
def test_a_forbidden_arrow_is_found(package: dict[str, ast.Module], source: str, text: str) -> None:
    assert len(wrong(package | {source: ast.parse(text)})) == 1


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("backend", "def open_backend():\n    from xenaltp2m.backend import mock, libxc"),
        ("view", "if TYPE_CHECKING:\n    from xenaltp2m.altp2m import Altp2m"),
        (
            "backend.libxc",
            "from xenaltp2m.backend.libxc import clib\nfrom xenaltp2m.abi import _ffi",
        ),
        ("cli", "import xenaltp2m as xa\nfrom xenaltp2m.backend.mock import MockBackend"),
        ("symbols", "from xenaltp2m.xen import Xen"),
        ("view", "import ast\nfrom xenaltp2mtools import x"),
    ],
)
def test_an_allowed_arrow_is_not(package: dict[str, ast.Module], source: str, text: str) -> None:
    assert wrong(package | {source: ast.parse(text)}) == []


def test_a_module_without_a_place_is_found(package: dict[str, ast.Module]) -> None:
    with pytest.raises(LookupError, match="where helpers belongs"):
        wrong(package | {"helpers": ast.parse("import xenaltp2m")})


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
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
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
