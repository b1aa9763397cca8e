/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * libxentoollog.so.1
 * Origin: tools/include/xentoollog.h, RELEASE-4.14.0 .. RELEASE-4.22.0, unchanged (LGPL-2.1-only).
 *
 * A NULL logger is fine for libxenctrl, libxenevtchn and libxenforeignmemory, which then make
 * one that writes to stderr. It is not for libxl: libxl_ctx_alloc keeps the pointer as it is and
 * xtl_logv calls logger->vmessage at the first message (tools/libs/toollog/xtl_core.c).
 */

typedef enum xentoollog_level {
    XTL_NONE,
    XTL_DEBUG,
    XTL_VERBOSE,
    XTL_DETAIL,
    XTL_PROGRESS,
    XTL_INFO,
    XTL_NOTICE,
    XTL_WARN,
    XTL_ERROR,
    XTL_CRITICAL,
    XTL_NUM_LEVELS
} xentoollog_level;

enum {
    XTL_STDIOSTREAM_SHOW_PID        = 0x01,
    XTL_STDIOSTREAM_SHOW_DATE       = 0x02,
    XTL_STDIOSTREAM_HIDE_PROGRESS   = 0x04,
    XTL_STDIOSTREAM_PROGRESS_USE_CR = 0x08,
    XTL_STDIOSTREAM_PROGRESS_NO_CR  = 0x10
};

typedef struct xentoollog_logger xentoollog_logger;
typedef struct xentoollog_logger_stdiostream xentoollog_logger_stdiostream;

/* The result is a xentoollog_logger too (its first member): ffi.cast it. Destroying it does not
 * close the stream. */
xentoollog_logger_stdiostream *xtl_createlogger_stdiostream(
    FILE *f, xentoollog_level min_level, unsigned flags);
void xtl_logger_destroy(struct xentoollog_logger *logger);
