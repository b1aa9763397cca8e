/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * libxencall.so.1: hypercalls that libxenctrl has no function for.
 * Origin: tools/include/xencall.h (tools/libs/call/include/xencall.h in 4.14), RELEASE-4.14.0 ..
 * RELEASE-4.22.0 (LGPL-2.1-only); the numbers from public/xen.h and public/hvm/hvm_op.h (MIT).
 */

enum {
    __HYPERVISOR_hvm_op = 34,
    __HYPERVISOR_domctl = 36,
};

enum {
    HVMOP_ALTP2M_INTERFACE_VERSION = 1,
    HVMOP_altp2m_set_mem_access_multi = 9,
    HVMOP_get_mem_type = 15,
    HVMOP_altp2m = 25,
};

/* What HVMOP_get_mem_type answers: hvmmem_type_t. */
enum {
    HVMMEM_ram_rw = 0,
    HVMMEM_ram_ro = 1,
    HVMMEM_mmio_dm = 2,
    HVMMEM_ioreq_server = 4
};

typedef struct xencall_handle xencall_handle;

xencall_handle *xencall_open(struct xentoollog_logger *logger, unsigned open_flags);
int xencall_close(xencall_handle *xcall);
/* Memory that the hypervisor can reach, and the only one a hypercall may be given. */
void *xencall_alloc_buffer(xencall_handle *xcall, size_t size);
void xencall_free_buffer(xencall_handle *xcall, void *p);
int xencall1(xencall_handle *xcall, unsigned int op, uint64_t arg1);
int xencall2(xencall_handle *xcall, unsigned int op, uint64_t arg1, uint64_t arg2);
