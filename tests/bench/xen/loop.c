/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What C reaches where our Python monitor is measured: a loop over the ring that does no more than
 * it must. Built once for all releases: it has its own declarations and loads dom0's libraries.
 *
 *     loop DOMID bulk                              protects all gfns by one call
 *     loop DOMID toggle|fast SECONDS [GFN...]      answers violations of these gfns, or of all
 *     loop DOMID toggle|fast SECONDS shadow GFN NEW    answers int3 in the page that is shown instead
 *
 * prints what it has measured as JSON.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { ACCESS_RW = 3, ACCESS_X = 4, ACCESS_RWX = 7 };
enum { REASON_MEM_ACCESS = 1, REASON_BREAKPOINT = 6, REASON_SINGLESTEP = 7 };
enum {
    VCPU_PAUSED = 1 << 0,
    TOGGLE_SINGLESTEP = 1 << 4,
    ALTERNATE_P2M = 1 << 7,
    FAST_SINGLESTEP = 1 << 11,
};
enum { SINGLE_STEP_OFF = 0, LAST_VCPU = 31, ENTRIES = 8 };

struct event { /* the part of vm_event_request_t that is the same from 4.14 on */
    uint32_t version, flags, reason, vcpu;
    uint16_t view, pad[3];
    union {
        uint8_t all[32];
        uint16_t step_to;
    } u;
};

struct ring {
    uint32_t req_prod, req_event, rsp_prod, rsp_event;
    uint8_t pad[48];
    uint8_t entries[];
};

struct library; /* any handle */
typedef struct library *handle;

#define LIBXENCTRL(call)                                                              \
    call(handle, xc_interface_open, (void *, void *, unsigned))                       \
    call(int, xc_interface_close, (handle))                                           \
    call(int, xc_vm_event_get_version, (handle))                                      \
    call(int, xc_domain_maximum_gpfn, (handle, uint32_t, unsigned long *))            \
    call(int, xc_domain_pause, (handle, uint32_t))                                    \
    call(int, xc_domain_unpause, (handle, uint32_t))                                  \
    call(int, xc_domain_debug_control, (handle, uint32_t, uint32_t, uint32_t))        \
    call(void *, xc_monitor_enable, (handle, uint32_t, uint32_t *))                   \
    call(int, xc_monitor_disable, (handle, uint32_t))                                 \
    call(int, xc_monitor_singlestep, (handle, uint32_t, bool))                        \
    call(int, xc_altp2m_set_domain_state, (handle, uint32_t, bool))                   \
    call(int, xc_altp2m_create_view, (handle, uint32_t, int, uint16_t *))             \
    call(int, xc_altp2m_destroy_view, (handle, uint32_t, uint16_t))                   \
    call(int, xc_altp2m_switch_to_view, (handle, uint32_t, uint16_t))                 \
    call(int, xc_monitor_software_breakpoint, (handle, uint32_t, bool))               \
    call(int, xc_altp2m_change_gfn, (handle, uint32_t, uint16_t, uint64_t, uint64_t)) \
    call(int, xc_altp2m_set_mem_access, (handle, uint32_t, uint16_t, uint64_t, int))  \
    call(int, xc_altp2m_set_mem_access_multi,                                         \
         (handle, uint32_t, uint16_t, uint8_t *, uint64_t *, uint32_t))
#define LIBXENEVTCHN(call)                                                            \
    call(handle, xenevtchn_open, (void *, unsigned))                                  \
    call(int, xenevtchn_close, (handle))                                              \
    call(int, xenevtchn_fd, (handle))                                                 \
    call(int, xenevtchn_bind_interdomain, (handle, uint32_t, uint32_t))               \
    call(int, xenevtchn_unbind, (handle, uint32_t))                                   \
    call(int, xenevtchn_pending, (handle))                                            \
    call(int, xenevtchn_unmask, (handle, uint32_t))                                   \
    call(int, xenevtchn_notify, (handle, uint32_t))

#define DECLARE(result, name, arguments) static result (*name) arguments;
LIBXENCTRL(DECLARE)
LIBXENEVTCHN(DECLARE)

static volatile sig_atomic_t interrupted;

static void interrupt(int number)
{
    (void)number;
    interrupted = 1;
}

__attribute__((noreturn)) static void fail(const char *what)
{
    fprintf(stderr, "loop: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void check(int result, const char *what)
{
    if (result < 0)
        fail(what);
}

#define CHECKED(name, ...) check(name(__VA_ARGS__), #name)

static void load(void)
{
    void *library = NULL;
    char name[32];

    for (int minor = 14; library == NULL && minor < 40; minor++) {
        snprintf(name, sizeof(name), "libxenctrl.so.4.%d", minor);
        library = dlopen(name, RTLD_NOW);
    }
    if (library == NULL)
        fail("no libxenctrl");
#define FIND(result, name, arguments)                                                 \
    if ((name = (result(*) arguments)dlsym(library, #name)) == NULL)                  \
        fail(#name);
    LIBXENCTRL(FIND)
    library = dlopen("libxenevtchn.so.1", RTLD_NOW);
    if (library == NULL)
        fail("no libxenevtchn");
    LIBXENEVTCHN(FIND)
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

struct agent {
    handle xc, evtchn;
    uint32_t domid, port, consumed;
    uint16_t view;
    bool fast;
    struct ring *ring;
    size_t size;            /* of an entry */
    unsigned long accesses, steps;
};

/* Protects the gfns, or all there are: without x, as xen-access altp2m_exec does. */
static uint32_t protect(struct agent *agent, char **texts, int count, double *seconds)
{
    unsigned long last;
    uint32_t number = (uint32_t)count;
    uint64_t *gfns;
    uint8_t *accesses;
    double start;

    if (count == 0) {
        CHECKED(xc_domain_maximum_gpfn, agent->xc, agent->domid, &last);
        number = (uint32_t)last + 1;
    }
    gfns = malloc(number * sizeof(*gfns));
    accesses = malloc(number);
    if (gfns == NULL || accesses == NULL)
        fail("memory");
    memset(accesses, ACCESS_RW, number);
    for (uint32_t i = 0; i < number; i++)
        gfns[i] = count == 0 ? i : strtoul(texts[i], NULL, 0);
    start = now();
    CHECKED(xc_altp2m_set_mem_access_multi, agent->xc, agent->domid, agent->view, accesses, gfns,
            number);
    *seconds = now() - start;
    free(gfns);
    free(accesses);
    return number;
}

static void create_view(struct agent *agent, int access)
{
    CHECKED(xc_altp2m_set_domain_state, agent->xc, agent->domid, true);
    CHECKED(xc_altp2m_create_view, agent->xc, agent->domid, access, &agent->view);
}

static void remove_view(struct agent *agent)
{
    CHECKED(xc_altp2m_switch_to_view, agent->xc, agent->domid, 0);
    CHECKED(xc_altp2m_destroy_view, agent->xc, agent->domid, agent->view);
    CHECKED(xc_altp2m_set_domain_state, agent->xc, agent->domid, false);
}

/* Lets the view show another page, which is executed and not read. */
static uint32_t show(struct agent *agent, uint64_t gfn, uint64_t shown)
{
    CHECKED(xc_altp2m_change_gfn, agent->xc, agent->domid, agent->view, gfn, shown);
    CHECKED(xc_altp2m_set_mem_access, agent->xc, agent->domid, agent->view, gfn, ACCESS_X);
    CHECKED(xc_monitor_software_breakpoint, agent->xc, agent->domid, true);
    return 1;
}

static void attach(struct agent *agent)
{
    int version, port;

    agent->ring = xc_monitor_enable(agent->xc, agent->domid, &agent->port);
    if (agent->ring == NULL)
        fail("xc_monitor_enable");
    version = xc_vm_event_get_version(agent->xc);
    if (version != 6 && version != 7) {
        errno = ENOTSUP;
        fail("vm_event interface");
    }
    agent->size = version == 6 ? 384 : 400;
    agent->evtchn = xenevtchn_open(NULL, 0);
    if (agent->evtchn == NULL)
        fail("xenevtchn_open");
    port = xenevtchn_bind_interdomain(agent->evtchn, agent->domid, agent->port);
    check(port, "xenevtchn_bind_interdomain");
    agent->port = (uint32_t)port;
    memset(agent->ring, 0, 4096);
    agent->ring->req_event = agent->ring->rsp_event = 1;
}

static void answer(struct agent *agent, struct event *event, bool stepping)
{
    uint32_t flags = event->flags & VCPU_PAUSED;

    bool hit = event->reason == REASON_MEM_ACCESS || event->reason == REASON_BREAKPOINT;

    agent->accesses += hit;
    agent->steps += event->reason == REASON_SINGLESTEP;
    if (stepping && hit) {
        flags |= ALTERNATE_P2M | (agent->fast ? FAST_SINGLESTEP : TOGGLE_SINGLESTEP);
        event->view = 0;
        if (agent->fast)
            event->u.step_to = agent->view;
    } else if (stepping && event->reason == REASON_SINGLESTEP) {
        flags |= ALTERNATE_P2M | TOGGLE_SINGLESTEP;
        event->view = agent->view;
    }
    event->flags = flags;
}

/* Answers all that is in the ring; a request and its response have the same layout. */
static void drain(struct agent *agent, bool stepping)
{
    struct ring *ring = agent->ring;
    struct event event;
    uint8_t *entry;

    while (agent->consumed != __atomic_load_n(&ring->req_prod, __ATOMIC_ACQUIRE)) {
        memcpy(&event, &ring->entries[agent->consumed % ENTRIES * agent->size], sizeof(event));
        agent->consumed++;
        ring->req_event = agent->consumed + 1;
        answer(agent, &event, stepping);
        entry = &ring->entries[ring->rsp_prod % ENTRIES * agent->size];
        memset(entry, 0, agent->size);
        memcpy(entry, &event, sizeof(event));
        __atomic_store_n(&ring->rsp_prod, ring->rsp_prod + 1, __ATOMIC_RELEASE);
    }
}

/* Returns how long it took. */
static double serve(struct agent *agent, double seconds)
{
    double start = now(), end = start + seconds;
    struct pollfd ready = { .fd = xenevtchn_fd(agent->evtchn), .events = POLLIN };

    while (!interrupted && now() < end) {
        if (poll(&ready, 1, 100) <= 0)
            continue;
        check(xenevtchn_pending(agent->evtchn), "xenevtchn_pending");
        CHECKED(xenevtchn_unmask, agent->evtchn, agent->port);
        drain(agent, true);
        CHECKED(xenevtchn_notify, agent->evtchn, agent->port);
    }
    return now() - start;
}

/* No vCPU is left paused, single-stepping or in the view. */
static void detach(struct agent *agent)
{
    CHECKED(xc_domain_pause, agent->xc, agent->domid);
    remove_view(agent);
    CHECKED(xc_monitor_singlestep, agent->xc, agent->domid, false);
    xc_monitor_software_breakpoint(agent->xc, agent->domid, false); /* if it is on */
    drain(agent, false);
    CHECKED(xenevtchn_notify, agent->evtchn, agent->port);
    for (uint32_t vcpu = 0; vcpu <= LAST_VCPU; vcpu++)
        xc_domain_debug_control(agent->xc, agent->domid, SINGLE_STEP_OFF, vcpu);
    munmap(agent->ring, 4096);
    CHECKED(xc_monitor_disable, agent->xc, agent->domid);
    CHECKED(xenevtchn_unbind, agent->evtchn, agent->port);
    xenevtchn_close(agent->evtchn);
    CHECKED(xc_domain_unpause, agent->xc, agent->domid);
}

int main(int argc, char **argv)
{
    struct agent agent = { 0 };
    double protecting, running;
    unsigned long hits;
    uint32_t gfns;
    bool bulk = argc == 3 && strcmp(argv[2], "bulk") == 0;
    bool shadow = argc == 7 && strcmp(argv[4], "shadow") == 0;

    agent.fast = argc > 3 && strcmp(argv[2], "fast") == 0;
    if (!bulk && !agent.fast && (argc < 4 || strcmp(argv[2], "toggle") != 0)) {
        fprintf(stderr, "usage: loop DOMID bulk | loop DOMID toggle|fast SECONDS [GFN...]\n"
                        "       loop DOMID toggle|fast SECONDS shadow GFN NEW\n");
        return 2;
    }
    agent.domid = (uint32_t)strtoul(argv[1], NULL, 0);
    load();
    signal(SIGINT, interrupt);
    signal(SIGTERM, interrupt);
    agent.xc = xc_interface_open(NULL, NULL, 0);
    if (agent.xc == NULL)
        fail("xc_interface_open");
    if (bulk) {
        create_view(&agent, ACCESS_RW);
        gfns = protect(&agent, NULL, 0, &protecting);
        remove_view(&agent);
        printf("{\"gfns\": %u, \"seconds\": %.6f}\n", gfns, protecting);
    } else {
        attach(&agent);
        create_view(&agent, shadow ? ACCESS_RWX : ACCESS_RW);
        if (shadow)
            gfns = show(&agent, strtoul(argv[5], NULL, 0), strtoul(argv[6], NULL, 0));
        else
            gfns = protect(&agent, argv + 4, argc - 4, &protecting);
        CHECKED(xc_monitor_singlestep, agent.xc, agent.domid, true);
        CHECKED(xc_altp2m_switch_to_view, agent.xc, agent.domid, agent.view);
        running = serve(&agent, strtod(argv[3], NULL));
        hits = agent.accesses;
        detach(&agent);
        printf("{\"hits\": %lu, \"seconds\": %.6f, \"steps\": %lu, \"gfns\": %u}\n", hits, running,
               agent.steps, gfns);
    }
    xc_interface_close(agent.xc);
    return 0;
}
