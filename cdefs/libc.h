/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What the C library must do for us: give libxentoollog its stream, and free what libxl and
 * libxenstore malloc()ed for the caller.
 * Origin: ISO C and POSIX.1-2008.
 */

FILE *fdopen(int fd, const char *mode);
int fclose(FILE *stream);
void free(void *ptr);
/* What unmaps the ring page that xc_monitor_enable returns (tools/misc/xen-access.c does so). */
int munmap(void *addr, size_t length);
