"""Adaptive coefficients. AdaptiveEntropy beside TRL's controller: test_objective_parity.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from rft_lightning.control import AdaptiveEntropy, AdaptiveKL
from rft_lightning.errors import NonFiniteError


@given(
    st.lists(st.tuples(st.floats(-1, 10), st.integers(1, 512)), min_size=1, max_size=30),
    st.floats(1e-3, 1.0),
    st.floats(1e-3, 1.0),
)
@settings(max_examples=50, deadline=None)
def test_adaptive_kl_follows_ziegler(steps, target, start):
    controller = AdaptiveKL(target=target, horizon=1000)
    controller.start(start)
    expected = start
    for kl, completions in steps:
        controller.update(kl, completions)
        expected *= 1 + min(0.2, max(-0.2, kl / target - 1)) * completions / 1000
        assert controller.value == pytest.approx(expected)
        assert controller.value > 0


def test_adaptive_kl_brings_a_system_to_its_target():
    """A KL that falls as beta grows settles at the target, wherever beta starts."""
    for start in (0.001, 1.0):
        controller = AdaptiveKL(target=0.05, horizon=1000)
        controller.start(start)
        for _ in range(2000):
            controller.update(0.01 / controller.value, 100)
        assert controller.value == pytest.approx(0.2, rel=1e-3)


def test_adaptive_entropy_acts_only_while_the_entropy_is_low():
    controller = AdaptiveEntropy(target=0.5, delta=0.1, minimum=0.05, maximum=0.25)
    controller.start(0.1)
    assert controller.value == 0  # nothing measured yet
    controller.update(0.5, 8)  # at the target counts as low
    assert controller.value == pytest.approx(0.2)
    controller.update(0.3, 8)
    assert controller.value == 0.25
    controller.update(0.7, 8)
    assert controller.value == 0
    assert controller.coefficient == pytest.approx(0.15)
    controller.update(0.7, 8)
    assert controller.coefficient == pytest.approx(0.05)


@pytest.mark.parametrize(
    "make", [lambda: AdaptiveKL(target=0.1), lambda: AdaptiveEntropy(target=0.3)], ids=["kl", "entropy"]
)
def test_a_resumed_controller_continues(make):
    measured = [0.2, 0.05, 0.4, 0.25, 0.2, 0.3]
    whole, first, second = make(), make(), make()
    for controller in (whole, first, second):
        controller.start(0.04)
    for value in measured:
        whole.update(value, 64)
    for value in measured[:3]:
        first.update(torch.tensor(value), 64)
    state = first.state_dict()
    assert all(type(value) is float for value in state.values())
    second.load_state_dict(state)
    for value in measured[3:]:
        second.update(value, 64)
    assert second.value == pytest.approx(whole.value)
    assert second.state_dict() == pytest.approx(whole.state_dict())
    assert whole.value != 0.04


def test_controllers_can_be_named_in_yaml():
    parser = ArgumentParser()
    parser.add_argument("--kl", type=AdaptiveKL)
    parser.add_argument("--entropy", type=AdaptiveEntropy)
    config = parser.parse_object(
        {
            "kl": {"class_path": "rft_lightning.control.AdaptiveKL", "init_args": {"target": 0.1, "horizon": 500}},
            "entropy": {"class_path": "rft_lightning.control.AdaptiveEntropy", "init_args": {"maximum": 0.5}},
        }
    )
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    built = build(config)
    assert (built.kl.target, built.kl.horizon, built.entropy.maximum) == (0.1, 500, 0.5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdaptiveKL(target=0.0), "target > 0"),
        (lambda: AdaptiveKL(target=0.1, horizon=0), "horizon > 0"),
        (lambda: AdaptiveKL(target=0.1).start(0.0), "cannot start from 0.0; set the objective's beta above 0"),
        (lambda: AdaptiveEntropy(target=-1), "target >= 0"),
        (lambda: AdaptiveEntropy(delta=0), "delta > 0"),
        (lambda: AdaptiveEntropy(minimum=0.5, maximum=0.1), "minimum <= maximum"),
        (lambda: AdaptiveEntropy().start(-0.1), "entropy_coef between 0 and its maximum 1.0, found -0.1"),
    ],
)
def test_errors_say_what_was_expected(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_step_must_be_short_beside_the_horizon():
    controller = AdaptiveKL(target=0.1, horizon=100)
    controller.start(0.04)
    with pytest.raises(ValueError, match="500 completions needs a horizon above 100"):
        controller.update(0.1, 500)


@pytest.mark.parametrize("measured", [math.nan, math.inf])
@pytest.mark.parametrize("controller", [AdaptiveKL(target=0.1), AdaptiveEntropy()])
def test_a_measurement_that_is_not_finite_is_refused(controller, measured):
    controller.start(0.04)
    with pytest.raises(NonFiniteError, match="diverged"):
        controller.update(measured, 8)
