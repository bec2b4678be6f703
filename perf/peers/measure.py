"""Time and memory of work on the device."""

import ctypes
import time

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
MIN_SAMPLES, MAX_SAMPLES = 5, 200


def keep_freed_memory():
    """Has malloc keep what is freed, as PyTorch does on a GPU. Otherwise glibc gives large arrays back to the system,
    or not, depending on what ran before, and each page that comes anew costs a fault: of gradients of 200 MB 40 ms.
    With another C library times are what they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_ARENA_MAX, 1)  # others could not do without mmap


class Clock:
    """Seconds that a call takes: by events on a CUDA device; by the wall clock on a CPU, or where the framework has
    its own stream and so gives wait()."""

    def __init__(self, device, wait=None):
        self.events = device == "cuda" and wait is None
        self.wait = wait or (lambda: None)
        self.junk = None
        if device == "cuda":
            size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
            self.junk = torch.empty(size, dtype=torch.int8, device=device)

    def seconds(self, call):
        if self.junk is not None:
            self.junk.zero_()  # nothing of the call's data stays in L2, and the host gets ahead of the device
        if self.events:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            return 1e-3 * start.elapsed_time(stop)
        if self.junk is not None:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start


def samples(clock, calls, seconds):
    """One list of seconds for each of the calls, which are made in turns. A third of the time warms up; then five
    rounds at least, more while there is time, and fewer only if they would take three times as long."""
    begin = time.perf_counter()
    while True:
        taken = [[clock.seconds(call)] for call in calls]
        if time.perf_counter() - begin > seconds / 3:
            break
    if time.perf_counter() - begin > seconds:  # the one round that there is time for
        return taken
    for sample in taken:
        sample.clear()
    while len(taken[0]) < MAX_SAMPLES:
        for call, sample in zip(calls, taken):
            sample.append(clock.seconds(call))
        used = time.perf_counter() - begin
        if used > 3 * seconds or (used > seconds and len(taken[0]) >= MIN_SAMPLES):
            break
    return taken


def peak_memory(call, device):
    """The most bytes that a call needs beyond those that are allocated before; None where torch does not count."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
