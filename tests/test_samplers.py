from collections import Counter

import pytest

from rft_lightning.datamodules.samplers import EvaluationSampler, RolloutBatchSampler


def stream(size, batches, **kwargs):
    sampler = RolloutBatchSampler(size, **kwargs)
    return [sampler.batch(number) for number in range(batches)]


def test_every_row_comes_once_per_pass_in_an_order_of_the_seed():
    entries = [entry for batch in stream(10, 4, batch_size=5, seed=3) for entry in batch]
    rows = [row for row, _ in entries]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    assert entries == [entry for batch in stream(10, 4, batch_size=5, seed=3) for entry in batch]
    assert entries != [entry for batch in stream(10, 4, batch_size=5, seed=4) for entry in batch]


def test_the_global_batch_does_not_depend_on_the_number_of_processes():
    one = stream(23, 6, batch_size=8, seed=1)
    four = [stream(23, 6, batch_size=2, seed=1, rank=rank, world_size=4) for rank in range(4)]
    assert one == [[entry for rank in range(4) for entry in four[rank][number]] for number in range(6)]


def test_a_set_smaller_than_the_batch_repeats_with_occurrences():
    batch = stream(3, 1, batch_size=8)[0]
    assert Counter(row for row, _ in batch).most_common(1)[0][1] == 3
    for row in range(3):
        occurrences = [occurrence for found, occurrence in batch if found == row]
        assert occurrences == list(range(len(occurrences)))


def test_occurrences_count_over_the_global_batch():
    ranks = [stream(3, 1, batch_size=4, rank=rank, world_size=2)[0] for rank in range(2)]
    assert ranks[0] + ranks[1] == stream(3, 1, batch_size=8)[0]


def test_epochs_continue_the_stream():
    sampler = RolloutBatchSampler(7, 2, seed=0)
    assert len(sampler) == 3
    assert [*sampler, *sampler] == stream(7, 6, batch_size=2, seed=0)


def test_state_restores_the_epoch_and_refuses_other_data():
    sampler = RolloutBatchSampler(7, 2)
    list(sampler)
    iterator = iter(sampler)
    next(iterator)
    state = sampler.state_dict()
    other = RolloutBatchSampler(7, 2)
    other.load_state_dict(state)
    assert list(other) == [sampler.batch(number) for number in (3, 4, 5)]
    with pytest.raises(ValueError, match="7 training rows, the data now has 8"):
        RolloutBatchSampler(8, 2).load_state_dict(state)


def test_evaluation_splits_rows_without_padding():
    parts = [list(EvaluationSampler(7, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(row for part in parts for row, _ in part) == list(range(7))
    assert [len(part) for part in parts] == [3, 2, 2]
