"""Noise and next-token draws: uniform, independent, the same anywhere, and distributed as the model says."""

import math

import pytest
import torch
from scipy import stats
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy.noise import gumbel, row_keys
from rft_lightning.policy.sampling import Sampling, next_tokens
from rft_lightning.sample import Sample

NOTHING = torch.tensor([], dtype=torch.long)


def samples(count, occurrence=0):
    return [Sample(f"sample/{i}", None, None, None, (1, 1), occurrence=occurrence) for i in range(count)]


def keys(count, group_size=1, *, seed=0, step=0, occurrence=0):
    return row_keys(samples(count, occurrence), group_size, seed=seed, step=step, device=torch.device("cpu"))


def uniforms(keys_N, position, vocabulary=1000):
    noise = gumbel(keys_N, position, torch.arange(vocabulary)[None])
    return (-noise.double()).exp().neg().exp()


def test_noise_is_uniform_and_independent_between_tokens_rows_and_positions():
    u = uniforms(keys(300), 0)
    counts = torch.histc(u.float(), bins=100, min=0, max=1)
    assert stats.chisquare(counts).pvalue > 1e-3
    others = {"next row": u.roll(1, 0), "next token": u.roll(1, 1), "next position": uniforms(keys(300), 1)}
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 4 / u.numel() ** 0.5, name


def test_extreme_noise_is_finite_and_reaches_far():
    noise = gumbel(keys(64), 0, torch.arange(152_000)[None])
    assert noise.isfinite().all()
    # The largest of 10 million standard Gumbel variables lies near log(10 million) = 16.1.
    assert 14 < noise.max() < 22


def test_noise_is_a_function_of_the_row_alone():
    together = keys(5, 4)
    assert torch.equal(together.view(5, 4)[3], row_keys(samples(5)[3:4], 4, seed=0, step=0, device=torch.device("cpu")))
    assert torch.equal(
        gumbel(together, 7, torch.arange(50)[None])[9], gumbel(together[9:10], 7, torch.arange(50)[None])[0]
    )
    # ... and of the token, not of its place among the candidates
    some = torch.tensor([[3, 49, 0]])
    assert torch.equal(
        gumbel(together, 7, torch.arange(50)[None])[:, [3, 49, 0]], gumbel(together, 7, some.expand(20, 3))
    )


def test_every_part_of_the_key_changes_the_noise():
    variants = [keys(1), keys(1, seed=1), keys(1, step=1), keys(1, occurrence=1), keys(2)[1:], keys(1, 2)[1:]]
    assert len({int(key) for key in variants}) == len(variants)
    # Words must not be exchangeable: seed 0 at step 1 is another run than seed 1 at step 0.
    assert keys(1, seed=2, step=3) != keys(1, seed=3, step=2)


def python_gumbel(key, position, token):
    """The same hashes in Python's integers, which neither wrap nor have a sign."""

    def mix64(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def mix32(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    key = mix64((key + (position + 1) * 0x9E3779B97F4A7C15) % 2**64)
    bits = mix32((mix32(token ^ (key % 2**32)) + (key >> 32)) % 2**32)
    return -math.log(-math.log1p(-((bits % 2**31) + 0.5) / 2**31))


def test_what_was_drawn_yesterday_is_drawn_tomorrow():
    key = keys(1, 2, seed=42, step=7)
    assert key.tolist() == [6446760235423207554, 2076469151931461299]
    tokens = [0, 1, 777, 151_935]
    found = gumbel(key, 3, torch.tensor([tokens, tokens]))
    expected = torch.tensor([[python_gumbel(k % 2**64, 3, token) for token in tokens] for k in key.tolist()])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
]


def reference(logits_V, settings):
    """The distribution `generate` would draw from."""
    scores = logits_V[None]
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if name in settings:
            scores = warper(settings[name])(None, scores)
    return scores[0].softmax(0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_100000_draws_follow_the_logits(settings):
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    row_key = keys(1000)
    drawn = [
        next_tokens(logits.expand(1000, -1), Sampling(**settings), row_key, position, NOTHING)[0]
        for position in range(100)
    ]
    counts = torch.bincount(torch.cat(drawn), minlength=40).double()
    expected = 100_000 * reference(logits, settings).double()
    assert (counts[expected == 0] == 0).all()
    common = expected >= 5  # rarer tokens are too few for the test
    rest = (expected > 0) & ~common
    observed = [*counts[common].tolist(), *([counts[rest].sum().item()] if rest.any() else [])]
    wanted = [*expected[common].tolist(), *([expected[rest].sum().item()] if rest.any() else [])]
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_forbidden_tokens_are_never_drawn_and_logprobs_are_those_of_the_model(settings):
    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(2))
    logits[:, 7] += 10
    tokens, logp = next_tokens(logits, Sampling(**settings), keys(64), 0, torch.tensor([7]))
    assert (tokens != 7).all()
    temperature = settings.get("temperature", 1.0)
    expected = (logits / temperature).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)


def test_greedy_takes_the_likeliest():
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(2))
    tokens, logp = next_tokens(logits, Sampling(temperature=0), keys(9), 0, NOTHING)
    assert torch.equal(tokens, logits.argmax(1))
    torch.testing.assert_close(logp, logits.log_softmax(1).amax(1))


def test_a_row_draws_the_same_in_any_company():
    """Every row alone, in another order and with others gives the same token, with and without truncation."""
    logits = torch.randn(11, 300, generator=torch.Generator().manual_seed(3))
    for settings in SETTINGS:
        sampling = Sampling(**settings)
        together = next_tokens(logits, sampling, keys(11), 4, NOTHING)[0]
        backwards = next_tokens(logits.flip(0), sampling, keys(11).flip(0), 4, NOTHING)[0].flip(0)
        alone = torch.cat(
            [next_tokens(logits[i : i + 1], sampling, keys(11)[i : i + 1], 4, NOTHING)[0] for i in range(11)]
        )
        assert torch.equal(together, backwards)
        assert torch.equal(together, alone)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigConflictError, match=next(iter(settings))):
        Sampling(**settings)
