"""How the C library's allocator treats a forward pass's memory on a CPU."""

from __future__ import annotations

import torch

LARGEST = 2**25 - 2**20
"""Bytes: a little under 32 MiB, the highest that glibc raises its threshold by itself."""


def keep_freed_memory() -> None:
    """Lets a layer's activations take the memory that the layer before has freed.

    glibc maps large blocks from the system and unmaps them when they are freed, so that the kernel hands out every
    page of every activation anew. Where "large" begins follows the largest block freed so far (`mallopt(3)`,
    M_MMAP_THRESHOLD), up to 32 MiB; freeing one of that size makes it so from the start, and not when chance has it.
    The block is never written to, so it takes no memory. It is a setting of the whole process. A `TransformersVLM` and
    a trainer that shares prefixes on a CPU make it when they are made. A threshold that the user has set by
    MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES stays; other allocators are not touched.
    """
    torch.empty(LARGEST, dtype=torch.uint8)
