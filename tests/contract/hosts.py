# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts that can make guests for the contract: the mock, and Xen through xl."""

from __future__ import annotations

import subprocess
from pathlib import Path

from xenaltp2m.abi.releases import Release
from xenaltp2m.backend import Backend
from xenaltp2m.backend.mock import MockBackend
from xenaltp2m.types import Altp2mMode


class Host:
    """A hypervisor that can make guests: PVH, 16 MiB, paused, never run."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.release: Release = backend.release
        self._shared: dict[tuple[Altp2mMode, int], int] = {}

    def shared_domain(self, mode: Altp2mMode = Altp2mMode.EXTERNAL, vcpus: int = 1) -> int:
        """Return a domain that tests share: its host p2m may have been changed by others."""
        key = mode, vcpus
        if key not in self._shared:
            self._shared[key] = self.create(mode, vcpus)
        return self._shared[key]

    def reset(self) -> None:
        """Bring the shared domains back to where a test may start."""
        for (mode, _), domid in self._shared.items():
            if mode is not Altp2mMode.DISABLED:
                self.backend.altp2m_set_domain_state(domid, False)

    def close(self) -> None:
        """Destroy the shared domains."""
        for domid in self._shared.values():
            self.destroy(domid)
        self.backend.close()

    def name_of(self, mode: Altp2mMode, vcpus: int) -> str:
        """Return the name of the next domain of this kind."""
        raise NotImplementedError

    def create(self, mode: Altp2mMode = Altp2mMode.EXTERNAL, vcpus: int = 1) -> int:
        """Make a domain of one's own."""
        raise NotImplementedError

    def create_plain(self) -> int:
        """Make a domain in whose configuration altp2m is not named."""
        raise NotImplementedError

    def pv_domain(self) -> int:
        """Return a domain that is PV."""
        raise NotImplementedError

    def destroy(self, domid: int) -> None:
        """Destroy a domain."""
        raise NotImplementedError


class MockHost(Host):
    """The mock: as many domains as asked for."""

    backend: MockBackend

    def name_of(self, mode: Altp2mMode, vcpus: int) -> str:
        return f"{mode.name.lower()}-{vcpus}-{len(self.backend.machine.domains)}"

    def create(self, mode: Altp2mMode = Altp2mMode.EXTERNAL, vcpus: int = 1) -> int:
        return self.backend.add_domain(self.name_of(mode, vcpus), mode=mode, vcpus=vcpus)

    def create_plain(self) -> int:
        return self.create(Altp2mMode.DISABLED)

    def pv_domain(self) -> int:
        return self.backend.add_domain("pv", kind="pv", mode=Altp2mMode.DISABLED)

    def destroy(self, domid: int) -> None:
        self.backend.destroy(domid)


class XenHost(Host):
    """The hypervisor underneath, through xl."""

    _created = 0

    def name_of(self, mode: Altp2mMode, vcpus: int) -> str:
        return f"{mode.name.lower()}-{vcpus}-{self._created}"

    def create(self, mode: Altp2mMode = Altp2mMode.EXTERNAL, vcpus: int = 1) -> int:
        self._created += 1
        config = f"/lab/{mode.name.lower()}-{vcpus}.cfg"
        return self._create(config, self.name_of(mode, vcpus))

    def create_plain(self) -> int:
        text = Path("/lab/disabled-1.cfg").read_text()
        lines = [line for line in text.splitlines() if not line.startswith("altp2m")]
        config = Path("/tmp/plain.cfg")
        config.write_text("\n".join(lines))
        return self._create(str(config), "plain")

    def pv_domain(self) -> int:
        return 0

    def _create(self, config: str, name: str) -> int:
        subprocess.run(["xl", "create", "-p", "-q", "-e", config, f'name="{name}"'], check=True)
        found = subprocess.run(["xl", "domid", name], check=True, capture_output=True, text=True)
        return int(found.stdout)

    def destroy(self, domid: int) -> None:
        subprocess.run(["xl", "destroy", str(domid)], check=True)
