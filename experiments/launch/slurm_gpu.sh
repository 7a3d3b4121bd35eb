#!/usr/bin/env bash
# Runs experiments.generate on the GPUs of a Slurm cluster, one process per node with all its GPUs:
#
#   sbatch --nodes=2 --gpus-per-node=8 experiments/launch/slurm_gpu.sh --flagfile=experiments/flagfiles/paper_5s.flags \
#     --checkpoint=/shared/wan_1_3b --prompts_file=/shared/prompts.txt --output_dir=/shared/videos
#
# from the repository, which all nodes see, as they must see the folders of the flags. A job that Slurm starts again
# after it was preempted, or that is submitted again after its time was up, goes on in the middle of a video. With
# --overwrite it would begin the list anew: take another --output_dir instead.
#
#   PYTHON       the interpreter with the package in it (pip install -e '.[cuda]'); python by default
#   SAVE_EVERY   chunks between two saved states, 5 by default
#   CACHE        folder of compiled programs, ~/.cache/streamt1_jax by default
#   PORT         of the first node, where the processes meet; by default one that follows from the job
#SBATCH --job-name=streamt1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

# Slurm runs a copy of this file, from the folder of sbatch.
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
if [[ ! -f $root/experiments/launch/xla_flags.sh ]]; then
  echo "submit this from the folder of the repository; $root has no experiments/launch" >&2
  exit 2
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "this is for sbatch, or for bash in an allocation of salloc" >&2
  exit 2
fi
# shellcheck source=xla_flags.sh
source "$root/experiments/launch/xla_flags.sh"
export_xla_flags gpu
cd "$root"

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}
port=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
# The number of a process is known where it runs, so the shell there fills it in. A process that fails ends the others.
# shellcheck disable=SC2016
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  bash -c 'exec "$0" -m experiments.generate --process_id="$SLURM_PROCID" "$@"' "${PYTHON:-python}" \
  --coordinator_address="$first_node:$port" --num_processes="$SLURM_JOB_NUM_NODES" \
  --compilation_cache_dir="${CACHE:-$HOME/.cache/streamt1_jax}" --save_every="${SAVE_EVERY:-5}" "$@"
