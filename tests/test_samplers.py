from collections import Counter

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

from rft_lightning.datamodules.samplers import EvaluationSampler, RolloutBatchSampler
from rft_lightning.sample import NOT_COUNTED


class Entries:
    """A data set whose rows are what the sampler asks for."""

    def __len__(self):
        return 7

    def __getitem__(self, entry):
        return entry


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


def test_waves_of_an_oversampled_batch_are_the_batches_of_the_stream():
    """Wave w of batch n is batch n * O + w of a run without oversampling, on every rank; occurrences count over all."""
    plain = [stream(23, 6, batch_size=2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    waves = [stream(23, 2, batch_size=2, seed=1, rank=rank, world_size=2, oversample=3) for rank in range(2)]
    for rank in range(2):
        assert [[row for row, _ in batch] for batch in waves[rank]] == [
            [row for batch in plain[rank][number * 3 : number * 3 + 3] for row, _ in batch] for number in range(2)
        ]
    few = stream(3, 1, batch_size=2, oversample=4)[0]
    assert sorted(few) == sorted({(row, n) for row, n in few})
    assert len(RolloutBatchSampler(23, 2, oversample=3)) == 3


def test_epochs_continue_the_stream():
    sampler = RolloutBatchSampler(7, 2, seed=0)
    assert len(sampler) == 3
    assert [*sampler, *sampler] == stream(7, 6, batch_size=2, seed=0)


@pytest.mark.parametrize(("done", "rest"), [(0, [3, 4, 5]), (1, [4, 5]), (3, [6, 7, 8])])
def test_state_restores_the_place_in_the_epoch(done, rest):
    """Epochs of three batches; a whole epoch is followed by the next one."""
    sampler = RolloutBatchSampler(7, 2)
    list(sampler)
    iterator = iter(sampler)
    # `done == 0`: the checkpoint of the end of the first epoch.
    for _ in range(done):
        next(iterator)
    resumed = RolloutBatchSampler(7, 2)
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.state_dict() == sampler.state_dict()
    assert list(resumed) == [sampler.batch(number) for number in rest]
    assert next(iter(resumed)) == sampler.batch(rest[-1] + 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 3, 4])
def test_a_stateful_loader_resumes_at_the_next_batch(workers, done):
    def loader():
        sampler = RolloutBatchSampler(7, 2)
        return StatefulDataLoader(Entries(), batch_sampler=sampler, collate_fn=list, num_workers=workers)

    whole, first, resumed = loader(), loader(), loader()
    expected = [*whole, *whole, *whole]
    batches = (batch for _ in range(2) for batch in first)
    assert [next(batches) for _ in range(done)] == expected[:done]
    resumed.load_state_dict(first.state_dict())
    assert [*resumed, *resumed][:4] == expected[done : done + 4]


def test_state_of_other_data_is_refused():
    state = RolloutBatchSampler(7, 2).state_dict()
    with pytest.raises(ValueError, match="7 training rows, the data now has 8"):
        RolloutBatchSampler(8, 2).load_state_dict(state)


def test_state_of_another_global_batch_is_refused_and_of_another_cut_of_it_is_not():
    sampler = RolloutBatchSampler(16, 4)
    next(iter(sampler))
    with pytest.raises(ValueError, match=r"4 prompts per global batch, now there are 4 on each of 2"):
        RolloutBatchSampler(16, 4, world_size=2).load_state_dict(sampler.state_dict())
    half = RolloutBatchSampler(16, 2, world_size=2)
    half.load_state_dict(sampler.state_dict())
    assert next(iter(half)) == sampler.batch(1)[:2]


def test_evaluation_splits_rows_without_padding():
    few = [list(EvaluationSampler(2, rank=rank, world_size=4)) for rank in range(4)]
    assert few == [[(0, 0)], [(1, 0)], [(0, NOT_COUNTED)], [(0, NOT_COUNTED)]]
    parts = [list(EvaluationSampler(7, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(row for part in parts for row, _ in part) == list(range(7))
    assert [len(part) for part in parts] == [3, 2, 2]
