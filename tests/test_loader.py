"""The order of the training data, resumed at any batch; how many processes load them, and what becomes of these."""

import os

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vavae_tools.data import images as decoded
from vavae_tools.data.demo.shapes import ShapeImages, captioned_shape_data
from vavae_tools.data.images import ImageFolder, ImageSetDataModule
from vavae_tools.data.loader import (
    EpochOrder,
    OrderedDataModule,
    batches_in_order,
    loader_faults,
    loading_workers,
    local_world_size,
    usable_cores,
)
from vavae_tools.data.tokens.dataset import TokenImageDataset
from vavae_tools.runtime.errors import UserError


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(64, 1, 4), (64, 8, 4), (3, 2, 1), (1, 1, 1), (1, 2, 0)])
def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert (loading_workers(), usable_cores(), local_world_size()) == (workers, cores, ranks)

    def workers_of(**options) -> int:
        return ImageSetDataModule(ShapeImages(64, 4, 32), None, {"a": 0}, batch_size=16, **options).num_workers

    assert workers_of() == 0  # in memory
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", ranks * 64 * 32 * 32 * 3 - 1)
    assert workers_of() == workers and workers_of(num_workers=7) == 7


# ---- what becomes of them
class Ends(Dataset):
    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> int:
        if self.how == "killed":
            os.kill(os.getpid(), 9)
        if self.how == "user":
            raise UserError("b/2.png of s.tar cannot be read: take it out")
        raise ValueError("another one")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", r"^A loading process was ended by signal Killed, mostly because memory or /dev/shm ran out: set"),
        ("user", r"^b/2\.png of s\.tar cannot be read: take it out$"),
    ],
)
def test_a_loading_process_that_ends_is_one_line(how, message):
    with pytest.raises(UserError, match=message) as error, loader_faults():
        list(DataLoader(Ends(how), num_workers=1))
    assert "\n" not in str(error.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(ValueError, match="another one"), loader_faults():
        list(DataLoader(Ends("else"), num_workers=1))
    disk = "unable to write to file </data/x>: No space left on device"
    for error in (RuntimeError("CUDA out of memory"), UserError("two\nlines"), RuntimeError(disk)):
        with pytest.raises(type(error), match=str(error)), loader_faults():
            raise error


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that",
        "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for file </torch_7",
        "unable to write to file </torch_10_2>: No space left on device (28)",
    ],
)
def test_full_shared_memory_is_named(text):
    exited = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
    for error, cause in ((RuntimeError(text), None), (exited, RuntimeError(text))):
        with pytest.raises(UserError, match=r"^A loading process .*/dev/shm ran out: set num_work"), loader_faults():
            raise error from cause


# ---- the order
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
    assert list(EpochOrder(8, 2, seed=5)) == [1, 7, 3, 5, 6, 0, 4, 2]  # as it always was


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

    for length, world_size, batch in ((5, 1, 5), (5, 2, 2), (1, 1, 1)):  # few data are one smaller batch
        order = EpochOrder(length, 64, 0, world_size - 1, world_size)
        assert (order.batches, order.batch_size, len(order), len(list(order))) == (1, batch, batch, batch)


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

    def get_batch(self, indices):
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
    """19 images are 9 batches of 2, of which 8 make 2 steps of 4; of fewer than a step there is what there is."""
    order = EpochOrder(19, 2, seed=3)
    all_batches = list(order)
    order.gathered = 4
    assert (order.batches, len(order)) == (8, 16) and list(order) == all_batches[:16]
    order.gathered = 10
    assert order.batches == 9


@pytest.mark.parametrize(
    "make",
    [
        lambda split: ImageFolder(split / "train", 8),
        lambda split: captioned_shape_data(8, 16).train_data,
        lambda split: TokenImageDataset("zen", 32),
    ],
)
def test_torchs_own_loader_reads_samples(split_dir, make):
    """As people write it: `DataLoader(dataset, batch_size=4, shuffle=True)`."""
    data = make(split_dir)
    for workers in (0, 1):
        batch = next(iter(DataLoader(data, batch_size=4, shuffle=True, num_workers=workers)))
        whole = data.get_batch(batch["index"].tolist())
        assert batch.keys() == whole.keys()
        for name, values in whole.items():
            same = torch.equal(batch[name], values) if isinstance(values, torch.Tensor) else batch[name] == values
            assert same, name
    assert data[0]["index"].ndim == 0
