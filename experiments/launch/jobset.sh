#!/usr/bin/env bash
# Runs experiments.generate on Kubernetes, one pod per host, from any machine with kubectl:
#
#   docker build --file=experiments/launch/Dockerfile --target=tpu --tag=IMAGE . && docker push IMAGE
#   export NAME=stream TARGET=tpu IMAGE=IMAGE HOSTS=2 CHIPS=4 ACCELERATOR=tpu-v6e-slice TOPOLOGY=2x4
#   experiments/launch/jobset.sh --flagfile=experiments/flagfiles/paper_5s.flags --checkpoint=gs://my-bucket/wan_1_3b \
#     --prompts_file=gs://my-bucket/prompts.txt --output_dir=gs://my-bucket/videos
#
# With --dry_run before the flags the manifest is printed, and nothing is called. The cluster must have JobSet installed,
# and its pods must be allowed to use the bucket. This script was never run with a real cluster.
#
#   NAME          of the JobSet
#   TARGET        of the Dockerfile: cpu, cuda or tpu
#   IMAGE         what the Dockerfile makes for that target
#   HOSTS         pods, 1 by default; for TPUs the hosts of the slice
#   CHIPS         TPU chips or GPUs of a host; not for cpu
#   ACCELERATOR   for tpu: what the nodes' label says, such as tpu-v6e-slice, tpu-v5p-slice or tpu7x
#   TOPOLOGY      for tpu: chips of the slice, such as 2x4
#   RESTARTS      how often the run may start again, 10 by default
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=xla_flags.sh
source "$HERE/xla_flags.sh"

main() {
  local apply=(kubectl apply --filename=-)
  case "${1:-}" in
    --dry_run)
      apply=(cat)
      shift
      ;;
    '' | help | --help)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      return
      ;;
  esac
  : "${NAME:?name of the JobSet}" "${TARGET:?cpu, cuda or tpu}" "${IMAGE:?image of that target}"
  HOSTS=${HOSTS:-1} RESTARTS=${RESTARTS:-10} ARGUMENTS=$(json_list "$@")
  case "$TARGET" in
    cpu | cuda | tpu) "set_$TARGET" ;;
    *)
      echo "TARGET=$TARGET is not cpu, cuda or tpu" >&2
      return 2
      ;;
  esac
  local manifest variable value
  manifest=$(<"$HERE/jobset.yaml")
  for variable in NAME PLACEMENT RESTARTS HOSTS NODES IMAGE ARGUMENTS ENVIRONMENT RESOURCES; do
    value=${!variable}
    manifest=${manifest//"\${$variable}"/"$value"}
  done
  "${apply[@]}" <<<"$manifest"
}

# Texts as JSON, which is YAML.
json() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  printf '"%s"' "${text//$'\t'/\\t}"
}

json_list() {
  local item separator=
  printf '['
  for item; do
    printf '%s' "$separator"
    json "$item"
    separator=', '
  done
  printf ']'
}

variable() {
  printf '{"name": "%s", "value": %s}' "$1" "$(json "$2")"
}

# The pods are told where the first of them is; TPU hosts find each other.
meeting() {
  printf '%s, %s, ' "$(variable JAX_COORDINATOR_ADDRESS "$NAME-hosts-0-0.$NAME:20041")" \
    "$(variable JAX_NUM_PROCESSES "$HOSTS")"
  printf '{"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": "%s"}}}' \
    "metadata.annotations['batch.kubernetes.io/job-completion-index']"
}

set_cpu() {
  PLACEMENT='{}' NODES='{}' RESOURCES='{"requests": {"cpu": 4, "memory": "16Gi"}}'
  ENVIRONMENT="[$(meeting)]"
}

set_cuda() {
  : "${CHIPS:?GPUs of a host}"
  PLACEMENT='{}' NODES='{}' RESOURCES="{\"limits\": {\"nvidia.com/gpu\": $CHIPS}}"
  ENVIRONMENT="[$(variable XLA_FLAGS "$(xla_flags gpu)"), $(meeting)]"
}

set_tpu() {
  : "${CHIPS:?TPU chips of a host}" "${ACCELERATOR:?label of the nodes, such as tpu-v6e-slice}" "${TOPOLOGY:?such as 2x4}"
  local chip
  case "$ACCELERATOR" in
    tpu-v6e-*) chip=v6e-0 ;;
    tpu-v5p-*) chip=v5p-0 ;;
    tpu-v5-lite-*) chip=v5litepod-0 ;;
    tpu7x*) chip=tpu7x-0 ;;
    *)
      echo "no chips are known for ACCELERATOR=$ACCELERATOR" >&2
      return 2
      ;;
  esac
  # All pods on the nodes of one slice.
  PLACEMENT='{"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}'
  NODES="{\"cloud.google.com/gke-tpu-accelerator\": \"$ACCELERATOR\", \"cloud.google.com/gke-tpu-topology\": \"$TOPOLOGY\"}"
  RESOURCES="{\"limits\": {\"google.com/tpu\": $CHIPS}}"
  ENVIRONMENT="[$(variable LIBTPU_INIT_ARGS "$(xla_flags "$chip")")]"
}

main "$@"
