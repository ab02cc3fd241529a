#!/bin/bash
# A run on machines without a scheduler, the same command on each: NODE_RANK=0 bash torchrun.sh TASK.yaml [...]
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash configs/cluster/torchrun.sh configs/coco.yaml     # on host0
#   NODES=2 NODE_RANK=1 MASTER_ADDR=host0 bash configs/cluster/torchrun.sh configs/coco.yaml     # on host1
#
# Further arguments are those of rft fit. Started again, a run goes on from its last checkpoint.
#
# Environment:
#   NODES, NODE_RANK  how many machines there are, and which this is, from 0; 1 and 0
#   DEVICES           processes on each machine; one per GPU
#   MASTER_ADDR, MASTER_PORT  machine 0, and a free port there; 127.0.0.1 and 29500
#   RUN     folder of checkpoints, on a file system that all machines share; runs/ with the name of the task's file
#   PYTHON  interpreter with rft_lightning; python
#
# Exit status 75: interrupted and saved, start it again. torchrun ends processes 30 seconds after it was told to end: if
# a rollout batch and a save take longer, let the run end by itself, with the RolloutCheckpoint's wall_time.
set -euo pipefail
if [ $# -eq 0 ]; then
  echo "usage: bash torchrun.sh TASK.yaml [arguments of rft fit]" >&2
  exit 2
fi
task=$(realpath "$1")
shift
nodes=${NODES:-1} node=${NODE_RANK:-0}
devices=${DEVICES:-$(nvidia-smi --list-gpus | wc -l)}
run=$(realpath -m "${RUN:-runs/$(basename "$task" .yaml)}")
mkdir -p "$run"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
cat >"$run/node-$node.yaml" <<YAML
config: "$task"
trainer:
  num_nodes: $nodes
  devices: $devices
  callbacks+:
    - class_path: rft_lightning.callbacks.RolloutCheckpoint
      init_args: {dirpath: "$run/checkpoints"}
YAML
if [ -e "$run/checkpoints/last.ckpt" ]; then
  set -- "$@" --ckpt_path "$run/checkpoints/last.ckpt"
fi

# torchrun itself would end with status 1 whatever its processes ended with.
launch='
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except ChildFailedError as error:
    sys.exit(error.get_first_failure()[1].exitcode)
'
exec "${PYTHON:-python}" -c "$launch" --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$devices" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  -m rft_lightning fit -c "$run/node-$node.yaml" "$@"
