# Flags of XLA for each kind of chip, and why. To be sourced: `export_xla_flags v6e-8` or `export_xla_flags gpu`.
#
# There are few on purpose: XLA's defaults are good, and change with every release. Flags that are set already win:
# where a flag is given twice the later one counts.
# shellcheck shell=bash

# On a `model` axis every sub-layer ends with an all-reduce of its activations (about 14 MB a candidate at 832x480 in
# bfloat16). Fused, its steps run between tiles of the matrix product beside it, instead of after it. The candidate and
# data axes have no such collectives: there these flags change nothing.
COLLECTIVE_FLAGS=(
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
  --xla_tpu_overlap_compute_collective_tc=true
)

# How much of the on-chip vector memory one operation may use; the rest prefetches for the next. Compute-bound matrix
# products, which is what denoising is, profit from larger tiles. 96 MiB of the 128 MiB that a v6e has.
VMEM_FLAGS=(--xla_tpu_scoped_vmem_limit_kib=98304)

# Starts collectives as early and waits for them as late as possible; without it they are issued where they are needed.
GPU_FLAGS=(--xla_gpu_enable_latency_hiding_scheduler=true)

# Prints the flags for an accelerator type of Google Cloud (v5litepod-8, v6e-8, ...) or for `gpu`.
xla_flags() {
  case "$1" in
    v6e-*) echo "${COLLECTIVE_FLAGS[*]} ${VMEM_FLAGS[*]}" ;;
    v4-* | v5litepod-* | v5p-* | tpu7x-*) echo "${COLLECTIVE_FLAGS[*]}" ;;
    gpu) echo "${GPU_FLAGS[*]}" ;;
    *)
      echo "no flags are known for $1: give v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-N or gpu" >&2
      return 2
      ;;
  esac
}

# libtpu reads its flags from one variable, everything else from another.
export_xla_flags() {
  local flags
  flags=$(xla_flags "$1") || return
  if [[ $1 == gpu ]]; then
    export XLA_FLAGS="$flags ${XLA_FLAGS:-}"
  else
    export LIBTPU_INIT_ARGS="$flags ${LIBTPU_INIT_ARGS:-}"
  fi
}
