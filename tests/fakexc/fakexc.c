/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A stand-in for Xen's libraries: every function that xenaltp2m.backend.libxc calls notes its
 * arguments and answers as the test told it to. One shared object plays all of them under several
 * names. Prototypes as in Xen's headers, 4.14 to 4.22; pointers to what Xen keeps opaque are void *.
 */

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { NAME = 48, ARGS = 10, DATA = 8192, CALLS = 64, ANSWERS = 16, PAGE = 4096 };

struct fake_call {
    char name[NAME];
    uint32_t count;
    uint32_t size;             /* of the arrays that came with the call, one behind the other */
    uint64_t args[ARGS];       /* the handle's kind, then the others; no pointers to results */
    unsigned char data[DATA];
};

struct answer {
    char name[NAME];
    bool pending;
    int error;
    int64_t result;
    uint64_t outs[2];
    uint32_t size;
    unsigned char data[DATA];
};

static struct fake_call calls[CALLS];
static uint32_t call_count;
static struct answer answers[ANSWERS];
static const struct answer nothing;
static char said[256];
static bool quiet;
static void *logger;

/* Any address will do for a handle; a different one for each kind tells them apart. */
static char xch = 'c', xce = 'e', fmem = 'f', xs = 's', xl = 'l', xcall = 'h';

static char kind(const void *h)
{
    const char *known[] = {&xch, &xce, &fmem, &xs, &xl, &xcall};
    for (int i = 0; i < 6; i++)
        if (h == known[i])
            return *known[i];
    return 0;
}

/* --- what the tests call ------------------------------------------------------------------- */

void fake_reset(void)
{
    call_count = 0;
    memset(answers, 0, sizeof(answers));
    said[0] = 0;
    quiet = false;
}

/* Answer nothing and note nothing, as fast as C can. */
void fake_quiet(bool on)
{
    quiet = on;
}

/* How the next call of a function goes; several of one function are used up in order. */
int fake_answer(const char *name, int64_t result, int error, uint64_t out0, uint64_t out1,
                const void *data, uint32_t size)
{
    for (int i = 0; i < ANSWERS; i++) {
        struct answer *a = &answers[i];
        if (a->pending || size > DATA)
            continue;
        *a = (struct answer){.pending = true, .result = result, .error = error,
                             .outs = {out0, out1}, .size = size};
        snprintf(a->name, NAME, "%s", name);
        if (size)
            memcpy(a->data, data, size);
        return 0;
    }
    return -1;
}

/* What the next function that fails writes to its logger. */
void fake_say(const char *words)
{
    snprintf(said, sizeof(said), "%s", words);
}

uint32_t fake_count(void)
{
    return call_count;
}

const struct fake_call *fake_call(uint32_t index)
{
    return index < call_count && index < CALLS ? &calls[index] : NULL;
}

bool fake_mapped(uint64_t address)
{
    return !msync((void *)address, PAGE, MS_ASYNC);
}

/* --- noting and answering ------------------------------------------------------------------ */

static struct fake_call *note(const char *name, uint32_t count, const uint64_t *args)
{
    struct fake_call *call = &calls[call_count < CALLS ? call_count : CALLS - 1];
    call_count++;
    snprintf(call->name, NAME, "%s", name);
    call->count = count;
    call->size = 0;
    memcpy(call->args, args, count * sizeof(*args));
    return call;
}

static void note_data(struct fake_call *call, const void *data, uint64_t size)
{
    uint64_t room = DATA - call->size;
    if (size > room)
        size = room;
    memcpy(call->data + call->size, data, size);
    call->size += size;
}

static const struct answer *find(const char *name)
{
    for (int i = 0; i < ANSWERS; i++)
        if (answers[i].pending && !strcmp(answers[i].name, name)) {
            answers[i].pending = false;
            return &answers[i];
        }
    return &nothing;
}

struct logger {
    FILE *stream;
    int level;
    unsigned flags;
};

static void fail(const struct answer *a)
{
    struct logger *to = logger;
    if (said[0] && to) {
        fprintf(to->stream, "%s\n", said);
        fflush(to->stream);
        said[0] = 0;
    }
    errno = a->error;
}

#define ARGUMENTS(...) \
    const uint64_t arguments[] = {__VA_ARGS__}; \
    struct fake_call *call = note(__func__, sizeof(arguments) / sizeof(uint64_t), arguments); \
    const struct answer *a = find(__func__); \
    (void)call; \
    if (a->error) \
        fail(a)

#define NOTE(...) \
    if (quiet) \
        return 0; \
    ARGUMENTS(kind(h), __VA_ARGS__)

/* A function whose results are numbers: its body, and one whose result is written on success. */
#define PLAIN(...) { NOTE(__VA_ARGS__); return a->result; }
#define OUT(type, where, ...) \
    { NOTE(__VA_ARGS__); if (a->result >= 0) *(where) = (type)a->outs[0]; return a->result; }

#define BLOCK(data, size) note_data(call, data, size)

/* --- libxentoollog ------------------------------------------------------------------------- */

void *xtl_createlogger_stdiostream(FILE *stream, int min_level, unsigned flags)
{
    ARGUMENTS(min_level, flags);
    if (a->result < 0)
        return NULL;
    struct logger *made = malloc(sizeof(*made));
    *made = (struct logger){stream, min_level, flags};
    return logger = made;
}

void xtl_logger_destroy(void *which)
{
    ARGUMENTS(which == logger);
    free(which);
    logger = NULL;
}

/* --- libxenctrl ---------------------------------------------------------------------------- */

typedef unsigned long pfn;

void *xc_interface_open(void *log, void *build_log, unsigned flags)
{
    ARGUMENTS(log == logger, build_log == logger, flags);
    return a->result < 0 ? NULL : &xch;
}

int xc_interface_close(void *h) PLAIN()

int xc_version(void *h, int cmd, void *arg)
{
    NOTE(cmd, arg != NULL);
    if (arg)
        memcpy(arg, a->data, a->size);
    return a == &nothing && !cmd ? 4 << 16 | 17 : a->result;
}

int xc_vm_event_get_version(void *h) PLAIN()

int xc_domain_getinfolist(void *h, uint32_t first, unsigned max, void *info)
{
    NOTE(first, max);
    memcpy(info, a->data, a->size);
    return a->result;
}

int xc_domain_pause(void *h, uint32_t domid) PLAIN(domid)
int xc_domain_unpause(void *h, uint32_t domid) PLAIN(domid)
int xc_domain_maximum_gpfn(void *h, uint32_t domid, pfn *gpfn) OUT(pfn, gpfn, domid)
int xc_domain_setmaxmem(void *h, uint32_t domid, uint64_t kib) PLAIN(domid, kib)

int xc_domain_populate_physmap_exact(void *h, uint32_t domid, unsigned long nr, unsigned order,
                                     unsigned flags, pfn *gfns)
{
    NOTE(domid, nr, order, flags);
    BLOCK(gfns, nr * sizeof(*gfns));
    memset(gfns, 0xee, nr * sizeof(*gfns)); /* the real one writes to it, too */
    return a->result;
}

int xc_domain_decrease_reservation_exact(void *h, uint32_t domid, unsigned long nr,
                                         unsigned order, pfn *gfns)
{
    NOTE(domid, nr, order);
    BLOCK(gfns, nr * sizeof(*gfns));
    memset(gfns, 0xee, nr * sizeof(*gfns));
    return a->result;
}

/* While nothing is noted, which threads may run into, a high parameter is the errno to fail with. */
int xc_hvm_param_get(void *h, uint32_t domid, uint32_t param, uint64_t *value)
{
    if (quiet && param >> 31) {
        errno = param & 0xff;
        return -1;
    }
    NOTE(domid, param);
    if (a->result >= 0)
        *value = a->outs[0];
    return a->result;
}

int xc_hvm_param_set(void *h, uint32_t domid, uint32_t param, uint64_t value)
    PLAIN(domid, param, value)

int xc_domain_hvm_getcontext(void *h, uint32_t domid, uint8_t *buffer, uint32_t size)
{
    NOTE(domid, buffer != NULL, size);
    if (buffer)
        memcpy(buffer, a->data, a->size < size ? a->size : size);
    return a->result;
}

int xc_domain_hvm_getcontext_partial(void *h, uint32_t domid, uint16_t type, uint16_t instance,
                                     void *buffer, uint32_t size)
{
    NOTE(domid, type, instance, size);
    memcpy(buffer, a->data, a->size < size ? a->size : size);
    return a->result;
}

int xc_domain_hvm_setcontext(void *h, uint32_t domid, uint8_t *buffer, uint32_t size)
{
    NOTE(domid, size);
    BLOCK(buffer, size);
    return a->result;
}

int xc_domain_debug_control(void *h, uint32_t domid, uint32_t op, uint32_t vcpu)
    PLAIN(domid, op, vcpu)

int xc_vcpu_getinfo(void *h, uint32_t domid, uint32_t vcpu, void *info)
{
    NOTE(domid, vcpu);
    memcpy(info, a->data, a->size);
    return a->result;
}

int xc_hvm_inject_trap(void *h, uint32_t domid, int vcpu, uint8_t vector, uint8_t type,
                       uint32_t error_code, uint8_t length, uint64_t cr2)
    PLAIN(domid, (uint32_t)vcpu, vector, type, error_code, length, cr2)

int xc_get_paging_mempool_size(void *h, uint32_t domid, uint64_t *size) OUT(uint64_t, size, domid)
int xc_set_paging_mempool_size(void *h, uint32_t domid, uint64_t size) PLAIN(domid, size)

int xc_domain_get_pod_target(void *h, uint32_t domid, uint64_t *pages, uint64_t *cached,
                             uint64_t *entries)
{
    NOTE(domid);
    uint64_t *to[] = {pages, cached, entries};
    for (uint32_t i = 0; i < 3; i++) /* on failure, too, as the real one */
        *to[i] = i < a->size / sizeof(uint64_t) ? ((uint64_t *)a->data)[i] : 0;
    return a->result;
}

/* Of both prototypes: up to 4.15 the fourth argument is a bitmap, of which none is given, and the
 * sixth is the size. What a caller of the newer one has in the sixth is not looked at. */
int xc_shadow_control(void *h, uint32_t domid, unsigned op, void *size, unsigned long mode,
                      unsigned long *older_size)
{
    NOTE(domid, op, size != NULL, (unsigned)mode);
    if (a->result < 0)
        return a->result;
    if (size)
        *(unsigned *)size = a->outs[0];
    else
        *older_size = a->outs[0];
    return a->result;
}

long long xc_logdirty_control(void *h) PLAIN()

int xc_set_mem_access(void *h, uint32_t domid, unsigned access, uint64_t first, uint32_t nr)
    PLAIN(domid, access, first, nr)

int xc_set_mem_access_multi(void *h, uint32_t domid, uint8_t *access, uint64_t *gfns, uint32_t nr)
{
    NOTE(domid, nr, (uintptr_t)access, (uintptr_t)gfns);
    BLOCK(access, nr);
    BLOCK(gfns, nr * sizeof(*gfns));
    return a->result;
}

int xc_get_mem_access(void *h, uint32_t domid, uint64_t gfn, unsigned *access)
    OUT(unsigned, access, domid, gfn)
int xc_domain_set_access_required(void *h, uint32_t domid, unsigned required)
    PLAIN(domid, required)

int xc_altp2m_get_domain_state(void *h, uint32_t domid, bool *state) OUT(bool, state, domid)
int xc_altp2m_set_domain_state(void *h, uint32_t domid, bool state) PLAIN(domid, state)
int xc_altp2m_set_vcpu_enable_notify(void *h, uint32_t domid, uint32_t vcpu, pfn gfn)
    PLAIN(domid, vcpu, gfn)
int xc_altp2m_set_vcpu_disable_notify(void *h, uint32_t domid, uint32_t vcpu) PLAIN(domid, vcpu)
int xc_altp2m_create_view(void *h, uint32_t domid, unsigned access, uint16_t *view)
    OUT(uint16_t, view, domid, access)
int xc_altp2m_destroy_view(void *h, uint32_t domid, uint16_t view) PLAIN(domid, view)
int xc_altp2m_switch_to_view(void *h, uint32_t domid, uint16_t view) PLAIN(domid, view)
int xc_altp2m_set_mem_access(void *h, uint32_t domid, uint16_t view, pfn gfn, unsigned access)
    PLAIN(domid, view, gfn, access)

int xc_altp2m_set_mem_access_multi(void *h, uint32_t domid, uint16_t view, uint8_t *access,
                                   uint64_t *gfns, uint32_t nr)
{
    NOTE(domid, view, nr, (uintptr_t)access, (uintptr_t)gfns);
    BLOCK(access, nr);
    BLOCK(gfns, nr * sizeof(*gfns));
    return a->result;
}

int xc_altp2m_get_mem_access(void *h, uint32_t domid, uint16_t view, pfn gfn, unsigned *access)
    OUT(unsigned, access, domid, view, gfn)
int xc_altp2m_change_gfn(void *h, uint32_t domid, uint16_t view, pfn old_gfn, pfn new_gfn)
    PLAIN(domid, view, old_gfn, new_gfn)
int xc_altp2m_set_suppress_ve(void *h, uint32_t domid, uint16_t view, pfn gfn, bool suppress)
    PLAIN(domid, view, gfn, suppress)

int xc_altp2m_set_supress_ve_multi(void *h, uint32_t domid, uint16_t view, pfn first, pfn last,
                                   bool suppress, pfn *error_gfn, int32_t *error_code)
{
    NOTE(domid, view, first, last, suppress);
    if (a->outs[1]) { /* whatever the result is */
        *error_gfn = a->outs[0];
        *error_code = (int32_t)a->outs[1];
    }
    return a->result;
}

int xc_altp2m_get_suppress_ve(void *h, uint32_t domid, uint16_t view, pfn gfn, bool *suppress)
    OUT(bool, suppress, domid, view, gfn)
int xc_altp2m_get_vcpu_p2m_idx(void *h, uint32_t domid, uint32_t vcpu, uint16_t *view)
    OUT(uint16_t, view, domid, vcpu)
int xc_altp2m_set_visibility(void *h, uint32_t domid, uint16_t view, bool visible)
    PLAIN(domid, view, visible)

void *xc_monitor_enable(void *h, uint32_t domid, uint32_t *port)
{
    ARGUMENTS(kind(h), domid);
    if (a->result < 0)
        return NULL;
    *port = (uint32_t)a->outs[0];
    return mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

int xc_monitor_disable(void *h, uint32_t domid) PLAIN(domid)
int xc_monitor_resume(void *h, uint32_t domid) PLAIN(domid)
int xc_monitor_get_capabilities(void *h, uint32_t domid, uint32_t *capabilities)
    OUT(uint32_t, capabilities, domid)
int xc_monitor_write_ctrlreg(void *h, uint32_t domid, uint16_t index, bool enable, bool sync,
                             uint64_t bitmask, bool onchangeonly)
    PLAIN(domid, index, enable, sync, bitmask, onchangeonly)
int xc_monitor_mov_to_msr(void *h, uint32_t domid, uint32_t msr, bool enable, bool onchangeonly)
    PLAIN(domid, msr, enable, onchangeonly)
int xc_monitor_singlestep(void *h, uint32_t domid, bool enable) PLAIN(domid, enable)
int xc_monitor_software_breakpoint(void *h, uint32_t domid, bool enable) PLAIN(domid, enable)
int xc_monitor_descriptor_access(void *h, uint32_t domid, bool enable) PLAIN(domid, enable)
int xc_monitor_guest_request(void *h, uint32_t domid, bool enable, bool sync, bool userspace)
    PLAIN(domid, enable, sync, userspace)
int xc_monitor_inguest_pagefault(void *h, uint32_t domid, bool disable) PLAIN(domid, disable)
int xc_monitor_debug_exceptions(void *h, uint32_t domid, bool enable, bool sync)
    PLAIN(domid, enable, sync)
int xc_monitor_cpuid(void *h, uint32_t domid, bool enable) PLAIN(domid, enable)
int xc_monitor_privileged_call(void *h, uint32_t domid, bool enable) PLAIN(domid, enable)
int xc_monitor_emul_unimplemented(void *h, uint32_t domid, bool enable) PLAIN(domid, enable)
int xc_monitor_vmexit(void *h, uint32_t domid, bool enable, bool sync) PLAIN(domid, enable, sync)
int xc_monitor_io(void *h, uint32_t domid, bool enable) PLAIN(domid, enable)
int xc_monitor_emulate_each_rep(void *h, uint32_t domid, bool enable) PLAIN(domid, enable)

/* --- libxenevtchn -------------------------------------------------------------------------- */

void *xenevtchn_open(void *log, unsigned flags)
{
    ARGUMENTS(log == logger, flags);
    return a->result < 0 ? NULL : &xce;
}

int xenevtchn_close(void *h) PLAIN()
int xenevtchn_fd(void *h) PLAIN()
int xenevtchn_bind_interdomain(void *h, uint32_t domid, uint32_t port) PLAIN(domid, port)
int xenevtchn_pending(void *h) PLAIN()
int xenevtchn_unmask(void *h, uint32_t port) PLAIN(port)
int xenevtchn_notify(void *h, uint32_t port) PLAIN(port)

/* --- libxencall ---------------------------------------------------------------------------- */

enum { DOMCTL = 144 }; /* sizeof(struct xen_domctl) */
enum { GET_MEM_TYPE = 15 }; /* HVMOP_get_mem_type */

void *xencall_open(void *log, unsigned flags)
{
    ARGUMENTS(log == logger, flags);
    return a->result < 0 ? NULL : &xcall;
}

int xencall_close(void *h) PLAIN()

/* What was there before is in it, as in the real one's. */
void *xencall_alloc_buffer(void *h, size_t size)
{
    ARGUMENTS(kind(h), size);
    return a->result < 0 ? NULL : memset(malloc(size), 0xa5, size);
}

void xencall_free_buffer(void *h, void *buffer)
{
    ARGUMENTS(kind(h), (uintptr_t)buffer);
    free(buffer);
    errno = 0;
}

int xencall1(void *h, unsigned op, uint64_t argument)
{
    NOTE(op, argument);
    BLOCK((void *)argument, DOMCTL);
    return a->result;
}

/* struct xen_hvm_altp2m_op with a bulk access in it. */
struct altp2m_op {
    uint32_t version, cmd;
    uint16_t domain, pads[3];
    uint16_t view, pad;
    uint32_t nr;
    uint64_t opaque, pfn_list, access_list;
    unsigned char rest[32];
};
_Static_assert(sizeof(struct altp2m_op) == 80, "as in Xen");

/* While nothing is noted, which threads may run into, a high view wants gfns and accesses like it,
 * all of them, whatever other threads do meanwhile. Xen leaves how far a continuation had come. */
int xencall2(void *h, unsigned op, uint64_t command, uint64_t argument)
{
    struct altp2m_op *bulk = (void *)argument;
    if (command == GET_MEM_TYPE) {
        NOTE(op, command, argument);
        BLOCK((void *)argument, 16); /* struct xen_hvm_get_mem_type, the type at 2 */
        ((uint16_t *)argument)[1] = a->outs[0];
        return a->result;
    }
    if (quiet && bulk->view >> 15)
        for (uint32_t i = 0; i < bulk->nr; i++)
            if (((uint64_t *)bulk->pfn_list)[i] != bulk->view ||
                ((uint8_t *)bulk->access_list)[i] != (uint8_t)bulk->view) {
                errno = EIO;
                return -1;
            }
    NOTE(op, command, argument);
    BLOCK(bulk, sizeof(*bulk));
    BLOCK((void *)bulk->pfn_list, bulk->nr * sizeof(uint64_t));
    BLOCK((void *)bulk->access_list, bulk->nr);
    bulk->opaque = bulk->nr;
    return a->result;
}

/* --- libxenforeignmemory ------------------------------------------------------------------- */

void *xenforeignmemory_open(void *log, unsigned flags)
{
    ARGUMENTS(log == logger, flags);
    return a->result < 0 ? NULL : &fmem;
}

int xenforeignmemory_close(void *h) PLAIN()

/* Every page begins with its gfn. */
void *xenforeignmemory_map(void *h, uint32_t domid, int prot, size_t pages, const pfn gfns[],
                           int err[])
{
    ARGUMENTS(kind(h), domid, prot, pages, err == NULL);
    BLOCK(gfns, pages * sizeof(*gfns));
    if (a->result < 0)
        return NULL;
    char *area = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                      -1, 0);
    if (area == MAP_FAILED)
        return NULL;
    for (size_t i = 0; i < pages; i++)
        memcpy(area + i * PAGE, &gfns[i], sizeof(gfns[i]));
    mprotect(area, pages * PAGE, prot);
    return area;
}

int xenforeignmemory_unmap(void *h, void *area, size_t pages)
{
    NOTE((uintptr_t)area, pages);
    if (a->result >= 0)
        munmap(area, pages * PAGE);
    return a->result;
}

/* --- libxenstore --------------------------------------------------------------------------- */

static void *copied(const struct answer *a)
{
    char *copy = malloc(a->size + 1);
    memcpy(copy, a->data, a->size);
    copy[a->size] = 0;
    return copy;
}

void *xs_open(unsigned long flags)
{
    ARGUMENTS(flags);
    return a->result < 0 ? NULL : &xs;
}

void xs_close(void *h)
{
    ARGUMENTS(kind(h));
}

void *xs_read(void *h, uint32_t transaction, const char *path, unsigned *length)
{
    ARGUMENTS(kind(h), transaction);
    BLOCK(path, strlen(path));
    if (a->result < 0)
        return NULL;
    *length = a->size;
    return copied(a);
}

/* --- libxenlight --------------------------------------------------------------------------- */

int libxl_ctx_alloc(void **context, int version, unsigned flags, void *log)
{
    ARGUMENTS(version, flags, log == logger);
    *context = a->result < 0 ? NULL : &xl;
    return a->result;
}

int libxl_ctx_free(void *context)
{
    ARGUMENTS(kind(context));
    return a->result;
}

int libxl_userdata_retrieve(void *context, uint32_t domid, const char *id, uint8_t **data,
                            int *length)
{
    ARGUMENTS(kind(context), domid);
    BLOCK(id, strlen(id));
    if (a->result >= 0 && a->size) {
        *data = copied(a);
        *length = (int)a->size;
    }
    return a->result;
}

/* --- what the benchmark calls: the same work, from C ---------------------------------------- */

typedef int set_mem_access(void *h, uint32_t domid, uint16_t view, pfn gfn, unsigned access);

int fake_loop_single(set_mem_access *volatile *function, uint32_t domid, uint16_t view, uint64_t n,
                     unsigned access)
{
    int failed = 0;
    for (uint64_t gfn = 0; gfn < n; gfn++)
        failed |= (*function)(&xch, domid, view, gfn, access);
    return failed;
}
