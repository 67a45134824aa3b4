/*
 * Surviving guest memory that goes away while it is touched.
 *
 * What belongs here: the handlers of SIGBUS and SIGSEGV and the thread's stack of guards. What does not: who enters a
 * guard and what a lost page means to it.
 */
#include <signal.h>
#include <string.h>

#include "core.h"

/* initial-exec: the handler must not run the allocator, which a lazily made thread-local variable would. */
static _Thread_local struct vu_guard *innermost __attribute__((tls_model("initial-exec")));
/* How many foreign handlers deep this thread is: faulthandler raises the signal again from inside its handler. */
static _Thread_local unsigned foreign_depth __attribute__((tls_model("initial-exec")));

/* The handlers that ours replaced, oldest first. Some are put on top of ours later (faulthandler.enable), so there may be
 * several; those who come when the list is full share its last place. */
#define FOREIGN 8
struct foreign {
    int signal;
    struct sigaction actions[FOREIGN];
    _Atomic unsigned count;
};
static struct foreign foreign_bus = {.signal = SIGBUS};
static struct foreign foreign_segv = {.signal = SIGSEGV};

static bool holds(const struct vu_span *span, uintptr_t address)
{
    return address - span->base < span->length;
}

static bool covers(const struct vu_guard *guard, uintptr_t address)
{
    return holds(&guard->extra[0], address) || holds(&guard->extra[1], address) ||
           (guard->map && vu_map_page_size(guard->map, (const void *)address) != 0);
}

/* Whether the interrupted instruction made the fault. Not so a signal that a process sent (si_code <= 0, and si_addr means
 * nothing), nor the kernel's warning of bad memory that nobody has touched yet: it comes at any moment, while a lock is
 * held for example, and who touches that page gets a fault of his own. */
static bool is_fault(int signal, const siginfo_t *info)
{
    return info->si_code > 0 && !(signal == SIGBUS && info->si_code == BUS_MCEERR_AO);
}

/* Neither ours nor anybody's: die as if there had been no handler. A fault happens again on return, other signals do
 * not. */
static void give_up(int signal, const siginfo_t *info)
{
    struct sigaction standard = {.sa_handler = SIG_DFL};
    sigaction(signal, &standard, NULL);
    if (!is_fault(signal, info))
        raise(signal);
}

static void pass_on(int signal, siginfo_t *info, void *context)
{
    struct foreign *foreign = signal == SIGBUS ? &foreign_bus : &foreign_segv;
    unsigned count = atomic_load(&foreign->count);
    if (foreign_depth >= count)
        return give_up(signal, info);
    const struct sigaction *action = &foreign->actions[count - 1 - foreign_depth];
    if (!(action->sa_flags & SA_SIGINFO) && (action->sa_handler == SIG_DFL || action->sa_handler == SIG_IGN))
        return give_up(signal, info);
    foreign_depth++;
    if (action->sa_flags & SA_SIGINFO)
        action->sa_sigaction(signal, info, context);
    else
        action->sa_handler(signal);
    foreign_depth--;
}

static void on_fault(int signal, siginfo_t *info, void *context)
{
    for (struct vu_guard *guard = is_fault(signal, info) ? innermost : NULL; guard; guard = guard->outer) {
        if (covers(guard, (uintptr_t)info->si_addr)) {
            innermost = guard->outer;
            foreign_depth = 0; /* a foreign handler that left by a jump never counted back */
            siglongjmp(guard->env, 1);
        }
    }
    pass_on(signal, info, context);
}

static void remember(struct foreign *foreign, const struct sigaction *action)
{
    unsigned count = atomic_load(&foreign->count);
    if (count > 0 && foreign->actions[count - 1].sa_sigaction == action->sa_sigaction)
        return;
    foreign->actions[count < FOREIGN ? count : FOREIGN - 1] = *action;
    if (count < FOREIGN)
        atomic_store(&foreign->count, count + 1);
}

/* SA_NODEFER, and no mask restored by the jump: the signal is never blocked, so the next fault is seen as well.
 * The kernel swaps the handlers in one step, so of several threads only one gets to remember a foreign handler. */
static int install(struct foreign *foreign)
{
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    struct sigaction before;
    if (sigaction(foreign->signal, NULL, &before) < 0)
        return VU_E_SYS;
    if ((before.sa_flags & SA_SIGINFO) && before.sa_sigaction == on_fault)
        return 0;
    if (sigaction(foreign->signal, &ours, &before) < 0)
        return VU_E_SYS;
    if (!(before.sa_flags & SA_SIGINFO) || before.sa_sigaction != on_fault)
        remember(foreign, &before);
    return 0;
}

int vu_guard_install(void)
{
    int code = install(&foreign_bus);
    return code < 0 ? code : install(&foreign_segv);
}

void vu_guard_enter(struct vu_guard *guard, const vu_map *map)
{
    guard->map = map;
    guard->extra[0] = guard->extra[1] = (struct vu_span){0, 0};
    guard->outer = innermost;
    innermost = guard;
    /* The handler runs on this thread: no more than the order of the compiler's stores matters. */
    atomic_signal_fence(memory_order_seq_cst);
}

void vu_guard_leave(struct vu_guard *guard)
{
    atomic_signal_fence(memory_order_seq_cst);
    innermost = guard->outer;
}
