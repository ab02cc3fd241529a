"""What NF4 costs the shipped policy, part by part, and how fast weights are rounded to it.

    python benchmarks/quantization.py --output quantization.json

The policy answers pictures of shapes; then the linear layers of one part at a time (or of all, but for the output head)
are rounded to NF4 with double quantisation, and the same answers are scored again. Printed are the KL divergence from
the original in nats per token (the mean of r - 1 - log r over its own answers, with r the ratio of probabilities after
and before rounding, which is never negative; Schulman, 2020) and the mean |difference| of the log-probs. The shipped
tower is 96 wide, of which `model.quantize` would leave most layers alone: here all of it is rounded, 64 weights at a
time as they lie in memory. Last comes the speed of rounding a layer of the width of Qwen2-VL-2B's on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from random_policy import machine
from torch import Tensor, nn

from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.policy.families import PARTS, part_parameters
from rft_lightning.policy.loading import load_policy, load_processor
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.policy.quantization import BLOCK, NF4
from rft_lightning.policy.rollout import sample_groups
from rft_lightning.sample import Rollouts

POLICY = "asset:tiny-qwen2-vl"
LAYER = (8960, 1536)  # of Qwen2-VL-2B's decoder


def rounded(weight: Tensor) -> Tensor:
    """The nearest weights that NF4 can hold."""
    codes, state = quantize_4bit(weight.reshape(-1, BLOCK), compress_statistics=True, quant_type=NF4)
    return dequantize_4bit(codes, state).view_as(weight)


@torch.no_grad()
def round_parts(model: nn.Module, parts: Sequence[str]) -> int:
    """Round the linear layers of some parts, the output head excepted; how many weights these are."""
    mine = {name for part in parts for name in part_parameters(model, part)}
    head, count = model.get_output_embeddings(), 0  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and f"{name}.weight" in mine:
            module.weight.copy_(rounded(module.weight))
            count += module.weight.numel()
    return count


@torch.no_grad()
def logprobs(model: nn.Module, answers: Sequence[Rollouts]) -> Tensor:
    """Log-probs of all tokens of the answers, one after the other."""
    found = []
    for rollouts in answers:
        mask = rollouts.completion_mask
        found.append(plain_group_logprobs(model, rollouts.prompts, rollouts.completion_ids, mask)[0][mask])
    return torch.cat(found)


def cost(before: Tensor, after: Tensor) -> dict[str, float]:
    """KL divergence per token and mean |difference| of log-probs."""
    log_ratio = after - before
    return {
        "kl": float((log_ratio.exp() - 1 - log_ratio).mean()),
        "difference": float(log_ratio.abs().mean()),
    }


def speed(rounds: int) -> float:
    """Weights that are rounded in a second of one core's time."""
    threads, weight, times = torch.get_num_threads(), torch.randn(LAYER), []
    torch.set_num_threads(1)
    for _ in range(rounds + 1):
        begun = time.process_time()
        quantize_4bit(weight, compress_statistics=True, quant_type=NF4)
        times.append(time.process_time() - begun)
    torch.set_num_threads(threads)
    return weight.numel() / statistics.median(times[1:])


# The run --------------------------------------------------------------------------------------------------------------


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """What rounding each part costs, and its speed."""
    data = ShapesDataModule(processor=POLICY, val_size=settings.pictures)
    samples, tokenizer = data.split("val"), load_processor(POLICY).tokenizer
    prompts = [data.encoder(samples[i : i + settings.batch]) for i in range(0, settings.pictures, settings.batch)]
    original = load_policy(POLICY).eval()
    answers = [
        sample_groups(original, prompt, settings.answers, tokenizer=tokenizer, max_completion_length=64, seed=0)
        for prompt in prompts
    ]
    before = logprobs(original, answers)
    found: dict[str, Any] = {"tokens": len(before), "parts": {}}
    for name, parts in {**{part: [part] for part in PARTS}, "all": list(PARTS)}.items():
        model = load_policy(POLICY).eval()
        weights = round_parts(model, parts)
        found["parts"][name] = {"weights": weights, **cost(before, logprobs(model, answers))}
    return found | {"weights_per_second": speed(settings.rounds)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--answers", type=int, default=2, help="to each picture")
    parser.add_argument("--batch", type=int, default=16, help="pictures at a time")
    parser.add_argument("--rounds", type=int, default=3, help="roundings of the layer that count; one more comes first")
    return parser.parse_args(arguments)


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    settings = results["settings"]
    lines = [
        f"{settings['answers']} answers to each of {settings['pictures']} pictures, {results['tokens']} tokens",
        f"{'rounded to NF4':<16}{'weights':>9}{'KL, nats':>10}{'|difference|':>14}",
    ]
    for name, part in results["parts"].items():
        lines.append(f"{name:<16}{part['weights']:>9}{part['kl']:>10.4f}{part['difference']:>14.3f}")
    return "\n".join([*lines, f"{results['weights_per_second'] / 1e6:.0f} M weights per second and core"])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    shown = {name: value for name, value in vars(settings).items() if name != "output"}
    results = {"machine": machine(), "settings": shown, **run(settings)}
    print(table(results))
    if settings.output is not None:
        settings.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
