/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * libxenctrl.so.4.N: memory access on the host p2m, and the monitor's switches.
 * Origin: tools/include/xenctrl.h (tools/libxc/include/xenctrl.h in 4.14), RELEASE-4.14.0 ..
 * RELEASE-4.22.0 (LGPL-2.1-only); XEN_DOMCTL_* from xen/include/public/domctl.h (MIT).
 */

int xc_set_mem_access(
    xc_interface *xch, uint32_t domain_id, xenmem_access_t access, uint64_t first_pfn,
    uint32_t nr);
int xc_set_mem_access_multi(
    xc_interface *xch, uint32_t domain_id, uint8_t *access, uint64_t *pages, uint32_t nr);
int xc_get_mem_access(
    xc_interface *xch, uint32_t domain_id, uint64_t pfn, xenmem_access_t *access);
int xc_domain_set_access_required(xc_interface *xch, uint32_t domid, unsigned int required);

enum {
    XEN_DOMCTL_monitor_op                        = 77,
    XEN_DOMCTL_MONITOR_OP_CONTROL_REGISTERS      = 4
};

/* Bit numbers in the word xc_monitor_get_capabilities fills. */
enum {
    XEN_DOMCTL_MONITOR_EVENT_WRITE_CTRLREG       = 0,
    XEN_DOMCTL_MONITOR_EVENT_MOV_TO_MSR          = 1,
    XEN_DOMCTL_MONITOR_EVENT_SINGLESTEP          = 2,
    XEN_DOMCTL_MONITOR_EVENT_SOFTWARE_BREAKPOINT = 3,
    XEN_DOMCTL_MONITOR_EVENT_GUEST_REQUEST       = 4,
    XEN_DOMCTL_MONITOR_EVENT_DEBUG_EXCEPTION     = 5,
    XEN_DOMCTL_MONITOR_EVENT_CPUID               = 6,
    XEN_DOMCTL_MONITOR_EVENT_PRIVILEGED_CALL     = 7,
    XEN_DOMCTL_MONITOR_EVENT_INTERRUPT           = 8,
    XEN_DOMCTL_MONITOR_EVENT_DESC_ACCESS         = 9,
    XEN_DOMCTL_MONITOR_EVENT_EMUL_UNIMPLEMENTED  = 10,
    XEN_DOMCTL_MONITOR_EVENT_INGUEST_PAGEFAULT   = 11,
    XEN_DOMCTL_MONITOR_EVENT_VMEXIT              = 12, /* since 4.17 */
    XEN_DOMCTL_MONITOR_EVENT_IO                  = 13  /* since 4.18 */
};

int xc_vm_event_get_version(xc_interface *xch);

void *xc_monitor_enable(xc_interface *xch, uint32_t domain_id, uint32_t *port);
int xc_monitor_disable(xc_interface *xch, uint32_t domain_id);
int xc_monitor_resume(xc_interface *xch, uint32_t domain_id);
int xc_monitor_get_capabilities(
    xc_interface *xch, uint32_t domain_id, uint32_t *capabilities);

int xc_monitor_write_ctrlreg(
    xc_interface *xch, uint32_t domain_id, uint16_t index, bool enable, bool sync,
    uint64_t bitmask, bool onchangeonly);
int xc_monitor_mov_to_msr(
    xc_interface *xch, uint32_t domain_id, uint32_t msr, bool enable, bool onchangeonly);
int xc_monitor_singlestep(xc_interface *xch, uint32_t domain_id, bool enable);
int xc_monitor_software_breakpoint(xc_interface *xch, uint32_t domain_id, bool enable);
int xc_monitor_descriptor_access(xc_interface *xch, uint32_t domain_id, bool enable);
int xc_monitor_guest_request(
    xc_interface *xch, uint32_t domain_id, bool enable, bool sync, bool allow_userspace);
/* The flag is inverted: true asks Xen to hide faults on the guest's own page tables. */
int xc_monitor_inguest_pagefault(xc_interface *xch, uint32_t domain_id, bool disable);
int xc_monitor_debug_exceptions(
    xc_interface *xch, uint32_t domain_id, bool enable, bool sync);
int xc_monitor_cpuid(xc_interface *xch, uint32_t domain_id, bool enable);
int xc_monitor_privileged_call(xc_interface *xch, uint32_t domain_id, bool enable);
int xc_monitor_emul_unimplemented(xc_interface *xch, uint32_t domain_id, bool enable);
int xc_monitor_emulate_each_rep(xc_interface *xch, uint32_t domain_id, bool enable);
/* since 4.17 */
int xc_monitor_vmexit(xc_interface *xch, uint32_t domain_id, bool enable, bool sync);
/* since 4.18 */
int xc_monitor_io(xc_interface *xch, uint32_t domain_id, bool enable);
