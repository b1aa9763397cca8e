/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * libxenlight.so.4.N, through the one door that keeps its shape: names, and a domain's
 * configuration as JSON.
 * Origin: tools/include/{libxl,libxl_utils}.h and libxl_types.idl (tools/libxl/ in 4.14),
 * RELEASE-4.14.0 .. RELEASE-4.22.0, these prototypes unchanged (LGPL-2.1-only).
 *
 * libxl_ctx_alloc wants version LIBXL_VERSION, a logger that is not NULL (see toollog.h), and a
 * running xenstored: it opens libxenctrl and xenstore itself.
 */

typedef struct libxl__ctx libxl_ctx;

enum { LIBXL_VERSION = 0 };

enum {
    ERROR_NONSPECIFIC     = -1,
    ERROR_VERSION         = -2,
    ERROR_FAIL            = -3,
    ERROR_NI              = -4,
    ERROR_NOMEM           = -5,
    ERROR_INVAL           = -6,
    ERROR_DOMAIN_NOTFOUND = -21,
    ERROR_NOTFOUND        = -23
};

int libxl_ctx_alloc(libxl_ctx **pctx, int version, unsigned flags, xentoollog_logger *lg);
int libxl_ctx_free(libxl_ctx *ctx);

int libxl_name_to_domid(libxl_ctx *ctx, const char *name, uint32_t *domid);
/* malloc()ed, or NULL. */
char *libxl_domid_to_name(libxl_ctx *ctx, uint32_t domid);

/*
 * Never laid out here: it grows with every release. Pass a zeroed buffer longer than any (see
 * LIBXL_DOMAIN_CONFIG_ROOM in xenaltp2m/abi/layouts.py); libxl_domain_config_init clears as much as
 * the library means.
 */
typedef struct libxl_domain_config libxl_domain_config;
typedef ... libxl_asyncop_how;

void libxl_domain_config_init(libxl_domain_config *d_config);
void libxl_domain_config_dispose(libxl_domain_config *d_config);
/* ao_how came with 4.13, so every release we bind has it; NULL makes the call synchronous. */
int libxl_retrieve_domain_configuration(
    libxl_ctx *ctx, uint32_t domid, libxl_domain_config *d_config,
    const libxl_asyncop_how *ao_how);
/* malloc()ed, or NULL. */
char *libxl_domain_config_to_json(libxl_ctx *ctx, libxl_domain_config *p);

/*
 * The JSON text that libxl itself keeps for a domain, under the id "libxl-json". Unlike
 * libxl_retrieve_domain_configuration it neither forks, nor talks to QEMU, nor asserts
 * (libxl_dom.c:libxl_userdata_retrieve; 4.14 .. 4.22). malloc()ed; no data is *datalen_r == 0.
 */
int libxl_userdata_retrieve(
    libxl_ctx *ctx, uint32_t domid, const char *userdata_userid, uint8_t **data_r,
    int *datalen_r);
