"""Attention part by part against a dense mask, and where tokens go in a row against a loop."""

import pytest
import torch

from rft_lightning.policy.group_attention import PackedGroups, as_mask, install, merged, part, part_backward
from rft_lightning.policy.group_row import GroupRow

SCALE = 0.3
SHAPES = {
    "one group, even": ([7], [[3, 3, 3]]),
    "one group, ragged": ([7], [[3, 1, 0]]),
    "one completion": ([4], [[1]]),
    "nothing written": ([4], [[0, 0]]),
    "ragged groups": ([7, 3, 5], [[3, 1, 2], [0, 0, 0], [5, 5, 1]]),
    "even groups": ([40, 40], [[30, 30], [30, 30]]),
    "a prompt of one token": ([1, 9], [[2], [6]]),
    "of every length": ([5, 70, 33, 17], [[1, 90, 16], [17, 33, 0], [64, 65, 2], [0, 0, 31]]),
}


def make_row(prompts, completions):
    return GroupRow(prompts, completions, max(prompts), max(1, *(max(group) for group in completions)))


def owners(prompts, completions):
    """(group, completion; 0 the prompt) of every token of the row."""
    found = []
    for b, (length, group) in enumerate(zip(prompts, completions, strict=True)):
        found += [(b, 0)] * length
        for g, tokens in enumerate(group):
            found += [(b, g + 1)] * tokens
    return found


def dense(q, k, v, prompts, completions):
    who = owners(prompts, completions)
    seen = [[j <= i and a[0] == b[0] and b[1] in (0, a[1]) for j, b in enumerate(who)] for i, a in enumerate(who)]
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q, k, v, attn_mask=torch.tensor(seen), scale=SCALE, enable_gqa=True)[0].transpose(0, 1)


def tensors(size, heads, key_heads, dtype):
    generator = torch.Generator().manual_seed(size)
    return [
        torch.randn(size, n, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, key_heads, key_heads)
    ]


def attend(row, q, k, v):
    as_model = (x.transpose(0, 1)[None] for x in (q, k, v))
    return PackedGroups(row).attend(0, *as_model, SCALE)[0]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_a_dense_mask(shape, heads):
    row = make_row(*shape)
    q, k, v = tensors(row.size, *heads, torch.float32)
    expected, found = dense(q, k, v, *shape), attend(row, q, k, v)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    for ours, dense_one in zip(gradients, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, dense_one, atol=4e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_in_bfloat16_it_is_off_by_rounding(shape):
    row = make_row(*shape)
    q, k, v = tensors(row.size, 4, 2, torch.bfloat16)
    assert (attend(row, q, k, v).double() - dense(q, k, v, *shape)).abs().max() < 0.03


@pytest.mark.parametrize("shape", [SHAPES["ragged groups"], SHAPES["one group, even"]], ids=["ragged", "even"])
def test_gradients_by_finite_differences(shape):
    row = make_row(*shape)
    torch.autograd.gradcheck(lambda q, k, v: attend(row, q, k, v), tensors(row.size, 2, 1, torch.float64))


def test_scores_of_any_size():
    """Log-sum-exps are merged without overflow, where one set of keys outweighs the other entirely."""
    shape = SHAPES["ragged groups"]
    row = make_row(*shape)
    q, k, v = tensors(row.size, 2, 2, torch.float32)
    found = attend(row, 200 * q, k, v)
    torch.testing.assert_close(found.double(), dense(200 * q, k, v, *shape), atol=2e-4, rtol=0)
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), (q, k, v)))


def test_merging_in_either_order():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, 3, 8, generator=generator) for _ in range(3))
    whole, whole_lse = part(q, k, v, scale=SCALE)
    first, second = (part(q, k[:, where], v[:, where], scale=SCALE) for where in (slice(2), slice(2, None)))
    for pair in ((first, second), (second, first)):
        out, lse = merged(*pair)
        torch.testing.assert_close(out, whole, atol=1e-6, rtol=0)
        torch.testing.assert_close(lse, whole_lse, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_where_tokens_go(shape):
    prompts, completions = shape
    row, who = make_row(*shape), owners(*shape)
    width, longest, size = max(prompts), max(1, *(max(group) for group in completions)), len(completions[0])
    columns = width + size * longest
    expected, predicting, written = [], [], []
    for b, length in enumerate(prompts):
        expected += [b * columns + width - length + i for i in range(length)]
        last = len(expected) - 1
        for g, tokens in enumerate(completions[b]):
            for t in range(tokens):
                predicting.append(last if t == 0 else len(expected) - 1)
                written.append((b * size + g) * longest + t)
                expected.append(b * columns + width + g * longest + t)
    assert row.tokens.tolist() == expected
    assert row.predicting.tolist() == predicting
    assert row.written.tolist() == written
    assert row.size == len(who)
    numbers = torch.arange(1, row.size + 1)
    for runs, real in (
        (row.prompts, prompts),
        (row.answers, [sum(group) for group in completions]),
        (row.completions, [n for group in completions for n in group if n]),
    ):
        blocks = runs.split(numbers, padding=0)
        assert sorted(n for block in blocks for n in (block > 0).sum(1).tolist()) == sorted(real)
        joined = runs.join(blocks, numbers)
        assert len(joined) == sum(real)
        assert (joined.diff() > 0).all()
    halves = (
        row.prompts.join(row.prompts.split(numbers), numbers),
        row.answers.join(row.answers.split(numbers), numbers),
    )
    assert torch.equal(row.join(*halves), numbers)
    rectangle = torch.arange(len(prompts) * columns).view(len(prompts), columns)
    assert row.pack(rectangle).tolist() == [expected]


def test_a_model_without_our_mask_computes_as_before(tiny_policy):
    from transformers import AttentionInterface

    from rft_lightning.policy.loading import load_policy

    model = load_policy(tiny_policy).eval()
    ids = torch.arange(20, 40)[None]
    attention = AttentionInterface()["sdpa"]
    install()
    install()
    ours = model(input_ids=ids).logits
    AttentionInterface.register("sdpa", getattr(AttentionInterface()["sdpa"], "__wrapped__", attention))
    try:
        assert torch.equal(model(input_ids=ids).logits, ours)
    finally:
        install()


def test_the_mask_passes_for_a_dense_one():
    mask = as_mask(PackedGroups(make_row([2], [[1]])), torch.device("cpu"))
    assert isinstance(mask, torch.Tensor)
    assert len(mask.shape) == 4


def test_the_kernels_of_cuda_take_what_they_are_given():
    """Shapes and arguments alone: fake tensors compute nothing, and need no GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = (torch.empty(2, length, 4, 64, device="cuda", dtype=torch.bfloat16) for length in (101, 43))
        for keys, settings in ((k, {"bias": torch.empty(2, 1, 1, 43, device="cuda")}), (q, {"causal": True})):
            out, lse = part(q, keys, keys, scale=SCALE, **settings)
            assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
            gradients = part_backward((out, q, out, lse), keys, keys, scale=SCALE, **settings)
            assert [x.shape for x in gradients] == [q.shape, keys.shape, keys.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_on_cuda(shape, dtype):
    prompts, completions = shape
    longest = max(1, *(max(group) for group in completions))
    row = GroupRow(prompts, completions, max(prompts), longest, "cuda")
    q, k, v = (x.detach().cuda().requires_grad_() for x in tensors(row.size, 6, 2, dtype))
    expected, found = dense(*(x.cpu() for x in (q, k, v)), *shape), attend(row, q, k, v)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found.cpu().double(), expected, atol=tolerance, rtol=0)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((found * weights.cuda()).sum(), (q, k, v))
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=2 * tolerance, rtol=0.02)


def test_one_long_completion_does_not_lengthen_the_others():
    """Blocks hold runs of similar length: padding at most doubles what is computed."""
    lengths = [[16] * 7 + [1000], [20] * 8]
    row = GroupRow([300, 1700], lengths, 1700, 1000)
    places = sum(block.numel() for block in row.completions.split(torch.arange(row.size)))
    assert places <= 2 * sum(map(sum, lengths))
    pairs = sum(block.numel() * block.shape[1] for block in row.prompts.split(torch.arange(row.size)))
    assert pairs == 300**2 + 1700**2
