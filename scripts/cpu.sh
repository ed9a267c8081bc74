# Source this script before you train on a CPU: `source scripts/cpu.sh`. It has no effect if there
# is a GPU, and keeps variables that are already set.
if [[ "$(nvidia-smi -L 2>/dev/null || true)" != *GPU* ]]; then
    # Use two devices, with half of a batch each: a single one leaves the second core partly idle.
    if [[ "$(getconf _NPROCESSORS_ONLN)" -ge 2 && "${XLA_FLAGS:-}" != *device_count* ]]; then
        export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2"
    fi
    # XLA frees its buffers after each step. By default, glibc returns them to the system, which
    # must clear their pages before the next step. Keep blocks of up to 4 GiB, 8 GiB in total.
    tunables="glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$tunables:glibc.malloc.trim_threshold=8589934592}"
    unset tunables
fi
