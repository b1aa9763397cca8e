/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * libxenforeignmemory.so.1
 * Origin: tools/include/xenforeignmemory.h, RELEASE-4.14.0 .. RELEASE-4.22.0 (LGPL-2.1-only).
 */

typedef struct xenforeignmemory_handle xenforeignmemory_handle;

xenforeignmemory_handle *xenforeignmemory_open(
    struct xentoollog_logger *logger, unsigned open_flags);
int xenforeignmemory_close(xenforeignmemory_handle *fmem);
/* With err non-NULL a mapping can succeed in part, each page's errno in err[]. */
void *xenforeignmemory_map(
    xenforeignmemory_handle *fmem, uint32_t dom, int prot, size_t pages, const xen_pfn_t arr[],
    int err[]);
int xenforeignmemory_unmap(xenforeignmemory_handle *fmem, void *addr, size_t pages);
