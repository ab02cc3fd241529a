"""The cost of an update over the size of groups and the length of prompts: a shared prompt beside a repeated one.

    python benchmarks/sharing.py --output sharing.json

Forward and backward of the log-probs of G completions of one prompt, with the random policy of step_config.json, in
both layouts that share the prompt (`prefix_cache`, `packed`) and in the one that repeats it (`plain`). Prompts grow by
their picture (`image`) or, around a small picture, by their text (`text`). Routes take turns; printed are medians in
seconds. Where a prompt is shared, time should grow as its tokens and those of all completions, P + G*C: below each
table stands the line seconds = start + slope * (P + G*C) that fits best with the share of the variance that it explains
(R2), and how far the time per token spreads. (The tower's attention grows as the square of a picture's patches, four to
a token, in every route.) `plain` is left out ("-") where its rows hold more tokens than --cap.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from random_policy import DEVICE, build, load, prompts_of, random_completions, report, seconds

from rft_lightning.policy.shared_prefix import group_logprobs
from rft_lightning.sample import PromptBatch

SHARED, PLAIN = ("prefix_cache", "packed"), "plain"
ROUTES = (*SHARED, PLAIN)
IMAGE_TOKEN_SIDE, SMALL_SIDE = 28, 56  # pixels of an image token, and of the picture that text grows around


def prompt_of(folder: str, kind: str, tokens: int) -> PromptBatch:
    """One prompt of about so many tokens (of exactly so many, where it grows by text)."""
    small = prompts_of(folder, 1, side=SMALL_SIDE)
    missing = max(0, tokens - small.input_ids.shape[1])
    if kind == "text":
        return prompts_of(folder, 1, side=SMALL_SIDE, digits=missing)
    image_tokens = missing + (SMALL_SIDE // IMAGE_TOKEN_SIDE) ** 2
    return prompts_of(folder, 1, side=IMAGE_TOKEN_SIDE * round(image_tokens**0.5))


def measure(model: Any, prompt: PromptBatch, group_size: int, settings: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an update by route, None for what is over the cap, and how far the log-probs of the routes differ."""
    ids_BGC = random_completions(settings.policy, model, group_size, settings.length)
    mask_BGC = torch.ones_like(ids_BGC, dtype=torch.bool)
    length = prompt.input_ids.shape[1]
    repeated = group_size * (length + settings.length)
    routes = [route for route in settings.routes if route != PLAIN or repeated <= settings.cap]
    times: dict[str, list[float]] = {route: [] for route in routes}
    logp = {}
    for _ in range(settings.rounds + 1):
        for route in routes:

            def update(route: str = route) -> None:
                model.zero_grad()
                logp[route] = group_logprobs(model, prompt, ids_BGC, mask_BGC, forward=route)
                logp[route].mean().backward()
                logp[route] = logp[route].detach()

            times[route].append(seconds(update))
    spread = max(float((logp[route] - logp[routes[0]]).abs().max()) for route in routes)
    return {
        "prompt_tokens": length,
        "group_size": group_size,
        "shared_tokens": length + group_size * settings.length,
        "repeated_tokens": repeated,
        "largest_difference": spread,
        **{route: statistics.median(times[route][1:]) if route in times else None for route in settings.routes},
    }


def line_through(rows: Sequence[dict[str, Any]], route: str) -> dict[str, float]:
    """Seconds of a route over P + G*C: the line of least squares, and the spread of the time per token."""
    tokens = [row["shared_tokens"] for row in rows]
    times = [row[route] for row in rows]
    per_token = [time / count for time, count in zip(times, tokens, strict=True)]
    found = {"lowest": min(per_token), "highest": max(per_token), "spread": max(per_token) / min(per_token)}
    if len(set(tokens)) > 2:  # through two points every line is exact
        slope, start = statistics.linear_regression(tokens, times)
        found |= {"start": start, "slope": slope, "r2": statistics.correlation(tokens, times) ** 2}
    return found


# The run --------------------------------------------------------------------------------------------------------------


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """All measurements by what the prompts grow by."""
    with tempfile.TemporaryDirectory() as folder:
        build(settings.policy, Path(folder))
        model = load(settings.policy, folder)
        prompts = {
            kind: [prompt_of(folder, kind, tokens) for tokens in settings.prompt_tokens] for kind in settings.grow
        }
    found: dict[str, Any] = {}
    for kind in settings.grow:
        rows = [measure(model, prompt, size, settings) for prompt in prompts[kind] for size in settings.group_sizes]
        lines = {route: line_through(rows, route) for route in settings.routes if route != PLAIN}
        found[kind] = {"rows": rows, "lines": lines}
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--policy", choices=("cpu", "cuda"), default=DEVICE, help="its sizes")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=ROUTES)
    parser.add_argument("--grow", nargs="+", choices=("image", "text"), default=("image", "text"))
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[100, 200, 400, 1000, 2000], help="about")
    parser.add_argument("--length", type=int, default=64, help="tokens of each completion")
    parser.add_argument("--cap", type=int, default=9000, help="most tokens in the rows of the plain route")
    parser.add_argument("--rounds", type=int, default=3, help="updates of each that count; one more comes first")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes by itself")
    return parser.parse_args(arguments)


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    settings, lines = results["settings"], []
    for kind in settings["grow"]:
        lines.append(f"prompts that grow by {kind}, completions of {settings['length']} tokens, seconds of an update")
        heads = "".join(f"{route:>14}" for route in settings["routes"])
        lines.append(f"{'P':>6}{'G':>4}{'P + G*C':>9}{'G*(P + C)':>11}{heads}{'plain / best':>14}")
        for row in results[kind]["rows"]:
            line = (
                f"{row['prompt_tokens']:>6}{row['group_size']:>4}{row['shared_tokens']:>9}{row['repeated_tokens']:>11}"
            )
            times = {route: row[route] for route in settings["routes"]}
            line += "".join(f"{'-' if time is None else f'{time:.3f}':>14}" for time in times.values())
            best = min((time for route, time in times.items() if route != PLAIN), default=None)
            if best is not None and times.get(PLAIN) is not None:
                line += f"{times[PLAIN] / best:>14.2f}"
            lines.append(line)
        for route, found in results[kind]["lines"].items():
            line = f"{route}: {1e3 * found['lowest']:.3f} to {1e3 * found['highest']:.3f} ms per token of P + G*C"
            if "slope" in found:
                line += f"; {found['start']:.3f} s + {1e3 * found['slope']:.3f} ms per token, R2 {found['r2']:.3f}"
            lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return report(settings, run(settings), table)


if __name__ == "__main__":
    main()
