# SPDX-License-Identifier: LGPL-2.1-or-later
"""What users import: complete, documented, typed, and with Xen's numbers."""

from __future__ import annotations

import ast
import enum
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

import xenaltp2m
import xenaltp2m as xa
from xenaltp2m import Access, Altp2mMode, MemoryType, errors, types
from xenaltp2m.abi import releases
from xenaltp2m.abi._ffi import ffi
from xenaltp2m.backend import Backend, arguments
from xenaltp2m.backend.libxc import LibxcBackend
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.backend.mock.operations import ModelBackend
from xenaltp2m.backend.session.recording import RecordingBackend
from xenaltp2m.backend.session.replay import ReplayBackend
from xenaltp2m.handles import hazards
from xenaltp2m.tools import migration, rescue
from xenaltp2m.tools.state import capture
from xenaltp2m.values import state
from xenaltp2m.values.state import State

PACKAGE = Path(xenaltp2m.__file__).parent
GENERATED = {"_ffi.py"}
REACHED = {
    "Call",
    "Handle",
    "OpenView",
    "Return",
    "UndoList",
    "Release",
    "Backend",
    "Trace",
    "AddressSpace",
    "MappedPages",
    "Hazard",
    "State",
    "Carried",
    "Symbol",
    "Symbols",
    "RegisterValues",
    "VcpuRegisterValues",
}
"""Classes that users meet but never name, or import from where they are."""
PROTOCOL = {name for name in vars(Backend) if not name.startswith("_")}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name not in GENERATED:
            yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text())


def definitions(
    tree: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every public class, function and method by its dotted name."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}{node.name}.")


BACKENDS = {
    base.__name__
    for backend in (LibxcBackend, ModelBackend, RecordingBackend, ReplayBackend)
    for base in backend.__mro__
}
"""The classes that an operation of a backend may be defined in."""


def undocumented(tree: ast.Module) -> list[str]:
    """What has no docstring; a backend's operations have theirs in the Protocol."""
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for name, node in definitions(tree):
        of_protocol = name.partition(".")[0] in BACKENDS and node.name in PROTOCOL
        if not ast.get_docstring(node) and not of_protocol:
            missing.append(name)
    return missing


def untyped(tree: ast.Module) -> list[str]:
    """Which functions have a parameter or a result without annotation."""
    found = []
    for name, node in definitions(tree):
        if isinstance(node, ast.ClassDef):
            continue
        every = node.args
        given = [*every.posonlyargs, *every.args, *every.kwonlyargs]
        given += [extra for extra in (every.vararg, every.kwarg) if extra]
        bound = "." in name and given[:1] and given[0].arg in {"self", "cls"}
        if node.returns is None or any(
            argument.annotation is None for argument in (given[1:] if bound else given)
        ):
            found.append(name)
    return found


SOURCES = dict(sources())


@pytest.mark.parametrize("name", SOURCES)
def test_everything_public_is_documented_and_typed(name: str) -> None:
    assert undocumented(SOURCES[name]) == []
    assert untyped(SOURCES[name]) == []


@pytest.mark.parametrize(
    ("text", "without_words", "without_types"),
    [
        ("'''M.'''", [], []),
        ("x = 1", ["the module"], []),
        ("'''M.'''\ndef f() -> None: pass", ["f"], []),
        ("'''M.'''\ndef f(x: int): '''F.'''", [], ["f"]),
        ("'''M.'''\ndef f(x, *, y: int) -> None: '''F.'''", [], ["f"]),
        ("'''M.'''\ndef f(*x) -> None: '''F.'''", [], ["f"]),
        ("'''M.'''\ndef _f(x): pass", [], []),
        ("'''M.'''\nclass C:\n  def f(self) -> None: '''F.'''", ["C"], []),
        ("'''M.'''\nclass C:\n  '''C.'''\n  @property\n  def f(self) -> int: pass", ["C.f"], []),
        ("'''M.'''\nclass C:\n  '''C.'''\n  def close(self) -> None: pass", ["C.close"], []),
        ("'''M.'''\nclass LibxcBackend:\n  '''C.'''\n  def close(self) -> None: pass", [], []),
        ("'''M.'''\nclass LibxcBackend:\n  '''C.'''\n  def more(self): pass", ["LibxcBackend.more"],
         ["LibxcBackend.more"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_found(
    text: str, without_words: list[str], without_types: list[str]
) -> None:
    tree = ast.parse(text)
    assert undocumented(tree) == without_words
    assert untyped(tree) == without_types


# The names.


def order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_all_is_sorted_and_has_every_public_name() -> None:
    assert xenaltp2m.__all__ == sorted(xenaltp2m.__all__, key=order)
    bound = {
        name
        for name, value in vars(xenaltp2m).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert bound | set(xenaltp2m._LATER) == set(xenaltp2m.__all__)


def own_classes(module: ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and name[0] != "_"
    }


def test_every_error_and_type_is_exported() -> None:
    assert len(own_classes(errors)) > 10
    assert len(own_classes(types)) > 3
    assert own_classes(errors) | own_classes(types) <= set(xenaltp2m.__all__)


def classes_in(annotation: object) -> Iterator[type]:
    """The classes of ours that an annotation names."""
    if inspect.isclass(annotation) and annotation.__module__.startswith("xenaltp2m"):
        yield annotation
    for part in typing.get_args(annotation):
        yield from classes_in(part)


def public_functions(kind: type) -> Iterator[FunctionType]:
    for name, member in vars(kind).items():
        if not name.startswith("_"):
            function = member.fget if isinstance(member, property) else member
            if isinstance(function, FunctionType):
                yield function


def test_what_handles_take_and_give_is_exported() -> None:
    values = {name: getattr(xenaltp2m, name) for name in xenaltp2m.__all__}  # loads them
    modules = [sys.modules[name] for name in sys.modules if name.startswith("xenaltp2m.")]
    known = {name: value for module in modules for name, value in vars(module).items()}
    met = set()
    for value in values.values():
        for function in public_functions(value) if inspect.isclass(value) else ():
            hints = typing.get_type_hints(function, known)
            met |= {found.__name__ for hint in hints.values() for found in classes_in(hint)}
    assert {"View", "Altp2m", "Difference", "Mismatch", "DomainInfo"} <= met
    assert met - REACHED <= set(xenaltp2m.__all__)


def test_every_error_is_a_xen_error() -> None:
    for name in own_classes(errors):
        kind = getattr(errors, name)
        if not issubclass(kind, Warning | errors.ReplayError):
            assert issubclass(kind, errors.XenError)
            assert issubclass(kind, OSError)


# The numbers.


def constant(name: str) -> int:
    return int(ffi.integer_const(name))


def test_access_numbers_are_xen_s() -> None:
    """Those that are alike in every release; ``r_pw`` and ``default`` have no one number in C."""
    names = {access: str(access).replace("-", "") or "n" for access in Access.__members__.values()}
    for version in releases.SUPPORTED:
        numbers = releases.release(*version).access_numbers
        for access, name in names.items():
            if name not in {"r_pw", "default"}:
                assert numbers[access] == constant(f"XENMEM_access_{name}")
    assert len(names) == 12


def test_plain_rights_are_their_numbers() -> None:
    for access in map(Access, range(8)):
        assert access.value == constant(f"XENMEM_access_{str(access).replace('-', '') or 'n'}")


def test_altp2m_modes_are_xen_s() -> None:
    assert {f"XEN_ALTP2M_{mode.name.lower()}": mode.value for mode in Altp2mMode} == {
        name: constant(name)
        for name in (
            "XEN_ALTP2M_disabled",
            "XEN_ALTP2M_mixed",
            "XEN_ALTP2M_external",
            "XEN_ALTP2M_limited",
        )
    }


def test_memory_types_are_xen_s() -> None:
    names = {
        MemoryType.RAM: "ram_rw",
        MemoryType.READ_ONLY: "ram_ro",
        MemoryType.EMULATED: "mmio_dm",
        MemoryType.IOREQ_SERVER: "ioreq_server",
    }
    assert set(names) == set(MemoryType)
    for kind, name in names.items():
        assert kind.value == constant(f"HVMMEM_{name}")


def test_other_numbers_are_xen_s() -> None:
    assert constant("HVM_PARAM_ALTP2M") == types.HVM_PARAM_ALTP2M
    assert constant("DOMID_FIRST_RESERVED") == arguments.DOMID_LIMIT
    assert int(ffi.cast("xen_pfn_t", -1)) == types.ALL_GFNS
    assert xenaltp2m.PAGE_SIZE == 1 << xenaltp2m.PAGE_SHIFT == 4096


def test_enums_have_no_members_that_are_not_checked() -> None:
    """Whoever adds an enum of Xen's numbers adds it here."""
    found = {
        name
        for module in (types, errors)
        for name in own_classes(module)
        if issubclass(getattr(module, name), enum.Enum)
    }
    assert found == {"Access", "Altp2mMode", "MemoryType"}


# Access, as people write and read it.


def test_rights_combine() -> None:
    assert Access.R | Access.X is Access.RX
    assert Access.R | Access.W | Access.X is Access.RWX
    assert [str(access) for access in (Access.N, Access.RX, Access.RWX, Access.N2RWX)] == [
        "---", "r-x", "rwx", "n2rwx",
    ]  # fmt: skip
    assert [str(Access.RX2RW), str(Access.R_PW), str(Access.DEFAULT)] == [
        "rx2rw", "r_pw", "default",
    ]  # fmt: skip
    assert "DEFAULT" in str(Access.DEFAULT | Access.R)


# Arguments.

HANDLES = ("xen", "domain", "altp2m", "view", "memory", "space", "vcpu", "mock")
FUNCTIONS: dict[str, Callable[..., object]] = {
    one.__name__: one
    for one in (
        xa.connect, capture.capture, capture.compare, capture.restore,
        capture.scan, capture.obstacles, capture.differences, migration.import_views,
        migration.imported_views, migration.take_out_views, rescue.diagnose, rescue.rescue,
        hazards.survey, State.from_bytes, state.diff,
    )
}  # fmt: skip
ELSEWHERE = {
    "trace": "its options: test_traces.py",
    "close": "", "abandon": "", "read_string": "", "paused": "", "recording": "",
    "detach": "", "reattach": "", "remove_listener": "any other is passed over",
}  # fmt: skip
SOUND: dict[str, Any] = {
    "gfn": 5, "new_gfn": 6, "gfns": 5, "access": xa.Access.R, "address": 0x1000, "length": 4,
    "data": b"1234", "vcpu": 0, "number": 0, "which": 1, "cr3": 0x1000, "domid": 1, "view": None,
    "state": State(()), "before": State(()), "after": State(()), "callback": print, "program": [],
    "image": b"", "nth": 1, "errno": 1, "op": None, "registers": {}, "visible": True,
}  # fmt: skip
WRONG: dict[str, list[object]] = {
    "int": [None, "5", 2.5, True, -1],
    "int | None": ["5", 2.5, True, -1],
    "bool": [None, 1, "yes"],
    "str": [None, 1, b"x"],
    "str | None": [1, b"x"],
    "Access": [None, 1, "r"],
    "Access | None": [1, "r"],
    "int | Iterable[int]": [None, "5", 2.5, True, -1, b"x", [2.5], [True], [-1], [None]],
    "bytes | bytearray | memoryview": [None, "x", 1, [1]],
}
"""By how a parameter is annotated; an object of no kind is wrong everywhere."""


def opened(stack: ExitStack) -> dict[str, Any]:
    """One of each handle."""
    mock = MockBackend()
    mock.add_domain("guest", vcpus=2)
    xen = stack.enter_context(xa.connect(mock))
    domain = stack.enter_context(xen.domain(1))
    altp2m = stack.enter_context(domain.altp2m())
    return {
        "xen": xen, "domain": domain, "altp2m": altp2m, "view": altp2m.create_view(),
        "memory": domain.memory, "space": domain.memory.address_space(), "vcpu": domain.vcpu(0),
        "mock": mock,
    }  # fmt: skip


def calls() -> Iterator[tuple[str, str, str]]:
    """Every public method of a handle, and every function, with each of its parameters."""
    with ExitStack() as stack:
        made = opened(stack)
        for handle in HANDLES:
            kind = type(made[handle])
            for base in kind.__mro__:
                for name, member in vars(base).items():
                    public = inspect.isfunction(member) and not name.startswith("_")
                    if not public or name in ELSEWHERE or hasattr(Backend, name):
                        continue
                    for parameter in list(inspect.signature(member).parameters)[1:]:
                        if (name, parameter) != ("add_domain", "options"):  # tested below
                            yield handle, name, parameter
        for name, function in FUNCTIONS.items():
            for parameter in inspect.signature(function).parameters:
                yield "", name, parameter


@pytest.mark.parametrize(("handle", "name", "parameter"), sorted(set(calls())))
def test_fault_27_a_wrong_argument_is_refused_by_the_call(
    handle: str, name: str, parameter: str
) -> None:
    with ExitStack() as stack:
        made = opened(stack)
        call = getattr(made[handle], name) if handle else FUNCTIONS[name]
        signature = inspect.signature(call)
        one = signature.parameters[parameter]
        others = {
            other.name: made.get(other.name, SOUND.get(other.name, 1))
            for other in signature.parameters.values()
            if other.default is other.empty and other.kind is not other.VAR_POSITIONAL
            and other.kind is not other.VAR_KEYWORD and other is not one
        }  # fmt: skip
        wrong = [object(), *WRONG.get(str(one.annotation).strip("'"), [])]
        for value in wrong:
            given: dict[str, Any] = others | {parameter: value}
            args: tuple[object, ...] = ()
            if one.kind is one.VAR_POSITIONAL:
                args, given = (value,), others
            elif one.kind is one.VAR_KEYWORD:
                given = others | {"rax": value}
            before = len(made["mock"].calls)
            with pytest.raises(xa.InvalidArgumentError) as caught:
                call(*args, **given)
            assert caught.value.errno is None, value  # ours, not Xen's
            changing = [
                call.op for call in list(made["mock"].calls)[before:] if "get" not in call.op
            ]
            assert changing == [], value


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"xen": (5, 0)}, "4.14 to 4.22"), ({"xen": "5.0"}, "4.14 to 4.22"),
        ({"xen": 4.17}, "4.14 to 4.22"), ({"xen": None}, "4.14 to 4.22"),
        ({"xen": "four"}, "4.14 to 4.22"), ({"xen": (4, 17, 1)}, "4.14 to 4.22"),
        ({"xen": (4, 13)}, "4.14 to 4.22"), ({"library": "4.13"}, "library must be"),
        ({"altp2m": 1}, "altp2m must be True or False"), ({"seed": "x"}, "seed must be"),
        ({"memory_pages": 0}, "memory_pages must be at least"),
        ({"physical_address_bits": 64}, "0x24 to 0x34"),
    ],
)  # fmt: skip
def test_fault_27_arguments_of_the_mock(options: dict[str, Any], word: str) -> None:
    with pytest.raises(xa.InvalidArgumentError, match=word):
        MockBackend(**options)


def test_fault_27_a_release_may_be_text() -> None:
    for text, version in (("4.14", (4, 14)), ("4.17", (4, 17)), ("4.22", (4, 22))):
        mock = MockBackend(text, library=text)
        assert mock.release.version == version


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"vcpus": 0}, "vcpus must be 0x1 to 0x80, not 0x0"), ({"vcpus": 129}, "vcpus must be"),
        ({"vcpus": True}, "vcpus must be an integer"), ({"kind": "xen"}, "kind must be"),
        ({"mode": 7}, "mode must be"), ({"mode": "external"}, "mode must be"),
        ({"view_count": 513}, "view_count"), ({"memory_kib": -1}, "memory_kib"),
        ({"max_kib": 1}, "max_kib must be at least"), ({"pool_pages": 0}, "pool_pages"),
        ({"superpages": 1}, "superpages must be True"), ({"nested": "no"}, "nested must be True"),
        ({"name": None}, "name must be text"), ({"name": "guest"}, "'guest' already"),
    ],
)  # fmt: skip
def test_fault_27_arguments_of_a_modelled_domain(options: dict[str, Any], word: str) -> None:
    mock = MockBackend()
    mock.add_domain("guest")
    with pytest.raises(xa.InvalidArgumentError, match=word):
        mock.add_domain(**({"name": "other"} | options))
    assert list(mock.machine.domains) == [1]


def test_fault_27_the_name_of_a_domain_that_ended_is_free() -> None:
    mock = MockBackend()
    mock.destroy(mock.add_domain("guest"))
    mock.add_domain("guest")


def test_fault_27_a_domain_that_runs_is_not_booted() -> None:
    mock = MockBackend()
    domid = mock.add_domain("guest", memory_kib=16 << 10)
    image = Path(__file__).parents[2] / "examples" / "guest" / "hello.elf"
    mock.boot(domid, image)
    mock.domain_unpause(domid)
    with pytest.raises(xa.InvalidArgumentError, match="domain 1 runs"):
        mock.boot(domid, image)
