/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * libxenctrl.so.4.N: all of altp2m.
 * Origin: tools/include/xenctrl.h (tools/libxc/include/xenctrl.h in 4.14), RELEASE-4.14.0 ..
 * RELEASE-4.22.0, unchanged (LGPL-2.1-only); XEN_ALTP2M_* from xen/include/public/hvm/params.h
 * (MIT).
 *
 * domid is cut to 16 bits inside libxc (xc_altp2m.c, arg->domain = domid), and out-parameters are
 * written on success only, except those of set_supress_ve_multi.
 */

enum {
    XEN_ALTP2M_disabled = 0,
    XEN_ALTP2M_mixed    = 1,
    XEN_ALTP2M_external = 2,
    XEN_ALTP2M_limited  = 3
};

int xc_altp2m_get_domain_state(xc_interface *handle, uint32_t dom, bool *state);
int xc_altp2m_set_domain_state(xc_interface *handle, uint32_t dom, bool state);
int xc_altp2m_set_vcpu_enable_notify(
    xc_interface *handle, uint32_t domid, uint32_t vcpuid, xen_pfn_t gfn);
int xc_altp2m_set_vcpu_disable_notify(xc_interface *handle, uint32_t domid, uint32_t vcpuid);
int xc_altp2m_get_vcpu_p2m_idx(
    xc_interface *handle, uint32_t domid, uint32_t vcpuid, uint16_t *p2midx);

int xc_altp2m_create_view(
    xc_interface *handle, uint32_t domid, xenmem_access_t default_access, uint16_t *view_id);
int xc_altp2m_destroy_view(xc_interface *handle, uint32_t domid, uint16_t view_id);
int xc_altp2m_switch_to_view(xc_interface *handle, uint32_t domid, uint16_t view_id);
int xc_altp2m_set_visibility(
    xc_interface *handle, uint32_t domid, uint16_t view_id, bool visible);

int xc_altp2m_set_mem_access(
    xc_interface *handle, uint32_t domid, uint16_t view_id, xen_pfn_t gfn,
    xenmem_access_t access);
int xc_altp2m_set_mem_access_multi(
    xc_interface *handle, uint32_t domid, uint16_t view_id, uint8_t *access, uint64_t *gfns,
    uint32_t nr);
int xc_altp2m_get_mem_access(
    xc_interface *handle, uint32_t domid, uint16_t view_id, xen_pfn_t gfn,
    xenmem_access_t *access);
int xc_altp2m_change_gfn(
    xc_interface *handle, uint32_t domid, uint16_t view_id, xen_pfn_t old_gfn,
    xen_pfn_t new_gfn);

int xc_altp2m_set_suppress_ve(
    xc_interface *handle, uint32_t domid, uint16_t view_id, xen_pfn_t gfn, bool sve);
int xc_altp2m_get_suppress_ve(
    xc_interface *handle, uint32_t domid, uint16_t view_id, xen_pfn_t gfn, bool *sve);
/* "supress": the exported name really has one p. */
int xc_altp2m_set_supress_ve_multi(
    xc_interface *handle, uint32_t domid, uint16_t view_id, xen_pfn_t first_gfn,
    xen_pfn_t last_gfn, bool sve, xen_pfn_t *error_gfn, int32_t *error_code);
