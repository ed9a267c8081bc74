# To be sourced before training on a CPU: `source scripts/cpu.sh`. Where there is a GPU it changes
# nothing, and what is set already stays.
if [[ "$(nvidia-smi -L 2>/dev/null || true)" != *GPU* ]]; then
    # Two devices, each with half of a batch: one leaves part of a second core idle.
    if [[ "$(getconf _NPROCESSORS_ONLN)" -ge 2 && "${XLA_FLAGS:-}" != *device_count* ]]; then
        export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2"
    fi
    # XLA frees its buffers after each step; glibc would give them back to the system, which would
    # have to clear their pages again. Here blocks up to 4 GiB, and 8 GiB in all, are kept.
    tunables="glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$tunables:glibc.malloc.trim_threshold=8589934592}"
    unset tunables
fi
