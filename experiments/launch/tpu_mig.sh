#!/usr/bin/env bash
# Runs experiments.generate on a TPU slice that Compute Engine makes: a managed instance group, one VM per host. From any
# machine with gcloud:
#
#   export NAME=stream ZONE=us-east5-b MACHINE=ct6e-standard-4t TOPOLOGY=2x4 BUCKET=gs://my-bucket/stream
#   experiments/launch/tpu_mig.sh create
#   experiments/launch/tpu_mig.sh install
#   experiments/launch/tpu_mig.sh run --flagfile=experiments/flagfiles/paper_5s.flags \
#     --checkpoint=$BUCKET/wan_1_3b --prompts_file=$BUCKET/prompts.txt
#   experiments/launch/tpu_mig.sh delete
#
# With --dry_run before the action the commands are printed, and nothing is called. This script was never run with a real
# gcloud: its commands follow Google's pages "Create a MIG with multi-host TPU slice" and "Request TPU Spot VMs".
#
#   NAME            of the group, its template and its policy
#   ZONE            where it is
#   MACHINE         type of a host, such as ct6e-standard-4t or ct5p-hightpu-4t; its last number counts the chips
#   TOPOLOGY        chips of the slice, such as 2x4 or 2x2x2
#   BUCKET          folder of an object store that the hosts may write
#   IMAGE_FAMILY    another image; must be given for tpu7x-standard-4t
#   IMAGE_PROJECT   where that image is, ubuntu-os-accelerator-images by default
#   DISK            type of the boot disk, hyperdisk-balanced by default
#   SPOT            1 for hosts that may be preempted
#   SAVE_EVERY      chunks between two saved states, 5 by default
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=xla_flags.sh
source "$HERE/xla_flags.sh"
# shellcheck source=install.sh
source "$HERE/install.sh"

main() {
  DRY_RUN=
  if [[ ${1:-} == --dry_run ]]; then
    DRY_RUN=1
    shift
  fi
  local action=${1:-help}
  shift || true
  case "$action" in
    create | install | run | delete) ;;
    *)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      [[ $action == help || $action == --help ]] || exit 2
      return
      ;;
  esac
  : "${NAME:?name of the group}" "${ZONE:?zone of the group}" "${MACHINE:?type of a host, such as ct6e-standard-4t}"
  : "${TOPOLOGY:?chips of the slice, such as 2x4}"
  REGION=${ZONE%-*}
  local chips
  chips=$(accelerator)
  FLAGS=$(xla_flags "$chips")
  HOSTS=$(count_hosts)
  "$action" "$@"
}

# Runs a command, or prints it.
call() {
  if [[ -n $DRY_RUN ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# What xla_flags.sh calls the chips of a machine.
accelerator() {
  case "$MACHINE" in
    ct6e-*) echo v6e-0 ;;
    ct5p-*) echo v5p-0 ;;
    tpu7x-*) echo tpu7x-0 ;;
    *)
      echo "no chips are known for MACHINE=$MACHINE: give ct6e-standard-Nt, ct5p-hightpu-Nt or tpu7x-standard-4t" >&2
      return 2
      ;;
  esac
}

count_hosts() {
  local chips=$((${TOPOLOGY//x/*})) per_host
  per_host=$(grep -oE '[0-9]+t$' <<<"$MACHINE" | tr -d t) || per_host=0
  if ((per_host == 0 || chips < per_host || chips % per_host)); then
    echo "TOPOLOGY=$TOPOLOGY has $chips chips, which hosts of MACHINE=$MACHINE do not make up" >&2
    return 2
  fi
  echo $((chips / per_host))
}

image_family() {
  if [[ -n ${IMAGE_FAMILY:-} ]]; then
    echo "$IMAGE_FAMILY"
  elif [[ $MACHINE == tpu7x-* ]]; then
    echo "no image is known for MACHINE=$MACHINE: set IMAGE_FAMILY" >&2
    return 2
  else
    echo ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
  fi
}

create() {
  local family spot=() policy=()
  family=$(image_family)
  [[ ${SPOT:-0} == 0 ]] || spot=(--provisioning-model=SPOT --instance-termination-action=STOP)
  call gcloud compute instance-templates create "$NAME" --machine-type="$MACHINE" --maintenance-policy=TERMINATE \
    --image-family="$family" --image-project="${IMAGE_PROJECT:-ubuntu-os-accelerator-images}" \
    --boot-disk-type="${DISK:-hyperdisk-balanced}" --boot-disk-size=200GB --scopes=cloud-platform "${spot[@]}"
  if ((HOSTS > 1)); then
    # The hosts of a slice are wired to each other.
    call gcloud compute resource-policies create workload-policy "$NAME" --region="$REGION" --type=HIGH_THROUGHPUT \
      --accelerator-topology="$TOPOLOGY"
    policy=(--workload-policy="$NAME")
  fi
  # All hosts or none; a host that fails alone is of no use, so it is not replaced.
  call gcloud compute instance-groups managed create "$NAME" --zone="$ZONE" --template="$NAME" --size="$HOSTS" \
    --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing "${policy[@]}"
  call gcloud compute instance-groups managed wait-until "$NAME" --zone="$ZONE" --stable
}

hosts() {
  local list=(gcloud compute instance-groups managed list-instances "$NAME" --zone="$ZONE" --format='value(NAME)')
  if [[ -n $DRY_RUN ]]; then
    call "${list[@]}" >&2
    printf "$NAME-%s\n" $(seq "$HOSTS")
  else
    "${list[@]}"
  fi
}

# The same on every host at the same time; fails with the code of one that fails.
on_all_hosts() {
  local host processes=() code=0 names
  names=$(hosts)
  for host in $names; do
    call gcloud compute ssh "$host" --zone="$ZONE" --command="$1" &
    processes+=($!)
  done
  for process in "${processes[@]}"; do
    wait "$process" || code=$?
  done
  return "$code"
}

# The commit that is checked out here, into a virtual environment of its own: the images' Python is too old.
install() {
  local archive host names
  archive=$(mktemp -d)/streamt1_jax.tar.gz
  call git -C "$HERE/../.." archive --format=tar.gz --output="$archive" HEAD
  names=$(hosts)
  for host in $names; do
    call gcloud compute scp "$archive" "$host:" --zone="$ZONE"
  done
  on_all_hosts "$INSTALL"
  rm -rf "$(dirname "$archive")"
}

# JAX finds the other hosts of the slice by itself.
run() {
  : "${BUCKET:?folder of an object store, such as gs://my-bucket/stream}"
  local arguments
  printf -v arguments '%q ' --output_dir="$BUCKET/videos" --compilation_cache_dir="$BUCKET/compiled" \
    --save_every="${SAVE_EVERY:-5}" "$@"
  on_all_hosts "cd streamt1_jax && LIBTPU_INIT_ARGS=$(printf %q "$FLAGS ${LIBTPU_INIT_ARGS:-}") ../venv/bin/python -m experiments.generate $arguments"
}

delete() {
  call gcloud compute instance-groups managed delete "$NAME" --zone="$ZONE" --quiet
  ((HOSTS == 1)) || call gcloud compute resource-policies delete "$NAME" --region="$REGION" --quiet
  call gcloud compute instance-templates delete "$NAME" --quiet
}

main "$@"
