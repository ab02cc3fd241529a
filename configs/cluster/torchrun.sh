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
# Exit status 75: interrupted and saved, start it again. SIGTERM or SIGUSR1 to this script is passed on to its
# processes, which finish their rollout batch (or validation) and save, however long that takes; a second one ends them
# at once.
set -euo pipefail
if [ $# -eq 0 ]; then
  echo "usage: bash torchrun.sh TASK.yaml [arguments of rft fit]" >&2
  exit 2
fi
if [ ! -f "$1" ]; then
  echo "torchrun.sh: there is no file $1; expected the configuration of a task" >&2
  exit 2
fi
task=$(realpath "$1")
shift
nodes=${NODES:-1} node=${NODE_RANK:-0}
devices=${DEVICES:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)}
if [ "$devices" = 0 ]; then
  echo "torchrun.sh: nvidia-smi names no GPU here; set DEVICES, the number of processes on this machine" >&2
  exit 2
fi
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

# torchrun itself ends with status 1 whatever its processes ended with, and kills them 30 seconds after a signal.
launch='
import signal, sys
from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

start = PContext.start

def start_and_pass_signals_on(context):
    start(context)
    def pass_on(number, frame):
        for handler in context.subprocess_handlers.values():
            handler.proc.send_signal(number)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)

PContext.start = start_and_pass_signals_on
try:
    main()
except ChildFailedError as error:
    ends = [failure.exitcode for failure in error.failures.values()]
    # No process ends with 75 before all have saved; others may then be ended by torchrun, which waits for none.
    status = 75 if 75 in ends else error.get_first_failure()[1].exitcode
    sys.exit(status if status >= 0 else 128 - status)
except SignalException as stop:
    sys.exit(128 + stop.sigval)
'
exec "${PYTHON:-python}" -c "$launch" --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$devices" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  -m rft_lightning fit -c "$run/node-$node.yaml" "$@"
