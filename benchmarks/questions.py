"""Several questions about each picture, as the two stages of the detection protocol ask them.

    python benchmarks/questions.py --output questions.json

The same random policy (step_config.json) answers the same questions greedily, K about one picture in one batch:

- `generate`: the model's own, each question with the picture;
- `apart`: our rollout of the same questions with a picture of their own each;
- `together`: our rollout, to which it is one picture: the tower sees it once, and the decoder runs what the questions
  have in common once.

Routes take turns; printed are medians in seconds and the ratios of runs that follow one another. The answers of `apart`
and `together` are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from random_policy import DEVICE, build, load, report, seconds, sizes
from torch import Tensor

from rft_lightning.policy.families import end_token_ids, vision_token_ids
from rft_lightning.policy.loading import load_processor
from rft_lightning.policy.rollout import sample_groups
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import PresenceTarget, PromptBatch, Sample
from rft_lightning.tasks import PresenceTask

ROUTES = ("generate", "apart", "together")


def questions_of(folder: str, count: int, side: int) -> dict[str, PromptBatch]:
    """The same questions by route: about one picture, and about a picture each that looks the same."""
    encoder = PromptEncoder(folder, min_pixels=side**2, max_pixels=side**2, max_prompt_length=None)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture, task = Image.fromarray(pixels), PresenceTask()
    targets = [PresenceTarget(False, f"circle {number}", number, (side, side)) for number in range(count)]
    together = [Sample(str(i), picture, target, task, (side, side)) for i, target in enumerate(targets)]
    apart = [replace(sample, image=picture.copy()) for sample in together]
    found = {"apart": encoder(apart).to(DEVICE), "together": encoder(together).to(DEVICE)}
    return {**found, "generate": found["apart"]}


def answer(model: Any, tokenizer: Any, prompts: PromptBatch, length: int) -> Tensor:
    """[K, C] token ids of our rollout."""
    lengths = {"max_completion_length": length, "min_completion_length": length}
    rollouts = sample_groups(model, prompts, 1, tokenizer=tokenizer, temperature=0, seed=0, **lengths)
    return rollouts.completion_ids[:, 0]


def generate(model: Any, tokenizer: Any, prompts: PromptBatch, length: int) -> Tensor:
    """[K, C] token ids of the model's own."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        min_new_tokens=length,
        max_new_tokens=length,
        eos_token_id=end_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=vision_token_ids(model.config),
    )
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, **prompts.vision}
    ids: Tensor = model.generate(generation_config=config, **inputs)[:, prompts.input_ids.shape[1] :]
    tokenizer.batch_decode(ids, skip_special_tokens=True)
    return ids


def measure(model: Any, tokenizer: Any, prompts: dict[str, PromptBatch], settings: argparse.Namespace) -> dict:
    """Seconds of each route by round, the first round left out, and how many of our answers agree."""
    times: dict[str, list[float]] = {route: [] for route in ROUTES}
    ids: dict[str, Tensor] = {}
    engines: dict[str, Callable[..., Tensor]] = {"generate": generate, "apart": answer, "together": answer}
    for _ in range(settings.rounds + 1):
        for route in ROUTES:

            def run(route: str = route) -> None:
                ids[route] = engines[route](model, tokenizer, prompts[route], settings.length)

            times[route].append(seconds(run))
    times = {route: found[1:] for route, found in times.items()}
    ratios = {
        route: [theirs / ours for theirs, ours in zip(times[route], times["together"], strict=True)]
        for route in ROUTES[:-1]
    }
    return {
        "prompt_tokens": prompts["together"].input_ids.shape[1],
        "seconds": {route: statistics.median(found) for route, found in times.items()},
        "ratio": {
            route: {"median": statistics.median(found), "min": min(found), "max": max(found)}
            for route, found in ratios.items()
        },
        "same_answers": float((ids["apart"] == ids["together"]).all(1).float().mean()),
    }


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """All measurements by the number of questions."""
    with tempfile.TemporaryDirectory() as folder:
        build(settings.policy, Path(folder))
        model = load(settings.policy, folder).eval()
        tokenizer = load_processor(folder).tokenizer
        found = {}
        for count in settings.questions:
            found[count] = measure(model, tokenizer, questions_of(folder, count, settings.image_side), settings)
    return {"questions": found}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--policy", choices=("cpu", "cuda"), default=DEVICE, help="its sizes")
    parser.add_argument("--image-side", type=int, help="of the pictures in pixels; the policy's by default")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4, 16, 80], help="about one picture")
    parser.add_argument("--length", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each that count; one more comes first")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes by itself")
    found = parser.parse_args(arguments)
    found.image_side = found.image_side or sizes(found.policy)["image_side"]
    return found


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        f"answers of {results['settings']['length']} tokens",
        f"{'questions':>9}{'tokens':>8}{'generate s':>12}{'apart s':>9}{'together s':>12}{'generate / together':>28}"
        f"{'apart / together':>26}{'same answers':>14}",
    ]
    for count, row in results["questions"].items():
        times = row["seconds"]
        ratios = [
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" for ratio in row["ratio"].values()
        ]
        lines.append(
            f"{count:>9}{row['prompt_tokens']:>8}{times['generate']:>12.2f}{times['apart']:>9.2f}"
            f"{times['together']:>12.2f}{ratios[0]:>28}{ratios[1]:>26}{row['same_answers']:>14.0%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return report(settings, run(settings), table)


if __name__ == "__main__":
    main()
