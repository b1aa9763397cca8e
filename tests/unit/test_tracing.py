# SPDX-License-Identifier: LGPL-2.1-or-later
"""Traces of a few instructions on the simulator; ``tests/contract`` has what holds on Xen, too."""

from __future__ import annotations

import xenaltp2m as xa
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.symbols import Symbol, Symbols
from xenaltp2m.tracing import Call, Return, Trace

from .machinecode import CODE, HALT, Computer


def test_fault_02_a_stack_segment_with_a_base() -> None:
    """push $7; call; hlt: the return address is where SS begins, and esp."""
    base, top = 0x2_0008, 0x1000
    function = CODE + 8
    host = MockBackend((4, 17), memory_pages=1 << 13)
    computer = Computer(b"\x6a\x07" + b"\xe8\x01\0\0\0" + HALT + b"\x40\xc3", host=host)
    computer.describe()
    computer.set(rax=5, ss_base=base, rsp=top)
    symbols = Symbols([(function, 1, Symbol("function", function, 2))], "by hand")
    with (
        xa.connect(host) as xen,
        xen.domain(computer.domid) as dom,
        Trace(dom, "function", symbols=symbols, arguments=1, returns=True) as trace,
    ):
        host.steps_at_once = 200
        [call, came_back] = trace.calls(timeout=0.01)
    assert isinstance(call, Call)
    assert (call.stack, call.caller, call.arguments) == (base + top - 8, CODE + 7, (7,))
    assert isinstance(came_back, Return)
    assert came_back.value == 6
