/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * libxenctrl.so.4.N: the handle, versions, domain control, memory, HVM state.
 * Origin: tools/include/xenctrl.h (tools/libxc/include/xenctrl.h in 4.14), RELEASE-4.14.0 ..
 * RELEASE-4.22.0 (LGPL-2.1-only), and xenctrl_compat.h beside it; constants from
 * xen/include/public/{domctl,version,sched,hvm/dm_op,hvm/params}.h (MIT).
 */

typedef struct xc_interface_core xc_interface;

enum xc_open_flags {
    XC_OPENFLAG_DUMMY         = 1 << 0,
    XC_OPENFLAG_NON_REENTRANT = 1 << 1
};

xc_interface *xc_interface_open(
    xentoollog_logger *logger, xentoollog_logger *dombuild_logger, unsigned open_flags);
int xc_interface_close(xc_interface *xch);

/* Versions. XENVER_version is the return value (major << 16 | minor) and takes a NULL arg; the
 * others fill char[16] (extraversion), char[1024] (capabilities, commandline), char[64]
 * (changeset). None needs privilege except what XSM hides. */

enum {
    XENVER_version      = 0,
    XENVER_extraversion = 1,
    XENVER_capabilities = 3,
    XENVER_changeset    = 4,
    XENVER_pagesize     = 7,
    XENVER_commandline  = 9
};

int xc_version(xc_interface *xch, int cmd, void *arg);

/* Domains. */

/*
 * Never laid out here: a domctl structure, it changes with the interface version (see
 * xenaltp2m/abi/layouts.py). libxc takes the size of one element from its own header, so pass a
 * buffer longer than any release needs, cast to xc_domaininfo_t *.
 */
typedef struct xen_domctl_getdomaininfo xc_domaininfo_t;

enum {
    XEN_DOMINF_dying         = 1 << 0,
    XEN_DOMINF_hvm_guest     = 1 << 1,
    XEN_DOMINF_shutdown      = 1 << 2,
    XEN_DOMINF_paused        = 1 << 3,
    XEN_DOMINF_blocked       = 1 << 4,
    XEN_DOMINF_running       = 1 << 5,
    XEN_DOMINF_debugged      = 1 << 6,
    XEN_DOMINF_xs_domain     = 1 << 7,
    XEN_DOMINF_hap           = 1 << 8,
    XEN_DOMINF_shutdownmask  = 255,
    XEN_DOMINF_shutdownshift = 16
};

enum {
    SHUTDOWN_poweroff   = 0,
    SHUTDOWN_reboot     = 1,
    SHUTDOWN_suspend    = 2,
    SHUTDOWN_crash      = 3,
    SHUTDOWN_watchdog   = 4,
    SHUTDOWN_soft_reset = 5
};

int xc_domain_getinfolist(
    xc_interface *xch, uint32_t first_domain, unsigned int max_domains, xc_domaininfo_t *info);

int xc_domain_pause(xc_interface *xch, uint32_t domid);
int xc_domain_unpause(xc_interface *xch, uint32_t domid);

enum {
    XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF = 0,
    XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_ON  = 1
};

int xc_domain_debug_control(xc_interface *xch, uint32_t domid, uint32_t sop, uint32_t vcpu);

/*
 * Not laid out here either. libxc copies it back, so pass a buffer longer than any release needs,
 * cast. The vCPU is cut to 16 bits (xc_domain.c).
 */
typedef struct xen_domctl_getvcpuinfo xc_vcpuinfo_t;

int xc_vcpu_getinfo(xc_interface *xch, uint32_t domid, uint32_t vcpu, xc_vcpuinfo_t *info);

/* The same numbers as Xen's own X86_EVENTTYPE_*; dm_op.h makes them macros. */
enum {
    XEN_DMOP_EVENT_ext_int    = 0,
    XEN_DMOP_EVENT_nmi        = 2,
    XEN_DMOP_EVENT_hw_exc     = 3,
    XEN_DMOP_EVENT_sw_int     = 4,
    XEN_DMOP_EVENT_pri_sw_exc = 5,
    XEN_DMOP_EVENT_sw_exc     = 6
};

/*
 * xenctrl_compat.h, under XC_WANT_COMPAT_DEVICEMODEL_API: a wrapper of libxendevicemodel's
 * xendevicemodel_inject_event. An error_code of ~0 stands for none. The vCPU goes into a uint32_t.
 */
int xc_hvm_inject_trap(
    xc_interface *xch, uint32_t domid, int vcpu, uint8_t vector, uint8_t type, uint32_t error_code,
    uint8_t insn_len, uint64_t cr2);

/* Memory. */

int xc_domain_maximum_gpfn(xc_interface *xch, uint32_t domid, xen_pfn_t *gpfns);
int xc_domain_setmaxmem(xc_interface *xch, uint32_t domid, uint64_t max_memkb);
int xc_domain_populate_physmap_exact(
    xc_interface *xch, uint32_t domid, unsigned long nr_extents, unsigned int extent_order,
    unsigned int mem_flags, xen_pfn_t *extent_start);
int xc_domain_decrease_reservation_exact(
    xc_interface *xch, uint32_t domid, unsigned long nr_extents, unsigned int extent_order,
    xen_pfn_t *extent_start);

/* Pages; each pointer may be NULL. Up to 4.16 every failure's errno is 1 (xc_domain_pod_target). */
int xc_domain_get_pod_target(
    xc_interface *xch, uint32_t domid, uint64_t *tot_pages, uint64_t *pod_cache_pages,
    uint64_t *pod_entries);

/* The pool that p2m and view tables are built from. Bytes, and exact, since 4.17. */
/* since 4.17 */
int xc_get_paging_mempool_size(xc_interface *xch, uint32_t domid, uint64_t *size);
/* since 4.17 */
int xc_set_paging_mempool_size(xc_interface *xch, uint32_t domid, uint64_t size);

enum {
    XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION = 30,
    XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION = 31
};

typedef struct xc_hypercall_buffer xc_hypercall_buffer_t;
typedef struct xen_domctl_shadow_op_stats xc_shadow_op_stats_t;

/*
 * The same pool before 4.17, in MiB. One symbol, two prototypes: 4.16 moved the log-dirty
 * arguments out into xc_logdirty_control. The presence of that symbol tells which one a library
 * has. Where it is absent:
 *     ffi.cast("xc_shadow_control_4_14_t *", ffi.addressof(lib, "xc_shadow_control"))
 * Before 4.16 a success returns the (zero) page count, and a NULL dirty_bitmap and stats are
 * right for the two operations above.
 */
int xc_shadow_control(
    xc_interface *xch, uint32_t domid, unsigned int sop, unsigned int *mb, unsigned int mode);
typedef int xc_shadow_control_4_14_t(
    xc_interface *xch, uint32_t domid, unsigned int sop, xc_hypercall_buffer_t *dirty_bitmap,
    unsigned long pages, unsigned long *mb, uint32_t mode, xc_shadow_op_stats_t *stats);
/* since 4.16 */
long long xc_logdirty_control(
    xc_interface *xch, uint32_t domid, unsigned int sop, xc_hypercall_buffer_t *dirty_bitmap,
    unsigned long pages, unsigned int mode, xc_shadow_op_stats_t *stats);

/* HVM parameters and saved state. */

enum {
    HVM_PARAM_STORE_PFN              = 1,
    HVM_PARAM_STORE_EVTCHN           = 2,
    HVM_PARAM_IOREQ_PFN              = 5,
    HVM_PARAM_BUFIOREQ_PFN           = 6,
    HVM_PARAM_VIRIDIAN               = 9,
    HVM_PARAM_IDENT_PT               = 12,
    HVM_PARAM_CONSOLE_PFN            = 17,
    HVM_PARAM_NESTEDHVM              = 24,
    HVM_PARAM_PAGING_RING_PFN        = 27,
    HVM_PARAM_MONITOR_RING_PFN       = 28,
    HVM_PARAM_SHARING_RING_PFN       = 29,
    HVM_PARAM_TRIPLE_FAULT_REASON    = 31,
    HVM_PARAM_IOREQ_SERVER_PFN       = 32,
    HVM_PARAM_NR_IOREQ_SERVER_PAGES  = 33,
    HVM_PARAM_VM_GENERATION_ID_ADDR  = 34,
    HVM_PARAM_ALTP2M                 = 35
};

int xc_hvm_param_set(xc_interface *handle, uint32_t dom, uint32_t param, uint64_t value);
int xc_hvm_param_get(xc_interface *handle, uint32_t dom, uint32_t param, uint64_t *value);

/* getcontext with a NULL buffer returns the size needed. */
int xc_domain_hvm_getcontext(xc_interface *xch, uint32_t domid, uint8_t *ctxt_buf, uint32_t size);
int xc_domain_hvm_getcontext_partial(
    xc_interface *xch, uint32_t domid, uint16_t typecode, uint16_t instance, void *ctxt_buf,
    uint32_t size);
int xc_domain_hvm_setcontext(xc_interface *xch, uint32_t domid, uint8_t *hvm_ctxt, uint32_t size);
