#!/bin/sh
# What the image starts. This tells glibc what it cannot be told later, and hands over to `preview-agent`, so that
# signals and exit codes are the agent's own.
set -eu

# How much free memory glibc keeps for the agent's next event; `agent/memory.py` gives it back at each heartbeat. With
# glibc's own 128 KB an event of 100 KB gets 46 pages anew, a seventh of its way to the disk (572 against 488 us), and
# with an arena for each thread, each keeps its own. 32 MB is the most that glibc itself sets as the size from which a
# block gets pages of its own; what is trimmed unasked is twice that. Here and not in the image's environment: the
# project's programs, and whoever has a shell in the container, have glibc's defaults.
export MALLOC_ARENA_MAX="${MALLOC_ARENA_MAX:-1}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-67108864}"

exec preview-agent run "$@"
