# To be sourced before training on a CPU: `source scripts/cpu.sh`. Changes nothing beside a GPU.
# XLA's operations leave part of a second core idle, so the CPU stands as two devices, each with half
# of a batch; and since each step's buffers are mapped anew, memory is kept, in huge pages.
if [[ "$(nvidia-smi -L 2>/dev/null || true)" != *GPU* ]]; then
    if [[ "$(getconf _NPROCESSORS_ONLN)" -ge 2 && "${XLA_FLAGS:-}" != *device_count* ]]; then
        export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2"
    fi
    tunables="glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$tunables:glibc.malloc.trim_threshold=8589934592}"
    unset tunables
fi
