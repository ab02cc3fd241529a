"""Stopping a run from outside: a signal or the end of its time, after which it saves and can be resumed exactly."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from rft_lightning.errors import ConfigConflictError

#: EX_TEMPFAIL of sysexits.h: the run was interrupted and saved; start it again with ``--ckpt_path``.
EXIT_STATUS = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# One signal may come twice, to the process and to its group.
_SAME_SECONDS = 1.0
# This package is imported first thing, so the process is hardly older.
_START = time.monotonic()


class Interrupted(SystemExit):
    """The run stopped before its end, and everything is saved. Not caught, it ends the process without a traceback.

    Args:
        message: why it stopped, and how to go on.
        status: exit status of this process.
    """

    def __init__(self, message: str, status: int = EXIT_STATUS) -> None:
        super().__init__(status)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """Whether this process was asked to save and stop: by SIGTERM, by SIGUSR1, or as its time is over.

    A second signal of the same kind ends the process at once.

    Args:
        wall_time: how long the process may run, see :func:`seconds_of`; None for ever.

    Raises:
        ConfigConflictError: `wall_time` is no duration.
    """

    def __init__(self, wall_time: float | str | None = None) -> None:
        self.limit = None if wall_time is None else seconds_of(wall_time)
        self.wall_time = wall_time
        self._came: dict[int, float] = {}
        self._loud = False
        self._end_others: Callable[[int], None] | None = None

    @property
    def reason(self) -> str | None:
        """What asked for it, or None."""
        if self._came:
            return signal.Signals(next(iter(self._came))).name
        if self.limit is not None and time.monotonic() - _START >= self.limit:
            return f"wall_time {self.wall_time}"
        return None

    def listen(self, *, loud: bool, end_others: Callable[[int], None] | None = None) -> None:
        """Take the signals over, from Lightning too: its handler talks to other processes amid what they are doing.

        Lightning puts back what was there before it when the Trainer ends. Does nothing outside the main thread.

        Args:
            loud: whether this process says that it heard a signal.
            end_others: sends a signal to the processes that this one started.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self._loud, self._end_others = loud, end_others
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if number not in self._came:
            self._came[number] = now
            self._tell(f"{name}: saving and stopping at the end of this rollout batch; once more stops at once.")
        elif now - self._came[number] > _SAME_SECONDS:
            self._tell(f"{name} again: stopping at once. The last checkpoint is whole.")
            if self._end_others is not None:
                self._end_others(signal.SIGKILL)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _tell(self, text: str) -> None:
        if self._loud:
            os.write(2, f"\nrft: {text}\n".encode())  # print is not safe in a signal handler


def leave_signals_to_parent(worker: int = 0) -> None:
    """In a process that loads data: outlive a signal that was sent to all processes of a run, which still needs data.

    torchrun and schedulers send it to all. The second SIGTERM ends the process: it comes from the loader that
    shuts down, or from somebody in earnest.

    Args:
        worker: not used; DataLoader tells its number.
    """
    signal.signal(signal.SIGTERM, _let_pass_once)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _let_pass_once(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def seconds_of(duration: float | str) -> float:
    """Seconds of ``[DAYS-]HH:MM:SS`` or ``MM:SS``; a number is in seconds, as YAML reads an unquoted 12:00:00.

    Raises:
        ConfigConflictError: it is neither, or not above 0.
    """
    seconds = float(duration) if not isinstance(duration, str) else 0.0
    if isinstance(duration, str):
        found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", duration.strip())
        if found is not None:
            days, hours, minutes, rest = (int(part or 0) for part in found.groups())
            seconds = ((days * 24 + hours) * 60 + minutes) * 60.0 + rest
    if not seconds > 0:
        raise ConfigConflictError(
            f"wall_time is {duration!r}, expected seconds above 0, MM:SS, HH:MM:SS or DAYS-HH:MM:SS, such as 11:45:00."
        )
    return seconds
