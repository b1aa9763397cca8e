/* SPDX-License-Identifier: MIT
 *
 * Scalars every other file needs.
 * Origin: xen/include/public/{xen,memory,event_channel}.h, RELEASE-4.14.0 .. RELEASE-4.22.0 (MIT).
 */

typedef unsigned long xen_pfn_t;
typedef uint32_t evtchn_port_t;

/*
 * An enum in memory.h, declared here as the integer type GCC gives it. XENMEM_access_default is
 * left out on purpose: it is 10 up to 4.19 and 11 from 4.20, where XENMEM_access_r_pw took 10
 * (memory.h, xenmem_access_t). Only the running Xen's release tells which.
 */
typedef unsigned int xenmem_access_t;

enum {
    XENMEM_access_n     = 0,
    XENMEM_access_r     = 1,
    XENMEM_access_w     = 2,
    XENMEM_access_rw    = 3,
    XENMEM_access_x     = 4,
    XENMEM_access_rx    = 5,
    XENMEM_access_wx    = 6,
    XENMEM_access_rwx   = 7,
    XENMEM_access_rx2rw = 8,
    XENMEM_access_n2rwx = 9
};

enum {
    DOMID_FIRST_RESERVED = 0x7ff0,
    DOMID_SELF           = 0x7ff0,
    DOMID_INVALID        = 0x7ff4
};
