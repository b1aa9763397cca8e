/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * libxenlight.so.4.N, through the one door that keeps its shape: a domain's configuration as JSON.
 * Origin: tools/include/libxl.h (tools/libxl/ in 4.14), RELEASE-4.14.0 .. RELEASE-4.22.0, these
 * prototypes unchanged (LGPL-2.1-only).
 *
 * libxl_ctx_alloc wants version LIBXL_VERSION, a logger that is not NULL (see toollog.h), and a
 * running xenstored: it opens libxenctrl and xenstore itself.
 */

typedef struct libxl__ctx libxl_ctx;

enum { LIBXL_VERSION = 0 };

int libxl_ctx_alloc(libxl_ctx **pctx, int version, unsigned flags, xentoollog_logger *lg);
int libxl_ctx_free(libxl_ctx *ctx);

/*
 * The JSON text that libxl itself keeps for a domain, under the id "libxl-json". Unlike
 * libxl_retrieve_domain_configuration it neither forks, nor talks to QEMU, nor asserts
 * (libxl_dom.c:libxl_userdata_retrieve; 4.14 .. 4.22). malloc()ed; no data is *datalen_r == 0.
 */
int libxl_userdata_retrieve(
    libxl_ctx *ctx, uint32_t domid, const char *userdata_userid, uint8_t **data_r,
    int *datalen_r);
