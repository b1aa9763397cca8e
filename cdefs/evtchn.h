/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * libxenevtchn.so.1
 * Origin: tools/include/xenevtchn.h, RELEASE-4.14.0 .. RELEASE-4.22.0 (LGPL-2.1-only).
 */

typedef struct xenevtchn_handle xenevtchn_handle;
typedef int xenevtchn_port_or_error_t;

xenevtchn_handle *xenevtchn_open(struct xentoollog_logger *logger, unsigned int flags);
int xenevtchn_close(xenevtchn_handle *xce);
int xenevtchn_fd(xenevtchn_handle *xce);
xenevtchn_port_or_error_t xenevtchn_bind_interdomain(
    xenevtchn_handle *xce, uint32_t domid, evtchn_port_t remote_port);
int xenevtchn_notify(xenevtchn_handle *xce, evtchn_port_t port);
/* Blocks, whatever the fd's flags say (Linux): poll the fd first. */
xenevtchn_port_or_error_t xenevtchn_pending(xenevtchn_handle *xce);
int xenevtchn_unmask(xenevtchn_handle *xce, evtchn_port_t port);
