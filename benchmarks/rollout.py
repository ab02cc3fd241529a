"""The rollout beside ``model.generate`` with repeated prompts, and beside what memory bandwidth allows.

    python benchmarks/rollout.py --output rollout.json

Both engines answer the same prompts with the same random policy (step_config.json), G completions of exactly C tokens
each, texts included. `generate` gets every prompt G times, as other trainers call it. They take turns in one process.
The prefill ends with the forward over the prompts; the rest are decode steps, each with its draw. The floor of a decode
step is the time to read what it must: the weights of the decoder and the head, each prompt's keys and values once per
group, and those of the completions, at the bandwidth that a large copy or sum reaches here. (On a CPU the arithmetic of
that many rows takes longer.) Printed are medians, and the ratios of rollouts that follow one another. The draw is also
timed alone, with a vocabulary of 151,936 tokens: ours (log-probs included) beside softmax and multinomial.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from random_policy import DEVICE, build, load, now, prompts_of, report, seconds, sizes
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from rft_lightning.policy.families import end_token_ids, repeat_prompts, vision_token_ids
from rft_lightning.policy.loading import DTYPES, load_processor
from rft_lightning.policy.noise import row_keys
from rft_lightning.policy.rollout import sample_groups
from rft_lightning.policy.sampling import Sampling, next_tokens
from rft_lightning.sample import PromptBatch

ENGINES, PHASES = ("generate", "ours"), ("rollout", "prefill", "decode_step")
COPIED = 2**28  # bytes that the bandwidth is measured with: far more than any cache holds


# The two engines ------------------------------------------------------------------------------------------------------


def ours(model: Any, tokenizer: Any, prompts: PromptBatch, group_size: int, length: int, step: int) -> Tensor:
    """[N, C] token ids."""
    return sample_groups(
        model,
        prompts,
        group_size,
        tokenizer=tokenizer,
        max_completion_length=length,
        min_completion_length=length,
        seed=0,
        step=step,
    ).completion_ids.flatten(0, 1)


def generate(model: Any, tokenizer: Any, prompts: PromptBatch, group_size: int, length: int, step: int) -> Tensor:
    """[N, C] token ids."""
    from transformers import GenerationConfig

    rows = repeat_prompts(prompts, group_size)
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        min_new_tokens=length,
        max_new_tokens=length,
        eos_token_id=end_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=vision_token_ids(model.config),
    )
    torch.manual_seed(step)
    ids_NT = model.generate(
        input_ids=rows.input_ids, attention_mask=rows.attention_mask, generation_config=config, **rows.vision
    )
    ids_NC = ids_NT[:, rows.input_ids.shape[1] :]
    tokenizer.batch_decode(ids_NC, skip_special_tokens=True)
    return ids_NC


def rollouts(model: Any, tokenizer: Any, prompts: PromptBatch, settings: argparse.Namespace) -> dict[str, Any]:
    """Seconds by engine, phase and round; the engines in turns, their first rollouts left out."""
    engines: dict[str, Callable[..., Tensor]] = {"generate": generate, "ours": ours}
    times: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in ENGINES}
    rows = len(prompts) * settings.group_size
    for step in range(settings.rounds + 1):
        for name in ENGINES:
            begun = now()
            with end_of_prefill(model, rows) as ends:
                ids_NC = engines[name](model, tokenizer, prompts, settings.group_size, settings.length, step)
            ended = now()
            assert ids_NC.shape == (rows, settings.length)
            spent = ended - begun, ends[-1] - begun, (ended - ends[-1]) / (settings.length - 1)
            for phase, found in zip(PHASES, spent, strict=True):
                times[name][phase].append(found)
    return {name: {phase: found[1:] for phase, found in times[name].items()} for name in ENGINES}


@contextmanager
def end_of_prefill(model: Any, rows: int) -> Iterator[list[float]]:
    """Yields a list whose last entry is when the decoder had read the prompts: a decode step has one token per row."""
    ends: list[float] = []

    decoder = model.model.language_model

    def note(module: Any, _: Any, output: Any) -> None:
        if module is decoder and output.last_hidden_state.shape[:2].numel() > rows:
            ends.append(now())

    # One for all modules: a hook on the decoder itself would keep ours from its lean step.
    hook = register_module_forward_hook(note)
    try:
        yield ends
    finally:
        hook.remove()


# The floor ------------------------------------------------------------------------------------------------------------


def bandwidth() -> float:
    """Bytes per second that a copy (read and written) or a sum (read) of a large tensor reaches."""
    source = torch.ones(COPIED // 4, device=DEVICE)
    target = torch.empty_like(source)
    copies = [2 * COPIED / seconds(lambda: target.copy_(source)) for _ in range(7)]
    sums = [COPIED / seconds(source.sum) for _ in range(7)]
    return max(copies + sums)


def bytes_per_step(model: Any, prompts: PromptBatch, settings: argparse.Namespace) -> dict[str, int]:
    """What a decode step must read, with completions half grown."""
    text = model.config.get_text_config()
    layers = [weight for name, weight in model.model.language_model.named_parameters() if "embed_tokens" not in name]
    weights = [*layers, model.get_output_embeddings().weight]
    head_size = text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * weights[0].element_size()
    return {
        "weights": sum(weight.numel() * weight.element_size() for weight in weights),
        "prompt_cache": int(prompts.attention_mask.sum()) * cached,
        "completion_cache": len(prompts) * settings.group_size * settings.length * cached // 2,
    }


# The draw -------------------------------------------------------------------------------------------------------------


def draws(prompts: PromptBatch, settings: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of drawing one token for each row, by round."""
    rows = len(prompts) * settings.group_size
    dtype = DTYPES[sizes(settings.policy)["dtype"]]
    logits_NV = torch.randn(rows, settings.vocabulary, device=DEVICE).to(dtype)
    keys_N = row_keys(prompts.samples, settings.group_size, seed=0, step=0, device=logits_NV.device)
    forbidden = torch.arange(4, device=DEVICE)
    runs: dict[str, Callable[[], Any]] = {
        "generate": lambda: logits_NV.float().softmax(-1).multinomial(1),
        "ours": lambda: next_tokens(logits_NV, Sampling(), keys_N, 0, forbidden),
    }
    times: dict[str, list[float]] = {name: [] for name in ENGINES}
    for _ in range(2 * settings.rounds + 1):
        for name in ENGINES:
            times[name].append(seconds(runs[name]))
    return {name: found[1:] for name, found in times.items()}


# The run --------------------------------------------------------------------------------------------------------------


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of both and the ratio of each pair that follow one another."""
    ratios = [theirs / mine for theirs, mine in zip(times["generate"], times["ours"], strict=True)]
    ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {**{name: statistics.median(times[name]) for name in ENGINES}, "ratio": ratio, "all_seconds": times}


def run(settings: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        build(settings.policy, Path(folder))
        model = load(settings.policy, folder).eval()
        tokenizer = load_processor(folder).tokenizer
        prompts = prompts_of(folder, settings.prompts, side=settings.image_side)
    times = rollouts(model, tokenizer, prompts, settings)
    reads, speed = bytes_per_step(model, prompts, settings), bandwidth()
    floor = sum(reads.values()) / speed
    both = {phase: compared({name: times[name][phase] for name in ENGINES}) for phase in PHASES}
    return {
        "prompt_tokens": prompts.input_ids.shape[1],
        **both,
        "floor": {"seconds": floor, "bytes": reads, "bytes_per_second": speed},
        "decode_step_to_floor": {name: both["decode_step"][name] / floor for name in ENGINES},
        "draw": compared(draws(prompts, settings)),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = DEVICE == "cuda"
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--policy", choices=("cpu", "cuda"), default=DEVICE, help="its sizes")
    parser.add_argument("--image-side", type=int, help="of the pictures in pixels; the policy's by default")
    parser.add_argument("--prompts", type=int, default=16 if cuda else 4)
    parser.add_argument("--group-size", type=int, default=8 if cuda else 16)
    parser.add_argument("--length", type=int, default=256 if cuda else 64, help="tokens of each completion, 2 or more")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="of the draw alone")
    parser.add_argument("--rounds", type=int, default=5, help="rollouts of each that count; one more comes first")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes by itself")
    found = parser.parse_args(arguments)
    if found.length < 2:
        parser.error(f"Expected a length of 2 or more, so that there is a decode step, found {found.length}.")
    found.image_side = found.image_side or sizes(found.policy)["image_side"]
    return found


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    settings, floor = results["settings"], results["floor"]
    lines = [
        f"{settings['prompts']} prompts of {results['prompt_tokens']} tokens, {settings['group_size']} completions of "
        f"{settings['length']} each",
        f"{'ms':<34}{'generate':>10}{'ours':>10}{'generate / ours':>26}",
    ]
    names = {"rollout": "whole rollout", "prefill": "prefill", "decode_step": "decode step"}
    names["draw"] = f"draw, vocabulary of {settings['vocabulary']}"
    for part, name in names.items():
        row, ratio = results[part], results[part]["ratio"]
        lines.append(
            f"{name:<34}{1000 * row['generate']:>10.2f}{1000 * row['ours']:>10.2f}"
            f"{ratio['median']:>12.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        )
    times = results["decode_step_to_floor"]
    lines.append(f"{'decode step / floor':<34}{times['generate']:>10.2f}{times['ours']:>10.2f}")
    lines.append(
        f"floor of a decode step: {1000 * floor['seconds']:.2f} ms, {sum(floor['bytes'].values()) / 2**20:.1f} MiB "
        f"at {floor['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return report(settings, run(settings), table)


if __name__ == "__main__":
    main()
