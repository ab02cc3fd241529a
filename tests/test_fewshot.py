"""The k-shot draw: the same rows everywhere, nested, and honest about classes that have too few."""

import random
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from rft_lightning.datamodules.fewshot import draw_shots, hash_order
from rft_lightning.errors import ConfigConflictError, EmptyClassError

# String keys go through sets, whose order differs from process to process: golden values would show it.
ROWS = [(f"images/{n:03}.jpg", ("cat", "dog", "hot dog")[n % 3]) for n in range(60)]


def of(rows, name):
    return [key for key, found in rows if found == name]


def test_golden_draw():
    # Derived apart from the package, by sorting on the documented hash.
    assert draw_shots(ROWS, 2, seed=0) == [
        ("images/021.jpg", "cat"),
        ("images/025.jpg", "dog"),
        ("images/027.jpg", "cat"),
        ("images/029.jpg", "hot dog"),
        ("images/034.jpg", "dog"),
        ("images/044.jpg", "hot dog"),
    ]
    assert hash_order(range(8), seed=3, salt="rows") == [4, 6, 5, 3, 7, 1, 0, 2]
    assert hash_order([(1, 17), (1, 18), (2, 17)], seed=0) == [(1, 18), (1, 17), (2, 17)]


def test_neither_order_nor_repeats_nor_other_rows_matter():
    expected = draw_shots(ROWS, 3, seed=5)
    shuffled = random.Random(1).sample(ROWS * 2, 2 * len(ROWS))
    assert draw_shots(shuffled, 3, seed=5) == expected
    # Another class changes nothing in the draw of the first.
    alone = draw_shots([row for row in ROWS if row[1] == "cat"], 3, seed=5)
    assert alone == [row for row in expected if row[1] == "cat"]
    # Without a row that was not drawn, the draw stays.
    spare = next(row for row in ROWS if row not in expected)
    assert draw_shots([row for row in ROWS if row != spare], 3, seed=5) == expected


def test_shots_are_nested():
    for seed in range(5):
        draws = [set(draw_shots(ROWS, shots, seed=seed)) for shots in range(1, 21)]
        assert all(small < large for small, large in pairwise(draws))
        assert [len(draw) for draw in draws] == [3 * shots for shots in range(1, 21)]
        assert draws[-1] == set(draw_shots(ROWS, None, seed=seed)) == set(ROWS)


def test_seeds_and_classes_differ():
    draws = {tuple(draw_shots(ROWS, 4, seed=seed)) for seed in range(20)}
    assert len(draws) == 20
    both = [(n, name) for n in range(100) for name in ("cat", "dog")]
    drawn = draw_shots(both, 10, seed=0)
    assert of(drawn, "cat") != of(drawn, "dog")


def test_every_row_is_as_likely():
    counts = np.zeros(10)
    for seed in range(2000):
        counts[[key for key, _ in draw_shots([(n, "cat") for n in range(10)], 3, seed=seed)]] += 1
    # Binomial(2000, 0.3): standard deviation 20.5
    assert np.abs(counts - 600).max() < 5 * 20.5


def test_no_global_generator_is_used():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    draw_shots(ROWS, 4, seed=0)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_image_that_occurs_twice_is_one_shot():
    rows = [(1, "cat"), (1, "cat"), (2, "cat")]
    assert draw_shots(rows, 2, seed=0) == [(1, "cat"), (2, "cat")]


def test_few_examples_are_kept_and_named():
    rows = [(1, "cat"), (2, "cat"), (3, "dog"), (4, "bus"), (5, "bus"), (6, "bus")]
    with pytest.warns(UserWarning, match=r"Fewer than 3 images of 2 of 3 classes in val2017.*: cat \(2\), dog \(1\)\."):
        drawn = draw_shots(rows, 3, seed=0, split="val2017")
    assert drawn == sorted(rows)


def test_enough_examples_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_shots(ROWS, 20, seed=0)
        draw_shots(ROWS, None, seed=0)


def test_only_the_named_classes_are_drawn():
    assert {name for _, name in draw_shots(ROWS, 1, seed=0, classes=["dog"])} == {"dog"}


def test_a_class_without_example_is_an_error():
    with pytest.raises(EmptyClassError) as caught:
        draw_shots(
            ROWS, 2, seed=0, classes=["cat", "zebra"], split="train2017", looked_at=77, remark="Crowds are none."
        )
    message = str(caught.value)
    assert "'zebra'" in message
    assert "'cat'" not in message
    assert "train2017" in message
    assert "77 annotations" in message
    assert "Crowds are none." in message
    assert "train on another split" in message


def test_rows_are_counted_when_nothing_else_is():
    with pytest.raises(EmptyClassError, match="60 annotations"):
        draw_shots(ROWS, 2, seed=0, classes=["zebra"])


def test_no_rows_at_all_are_an_error():
    with pytest.raises(EmptyClassError, match="any class in train: 0 annotations"):
        draw_shots([], None, seed=0)


@pytest.mark.parametrize("shots", [0, -1])
def test_shots_below_one_are_an_error(shots):
    with pytest.raises(ConfigConflictError, match=rf"shots >= 1 or null \(all\), found {shots}"):
        draw_shots(ROWS, shots, seed=0)


# Objects as shots, other draws, refused keys

SIZES = {(n, "cat"): size for n, size in enumerate((1, 3, 2, 1, 5, 1, 2, 1, 4, 1))}


def objects(drawn):
    return sum(SIZES[pair] for pair in drawn)


def test_objects_are_drawn_in_whole_pictures_up_to_exactly_k():
    for seed in range(10):
        for shots in range(1, 9):
            drawn = draw_shots(SIZES, shots, seed=seed, unit="instance", instances=SIZES, nested=False)
            assert objects(drawn) == shots


def test_the_rule_of_few_shot_detection():
    # Derived apart from the package: the order of the draw, each picture taken if it fits.
    order = hash_order([n for n, _ in SIZES], seed=2, salt="shots/6/cat")
    left, expected = 6, []
    for n in order:
        if SIZES[n, "cat"] <= left:
            left -= SIZES[n, "cat"]
            expected.append((n, "cat"))
    assert left == 0
    assert draw_shots(SIZES, 6, seed=2, unit="instance", instances=SIZES, nested=False) == sorted(expected)
    assert any(SIZES[pair] > 1 for pair in expected)


@pytest.mark.filterwarnings("ignore:Fewer than")
def test_objects_nest():
    for seed in range(10):
        draws = [set(draw_shots(SIZES, k, seed=seed, unit="instance", instances=SIZES)) for k in range(1, 15)]
        assert all(small <= large for small, large in pairwise(draws))
        # Each draw adds one object to the one before, as long as there are pictures of one; then what fits, later.
        assert [objects(draw) for draw in draws[:5]] == [1, 2, 3, 4, 5]
        assert all(k - 3 <= objects(draw) <= k for k, draw in enumerate(draws, start=1))


def test_objects_that_do_not_fit_are_reported():
    sizes = {(1, "cat"): 3, (2, "cat"): 3, (1, "dog"): 1}
    with pytest.warns(
        UserWarning, match=r"Fewer than 4 objects of 2 of 2 classes in train; what fits is used: cat \(3"
    ):
        assert objects_of(draw_shots(sizes, 4, seed=0, unit="instance", instances=sizes), sizes) == {"cat": 3, "dog": 1}
    with pytest.raises(EmptyClassError, match=r"'cat' .*None of its pictures can be used or fits into the shots"):
        draw_shots(sizes, 2, seed=0, unit="instance", instances=sizes, classes=["cat"])


def objects_of(drawn, sizes):
    return {name: sum(sizes[pair] for pair in drawn if pair[1] == name) for name in ("cat", "dog")}


def test_draws_that_do_not_nest_are_their_own():
    draws = [set(draw_shots(ROWS, shots, seed=0, nested=False)) for shots in range(1, 11)]
    assert [len(draw) for draw in draws] == [3 * shots for shots in range(1, 11)]
    assert not all(small <= large for small, large in pairwise(draws))
    assert set(draw_shots(ROWS, None, seed=0, nested=False)) == set(ROWS)


def test_the_next_key_takes_the_place_of_a_refused_one():
    first = draw_shots(ROWS, 3, seed=5)
    asked = []

    def usable(key, name):
        asked.append((key, name))
        return (key, name) != first[0]

    drawn = draw_shots(ROWS, 3, seed=5, usable=usable)
    assert set(first[1:]) <= set(drawn)
    assert first[0] not in drawn
    assert [name for _, name in drawn].count("cat") == 3
    assert len(asked) == 10, "only what is drawn is asked about"
    assert set(draw_shots(ROWS, None, seed=5, usable=usable)) == set(ROWS) - {first[0]}


def test_a_class_of_which_all_is_refused_is_empty():
    with pytest.raises(EmptyClassError, match=r"No example of 'cat'.*None of its pictures can be used"):
        draw_shots(ROWS, 3, seed=0, classes=["cat", "dog"], usable=lambda key, name: name != "cat")


def test_salts_give_unrelated_draws():
    assert draw_shots(ROWS, 3, seed=0, salt="val_shots") != draw_shots(ROWS, 3, seed=0)
