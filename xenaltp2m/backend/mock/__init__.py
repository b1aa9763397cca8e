# SPDX-License-Identifier: LGPL-2.1-or-later
"""A hypervisor without Xen: the Backend Protocol over a model of Xen's altp2m.

The model answers as the chosen release does, errno for errno, so that agents and their tests run
anywhere. On top of the Protocol there is what a test wants: domains to create, a log of calls,
failures on demand, a guest that touches memory, and a readable dump of any view.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

from xenaltp2m import errors
from xenaltp2m.abi.releases import SUPPORTED, Release, release
from xenaltp2m.abi.vm_event import as_line
from xenaltp2m.backend.mock.calls import Call, InjectedFault
from xenaltp2m.backend.mock.effects import (
    Cpuid,
    DebugException,
    DescriptorAccess,
    GuestRequest,
    Halt,
    PortIo,
    SetRegisters,
    WriteControlRegister,
    WriteMsr,
)
from xenaltp2m.backend.mock.guest import Outcome, touch
from xenaltp2m.backend.mock.machine import Domain, Livelock, Machine
from xenaltp2m.backend.mock.operations import ModelBackend
from xenaltp2m.backend.mock.p2m import Entry
from xenaltp2m.backend.mock.scheduler import run
from xenaltp2m.backend.mock.script import Access, Instruction, Script
from xenaltp2m.backend.mock.vcpu import Vcpu
from xenaltp2m.backend.protocol import Backend
from xenaltp2m.types import PAGE_SIZE
from xenaltp2m.values.arguments import check_flag, check_kind, check_number

__all__ = [
    "Access",
    "Call",
    "Cpuid",
    "DebugException",
    "DescriptorAccess",
    "GuestRequest",
    "Halt",
    "Instruction",
    "Livelock",
    "MockBackend",
    "Outcome",
    "PortIo",
    "SetRegisters",
    "WriteControlRegister",
    "WriteMsr",
]

_Text = TypeVar("_Text", bound=TextIO)


class MockBackend(ModelBackend):
    """The Backend Protocol on a modelled host, and what tests want besides.

    Attributes:
        machine: The modelled host, with its domains; tests may look and reach into it.
        calls: The calls made so far, oldest first; the oldest fall out past 100 000.
        steps_at_once: How many instructions a domain's vCPUs execute at most, together, when a
            call lets them go on: 256, or 250 000 of a domain that executes machine code, unless
            another number was set, in 256 turns; None: until they cannot, see :meth:`run`.
    """

    def __init__(
        self,
        xen: tuple[int, int] | str = (4, 17),
        *,
        altp2m: bool = True,
        privileged: bool = True,
        vm_event: bool = True,
        library: tuple[int, int] | str | None = None,
        executable_superpages: bool = False,
        has_virtualisation_exceptions: bool = True,
        physical_address_bits: int = 39,
        memory_pages: int = 1 << 20,
        seed: int = 0,
    ) -> None:
        """Make a host.

        Args:
            xen: The hypervisor's release, (4, 14) to (4, 22), or "4.14" to "4.22".
            altp2m: Whether Xen was booted with ``altp2m=1`` on a CPU that can.
            privileged: Whether the caller is the control domain.
            vm_event: Whether Xen was built with CONFIG_VM_EVENT, without which 4.22 can be.
            library: The libxenctrl's release where it is not the hypervisor's.
            executable_superpages: False on CPUs where Xen splits them for XSA-304.
            has_virtualisation_exceptions: Whether the CPU has #VE.
            physical_address_bits: The CPU's ``maxphysaddr``.
            memory_pages: The host's memory for guests, in 4 KiB pages; taken only when touched.
            seed: Of how vCPUs with machine code take turns: the same seed, the same run.

        Raises:
            InvalidArgumentError: An argument is not of its kind, or there is no such release.
        """
        for name, flag in (
            ("altp2m", altp2m),
            ("privileged", privileged),
            ("vm_event", vm_event),
            ("executable_superpages", executable_superpages),
            ("has_virtualisation_exceptions", has_virtualisation_exceptions),
        ):
            check_flag(name, flag)
        check_number("physical_address_bits", physical_address_bits, least=36, most=52)
        check_number("memory_pages", memory_pages, least=1)
        check_kind("seed", seed, int, "an integer")
        machine = Machine(
            _release("xen", xen),
            altp2m=altp2m,
            privileged=privileged,
            vm_event=vm_event,
            library=None if library is None else _release("library", library),
            executable_superpages=executable_superpages,
            has_virtualisation_exceptions=has_virtualisation_exceptions,
            physical_address_bits=physical_address_bits,
            memory_pages=memory_pages,
        )
        super().__init__(machine, seed)

    def add_domain(self, name: str = "guest", **options: Any) -> int:
        """Create a paused domain and return its domid.

        Args:
            name: Its name.
            **options: ``kind`` ("pvh", "hvm" or "pv"), ``mode``, ``view_count`` (4.21 and later),
                ``vcpus``, ``memory_kib``, ``max_kib``, ``pool_pages``, ``superpages``, ``nested``;
                see :meth:`xenaltp2m.backend.mock.machine.Machine.add_domain`.

        Raises:
            InvalidArgumentError: An option is not of its kind, or a domain has that name.
        """
        return self.machine.add_domain(name, **options).domid

    def domain(self, domid: int) -> Domain:
        """Return the model of a domain, to inspect it or to change it unknown to the agent."""
        check_number("domid", domid)
        found = self.machine.domains.get(domid)
        if found is None:
            raise errors.DomainNotFoundError(f"the mock host has no domain {domid!r}")
        return found

    def fail(self, op: str | None, nth: int, errno: int) -> None:
        """Make the ``nth`` call from now on (1 is the next) fail once, with nothing done.

        Args:
            op: The operation, or None to count calls of any.
            nth: From 1.
            errno: What the caller gets.
        """
        if op is not None and not (isinstance(op, str) and hasattr(Backend, op)):
            raise errors.InvalidArgumentError(f"there is no operation {op!r}")
        check_number("nth", nth, least=1)
        check_number("errno", errno, least=1)
        self._faults.append(InjectedFault(op, nth, errno))

    def touch(
        self, domid: int, gfn: int, kind: str = "r", vcpu: int = 0, offset: int = 0
    ) -> Outcome:
        """Let a vCPU read ("r"), write ("w") or fetch ("x") in a gfn, and say how that ended.

        A vCPU does it whatever else it does, running or not, for tests that need no program.
        """
        check_number("gfn", gfn)
        check_number("offset", offset, most=PAGE_SIZE - 1)
        if kind not in ("r", "w", "x"):
            raise errors.InvalidArgumentError(f'kind must be "r", "w" or "x", not {kind!r}')
        model = self._vcpu(domid, vcpu)
        return touch(self._monitor_of(domid), model, gfn, kind, offset)

    def load(
        self, domid: int, program: Iterable[Instruction], vcpu: int = 0, *, loop: bool = False
    ) -> None:
        """Give a vCPU a program, which it runs from the start; bring the vCPU up if it was down.

        It runs, with the domain's other vCPUs, in :meth:`run`, whenever a call lets it go on
        (``domain_unpause``, ``evtchn_notify``, ``monitor_resume``, ``monitor_disable``), and a
        little after each ``vcpu_getinfo``.

        Args:
            domid: The domain.
            program: What it executes, in order.
            vcpu: The vCPU.
            loop: Whether it begins again after the last; if not it then waits, as after HLT.
        """
        model = self._vcpu(domid, vcpu)
        check_kind("program", program, Iterable, "instructions")
        check_flag("loop", loop)
        self._script(domid, vcpu).load(program, loop=loop)
        model.online = True

    def boot(self, domid: int, image: str | os.PathLike[str] | bytes) -> None:
        """Give a domain a PVH guest's image to execute, as libxl does: see :meth:`load` for when.

        What it writes to port 0xe9 is in :meth:`console`. A guest with several vCPUs brings them up
        itself.

        Args:
            domid: The domain, paused since it was made.
            image: An ELF file, or its content.

        Raises:
            ImportError: The package unicorn is missing: ``pip install 'xenaltp2m[sim]'``.
            InvalidArgumentError: It is not an image of a PVH guest, or has no room in memory; or
                the domain runs.
            OSError: The file cannot be read.
        """
        check_kind("image", image, str | os.PathLike | bytes, "a path, or an ELF file's bytes")
        if not self.domain(domid).pauses:
            raise errors.InvalidArgumentError(
                f"domain {domid} runs: boot an image before the domain is unpaused", domid=domid
            )
        from xenaltp2m.backend.mock import images, simulator  # an extra, which opens libraries

        name = "the image" if isinstance(image, bytes) else os.fspath(image)
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        processors = simulator.processors(self._monitor_of(domid))
        images.load(self.domain(domid), content, name)
        self._simulate(domid, processors)

    def execute(self, domid: int, registers: Mapping[str, int], vcpu: int = 0) -> None:
        """Let a vCPU execute what is in memory, from the given registers on; see :meth:`boot`.

        Args:
            domid: The domain; :meth:`xenaltp2m.handles.memory.Memory.write` puts code and
                tables into it.
            registers: By the names of ``struct hvm_hw_cpu``. What is not given is as a PVH guest
                begins; with ``msr_efer`` in long mode (LMA) segments are those of 64-bit code.
            vcpu: The vCPU, which is brought up if it was down.

        Raises:
            ImportError: The package unicorn is missing: ``pip install 'xenaltp2m[sim]'``.
            InvalidArgumentError: There is no such register.
        """
        from xenaltp2m.backend.mock import images, simulator  # an extra, which opens libraries

        model = self._vcpu(domid, vcpu)
        check_kind("registers", registers, Mapping, "a mapping of names to numbers")
        if not self._simulates(domid):
            self._simulate(domid, simulator.processors(self._monitor_of(domid)))
        images.begin(model, registers)

    def console(self, domid: int) -> str:
        """Return what a guest that :meth:`boot` started wrote to port 0xe9."""
        self.domain(domid)
        [first, *_] = self._processors_of(domid)
        return first.written.decode(errors="replace")

    def run(self, domid: int, steps: int | None = None) -> int:
        """Let a domain's vCPUs execute, in turn, up to ``steps`` instructions.

        An attempt that executes none, for it causes an event or a fault, is a step, too; so is
        each repetition of a repeated string instruction. Without a number they execute until each
        of them waits for something. This is the fastest way for machine code, for then nothing
        counts its instructions; a guest that never stops is never come back from.

        Returns:
            How many were executed and counted; an attempt that causes an event or a fault does
            not count.
        """
        self.domain(domid)
        if steps is not None:
            check_number("steps", steps)
        return run(self._processors_of(domid), steps, self._chance)

    @contextlib.contextmanager
    def recording(self, domid: int, file: _Text) -> Iterator[_Text]:
        """Write down what a domain's vCPUs tell its agent, and the answers, while this lasts.

        A line of JSON for each, in their order: ``request`` (the reason) or ``response`` (the
        flags), ``vcpu``, and ``raw``, its bytes in hexadecimal, which
        :meth:`xenaltp2m.values.events.Event.of` wraps. Nothing else is in it, so the same run with
        the same seed gives the same file.

        Raises:
            InvalidArgumentError: It is being recorded.
        """
        monitor = self._monitor_of(domid)
        if monitor.record is not None:
            raise errors.InvalidArgumentError(f"domain {domid} is being recorded")

        def record(kind: str, raw: bytes) -> None:
            file.write(json.dumps(as_line(raw, response=kind == "response")) + "\n")

        monitor.record = record
        try:
            yield file
        finally:
            monitor.record = None

    def destroy(self, domid: int) -> None:
        """End a domain, as ``xl destroy`` does; it lingers, dying, while pages are mapped."""
        domain = self.domain(domid)
        domain.dying = True
        self._monitor_of(domid).clean_up()
        domain.relinquish()
        self._bury(domain)

    def migrate(self, domid: int) -> int:
        """Save a domain and restore it, as ``xl`` does: it has another domid then, and runs.

        Its memory, its vCPUs and its uuid are what they were; nothing else that a control domain
        has done to it is.

        Returns:
            The domid.
        """
        domain = self.domain(domid)
        new = max(self.machine.domains) + 1
        self._monitor_of(domid).migrate()
        tables: list[dict[int, Any]] = [self.machine.domains, self._monitors, self._processors]
        for table in tables:
            if domid in table:
                table[new] = table.pop(domid)
        domain.migrate(new)
        self._go_on(new)
        return new

    def shut_down(self, domid: int, reason: int = 0) -> None:
        """Let a guest shut down, with a ``SHUTDOWN_*`` reason."""
        check_number("reason", reason)
        self.domain(domid).shut_down(reason)

    def _vcpu(self, domid: int, number: int) -> Vcpu:
        vcpus = self.domain(domid).vcpus
        check_number("vcpu", number, most=len(vcpus) - 1)
        return vcpus[number]

    def _script(self, domid: int, vcpu: int) -> Script:
        processors = self._processors_of(domid)
        script = processors[vcpu]
        if not isinstance(script, Script):
            script = processors[vcpu] = Script(self._monitor_of(domid), script.vcpu)
        return script

    def dump(self, domid: int, view: int | None = None) -> str:
        """Describe the host p2m (``view`` None) or a view's own entries, a line for each run."""
        domain = self.domain(domid)
        if view is None:
            title = f"domain {domid} {domain.name}: host p2m, default {domain.host_default_access}"
            table = domain.host
        else:
            check_number("view", view, most=len(domain.views) - 1)
            state = domain.views[view]
            title = f"domain {domid} {domain.name}: view {view}"
            if not state.exists:
                return f"{title} does not exist"
            title += f", default {state.default_access}" + ("" if state.visible else ", hidden")
            if state.max_remapped >= state.min_remapped:
                title += f", remaps to {state.min_remapped:#x}..{state.max_remapped:#x}"
            table = state.table
        lines = [title]
        for first, count, entry in _runs(table.entries()):
            lines.append(
                f"  {first:#x}..{first + count - 1:#x} -> frame {entry.mfn:#x} "
                f"{entry.type.name.lower()} access {entry.access}"
                f"{'' if entry.suppress_ve else ' #VE'}"
            )
        return "\n".join(lines)

    def open_resources(self) -> list[str]:
        """What the caller has not given back: mappings, event channels, monitors."""
        left = [f"mapping of {len(m.pages)} pages" for m, _ in self._mappings.values()]
        left += [f"event channel {channel}" for channel in self._channels]
        left += [f"monitor of domain {domid}" for domid, m in self._monitors.items() if m.enabled]
        return left


def _release(name: str, wanted: tuple[int, int] | str) -> Release:
    """Return the release that is asked for, as (4, 17) or "4.17"."""
    try:
        version = tuple(map(int, wanted.split("."))) if isinstance(wanted, str) else wanted
        if version in SUPPORTED:
            return release(*version)
    except (TypeError, ValueError):
        pass
    oldest, newest = ("{}.{}".format(*SUPPORTED[at]) for at in (0, -1))
    raise errors.InvalidArgumentError(
        f'{name} must be a release from {oldest} to {newest}, as (4, 17) or "4.17", not {wanted!r}'
    )


def _runs(entries: Iterator[tuple[int, int, Entry]]) -> Iterator[tuple[int, int, Entry]]:
    """Join neighbouring leaves that continue each other: (first gfn, count, first entry)."""
    run: tuple[int, int, Entry] | None = None
    for gfn, order, entry in entries:
        size = 1 << order
        if run is not None:
            first, count, start = run
            if (gfn, entry) == (first + count, start._replace(mfn=start.mfn + count)):
                run = first, count + size, start
                continue
            yield run
        run = gfn, size, entry
    if run is not None:
        yield run
