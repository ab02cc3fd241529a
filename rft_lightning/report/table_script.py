"""A plan as a shell script that can be run again: every command is skipped where what it writes is there.

What depends on how far a run came (its last checkpoint, its policy) is looked up when a command runs, by the shell
functions at the head of the script. What was done when the plan was made stands commented out.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from textwrap import wrap

from rft_lightning.report.table_plan import LAST, TRAINED, Later, Plan, Step

_FUNCTIONS = rf"""
set -e

# Each attempt at a training has a folder of its own: of those that have a file, the newest.
newest() {{ printf '%s\n' "$1"/{TRAINED.parent.parent}/"$2" | sort -V | tail -n 1; }}
# Whether a training came to its end, and the policy that it wrote then.
trained() {{ [ -e "$(newest "$1" {TRAINED.parent.name}/{TRAINED.name})" ]; }}
policy() {{ dirname "$(newest "$1" {TRAINED.parent.name}/{TRAINED.name})"; }}
# The last checkpoint, and the same to go on from: null where there is none.
last() {{ newest "$1" {LAST}; }}
begun() {{ if [ -e "$(last "$1")" ]; then last "$1"; else echo null; fi; }}
"""


def script(plan: Plan, *, peak_flops: float, utilisation: float) -> str:
    """The plan as a shell script; costs and headings are comments."""
    lines, heading = [*_head(plan, peak_flops, utilisation), _FUNCTIONS.rstrip()], ""
    for step in plan.steps.values():
        if step.heading != heading:
            heading = step.heading
            lines += ["", f"# ---- {heading}"]
        cost = "done" if step.done else step.cost.line(peak_flops, utilisation)
        lines += [f"# {cost}", f"{'# ' if step.done else ''}{command(step)}"]
    return "\n".join(lines) + "\n"


def command(step: Step) -> str:
    """The command of a step, which runs where its output is missing."""
    there = f"trained {_quoted(step.folder)}" if step.is_training else f"[ -e {_quoted(step.folder / step.output)} ]"
    return f"{there} || {' '.join(_word(word) for word in step.words)}"


def _word(word: str | Later) -> str:
    return f'"$({word.function} {_quoted(word.run)})"' if isinstance(word, Later) else shlex.quote(word)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _head(plan: Plan, peak_flops: float, utilisation: float) -> list[str]:
    table, done = plan.table, sum(step.done for step in plan.steps.values())
    sizes = ", ".join(f"{name} {model.parameters:.2g}" for name, model in table.models.items())
    prompt, completion, answer = table.prompt_tokens, table.completion_tokens, table.answer_tokens
    notes = {row.method: table.systems[row.method].note for row in table.rows if row.method in table.systems}
    return [
        "#!/usr/bin/env bash",
        f"# {table.title}",
        f"# {len(plan.steps)} commands, of which {done} are done. Left to do:",
        *(f"#   {line}" for line in wrap(plan.left().line(peak_flops, utilisation), 110)),
        "# Estimated, not measured: 2 FLOP per parameter and token in a pass. Training: 5 passes (sampling, reference,",
        f"# policy forward, and backward as 2) over a prompt and G completions, {prompt} + G x {completion} tokens.",
        f"# SFT: 3 over {prompt} + {completion}. A question: 1 over {prompt} + {answer}. Parameters: {sizes}.",
        f"# GPU-hours at {utilisation:.0%} of {peak_flops / 1e12:g} TFLOP/s; a line above each command says its share.",
        "# After an interruption run it again: what is done is skipped, and a training goes on from its checkpoint.",
        *(f"# {method}: {note}" for method, note in notes.items() if note),
    ]


__all__ = ["command", "script"]
