"""The soft format reward: its value for every arrangement of the tags, and that no repetition pays."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rft_lightning.answers import parse_answer
from rft_lightning.rewards.format import soft_format_reward
from rft_lightning.sample import Answer, ClassTarget

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
RULES = ("strict", "paper", "published_code")


def soft(text: str) -> float:
    return soft_format_reward(Answer(text=text), None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>t</think> <answer>a</answer>", 1),
        # Text around and between is allowed here.
        ("Well: <think>t</think> so <answer>a</answer> done", 1),
        ("", 0),
        ("rose", 0),
        ("<answer>rose</answer>", 0.5),
        ("<think>t</think>rose", 0.5),
        ("<think>cut off", 0.25),
        ("<think>t</think><answer>cut off", 0.75),
        ("<think>t<answer>a</answer>", 0.75),
        ("rose</answer>", 0.25),
        # A repeated tag earns nothing and stands in nobody's way.
        ("<think>t</think><answer>a</answer><answer>b</answer>", 0.5),
        ("<think><think>t</think><answer>a</answer>", 0.75),
        ("<think>t</think><answer>a</answer>" * 2, 0),
        # Out of order.
        ("<answer>a</answer><think>t</think>", 0.5),
        ("</think><think><answer>a</answer>", 0.75),
        ("</answer><answer></think><think>", 0.25),
        ("</think><answer>a</answer><think>", 0.75),
        ("</think><answer>a</answer><think><think>", 0.75),
        ("<THINK>t</THINK><answer>a</answer>", 0.5),
    ],
)
def test_soft_format(text: str, expected: float):
    for rules in RULES:
        assert soft_format_reward(Answer(text=text), ClassTarget("rose"), rules=rules, step=3) == expected


@pytest.mark.parametrize("order", list(permutations(TAGS)))
def test_only_the_right_order_earns_everything(order: tuple[str, ...]):
    assert (soft("".join(order)) == 1) == (order == TAGS)


TEXT = st.lists(st.sampled_from([*TAGS, "a", "<", "\n", "<ANSWER>"]), max_size=12)


@given(TEXT, st.integers(0, 12), st.sampled_from(TAGS))
def test_repetition_never_pays(parts: list[str], place: int, tag: str):
    text = "".join(parts)
    again = "".join([*parts[:place], tag, *parts[place:]])
    assert soft(text) in (0, 0.25, 0.5, 0.75, 1)
    if text.count(tag) == 0:
        assert soft(again) in (soft(text), soft(text) + 0.25)
    else:
        assert soft(text) - 0.25 <= soft(again) <= soft(text)


@given(TEXT, TEXT.map("".join))
def test_the_strict_format_earns_everything(parts: list[str], thought: str):
    for text in ("".join(parts), f"<think>{thought}</think>{''.join(parts)}<answer>a</answer>"):
        if parse_answer(text).well_formed:
            assert soft(text) == 1


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="strict, paper, published_code, found 'lenient'"):
        soft_format_reward(Answer(), None, rules="lenient")
