"""What to do about failures of other processes, whose words do not tell, and about those that outlive their parent."""

from __future__ import annotations

import os
import re
import threading
import time

_RESUME = "Everything up to the last checkpoint is kept: go on with the same command and --ckpt_path .../last.ckpt."
_REMEDIES = {
    r"DataLoader worker .*(killed by signal|exited unexpectedly)": (
        "A process that loads data has ended. If it was killed, host memory has probably run out: lower "
        "data.num_workers. To see an error of its own: data.num_workers 0. "
    ),
    r"Connection (closed|reset) by (remote )?peer|Broken pipe|Timed out waiting|Socket Timeout|NCCL|wait timeout": (
        "Another process of this run has ended, or kept the others waiting for longer than the timeout of the strategy "
        "(trainer.strategy.init_args.timeout). The reason stands in the output of that process, above or in its log. "
    ),
}
# Seconds between looks at the parent, and for which a process may go on alone, to end by itself.
_LOOK, _PATIENCE = 2.0, 30.0


def remedy(error: BaseException) -> str | None:
    """What to do about an error that another process caused, in a sentence or two; None for any other."""
    found = (text for pattern, text in _REMEDIES.items() if re.search(pattern, str(error)))
    return next((f"{text}{_RESUME}" for text in found), None)


def end_with_parent() -> None:
    """End this process soon after the one that started it.

    A process that waits for a dead one on a GPU would hold its memory until the strategy's timeout, and a new run
    would find no room.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        time.sleep(_PATIENCE)
        os.write(2, b"rft: the process that started this one is gone, so this one ends too.\n")
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
