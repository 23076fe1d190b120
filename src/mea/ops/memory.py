"""Memory that a process frees: kept for its next tensors instead of given back to the system."""

import ctypes
import os

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of glibc's mallopt
SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Make this process keep memory that it frees, for its next tensors; tell whether that was possible.

    The C library gives blocks of tens of megabytes back to the system as soon as they are free and gets the next ones
    page by page, each filled with zeros first. Distilling a model with a large vocabulary on a processor spends most of
    its time on that. The price: between its peaks a process looks as large as at its largest.

    Only glibc is told; where the user has set its variables, or loads another allocator, nothing is changed.
    """
    if any(name in os.environ for name in SET_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return all(mallopt(which, 2**30) for which in (MMAP_THRESHOLD, TRIM_THRESHOLD))
