# SPDX-License-Identifier: LGPL-2.1-or-later
"""Properties of each Xen release: one table for numbers, presence and the mock's rules.

Presence decides wherever it can (is the symbol there?). The facts here are those that only the
release tells, each with the commit or function that made the difference.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from xenaltp2m.errors import not_known
from xenaltp2m.types import Access

OLDEST_MINOR = 14
NEWEST_MINOR = 22
SUPPORTED = tuple((4, minor) for minor in range(OLDEST_MINOR, NEWEST_MINOR + 1))

SYMBOL_SINCE: dict[str, tuple[int, int]] = {
    "xc_logdirty_control": (4, 16),
    "xc_get_paging_mempool_size": (4, 17),
    "xc_set_paging_mempool_size": (4, 17),
    "xc_monitor_vmexit": (4, 17),
    "xc_monitor_io": (4, 18),
}
"""The first release of each bound symbol that came after 4.14."""


def since(symbol: str) -> tuple[int, int]:
    """Return the first supported release whose library has ``symbol``."""
    return SYMBOL_SINCE.get(symbol, SUPPORTED[0])


@dataclass(frozen=True, slots=True)
class Release:
    """One Xen release and what is different in it from its neighbours.

    A release means its last update: what a stable update changed holds for the whole series.
    """

    major: int
    minor: int

    vm_event_version: int
    """``VM_EVENT_INTERFACE_VERSION`` in ``public/vm_event.h``."""
    domctl_version: int
    """``XEN_DOMCTL_INTERFACE_VERSION``: a library with another one gets EACCES from domctls."""
    sysctl_version: int
    """``XEN_SYSCTL_INTERFACE_VERSION``: the same for listing domains."""
    default_access_number: int
    """``XENMEM_access_default``: moved when ``r_pw`` took its number (ff10aa9d8f, 4.20)."""

    mode_set_at_creation: bool
    """The mode comes from createdomain and the parameter is read-only (0291089f6e, 4.19)."""
    failed_enable_clears_active: bool
    """An enable that fails leaves altp2m off; before, it stayed on (5e97b97bc2, 4.16)."""
    view_count_is_setting: bool
    """``altp2m_count`` decides the number of views (06cf6cdab4, 4.21); before it is 10."""
    most_views: int
    """How many views a domain has at most, view 0 among them: ``MAX_ALTP2M``, and from 4.21
    ``MAX_NR_ALTP2M``, which is how many EPT pointers VMFUNC's page holds."""
    lazy_copy_takes_view_default: bool
    """A lazy copy takes the view's default access, not the host's (7e5b662b28, 4.19)."""
    superpage_copy_takes_view_default: bool
    """A superpage copied ahead of a change does too (38a5bfc7f2, 4.22)."""
    lazy_copy_fits_view_order: bool
    """A lazy copy is no larger than the hole it fills (ced5685208, 4.17)."""
    drop_test_covers_order: bool
    """A dropped superpage counts with all its gfns for a reset (cbd0874fef, 4.17)."""
    fast_singlestep_alone: bool
    """Fast single-step works without ``xc_monitor_singlestep`` (410ef33439, 4.19)."""
    removal_delays_answers: bool
    """Once a page was taken from a p2m table, a remap's among them, the next resume of each vCPU
    does nothing of what answers asked for: it is left for the one after (``p2m_remove_entry``,
    ``vcpu_ioreq_handle_completion``, ``hvm_do_resume``, from 4.15)."""

    @property
    def version(self) -> tuple[int, int]:
        """``(major, minor)``."""
        return self.major, self.minor

    @property
    def access_numbers(self) -> Mapping[Access, int]:
        """``xenmem_access_t`` (``public/memory.h``) for each access this release knows."""
        return _access_numbers(self.default_access_number)

    @property
    def access_by_number(self) -> Mapping[int, Access]:
        """The inverse of :attr:`access_numbers`."""
        return _access_by_number(self.default_access_number)

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@functools.cache
def _access_numbers(default_number: int) -> dict[Access, int]:
    numbers = {Access(bits): bits for bits in range(8)}
    numbers[Access.RX2RW] = 8
    numbers[Access.N2RWX] = 9
    if default_number > 10:
        numbers[Access.R_PW] = 10
    numbers[Access.DEFAULT] = default_number
    return numbers


class _Accesses(dict[int, Access]):
    """The access of each number that Xen may say."""

    def __missing__(self, number: int) -> Access:
        raise not_known("an access", number, "altp2m_get_mem_access")


@functools.cache
def _access_by_number(default_number: int) -> _Accesses:
    numbers = _access_numbers(default_number)
    return _Accesses((number, access) for access, number in numbers.items())


_SYSCTL_VERSIONS = {
    14: 0x13, 15: 0x13, 16: 0x14, 17: 0x15, 18: 0x15, 19: 0x15, 20: 0x15, 21: 0x16, 22: 0x16,
}  # fmt: skip
_DOMCTL_VERSIONS = {
    14: 0x12, 15: 0x13, 16: 0x14, 17: 0x15, 18: 0x16, 19: 0x17, 20: 0x17, 21: 0x17, 22: 0x18,
}  # fmt: skip


@functools.cache
def release(major: int, minor: int) -> Release:
    """Return what is known of a Xen release.

    A minor newer than ``NEWEST_MINOR`` is taken to behave as the newest known.

    Args:
        major: 4.
        minor: From ``OLDEST_MINOR`` up.

    Raises:
        ValueError: The release is older than this library supports.
    """
    if (major, minor) < SUPPORTED[0]:
        raise ValueError(
            f"Xen {major}.{minor} is not supported: the oldest is "
            f"{SUPPORTED[0][0]}.{SUPPORTED[0][1]}"
        )
    known = NEWEST_MINOR if (major, minor) > SUPPORTED[-1] else minor
    return Release(
        major=major,
        minor=minor,
        vm_event_version=6 if known < 15 else 7,
        domctl_version=_DOMCTL_VERSIONS[known],
        sysctl_version=_SYSCTL_VERSIONS[known],
        default_access_number=10 if known < 20 else 11,
        mode_set_at_creation=known >= 19,
        failed_enable_clears_active=known >= 16,
        view_count_is_setting=known >= 21,
        most_views=10 if known < 21 else 512,
        lazy_copy_takes_view_default=known >= 19,
        superpage_copy_takes_view_default=known >= 22,
        lazy_copy_fits_view_order=known >= 17,
        drop_test_covers_order=known >= 17,
        fast_singlestep_alone=known >= 19,
        removal_delays_answers=known >= 15,
    )
