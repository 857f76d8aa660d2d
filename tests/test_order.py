"""The order of the training data: whole epochs, the same on any number of processes, taken up at any batch."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from vavae_tools.data.loader import EpochOrder, OrderedDataModule, batches_in_order


def of_epoch(order: EpochOrder, epoch: int) -> list[int]:
    order.set_epoch(epoch)
    return list(order)


def test_each_epoch_is_a_permutation_of_its_own():
    order = EpochOrder(24, 6, seed=3)
    epochs = [of_epoch(order, epoch) for epoch in range(5)]
    assert all(sorted(indices) == list(range(24)) for indices in epochs)
    assert len({tuple(indices) for indices in epochs}) == 5
    assert of_epoch(order, 2) == epochs[2]  # also when asked again
    assert of_epoch(EpochOrder(24, 6, seed=4), 0) != epochs[0]
    assert of_epoch(EpochOrder(24, 4, seed=3), 0) == epochs[0]  # the batch size cuts the same order


def test_first_order_stays_what_it_was():
    assert list(EpochOrder(8, 2, seed=5)) == [1, 7, 3, 5, 6, 0, 4, 2]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_global_batches_of_one(world_size):
    alone = EpochOrder(50, 8, seed=1)
    ranks = [EpochOrder(50, 8 // world_size, 1, rank, world_size) for rank in range(world_size)]
    for epoch in range(3):
        whole = torch.tensor(of_epoch(alone, epoch)).view(-1, 8)
        parts = [torch.tensor(of_epoch(rank, epoch)).view(-1, 8 // world_size) for rank in ranks]
        assert torch.equal(torch.cat(parts, dim=1), whole)
    assert {len(rank) for rank in ranks} == {len(alone) // world_size}


def test_an_epoch_holds_whole_batches_and_its_rest_comes_up_elsewhere():
    order = EpochOrder(50, 8)
    assert order.batches == 6 and len(order) == len(list(order)) == 48
    assert set().union(*(of_epoch(order, epoch) for epoch in range(8))) == set(range(50))


@pytest.mark.parametrize(("length", "world_size", "batch", "total"), [(5, 1, 5, 5), (5, 2, 2, 2), (1, 1, 1, 1)])
def test_few_data_are_one_smaller_batch(length, world_size, batch, total):
    order = EpochOrder(length, 64, 0, world_size - 1, world_size)
    assert (order.batches, order.batch_size, len(order), len(list(order))) == (1, batch, total, total)


def test_resuming_skips_once_and_the_length_stays_full():
    order = EpochOrder(24, 6)
    whole = of_epoch(order, 2)
    order = EpochOrder(24, 6)
    order.resume(2, 3)
    assert len(order) == 24
    order.set_epoch(2)  # Lightning says so after the first iter()
    assert list(order) == whole[18:]
    assert list(order) == whole  # only once
    order.resume(2, 3)
    assert of_epoch(order, 3) == of_epoch(EpochOrder(24, 6), 3)  # another epoch is not shortened
    order.resume(4, 0)
    assert list(order) == of_epoch(EpochOrder(24, 6), 4)


class Squares(Dataset):
    def __len__(self):
        return 20

    def __getitems__(self, indices):
        index = torch.tensor(indices)
        return {"square": index**2, "index": index}


class SquaresModule(OrderedDataModule):
    def __init__(self, **options):
        super().__init__(**options)
        self.train_data = Squares()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_arrive_as_the_data_set_made_them(num_workers):
    data = SquaresModule(batch_size=6, num_workers=num_workers, seed=1)
    batches = list(data.train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [6, 6, 6]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(EpochOrder(20, 6, 1))
    assert all(torch.equal(batch["square"], batch["index"] ** 2) for batch in batches)
    assert data.val_dataloader() == []


def test_validation_is_in_order_and_whole():
    data = SquaresModule(batch_size=6)
    data.val_data = Squares()
    assert torch.cat([batch["index"] for batch in data.val_dataloader()]).tolist() == list(range(20))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_processes_validate_all_once_in_as_many_batches_each(world_size, batch_size):
    for length in range(1, 60):
        ranks = [batches_in_order(length, batch_size, rank, world_size) for rank in range(world_size)]
        sizes = [len(batch) for batches in ranks for batch in batches]
        assert len({len(batches) for batches in ranks}) == 1 and min(sizes) > 0
        if length < world_size:  # every process all of them: the mean over processes is theirs
            assert ranks == [batches_in_order(length, batch_size)] * world_size
            continue
        in_turn = [index for together in zip(*ranks, strict=True) for batch in together for index in batch]
        assert in_turn == list(range(length))
        assert max(sizes) <= max(batch_size, 2 if world_size > 1 else 1)
        assert world_size == 1 or max(sizes) - min(sizes) <= 1


def test_alone_all_batches_but_the_last_are_full():
    assert batches_in_order(7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert batches_in_order(6, 3) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_process_validates_its_share_again_and_again(num_workers):
    shares = []
    for rank in range(3):
        data = SquaresModule(batch_size=4, num_workers=num_workers)
        data.val_data, data.trainer = Squares(), SimpleNamespace(global_rank=rank, world_size=3)
        loader = data.val_dataloader()
        seen = [[batch["index"].tolist() for batch in loader] for _ in range(2)]  # the second time by the same workers
        assert seen[0] == seen[1] == batches_in_order(20, 4, rank, 3) and len(loader) == 2
        shares += seen[0]
    assert sorted(index for batch in shares for index in batch) == list(range(20))


@pytest.mark.parametrize("when", ["before the loader is made", "after"])
def test_a_data_module_takes_its_place_up_again(when):
    data = SquaresModule(batch_size=5)
    loader = data.train_dataloader() if when == "after" else None
    data.load_state_dict({"epoch": 3, "batches_done": 2, "seed": 0, "samples": 20})
    loader = loader or data.train_dataloader()
    seen = torch.cat([batch["index"] for batch in loader]).tolist()
    assert seen == of_epoch(EpochOrder(20, 5), 3)[10:]
    assert len(loader) == 4
    assert SquaresModule(batch_size=5).state_dict() == {}  # without a trainer there is no place


def test_with_gathered_batches_an_epoch_has_whole_steps():
    """19 pictures are 9 batches of 2, of which 8 make 2 steps of 4; of fewer than a step there is what there is."""
    order = EpochOrder(19, 2, seed=3)
    all_batches = list(order)
    order.gathered = 4
    assert (order.batches, len(order)) == (8, 16) and list(order) == all_batches[:16]
    order.gathered = 10
    assert order.batches == 9
