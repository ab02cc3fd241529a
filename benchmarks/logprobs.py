"""Memory and time of log-probs with a vocabulary of 151,936 tokens: forward and backward of a group of completions.

    python benchmarks/logprobs.py --output logprobs.json

`ours` is group_logprobs. `plain` is the usual route: one row per completion, the logits of all its tokens in float32,
log-softmax and gather. Both score the same completions of one prompt with the same random policy (step_config.json),
with and without entropies, each in a process of its own. The peak is what an update takes above what the process held
before its forward (the weights): activations, logits and the gradients of the weights; on a CPU it is read from /proc,
so Linux is needed. The first update gives the peak, the ones after it the median time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from random_policy import DEVICE, build, load, machine, prompts_of, random_completions, seconds, sizes
from torch import Tensor, nn

from rft_lightning.policy.families import repeat_prompts
from rft_lightning.policy.shared_prefix import group_logprobs_and_entropies
from rft_lightning.sample import TOKEN_TENSORS, PromptBatch

ROUTES = ("plain", "ours")
MARK = "logprobs: "


# The two routes -------------------------------------------------------------------------------------------------------


def ours(model: Any, prompt: PromptBatch, ids_BGC: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    mask_BGC = torch.ones_like(ids_BGC, dtype=torch.bool)
    return group_logprobs_and_entropies(model, prompt, ids_BGC, mask_BGC, with_entropy=with_entropy)


def plain(model: Any, prompt: PromptBatch, ids_BGC: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    group_size, length = ids_BGC.shape[1:]
    rows = repeat_prompts(prompt, group_size)
    vision = {
        name: nn.functional.pad(tensor, (0, length)) if name in TOKEN_TENSORS else tensor
        for name, tensor in rows.vision.items()
    }
    ids_NC = ids_BGC.flatten(0, 1)
    logits_NCV = model(
        input_ids=torch.cat([rows.input_ids, ids_NC], 1),
        attention_mask=torch.cat([rows.attention_mask, torch.ones_like(ids_NC)], 1),
        use_cache=False,
        logits_to_keep=length + 1,
        **vision,
    ).logits[:, :-1]
    logp_NCV = logits_NCV.float().log_softmax(-1)
    del logits_NCV
    logp_BGC = logp_NCV.gather(-1, ids_NC[..., None]).view(ids_BGC.shape)
    if not with_entropy:
        return logp_BGC, None
    with torch.no_grad():  # a row at a time, as TRL does: not what the peak should hang on
        entropy_NC = torch.stack([-(logp_CV.exp() * logp_CV).sum(-1) for logp_CV in logp_NCV])
    return logp_BGC, entropy_NC.view(ids_BGC.shape)


# One route in its own process -----------------------------------------------------------------------------------------


class Peak:
    """The most memory held since it was made, above what was held then.

    Not resource.ru_maxrss: a process starts with the one of the process that started it, and loading counts in it.
    """

    def __init__(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now
        self.before = self.held()

    def mib(self) -> float:
        return self.held() - self.before

    @staticmethod
    def held() -> float:
        """The peak so far in MiB."""
        if DEVICE == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def work(settings: argparse.Namespace) -> None:
    """One route; the last line on stdout states what was found, the file its log-probs and entropies."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model = load(settings.policy, settings.folder, gradient_checkpointing=settings.gradient_checkpointing)
    prompt = prompts_of(settings.folder, 1, side=settings.image_side)
    ids_BGC = random_completions(settings.policy, model, settings.group_size, settings.length)
    route = {"plain": plain, "ours": ours}[settings.worker]

    def update(ids_BGC: Tensor = ids_BGC) -> tuple[Tensor, Tensor | None]:
        model.zero_grad()
        logp_BGC, entropy_BGC = route(model, prompt, ids_BGC, settings.with_entropy)
        logp_BGC.mean().backward()
        return logp_BGC.detach(), entropy_BGC

    update(ids_BGC[:, :1, :2])  # what is set up once is in no figure
    model.zero_grad()
    peak = Peak()
    results = update()
    found = {"memory_mib": peak.mib(), "prompt_tokens": prompt.input_ids.shape[1]}
    norms = torch.stack([weight.grad.float().norm() for weight in model.parameters() if weight.grad is not None])
    torch.save({"results": results, "gradient_norm": float(norms.norm())}, settings.results)
    del results
    times = [seconds(update) for _ in range(settings.rounds)]
    print(f"{MARK}{json.dumps(found | {'seconds': statistics.median(times), 'all_seconds': times})}")


# The comparison -------------------------------------------------------------------------------------------------------


def measure(route: str, with_entropy: bool, settings: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a process of its own finds: figures for the table, and results to compare."""
    results = Path(settings.folder) / f"{route}.pt"
    options = ["--worker", route, "--results", str(results)]
    for option in ("policy", "folder", "image_side", "group_size", "length", "rounds", "threads"):
        options += [f"--{option.replace('_', '-')}", str(getattr(settings, option))]
    options += with_entropy * ["--with-entropy"] + settings.gradient_checkpointing * ["--gradient-checkpointing"]
    run = subprocess.run([sys.executable, "-W", "ignore", __file__, *options], capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith(MARK)]
    if run.returncode or not lines:
        raise SystemExit(f"The route {route} stopped:\n{run.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix(MARK)), torch.load(results, weights_only=True)


def compare(with_entropy: bool, settings: argparse.Namespace) -> dict[str, Any]:
    """Both routes, their ratios, and how far apart their results are."""
    figures, results = {}, {}
    for route in ROUTES:
        figures[route], results[route] = measure(route, with_entropy, settings)
    theirs, mine = (results[route]["results"] for route in ROUTES)
    pairs = [(a, b) for a, b in zip(theirs, mine, strict=True) if a is not None]
    return {
        **figures,
        "memory_ratio": figures["plain"]["memory_mib"] / figures["ours"]["memory_mib"],
        "time_ratio": figures["plain"]["seconds"] / figures["ours"]["seconds"],
        "largest_difference": max(float((a - b).abs().max()) for a, b in pairs),
        "gradient_norm_ratio": results["plain"]["gradient_norm"] / results["ours"]["gradient_norm"],
    }


# The run --------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--policy", choices=("cpu", "cuda"), default=DEVICE, help="its sizes")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--image-side", type=int, help="of the picture in pixels; the policy's by default")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of each completion")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="for both")
    parser.add_argument("--rounds", type=int, default=3, help="updates that are timed; one more comes first")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes by itself")
    for name in ("worker", "folder", "results"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--with-entropy", action="store_true", help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    found.image_side = found.image_side or sizes(found.policy)["image_side"]
    return found


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    settings = results["settings"]
    tokens = results["log-probs"]["ours"]["prompt_tokens"]
    lines = [
        f"vocabulary of {settings['vocabulary']}, {settings['group_size']} completions of {settings['length']} tokens, "
        f"a prompt of {tokens}",
        f"{'':<26}{'route':<8}{'peak MiB':>9}{'s':>8}{'plain / ours: memory':>22}{'time':>7}{'differ by':>11}",
    ]
    for name in ("log-probs", "log-probs and entropies"):
        for route in ROUTES:
            row = results[name]
            line = f"{name:<26}{route:<8}{row[route]['memory_mib']:>9.0f}{row[route]['seconds']:>8.2f}"
            if route == "ours":
                line += f"{row['memory_ratio']:>22.2f}{row['time_ratio']:>7.2f}{row['largest_difference']:>11.1e}"
            lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    settings = parse(arguments)
    if settings.worker is not None:
        work(settings)
        return None
    with tempfile.TemporaryDirectory() as settings.folder:
        build(settings.policy, Path(settings.folder), vocab_size=settings.vocabulary)
        plainly, fully = compare(False, settings), compare(True, settings)
    shown = (
        "policy", "vocabulary", "image_side", "group_size", "length", "gradient_checkpointing", "rounds", "threads",
    )  # fmt: skip
    results = {
        "machine": machine(),
        "settings": {name: getattr(settings, name) for name in shown},
        "policy": sizes(settings.policy),
        "log-probs": plainly,
        "log-probs and entropies": fully,
    }
    print(table(results))
    if settings.output is not None:
        settings.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
