"""Throughput: how fast a run trains, and how far that is from what its hardware allows."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rft_lightning.collectives import gather_objects
from rft_lightning.errors import ConfigConflictError
from rft_lightning.flops import PolicyCosts, policy_costs
from rft_lightning.policy.families import PACKED, base_model
from rft_lightning.policy.shared_prefix import shares_keys
from rft_lightning.run_statistics import Workload, forward_slots

# A measurement repeats its work for so long and counts the fastest.
MEASURING_SECONDS = 0.05
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# Numerator and denominator by name; each is summed over the processes.
Fractions = dict[str, tuple[float, float]]


class Throughput(Callback):
    """Logs how fast training is, per training batch and for all processes together.

    - ``train/time/loading``: seconds between two batches without validation: waiting for data, and after a checkpoint
      the writing of it. The phases of the step stand beside it (``train/time/rollout`` and so on).
    - ``train/num_tokens``: tokens so far, each completion counted with its prompt, as TRL does.
    - ``train/throughput/prompts_per_second``, ``.../completion_tokens_per_second``: prompts rolled out and tokens
      sampled (supervised: trained on) over the seconds of step and loading.
    - ``train/throughput/padding/...``: shares of positions that hold no token. ``prompts``: of `rollout_prompts` at a
      time, padded to the longest for prefill. ``completions``: of as many groups, each row padded to the longest, which
      is what decoding in fixed batches computes (a decoder that drops ended rows computes less). ``training``: of what
      a pass of log-probs computes.
    - ``train/throughput/peak_memory_gib``: the most that one process had, in GiB: on CUDA, what torch allocated since
      training began; elsewhere, resident memory since the process started.
    - ``train/throughput/mfu/update``: model FLOPs utilisation, the operations that reference, old and training passes
      need (:mod:`rft_lightning.flops`) over those that the devices could make in the seconds of ``logprobs`` and
      ``update``. ``mfu/step``: with those of sampling, in the seconds of the whole step.
    - ``train/throughput/decode_floor_ratio``: seconds of the rollout over those that its decode steps take at least to
      read weights, keys and values (:meth:`rft_lightning.flops.PolicyCosts.decode_bytes`). Prefill and sampling are in
      the seconds, so a decode step by itself is nearer to its floor of 1.

    Supervised runs have no rollout and none of its numbers; families that policy/families.py does not know have neither
    utilisation nor floor. A number without a denominator (no decode step) is NaN. Outside ``fit`` nothing is logged.

    Args:
        peak_flops: operations per second of one device that are full utilisation. When None: the vendor's number for
            the precision of the run on CUDA devices that Lightning knows, else what a product of matrices reaches at
            the start of training.
        bandwidth: bytes per second that one device reads from its memory. When None: what a sum over a large tensor
            reaches at the start of training.

    Attributes:
        num_tokens: tokens so far; continued when a run is resumed.

    Raises:
        ConfigConflictError: peak_flops or bandwidth is not positive.
    """

    def __init__(self, *, peak_flops: float | None = None, bandwidth: float | None = None) -> None:
        for name, value in (("peak_flops", peak_flops), ("bandwidth", bandwidth)):
            if value is not None and not value > 0:
                raise ConfigConflictError(
                    f"Throughput.{name} is {value}, expected a positive number per second, or null to have it found."
                )
        self.peak_flops, self.bandwidth = peak_flops, bandwidth
        self.num_tokens = 0
        self._costs: PolicyCosts | None = None
        self._flops = self._bytes = math.nan  # per second of this process' device
        self._left = self._loading = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"num_tokens": self.num_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_tokens = state_dict["num_tokens"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        policy, device = getattr(pl_module, "policy", None), pl_module.device
        if policy is not None:
            dtype = MIXED.get(str(trainer.precision), base_model(policy).dtype)
            self._costs = policy_costs(policy, dtype=dtype)
        if self._costs is not None:
            self._flops = self.peak_flops or known_flops(device, dtype) or measured_flops(device, dtype)
            self._bytes = self.bandwidth or measured_bandwidth(device)
            rank_zero_info(
                f"Throughput compares with {self._flops / 1e12:.3g} TFLOP/s ({dtype}) and {self._bytes / 1e9:.3g} GB/s "
                "per device."
            )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._left = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._left = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._loading = time.perf_counter() - self._left

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        work: Workload | None = getattr(pl_module, "workload", None)
        if work is not None:
            one_row = work.layout == PACKED and shares_keys(pl_module.policy)
            own = self._rates(work, trainer.world_size) | self._padding(work, one_row) | self._limits(work)
            everyone = gather_objects((own, _num_tokens(work), peak_memory(pl_module.device)))
            self.num_tokens += sum(tokens for _, tokens, _ in everyone)
            values = {"num_tokens": self.num_tokens, **_summed([fractions for fractions, _, _ in everyone])}
            values["throughput/peak_memory_gib"] = max(memory for *_, memory in everyone) / 2**30
            pl_module.log_dict({f"train/{name}": float(value) for name, value in values.items()}, batch_size=len(batch))
        self._left = time.perf_counter()

    def _rates(self, work: Workload, processes: int) -> Fractions:
        groups = work.rolled_out or work.trained
        seconds = sum(work.seconds.values()) + self._loading
        # A sum over the processes by the mean of their seconds.
        counts = {
            "prompts": processes * sum(map(len, groups)),
            "completion_tokens": processes * sum(int(piece.completions.sum()) for piece in groups),
        }
        rates: Fractions = {f"throughput/{name}_per_second": (count, seconds) for name, count in counts.items()}
        return {"time/loading": (self._loading, 1), **rates}

    def _padding(self, work: Workload, one_row: bool) -> Fractions:
        trained = [forward_slots(piece, work.layout, one_row=one_row) for piece in work.trained]
        slots = {"training": trained}
        if work.rolled_out:
            slots["prompts"] = [_rectangle(piece.prompts) for piece in work.rolled_out]
            slots["completions"] = [_rectangle(piece.completions) for piece in work.rolled_out]
        return {
            f"throughput/padding/{name}": (sum(all_ - tokens for tokens, all_ in pairs), sum(all_ for _, all_ in pairs))
            for name, pairs in slots.items()
        }

    def _limits(self, work: Workload) -> Fractions:
        costs = self._costs
        if costs is None:
            return {}
        # The features of frozen parts are needed once, which the rollout is credited with.
        vision = not (costs.vision_is_frozen and work.rolled_out)
        scoring = sum(costs.forward(piece, vision=vision) for piece in work.trained)
        training = sum(
            costs.forward(piece, vision=vision and not work.one_tower_pass) + costs.backward(piece)
            for piece in work.trained
        )
        update = work.scoring_passes * scoring + work.training_passes * training
        seconds = work.seconds.get("logprobs", 0.0) + work.seconds["update"]
        limits = {"throughput/mfu/update": (update, seconds * self._flops)}
        if work.rolled_out:
            step = update + sum(costs.forward(piece) for piece in work.rolled_out)
            floor = costs.decode_bytes(work.rolled_out) / self._bytes
            limits["throughput/mfu/step"] = (step, sum(work.seconds.values()) * self._flops)
            limits["throughput/decode_floor_ratio"] = (work.seconds["rollout"], floor)
        return limits


def known_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The vendor's operations per second of dense products in this precision; None where they are not known."""
    return get_available_flops(device, dtype) if device.type == "cuda" else None


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of square matrices: what a device reaches, not what its vendor promises."""
    side = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / _fastest(lambda: matrix @ matrix, device)


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second of a sum over a tensor larger than most caches."""
    size = 2**26 if device.type == "cpu" else 2**29
    tensor = torch.zeros(size // 4, device=device)
    return size / _fastest(tensor.sum, device)


def peak_memory(device: torch.device) -> float:
    """Bytes: allocated by torch on a CUDA device since the last reset, else resident since the process started."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest call."""

    def seconds() -> float:
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    seconds()  # the first call sets up what it needs
    end, times = time.perf_counter() + MEASURING_SECONDS, [seconds()]
    while time.perf_counter() < end:
        times.append(seconds())
    return min(times)


def _rectangle(lengths: torch.Tensor) -> tuple[int, int]:
    """Tokens of rows, and the positions of a tensor that holds them."""
    return int(lengths.sum()), lengths.numel() * int(lengths.max())


def _num_tokens(work: Workload) -> int:
    groups = work.rolled_out or work.trained
    return sum(int((piece.prompts[:, None] + piece.completions).sum()) for piece in groups)


def _summed(everyone: list[Fractions]) -> dict[str, float]:
    values = {}
    for name in everyone[0]:
        numerator, denominator = (sum(fractions[name][i] for fractions in everyone) for i in (0, 1))
        values[name] = numerator / denominator if denominator else math.nan
    return values
