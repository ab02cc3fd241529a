#!/bin/bash
# slurm.sbatch on 8 nodes x 2 GPUs x 1 prompt, the paper's 16 prompts per step: bash slurm_8_nodes.sh TASK.yaml [...]
#
# A group of completions stays on one process, so 16 prompts keep 16 GPUs busy and no more: 8 nodes of 8 GPUs would need
# 64 prompts per step (--ntasks-per-node=8 --gpus-per-node=8 below), which is another run than the paper's.
set -euo pipefail
if [ $# -eq 0 ]; then
  echo "usage: bash slurm_8_nodes.sh TASK.yaml [arguments of rft fit]" >&2
  exit 2
fi
if [ ! -f "$1" ]; then
  echo "slurm_8_nodes.sh: there is no file $1; expected the configuration of a task" >&2
  exit 2
fi
here=$(dirname "$(realpath "$0")")
exec sbatch --nodes=8 --ntasks-per-node=2 --gpus-per-node=2 "$here/slurm.sbatch" "$@" --data.batch_size 1
