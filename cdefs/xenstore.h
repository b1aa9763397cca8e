/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * libxenstore.so.3.0 (up to 4.15), libxenstore.so.4 (from 4.16)
 * Origin: tools/include/xenstore.h, RELEASE-4.14.0 .. RELEASE-4.22.0 (LGPL-2.1-or-later).
 */

typedef uint32_t xs_transaction_t;
struct xs_handle;

enum { XBT_NULL = 0 };

struct xs_handle *xs_open(unsigned long flags);
void xs_close(struct xs_handle *xsh);
/* malloc()ed: free(). */
void *xs_read(struct xs_handle *h, xs_transaction_t t, const char *path, unsigned int *len);
