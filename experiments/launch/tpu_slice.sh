#!/usr/bin/env bash
# Runs experiments.generate on all hosts of a Cloud TPU slice, from any machine with gcloud:
#
#   export TPU_NAME=stream ZONE=us-east5-b ACCELERATOR=v6e-8 BUCKET=gs://my-bucket/stream
#   experiments/launch/tpu_slice.sh create
#   experiments/launch/tpu_slice.sh install
#   experiments/launch/tpu_slice.sh run --flagfile=experiments/flagfiles/paper_5s.flags \
#     --checkpoint=$BUCKET/wan_1_3b --prompts_file=$BUCKET/prompts.txt
#   experiments/launch/tpu_slice.sh delete
#
# `keep_running` in the place of the first three makes slices until the run is through: SPOT=1 slices are cheap and taken
# away. Nothing is lost with them: results, saved searches and compiled programs are in BUCKET, and the same command goes
# on in the middle of a video. With --overwrite every slice would begin the list anew: give it another BUCKET instead.
#
#   TPU_NAME     name of the slice
#   ZONE         where it is
#   ACCELERATOR  its type: v4-8, v5litepod-8, v5p-8, v6e-8, ...; decides the runtime version and XLA's flags
#   BUCKET       folder of an object store that the slice may write
#   RUNTIME      another runtime version
#   SPOT         1 for a slice that may be preempted
#   SAVE_EVERY   chunks between two saved states, 5 by default
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=xla_flags.sh
source "$HERE/xla_flags.sh"
# shellcheck source=install.sh
source "$HERE/install.sh"

main() {
  local action=${1:-help}
  shift || true
  case "$action" in
    create | install | run | keep_running | delete) ;;
    *)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      [[ $action == help || $action == --help ]] || exit 2
      return
      ;;
  esac
  : "${TPU_NAME:?name of the slice}" "${ZONE:?zone of the slice}" "${ACCELERATOR:?type of the slice, such as v6e-8}"
  # Else `keep_running` would try for ever.
  xla_flags "$ACCELERATOR" >/dev/null
  [[ -n ${RUNTIME:-} ]] || RUNTIME=$(runtime_version)
  echo "note: Google gives the Cloud TPU API fixes only, and no chips after v6e; tpu_mig.sh and jobset.sh do without it" >&2
  "$action" "$@"
}

runtime_version() {
  case "$ACCELERATOR" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *)
      echo "no runtime version is known for ACCELERATOR=$ACCELERATOR: set RUNTIME" >&2
      return 2
      ;;
  esac
}

create() {
  local spot=()
  [[ ${SPOT:-0} == 0 ]] || spot=(--spot)
  gcloud compute tpus tpu-vm create "$TPU_NAME" --zone="$ZONE" --accelerator-type="$ACCELERATOR" \
    --version="$RUNTIME" "${spot[@]}"
}

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$1"
}

# The commit that is checked out here, into a virtual environment of its own: the images' Python is too old.
install() {
  local archive
  archive=$(mktemp -d)/streamt1_jax.tar.gz
  git -C "$HERE/../.." archive --format=tar.gz --output="$archive" HEAD &&
    gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:" --zone="$ZONE" --worker=all &&
    on_all_workers "$INSTALL" &&
    rm -r "$(dirname "$archive")"
}

# JAX finds the other hosts of the slice by itself.
run() {
  : "${BUCKET:?folder of an object store, such as gs://my-bucket/stream}"
  local flags arguments
  flags="$(xla_flags "$ACCELERATOR") ${LIBTPU_INIT_ARGS:-}"
  printf -v arguments '%q ' --output_dir="$BUCKET/videos" --compilation_cache_dir="$BUCKET/compiled" \
    --save_every="${SAVE_EVERY:-5}" "$@"
  on_all_workers "cd streamt1_jax && LIBTPU_INIT_ARGS=$(printf %q "$flags") ../venv/bin/python -m experiments.generate $arguments"
}

slice_state() {
  gcloud compute tpus tpu-vm describe "$TPU_NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null || echo MISSING
}

keep_running() {
  : "${BUCKET:?folder of an object store, such as gs://my-bucket/stream}"
  # Whether this program has installed on the slice: how far another one came cannot be told.
  local state code installed= deaths=0
  while true; do
    state=$(slice_state)
    if [[ $state != READY ]]; then
      installed=
      deaths=0
      [[ $state == MISSING ]] || delete
      if ! create; then
        sleep "${RETRY_SECONDS:-60}"
        continue
      fi
    fi
    if [[ -z $installed ]]; then
      if ! install; then
        sleep "${RETRY_SECONDS:-60}"
        continue
      fi
      installed=1
    fi
    code=0
    run "$@" || code=$?
    case $code in
      # SIGTERM, after which a slice that is taken away may still look healthy; or ssh has lost its connection.
      143 | 255)
        sleep "${RETRY_SECONDS:-60}"
        continue
        ;;
      # Another process died, and JAX has ended this one: that host may be gone, too. Where processes die again and again
      # on a healthy slice, the fault is the program's.
      134)
        deaths=$((deaths + 1))
        if [[ $deaths -lt 5 ]]; then
          sleep "${RETRY_SECONDS:-60}"
          continue
        fi
        ;;
    esac
    # A program that ends by itself on a healthy slice will not do better on another one.
    if [[ $code == 0 || $(slice_state) == READY ]]; then
      return "$code"
    fi
  done
}

delete() {
  gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone="$ZONE" --quiet
}

main "$@"
