"""Calls that end in time, so that a reward which hangs does not hang the training.

A call runs in a thread of its own, which is left behind when the time is up. Python code in it is stopped by an
exception; a thread that waits (a sleep, a request) or computes in C goes on in the background. C code that keeps the
interpreter to itself, such as a regular expression that backtracks without end, cannot be left behind: no Python runs
until it returns. Then the process ends a while after its time, with the call stack on stderr, so that the run ends and
can be resumed instead of hanging.
"""

from __future__ import annotations

import ctypes
import faulthandler
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# Seconds to wait for an abandoned thread to end, and how often: code may catch the exception that stops it.
_PATIENCE, _ATTEMPTS = 0.1, 5
# Seconds after its time at which a call that lets no Python run ends the process.
_GRACE = 60.0


class OutOfTimeError(Exception):
    """A call was abandoned; not the built-in TimeoutError, which the call itself may raise."""


def call_within(seconds: float, function: Callable[[], T]) -> T:
    """`function()` in another thread, under the caller's torch modes and context variables.

    Raises:
        OutOfTimeError: it did not end within `seconds`.
        BaseException: whatever the function raises.
    """
    worker = getattr(_local, "worker", None)
    # After a fork the child has the object, but not its thread.
    if worker is None or not worker.thread.is_alive():
        worker = _local.worker = _Worker()
    worker.jobs.put(partial(copy_context().run, _in_callers_modes(function)))
    watched = threading.current_thread() is threading.main_thread() and _watch(seconds + _GRACE)
    try:
        value, error = worker.results.get(timeout=seconds)
    except BaseException as interruption:  # out of time, or Ctrl-C while it ran
        _local.worker = None
        worker.abandon()
        if isinstance(interruption, queue.Empty):
            raise OutOfTimeError from None
        raise
    finally:
        if watched:
            faulthandler.cancel_dump_traceback_later()
    if error is None:
        return value
    try:
        raise error
    finally:
        del error  # else it and this frame hold each other, and with them what the reward had in hand


def _watch(seconds: float) -> bool:
    """End the process after so long, unless that is cancelled: by a thread in C, which needs no interpreter."""
    if sys.__stderr__ is None:
        return False
    try:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    except (OSError, RuntimeError, ValueError):  # it is closed, or no file
        return False
    return True


def stuck_calls() -> int:
    """Number of abandoned calls of this process that could not be stopped and still go on."""
    _stuck[:] = [thread for thread in _stuck if thread.is_alive()]
    return len(_stuck)


# A worker per calling thread, so that a reward may itself call rewards.
_local = threading.local()
_stuck: list[threading.Thread] = []


class _Worker:
    """A thread that makes one call after the other."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.abandoned = False
        self.thread = threading.Thread(target=self._work, name="reward", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while not self.abandoned:
            job = self.jobs.get()
            try:
                self.results.put((job(), None))
            except BaseException as error:
                self.results.put((None, error))
            del job  # it holds the answer and the target until the next call

    def abandon(self) -> None:
        """Stop the thread if that is possible, and remember it if it is not."""
        self.abandoned = True
        for _ in range(_ATTEMPTS):
            # threading ends a thread on SystemExit without a word.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.thread.ident or 0), ctypes.py_object(SystemExit)
            )
            self.thread.join(_PATIENCE)
            if not self.thread.is_alive():
                return
        _stuck.append(self.thread)


def _in_callers_modes(function: Callable[[], T]) -> Callable[[], T]:
    """`function` under the modes of the calling thread that torch keeps per thread."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> T:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(inference))
            modes.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype in autocast.items():
                modes.enter_context(torch.autocast(kind, dtype))
            if device is not None:
                modes.enter_context(torch.cuda.device(device))
            return function()

    return run
