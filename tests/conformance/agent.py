# SPDX-License-Identifier: LGPL-2.1-or-later
"""A random agent: restricts, remaps, switches and answers as a seed says; keeps what it hears.

The same seed and the same guest from its first instruction on must be told the same, by real Xen
and by the simulator. What an agent does depends on nothing but its seed and the events so far.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import xenaltp2m as xa
from xenaltp2m.tools.symbols import Image

ACCESSES = [xa.Access.RW, xa.Access.R, xa.Access.N, xa.Access.RX, xa.Access.X, xa.Access.RWX]
EPISODE = 60
"""Events between two changes of mind."""
PATIENCE = 2.0
"""Seconds without an event after which none is expected."""
BEYOND = 2
"""Pages behind the image: where the guest's start information is."""
TABLES = ("boot_root", "boot_pointers", "boot_directory", "roots", "tables")
"""Page tables that the guest's CPU marks as used. Where they can be read and not written, the CPU
must fault (SDM 3C, 29.3.3.2); that of the lab, an emulator, does not."""
RACE, RACERS = "hit", 4
"""The function that several vCPUs call, in the guest that has it."""
TRIPS = "trips"
"""What only the guest counts that has a view of its own."""
VMFUNC = b"\x0f\x01\xd4"
CONTROL = xa.ControlRegister


class Agent:
    """Keeps what it hears of a domain; the subclasses answer."""

    def __init__(self, image: Image, limit: int) -> None:
        self.limit = limit
        self.rows: list[bytes] = []
        self.stop: Callable[[], None] = lambda: None
        self._code = [
            range(start, start + segment.size)
            for segment in image.segments
            for start in (segment.address, segment.virtual)
        ]

    def __call__(self, event: xa.Event) -> xa.Response | None:
        """Hear of an event and answer it."""
        if isinstance(event, xa.DomainEnded):
            return None
        self.rows.append(event.raw)
        astray = not any(event.registers.rip in span for span in self._code)
        if len(self.rows) >= self.limit or astray:
            self.stop()  # elsewhere a guest meets what firmware left there, which is Xen's own
            return None
        return self._answer(event)

    def _answer(self, event: xa.Event) -> xa.Response | None:
        raise NotImplementedError


class RandomAgent(Agent):
    """What one seed makes of a domain."""

    def __init__(
        self, dom: xa.Domain, altp2m: xa.Altp2m, image: Image, seed: int, limit: int
    ) -> None:
        super().__init__(image, limit)
        self.dom = dom
        self._chance = random.Random(seed)
        self._gfns = image_gfns(image)
        self._tables = [gfn for name in TABLES if name in names(image) for gfn in image.gfns(name)]
        self._shadows = [int(gfn) for gfn in dom.add_pages(2)]
        self._views = [altp2m.create_view() for _ in range(2)]
        self._busy = self._gfns[:1]
        """Pages with code that was executed lately: they stay restricted, so that events go on."""
        for view in self._views:
            self._decide(view)
        altp2m.switch_to_view(self._views[0])

    def _decide(self, view: xa.View) -> None:
        chance = self._chance
        for old in list(view.remaps):
            if chance.random() < 0.5:
                view.revert(old)
        view.set_access(self._gfns, xa.Access.RWX)
        density = chance.choice([0.1, 0.3, 0.6])
        for gfn in self._gfns:
            if chance.random() < density:
                view.set_access(gfn, chance.choice(ACCESSES))
        if chance.random() < 0.4:
            gfn, shadow = chance.choice(self._gfns), chance.choice(self._shadows)
            self.dom.memory.write_page(shadow, self.dom.memory.read_page(gfn))
            view.remap(gfn, shadow, access=chance.choice([xa.Access.RWX, xa.Access.RX]))

        for gfn in self._tables:
            if view.access(gfn) in (xa.Access.R, xa.Access.RX):
                view.set_access(gfn, xa.Access.RW)
        for each in self._views:
            for gfn in self._busy:
                each.set_access(gfn, chance.choice(ACCESSES[:3]))

    def _answer(self, event: xa.Event) -> xa.Response | None:
        chance = self._chance
        if len(self.rows) % EPISODE == 0:
            self._decide(chance.choice(self._views))
        if isinstance(event, xa.MemAccess) and event.access_flags & xa.AccessFlag.X:
            self._busy = [int(event.gfn), self._busy[0]]
        pick, view = chance.random(), chance.choice(self._views)
        if isinstance(event, xa.MemAccess):
            if pick < 0.5:
                return xa.Response.fast_singlestep(through=0, back_to=view)
            if pick < 0.75:
                return xa.Response.singlestep(view=0)
            if pick < 0.85:
                return xa.Response.emulate()
            if pick < 0.97:
                return xa.Response.fast_singlestep(through=0, back_to=view)
            if int(event.gfn) not in self._busy:
                view.set_access(int(event.gfn), xa.Access.RWX)
            return xa.Response.fast_singlestep(through=0, back_to=view)
        if isinstance(event, xa.Singlestep):
            return xa.Response.singlestep() if pick < 0.4 else xa.Response.resume(view=view)
        return None


class SeparateAgent(Agent):
    """Answers each vCPU as if there were no other: what it hears of one then depends on no other.

    Views stay as they are, for a change would come at another moment for each vCPU.
    """

    def __init__(
        self, dom: xa.Domain, altp2m: xa.Altp2m, image: Image, seed: int, limit: int
    ) -> None:
        super().__init__(image, limit)
        self._chances = [random.Random(f"{seed} {vcpu}") for vcpu in range(RACERS)]
        self._views = [altp2m.create_view() for _ in range(2)]
        [gfn] = image.gfns(RACE)
        for view in self._views:
            view.set_access(gfn, random.Random(seed).choice(ACCESSES[:3]))
        altp2m.switch_to_view(self._views[0])

    def _answer(self, event: xa.Event) -> xa.Response | None:
        chance = self._chances[int(event.vcpu)]
        pick, view = chance.random(), chance.choice(self._views)
        if isinstance(event, xa.MemAccess):
            if pick < 0.5:
                return xa.Response.fast_singlestep(through=0, back_to=view)
            return xa.Response.singlestep(view=0) if pick < 0.8 else xa.Response.emulate()
        return xa.Response.singlestep() if pick < 0.4 else xa.Response.resume(view=view)


class MixedAgent(Agent):
    """Shares altp2m with a guest that has a view of its own and VMFUNC: restricts that, too.

    In the guest's view there is #VE, and the lab's CPU tells the guest there which view VMFUNC last
    went to (Bochs, vmfunc_eptp_switching; nothing else sets eptp_index), not which Xen put it in.
    So it is put there only after VMFUNC went there.
    """

    def __init__(
        self, dom: xa.Domain, altp2m: xa.Altp2m, image: Image, seed: int, limit: int
    ) -> None:
        super().__init__(image, limit)
        self._dom, self._image = dom, image
        self._chance = random.Random(seed)
        self._gfns = image_gfns(image)
        self._code_gfns = image.gfns("main")
        view = altp2m.create_view()
        self._own, self._guests = int(view.id), 0
        self._last = 0
        """Where VMFUNC went."""
        self._decide(self._own)
        altp2m.switch_to_view(view)

    def _decide(self, view: int) -> None:
        chance, backend, domid = self._chance, self._dom._backend, int(self._dom.domid)
        density = chance.choice([0.1, 0.3, 0.6])
        for gfn in self._gfns:
            access = chance.choice(ACCESSES) if chance.random() < density else xa.Access.RWX
            if gfn in self._code_gfns:
                access = chance.choice(ACCESSES[:3])  # events go on
            backend.altp2m_set_mem_access(domid, view, gfn, access.value)
            if view != self._own:
                backend.altp2m_set_suppress_ve(domid, view, gfn, chance.random() < 0.7)

    def _answer(self, event: xa.Event) -> xa.Response | None:
        chance, here = self._chance, int(event.view or 0)
        if here not in (0, self._own):
            self._last = here
            if not self._guests:
                self._guests = here
                self._decide(here)
        if len(self.rows) % EPISODE == 0:
            self._decide(self._guests if self._guests and chance.random() < 0.5 else self._own)
        rip, is_switch = event.registers.rip, False
        for segment in self._image.segments:
            at = rip - segment.address
            is_switch |= segment.data[at : at + len(VMFUNC)] == VMFUNC if at >= 0 else False
        pick = chance.random()
        may_return = self._guests and self._last == self._guests and not is_switch
        view = self._guests if may_return and chance.random() < 0.7 else self._own
        if isinstance(event, xa.MemAccess):
            if is_switch:
                self._last = event.registers.rcx
            if pick < 0.4:
                return xa.Response.fast_singlestep(through=0, back_to=view)
            return xa.Response.singlestep(view=0) if pick < 0.99 else xa.Response.emulate()
        if pick < 0.4:
            if is_switch:
                self._last = event.registers.rcx
            return xa.Response.singlestep()
        free = pick < 0.8 and self._guests and not here  # it comes back by itself
        return xa.Response.resume() if free else xa.Response.resume(view=view)


def names(image: Image) -> set[str]:
    """The image's symbols."""
    return {symbol.name for symbol in image.symbols}


def kind_of(image: Image) -> type[RandomAgent | SeparateAgent | MixedAgent]:
    """What watches a guest."""
    if has_own_views(image):
        return MixedAgent
    return SeparateAgent if RACE in names(image) else RandomAgent


def has_own_views(image: Image) -> bool:
    """Whether it is the guest that uses altp2m itself."""
    return TRIPS in names(image)


def vcpus(image: Image) -> int:
    """How many vCPUs a guest gets."""
    return RACERS if RACE in names(image) else 1


def image_gfns(image: Image) -> list[int]:
    """The gfns an image is loaded to, and a few behind."""
    found: set[int] = set()
    for segment in image.segments:
        first = segment.address >> 12
        last = (segment.address + segment.size - 1) >> 12
        found |= set(range(first, last + 1))
    end = max(found)
    return sorted(found | set(range(end + 1, end + 1 + BEYOND)))


def subscriptions(chance: random.Random) -> list[xa.Subscription | type[xa.Event]]:
    """What else the agent hears of."""
    offered: Sequence[xa.Subscription | type[xa.Event]] = [
        xa.WriteCtrlreg.on(CONTROL.CR0),
        xa.WriteCtrlreg.on(CONTROL.CR3),
        xa.WriteCtrlreg.on(CONTROL.CR4),
        xa.MovToMsr.on(0xC0000080),
        xa.SoftwareBreakpoint,
        xa.GuestRequest,
    ]
    return [one for one in offered if chance.random() < 0.5]


def run(
    dom: xa.Domain,
    image: Image,
    seed: int,
    limit: int,
    unpause: Callable[[], None],
    patience: float = PATIENCE,
) -> list[bytes]:
    """Attach to a domain that has not begun, and return what was heard, as Xen wrote it."""
    chosen = subscriptions(random.Random(seed))
    with (
        dom.altp2m(accept=("mixed",)) as altp2m,  # some guests use views themselves
        dom.monitor(xa.MemAccess, xa.Singlestep, *chosen) as monitor,
    ):
        agent = kind_of(image)(dom, altp2m, image, seed, limit)
        agent.stop = monitor.stop
        unpause()
        monitor.run(agent, timeout=patience)
    return agent.rows
