# SPDX-License-Identifier: LGPL-2.1-or-later
"""What comes back in structures and texts: domains, names, configurations, saved state."""

from __future__ import annotations

import errno
import struct
from pathlib import Path
from uuid import UUID

import pytest

import xenaltp2m as xa
from xenaltp2m.abi.x86 import Paging
from xenaltp2m.backend.libxc import LibxcBackend
from xenaltp2m.errors import (
    DomainNotFoundError,
    InvalidArgumentError,
    LibraryError,
    NotMappedError,
    OutOfMemoryError,
    UnsupportedError,
    XenError,
)
from xenaltp2m.handles.memory import AddressSpace, MappedPages
from xenaltp2m.types import PAGE_SIZE, DomainInfo, DomId, PodTarget, VcpuInfo

from . import fake as fakexc
from .cases import DOMID
from .fake import Fake

UUID_BYTES = bytes(range(0x10, 0x20))


def info(
    domid: int,
    *,
    size: int = 112,
    flags: int = 0,
    pages: int = 0,
    max_pages: int = 0,
    vcpus: int = 0,
    max_vcpu_id: int = 0,
    shared_pages: int = 0,
    paged_pages: int = 0,
) -> bytes:
    """One ``struct xen_domctl_getdomaininfo``, laid out by hand from public/domctl.h."""
    raw = bytearray(b"\xa5" * size)
    raw[0:2] = domid.to_bytes(2, "little")
    raw[4:8] = flags.to_bytes(4, "little")
    raw[8:16] = pages.to_bytes(8, "little")
    raw[16:24] = max_pages.to_bytes(8, "little")
    raw[32:40] = shared_pages.to_bytes(8, "little")
    raw[40:48] = paged_pages.to_bytes(8, "little")
    raw[64:68] = vcpus.to_bytes(4, "little")
    raw[68:72] = max_vcpu_id.to_bytes(4, "little")
    raw[76:92] = UUID_BYTES
    return bytes(raw)


# xc_version.


def test_extraversion(backend: LibxcBackend, fake: Fake) -> None:
    fake.answer("xc_version", data=b".7-pre\0\0\0\0\0\0\0\0\0\0")
    assert backend.xen_extraversion() == ".7-pre"
    assert fake.only_call().args == (1, 1)
    fake.answer("xc_version", data=b"x" * 16)
    assert backend.xen_extraversion() == "x" * 16, "filled to the brim, without a NUL"


def test_commandline(backend: LibxcBackend, fake: Fake) -> None:
    fake.answer("xc_version", data=b"altp2m=1 com1=115200,8n1".ljust(1024, b"\0"))
    assert backend.xen_commandline() == "altp2m=1 com1=115200,8n1"
    assert fake.only_call().args == (9, 1)
    fake.answer("xc_version", data=b"y" * 1023 + b"\xff")
    assert backend.xen_commandline() == "y" * 1023 + "\udcff"


@pytest.mark.parametrize("method", ["xen_extraversion", "xen_commandline"])
def test_version_refused(method: str, backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xc_version", errno.EPERM)
    with pytest.raises(XenError) as caught:
        getattr(backend, method)()
    assert caught.value.errno == errno.EPERM


# xc_domain_getinfolist.


def test_domains(backend: LibxcBackend, fake: Fake) -> None:
    high = 0xFEDC_BA98_7654_3210
    raw = info(0, vcpus=2, max_vcpu_id=3) + info(
        0x7FEF,
        flags=0xFF00_0000 | 3 << 16 | 1 << 1 | 1 << 2 | 1 << 3,
        pages=high,
        max_pages=high + 1,
        vcpus=0x8000_0001,
        max_vcpu_id=0x8000_0000,
        shared_pages=high + 2,
        paged_pages=high + 3,
    )
    fake.answer("xc_domain_getinfolist", 2, data=raw)
    zero, guest = backend.domain_getinfolist(0, 5)
    assert fake.only_call().args == (0, 5)
    assert (zero.domid, zero.hvm, zero.paused, zero.dying, zero.shutdown) == (0,) + (False,) * 4
    assert (zero.shutdown_reason, zero.vcpus, zero.max_vcpu_id) == (0, 2, 3)
    assert guest == DomainInfo(
        domid=DomId(0x7FEF),
        uuid=UUID(bytes=UUID_BYTES),
        hvm=True,
        paused=True,
        dying=False,
        shutdown=True,
        shutdown_reason=3,
        pages=high,
        max_pages=high + 1,
        vcpus=0x8000_0001,
        max_vcpu_id=0x8000_0000,
        shared_pages=high + 2,
        paged_pages=high + 3,
    )


@pytest.mark.parametrize(
    ("release", "size"), [("4.14", 104), ("4.15", 104), ("4.16", 112), ("4.22", 112), ("4.40", 112)]
)
def test_the_librarys_release_gives_the_stride(release: str, size: int, tmp_path: Path) -> None:
    if not fakexc.have_compiler():
        pytest.skip("no gcc to build the stand-in with")
    library = fakexc.build(tmp_path / "lib", release=release)
    fake = Fake(library)
    fake.answer("xc_version", 4 << 16 | int(release.partition(".")[2]))
    backend = fakexc.connect(library)
    raw = b"".join(info(domid, size=size, pages=domid * 10) for domid in (3, 4, 9))
    fake.answer("xc_domain_getinfolist", 3, data=raw)
    found = backend.domain_getinfolist(1, 100)
    assert [(each.domid, each.pages) for each in found] == [(3, 30), (4, 40), (9, 90)]
    backend.close()


def test_a_stride_we_do_not_know_is_noticed(backend: LibxcBackend, fake: Fake) -> None:
    raw = b"".join(info(domid, size=120) for domid in (0, 1, 2, 3))
    fake.answer("xc_domain_getinfolist", 4, data=raw)
    with pytest.raises(LibraryError, match="lays out domains"):
        backend.domain_getinfolist(0, 10)


@pytest.mark.parametrize("domids", [[5, 5], [6, 5], [2]])
def test_domains_come_in_order(domids: list[int], backend: LibxcBackend, fake: Fake) -> None:
    fake.answer("xc_domain_getinfolist", len(domids), data=b"".join(map(info, domids)))
    with pytest.raises(LibraryError):
        backend.domain_getinfolist(3, 10)


def test_the_limit(backend: LibxcBackend, fake: Fake) -> None:
    assert backend.domain_getinfolist(0, 0) == []
    assert backend.domain_getinfolist(0x7FEF, 100) == []
    assert backend.domain_getinfolist(0, (1 << 32) - 1) == []
    assert [call.args for call in fake.calls] == [(0, 0), (0x7FEF, 1), (0, 0x7FF0)]


def test_no_domains_told(backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xc_domain_getinfolist", errno.EACCES)
    with pytest.raises(XenError, match="release is not the hypervisor") as caught:
        backend.domain_getinfolist(0, 1)
    assert caught.value.op == "domain_getinfolist"


# Names: xenstore.


def test_a_name(backend: LibxcBackend, fake: Fake) -> None:
    fake.answer("xs_read", data=b"win10")
    assert backend.domid_to_name(DOMID) == "win10"
    opened, read = fake.calls
    assert (opened.name, opened.args) == ("xs_open", (0,))
    assert (read.name, read.handle, read.args) == ("xs_read", "s", (0,))
    assert read.data == f"/local/domain/{DOMID}/name".encode()
    fake.reset()
    fake.answer("xs_read", data=b"\xff\xfe")
    assert backend.domid_to_name(0) == "\udcff\udcfe"
    assert fake.names() == ["xs_read"], "xenstore is opened once"


def test_no_name(backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xs_read", errno.ENOENT)
    assert backend.domid_to_name(5) is None


def test_xenstore_refuses(backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xs_read", errno.EACCES)
    with pytest.raises(XenError) as caught:
        backend.domid_to_name(5)
    assert (caught.value.op, caught.value.domid) == ("domid_to_name", 5)
    assert caught.value.errno == errno.EACCES


def test_xenstore_is_not_there(backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xs_open", errno.ECONNREFUSED)
    with pytest.raises(XenError) as caught:
        backend.domid_to_name(5)
    assert (caught.value.op, caught.value.errno) == ("xs_open", errno.ECONNREFUSED)
    fake.answer("xs_read", data=b"later")
    assert backend.domid_to_name(5) == "later"


def test_xenstore_is_closed(library: Path, fake: Fake) -> None:
    backend = fakexc.connect(library)
    backend.domid_to_name(1)
    backend.close()
    (closed,) = (call for call in fake.calls if call.name == "xs_close")
    assert closed.handle == "s"


def test_a_search_by_name(backend: LibxcBackend, fake: Fake) -> None:
    for _ in range(3):
        fake.answer("xc_domain_getinfolist", 3, data=info(0) + info(2) + info(7))
    for name in (b"Domain-0", b"win", b"win10"):
        fake.answer("xs_read", data=name)
    assert backend.name_to_domid("win10") == 7
    for number in (errno.ENOENT, errno.ENOENT):
        fake.fail("xs_read", number)
    fake.answer("xs_read", data=b"w\xc3\xafn")
    assert backend.name_to_domid("wïn") == 7
    for name in (b"a", b"b", b"c"):
        fake.answer("xs_read", data=name)
    assert backend.name_to_domid("win10") is None


def test_fault_14_a_name_that_two_domains_have(backend: LibxcBackend, fake: Fake) -> None:
    fake.answer("xc_domain_getinfolist", 3, data=info(0) + info(2) + info(7))
    for name in (b"win", b"Domain-0", b"win"):
        fake.answer("xs_read", data=name)
    with pytest.raises(InvalidArgumentError, match="2 domains are called 'win': 0, 7"):
        backend.name_to_domid("win")


def test_a_search_goes_on_past_a_batch(backend: LibxcBackend, fake: Fake) -> None:
    batch = b"".join(info(domid)[:112] for domid in range(73))
    assert len(batch) <= 8192
    import xenaltp2m.backend.libxc.toolstack as module

    before = module._DOMAINS_AT_ONCE
    module._DOMAINS_AT_ONCE = 73
    try:
        fake.answer("xc_domain_getinfolist", 73, data=batch)
        fake.answer("xc_domain_getinfolist", 1, data=info(0x7FEF))
        assert list(backend._every_domid()) == [*range(73), 0x7FEF]
        assert [call.args for call in fake.calls] == [(0, 73), (73, 73)]
    finally:
        module._DOMAINS_AT_ONCE = before


def test_what_xenstore_has(backend: LibxcBackend, fake: Fake) -> None:
    fake.answer("xs_read", data=b"hvm\0\xff")
    assert backend.xs_read("/libxl/7/type") == b"hvm\0\xff"
    assert fake.calls[-1].data == b"/libxl/7/type"
    fake.fail("xs_read", errno.ENOENT)
    assert backend.xs_read("/libxl/8/type") is None
    fake.fail("xs_read", errno.EACCES)
    with pytest.raises(XenError) as caught:
        backend.xs_read("/libxl/9/type")
    assert (caught.value.op, caught.value.errno) == ("xs_read", errno.EACCES)
    fake.reset()
    with pytest.raises(InvalidArgumentError, match="not a path"):
        backend.xs_read("/libxl/\0/type")
    assert fake.names() == []


# Configurations: libxl.


@pytest.fixture
def known(backend: LibxcBackend, fake: Fake) -> LibxcBackend:
    """A backend that will say, once, that the domain exists."""
    fake.answer("xc_domain_getinfolist", 1, data=info(DOMID))
    return backend


def test_a_configuration(known: LibxcBackend, fake: Fake) -> None:
    text = '{"c_info": {"name": "wïn"}}'
    fake.answer("libxl_userdata_retrieve", data=text.encode() + b"\0")
    assert known.domain_config_json(DOMID) == text
    asked, opened, retrieved = fake.calls
    assert (asked.name, asked.args) == ("xc_domain_getinfolist", (DOMID, 1))
    assert (opened.name, opened.args) == ("libxl_ctx_alloc", (0, 0, 1)), "never a NULL logger"
    assert (retrieved.name, retrieved.handle) == ("libxl_userdata_retrieve", "l")
    assert (retrieved.args, retrieved.data) == ((DOMID,), b"libxl-json")

    fake.reset()
    fake.answer("xc_domain_getinfolist", 1, data=info(DOMID))
    fake.answer("libxl_userdata_retrieve", data=b"{}")
    assert known.domain_config_json(DOMID) == "{}"
    assert "libxl_ctx_alloc" not in fake.names(), "libxl is opened once"
    fake.reset()
    known.close()
    assert "libxl_ctx_free" in fake.names()


@pytest.mark.parametrize("others", [[], [DOMID + 1]])
def test_no_such_domain(others: list[int], backend: LibxcBackend, fake: Fake) -> None:
    raw = b"".join(map(info, others))
    fake.answer("xc_domain_getinfolist", len(others), data=raw)
    with pytest.raises(DomainNotFoundError) as caught:
        backend.domain_config_json(DOMID)
    assert (caught.value.op, caught.value.domid) == ("domain_config_json", DOMID)
    assert fake.names() == ["xc_domain_getinfolist"]


def test_not_created_by_libxl(known: LibxcBackend, fake: Fake) -> None:
    with pytest.raises(XenError, match="not created by libxl") as caught:
        known.domain_config_json(DOMID)
    assert caught.value.errno == errno.ENOENT


def test_libxl_fails(known: LibxcBackend, fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    fake.say("libxl: error: libxl_internal.c:400: cannot open lockfile")
    fake.answer("libxl_userdata_retrieve", -17, errno=errno.EIO)
    with pytest.raises(XenError, match="libxl error -17") as caught:
        known.domain_config_json(DOMID)
    assert (caught.value.op, caught.value.domid) == ("domain_config_json", DOMID)
    assert caught.value.errno is None
    assert caught.value.__notes__ == ["libxl: error: libxl_internal.c:400: cannot open lockfile"]
    assert capfd.readouterr() == ("", "")


def test_libxl_does_not_open(known: LibxcBackend, fake: Fake) -> None:
    fake.say("libxl: error: cannot connect to xenstore")
    fake.answer("libxl_ctx_alloc", -3, errno=errno.ENOENT)
    with pytest.raises(XenError, match="libxl error -3") as caught:
        known.domain_config_json(DOMID)
    assert caught.value.__notes__ == ["libxl: error: cannot connect to xenstore"]
    fake.answer("xc_domain_getinfolist", 1, data=info(DOMID))
    fake.answer("libxl_userdata_retrieve", data=b"{}")
    assert known.domain_config_json(DOMID) == "{}", "once xenstored is up"


# xc_domain_get_pod_target.


def test_populate_on_demand(backend: LibxcBackend, fake: Fake) -> None:
    numbers = 0xFEDC_BA98_7654_3210, 1 << 63, 3
    fake.answer("xc_domain_get_pod_target", data=struct.pack("<QQQ", *numbers))
    assert backend.domain_get_pod_target(DOMID) == PodTarget(*numbers)
    assert fake.only_call().args == (DOMID,)
    fake.fail("xc_domain_get_pod_target", errno.EPERM)
    with pytest.raises(XenError, match="is gone") as caught:
        backend.domain_get_pod_target(DOMID)
    assert (caught.value.op, caught.value.domid) == ("domain_get_pod_target", DOMID)


# xc_shadow_control, of which there are two.


def test_the_pool_in_a_library_up_to_4_15(tmp_path: Path) -> None:
    if not fakexc.have_compiler():
        pytest.skip("no gcc to build the stand-in with")
    library = fakexc.build(tmp_path / "lib", without={"xc_logdirty_control"})
    fake = Fake(library)
    backend = fakexc.connect(library)
    fake.reset()
    fake.answer("xc_shadow_control", outs=(0xFEDC_BA98_7654, 0))
    assert backend.shadow_get_allocation(DOMID) == 0xFEDC_BA98_7654, "an unsigned long there"
    assert fake.only_call().args == (DOMID, 30, 0, 0)
    fake.fail("xc_shadow_control", errno.ENOMEM)
    with pytest.raises(OutOfMemoryError) as caught:
        backend.shadow_get_allocation(DOMID)
    assert (caught.value.op, caught.value.domid) == ("shadow_get_allocation", DOMID)
    backend.close()


# xc_vcpu_getinfo.


@pytest.mark.parametrize("size", [24, 48], ids=["known", "grown"])
@pytest.mark.parametrize("which", ["online", "blocked", "running", ""])
def test_a_vcpu(which: str, size: int, backend: LibxcBackend, fake: Fake) -> None:
    raw = bytearray(b"\xa5" * size)  # struct xen_domctl_getvcpuinfo, by hand from public/domctl.h
    raw[4:7] = bytes(3)
    if which:
        raw[4 + ["online", "blocked", "running"].index(which)] = 1
    raw[8:16] = (0xFEDC_BA98_7654_3210).to_bytes(8, "little")
    fake.answer("xc_vcpu_getinfo", data=bytes(raw))
    assert backend.vcpu_getinfo(DOMID, 0xFEDC) == VcpuInfo(
        online=which == "online",
        blocked=which == "blocked",
        running=which == "running",
        cpu_time=0xFEDC_BA98_7654_3210,
    )
    assert fake.only_call().args == (DOMID, 0xFEDC)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT])  # to 4.21, from 4.22 on
def test_no_such_vcpu(number: int, backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xc_vcpu_getinfo", number)
    with pytest.raises(XenError, match="no such vCPU") as caught:
        backend.vcpu_getinfo(DOMID, 9)
    assert caught.value.errno == number
    assert (caught.value.op, caught.value.domid, caught.value.vcpu) == ("vcpu_getinfo", DOMID, 9)


# Saved state.


def test_the_whole_stream(backend: LibxcBackend, fake: Fake) -> None:
    fake.answer("xc_domain_hvm_getcontext", 100)
    fake.answer("xc_domain_hvm_getcontext", 90, data=bytes(range(90)))
    assert backend.domain_hvm_getcontext(DOMID) == bytes(range(90))
    assert [call.args for call in fake.calls] == [(DOMID, 0, 0), (DOMID, 1, 100)]


@pytest.mark.parametrize("succeeding", [0, 1])
def test_the_stream_is_refused(succeeding: int, backend: LibxcBackend, fake: Fake) -> None:
    for _ in range(succeeding):
        fake.answer("xc_domain_hvm_getcontext", 8)
    fake.fail("xc_domain_hvm_getcontext", errno.ENOMEM)
    with pytest.raises(OutOfMemoryError) as caught:
        backend.domain_hvm_getcontext(DOMID)
    assert (caught.value.op, caught.value.domid) == ("domain_hvm_getcontext", DOMID)


def test_a_vcpus_registers(backend: LibxcBackend, fake: Fake) -> None:
    record = bytes(range(256)) * 4 + b"register"
    fake.answer("xc_domain_hvm_getcontext_partial", data=record)
    assert backend.domain_hvm_getcontext_partial(DOMID, 2, 0xFEDC) == record
    assert fake.only_call().args == (DOMID, 2, 0xFEDC, 1032)
    fake.fail("xc_domain_hvm_getcontext_partial", errno.ENOENT)
    with pytest.raises(XenError) as caught:
        backend.domain_hvm_getcontext_partial(DOMID, 2, 9)
    assert (caught.value.domid, caught.value.vcpu) == (DOMID, 9)


def stream(*records: tuple[int, int, bytes]) -> bytes:
    return b"".join(
        kind.to_bytes(2, "little") + number.to_bytes(2, "little") + len(body).to_bytes(4, "little")
        + body
        for kind, number, body in records
    )  # fmt: skip


RECORDS = stream((1, 0, b"header"), (19, 0, b"msrs"), (19, 1, b"other"), (0, 0, b""))


@pytest.mark.parametrize(
    ("kind", "instance", "body"), [(1, 0, b"header"), (19, 0, b"msrs"), (19, 1, b"other")]
)
def test_other_records(
    kind: int, instance: int, body: bytes, backend: LibxcBackend, fake: Fake
) -> None:
    fake.answer("xc_domain_hvm_getcontext", len(RECORDS))
    fake.answer("xc_domain_hvm_getcontext", len(RECORDS), data=RECORDS)
    assert backend.domain_hvm_getcontext_partial(DOMID, kind, instance) == body


@pytest.mark.parametrize(
    "raw", [b"", RECORDS, RECORDS[:9], b"\x13\0\x02\0\xff\xff\xff\xff", b"\xff" * 40], ids=repr
)
def test_a_record_that_is_not_there(raw: bytes, backend: LibxcBackend, fake: Fake) -> None:
    fake.answer("xc_domain_hvm_getcontext", len(raw))
    fake.answer("xc_domain_hvm_getcontext", len(raw), data=raw)
    with pytest.raises(XenError) as caught:
        backend.domain_hvm_getcontext_partial(DOMID, 19, 2)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.op == "domain_hvm_getcontext_partial"


# errors.from_errno's choice of class, as it arrives.


def test_esrch_with_and_without_a_gfn(backend: LibxcBackend, fake: Fake) -> None:
    fake.fail("xc_domain_pause", errno.ESRCH)
    with pytest.raises(DomainNotFoundError):
        backend.domain_pause(1)
    fake.fail("xc_altp2m_get_mem_access", errno.ESRCH)
    with pytest.raises(NotMappedError):
        backend.altp2m_get_mem_access(1, 1, 5)
    fake.fail("xc_altp2m_create_view", errno.EOPNOTSUPP)
    with pytest.raises(UnsupportedError):
        backend.altp2m_create_view(1, 7)


def test_more_is_read_than_stays_mapped(backend: LibxcBackend, fake: Fake) -> None:
    """The library refuses to unmap a page while a slice of it is alive."""
    fake.answer("xc_domain_getinfolist", 1, data=info(DOMID))
    with (
        xa.connect(backend) as xen,
        xen.domain(DOMID) as dom,
        MappedPages(dom.context, most=2) as mapped,
    ):
        unpaged = Paging(0, 0, 0, 0, user=False)
        found = AddressSpace(dom.memory, unpaged, mapped).read(PAGE_SIZE, 5 * PAGE_SIZE)
    assert found == b"".join(gfn.to_bytes(PAGE_SIZE, "little") for gfn in range(1, 6))
