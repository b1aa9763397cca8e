# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a backend checks before C sees it: numbers that C would silently truncate.

libxenctrl stores a domid in 16 bits and an access in 16 (``xc_altp2m.c``), so that domain 65541
would address domain 5. A number that fits is Xen's to judge.
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xenaltp2m.errors import InvalidArgumentError
from xenaltp2m.types import ALL_GFNS

_U8, _U16, _U32, _U64 = 1 << 8, 1 << 16, 1 << 32, 1 << 64
DOMID_LIMIT = 0x7FF0
"""``DOMID_FIRST_RESERVED``: numbers from here on are not domains."""

LIMITS: Mapping[str, int] = {
    "domid": DOMID_LIMIT,
    "first_domid": DOMID_LIMIT,
    "limit": _U32,
    "view": _U16,
    "vcpu": _U32,
    "gfn": _U64,
    "first_gfn": _U64,
    "last_gfn": _U64,
    "old_gfn": _U64,
    "new_gfn": _U64,
    "access": _U16,
    "default_access": _U16,
    "count": _U32,
    "max_kib": _U64,
    "order": 32,
    "param": _U32,
    "value": _U64,
    "typecode": _U16,
    "instance": _U16,
    "op": _U32,
    "size": _U64,
    "index": _U16,
    "bitmask": _U64,
    "msr": _U32,
    "vector": _U8,
    "kind": _U8,
    "error_code": _U32,
    "length": _U8,
    "cr2": _U64,
    "channel": _U32,
    "port": _U32,
    "remote_port": _U32,
}
"""The exclusive upper bound of each numeric parameter of the Protocol, by its name."""

FLAGS = frozenset(
    {
        *("allow_userspace", "disable", "enable", "onchangeonly", "required", "state", "suppress"),
        *("sync", "visible", "writable"),
    }
)
"""The parameters of the Protocol that are true or false."""


class Parameters:
    """The parameters of a method, but for ``self``.

    Attributes:
        names: Theirs, in order.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        """Look at a method."""
        signature = inspect.signature(method)
        bound = list(signature.parameters.values())[1:]
        self._signature = signature.replace(parameters=bound)
        self.names = tuple(one.name for one in bound)

    def bind(self, args: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments by their names, in the parameters' order.

        Raises:
            TypeError: They do not fit.
        """
        if len(args) == len(self.names) and not keywords:
            return dict(zip(self.names, args, strict=True))
        bound = self._signature.bind(*args, **keywords)
        bound.apply_defaults()
        return bound.arguments


def check(op: str, named: Mapping[str, object]) -> None:
    """Check every argument of an operation.

    Args:
        op: The operation, for the error.
        named: Arguments by parameter name; names without a bound are passed over.

    Raises:
        InvalidArgumentError: One is of another type, out of range, or arrays do not match.
    """
    for name, value in named.items():
        limit = LIMITS.get(name)
        if limit is not None:
            number = value if type(value) is int else as_int(op, name, value)
            if not 0 <= number < limit:
                raise out_of_range(op, name, number, limit)
        elif name in FLAGS:
            as_flag(op, name, value)
        elif name == "accesses":
            check_bulk(op, value, named["gfns"])


def as_int(op: str, name: str, value: object) -> int:
    """Return an int subclass (an enum, a NewType) as it is; refuse bool and everything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise InvalidArgumentError(
        f"{op}: {name} must be an integer, not {type(value).__name__}", op=op
    )


def as_flag(op: str, name: str, value: object) -> bool:
    """Return a bool as it is; refuse everything else."""
    if value is True or value is False:
        return value
    raise InvalidArgumentError(f"{op}: {name} must be a bool, not {value!r}", op=op)


def out_of_range(op: str, name: str, value: int, limit: int) -> InvalidArgumentError:
    """Make the error for a number C would truncate."""
    return InvalidArgumentError(
        f"{op}: {name} is {value:#x}, which is not in 0..{limit - 1:#x}", op=op
    )


def check_bulk(op: str, accesses: object, gfns: object) -> None:
    """Check the arrays of a bulk access call: one access byte for each 64-bit gfn."""
    if not isinstance(accesses, bytes | bytearray | memoryview):
        raise InvalidArgumentError(f"{op}: accesses must be bytes-like", op=op)
    if not (
        (isinstance(gfns, array) and gfns.typecode == "Q")
        or (isinstance(gfns, memoryview) and gfns.format == "Q" and gfns.c_contiguous)
    ):
        raise InvalidArgumentError(f'{op}: gfns must be array("Q", ...) or such a view', op=op)
    if len(accesses) != len(gfns):
        raise InvalidArgumentError(
            f"{op}: {len(accesses)} accesses do not match {len(gfns)} gfns", op=op
        )


def refuse_livelock(op: str, gfn: int) -> None:
    """Refuse the one argument that Xen never comes back from.

    Raises:
        InvalidArgumentError: ``gfn`` is ~0: the loop counter of ``p2m_set_suppress_ve_multi``
            wraps (``mm/altp2m.c``, 4.14 to 4.22).
    """
    if gfn == ALL_GFNS:
        raise InvalidArgumentError(f"{op}: Xen never returns from gfn ~0", op=op, gfn=gfn)


def only_domid(name: str, domids: Sequence[int]) -> int | None:
    """Return the only domid with a name, or None if there is none.

    xenstore keeps no name from being given twice, and libxl takes the first that it finds.
    """
    if len(domids) > 1:
        raise InvalidArgumentError(
            f"{len(domids)} domains are called {name!r}: {', '.join(map(str, domids))}",
            op="name_to_domid",
            hint=("give the domid or the uuid",),
        )
    return domids[0] if domids else None


def unknown_mapping(op: str) -> InvalidArgumentError:
    """Make the error for an unmap of something that was not mapped, or not any more."""
    return InvalidArgumentError(f"{op}: not a mapping of this backend, or unmapped already", op=op)
