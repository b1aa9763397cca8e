# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hazards that a real toolstack and a real hypervisor bring about."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import xenaltp2m as xa
from xenaltp2m.backend import Backend
from xenaltp2m.handles.hazards import Severity, survey
from xenaltp2m.types import HVM_PARAM_ALTP2M, MemoryType

_ENABLE_LOGDIRTY, _OFF = 2, 0
"""``XEN_DOMCTL_SHADOW_OP_*``, public/domctl.h."""


@contextmanager
def domain(backend: Backend, mode: str, *config: str) -> Iterator[xa.Domain]:
    """A domain of its own, paused, with more in its configuration than the others."""
    name = f'name="hazards-{mode}"'
    file = f"/lab/{mode}-1.cfg"
    subprocess.run(["xl", "create", "-p", "-q", "-e", file, name, *config], check=True)
    xen = xa.Xen(backend)
    dom = xen.domain(f"hazards-{mode}")
    try:
        yield dom
    finally:
        dom.abandon()
        xen.abandon()
        subprocess.run(["xl", "destroy", f"hazards-{mode}"], check=True)


def refused(dom: xa.Domain) -> list[str]:
    return [hazard.name for hazard in dom.hazards() if hazard.severity is Severity.PROBLEM]


def test_libxl_refuses_memory_below_maxmem_with_altp2m() -> None:
    command = ["xl", "create", "-p", "-q", "-e", "/lab/external-1.cfg", 'name="pod"', "maxmem=32"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode
    assert "PoD" in done.stderr


def test_memory_below_maxmem(backend: Backend) -> None:
    """Without altp2m libxl makes it; up to 4.18 its mode can then be set."""
    with domain(backend, "disabled", "maxmem=32") as dom:
        target = backend.domain_get_pod_target(int(dom.domid))
        assert target.entries > 0
        found = {hazard.name: hazard for hazard in dom.hazards()}
        assert found["populate-on-demand"].severity is Severity.PROBLEM
        assert str(target.entries) in found["populate-on-demand"].evidence
        assert "16384 KiB" in found["ballooning"].evidence
        if backend.release.mode_set_at_creation:
            return
        backend.hvm_param_set(int(dom.domid), HVM_PARAM_ALTP2M, xa.Altp2mMode.EXTERNAL)
        with pytest.raises(xa.HazardError) as caught:
            dom.altp2m()
        assert caught.value.hazards == ("populate-on-demand",)
        assert not dom.altp2m_active
        dom.altp2m(accept=("populate-on-demand",)).close()


def test_a_guest_that_is_to_balloon(backend: Backend) -> None:
    with domain(backend, "external") as dom:
        assert "ballooning" not in {hazard.name for hazard in dom.hazards()}
        subprocess.run(["xl", "mem-set", str(int(dom.domid)), "8m"], check=True)
        found = {hazard.name: hazard for hazard in dom.hazards()}
        assert "of 16384 KiB at most" in found["ballooning"].evidence
        dom.altp2m().close()  # it is only told


def test_log_dirty(backend: Backend) -> None:
    with domain(backend, "external") as dom, logging(backend, int(dom.domid)):
        assert backend.hvm_get_mem_type(int(dom.domid), 0x200) is MemoryType.READ_ONLY
        assert refused(dom) == ["log-dirty"]
        with pytest.raises(xa.HazardError) as caught:
            dom.altp2m()
        assert caught.value.hazards == ("log-dirty",)
        with dom.altp2m(accept=("log-dirty",)) as altp2m:
            view = altp2m.create_view()
            with pytest.raises(xa.XenError):  # what the hazard says of a remap
                view.remap(0x200, 0x201)


@contextmanager
def logging(backend: Backend, domid: int) -> Iterator[None]:
    """Have Xen log a domain's writes, as a migration does, through the library itself."""
    library = ctypes.CDLL(f"libxenctrl.so.{backend.release}", use_errno=True)
    library.xc_interface_open.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(library.xc_interface_open(None, None, 0))

    def control(op: int) -> None:
        # What the older prototype has more are zeros, in registers and on the stack.
        nothing = ctypes.c_void_p(None)
        done = library.xc_shadow_control(handle, domid, op, nothing, 0, nothing, 0, nothing)
        assert done == 0, ctypes.get_errno()

    control(_ENABLE_LOGDIRTY)
    try:
        yield
    finally:
        control(_OFF)
        library.xc_interface_close(handle)


def test_nested(backend: Backend) -> None:
    with domain(backend, "disabled", "nestedhvm=1") as dom:
        assert refused(dom) == ["nested"]


def test_a_device_that_xenstore_tells_of(backend: Backend) -> None:
    """The emulated machine has no IOMMU, so that the nodes are written without a device."""
    with domain(backend, "external") as dom:
        path = f"/local/domain/0/backend/pci/{int(dom.domid)}/0"
        nodes = [f"{path}/num_devs", "1", f"{path}/dev-0", "0000:03:00.0"]
        subprocess.run(["xenstore-write", *nodes], check=True)
        assert refused(dom) == ["passthrough"]
        with pytest.raises(xa.HazardError, match="0000:03:00"):
            dom.altp2m()
        dom.altp2m(accept=("passthrough",)).close()
        subprocess.run(["xenstore-rm", path], check=True)


def test_nothing_is_unknown_of_an_ordinary_guest(backend: Backend) -> None:
    with domain(backend, "external") as dom:
        found = survey(dom.context)
        assert found.unknown == {}
        assert not {"p2m-pool", "emulated-devices"} & {hazard.name for hazard in found.hazards}
