"""How many processes load pictures, by cores, ranks and shared memory; and what is said when one of them is ended."""

import os
import shutil
from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vavae_tools.data import images as decoded
from vavae_tools.data import loader as loading
from vavae_tools.data.demo.shapes import ShapePictures
from vavae_tools.data.images import PictureSetDataModule
from vavae_tools.data.loader import loader_faults, loading_workers, ranks_here, usable_cores, worker_fault
from vavae_tools.runtime.errors import UserError

MB = 2**20
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with so many cores, free bytes of /dev/shm (None: no such place), ranks and a quota."""

    def stand_in(cores=8, shared=2**34, ranks=None, quota=None, version=2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)

        def usage(path):
            assert str(path) == "/dev/shm"
            if shared is None:
                raise FileNotFoundError(path)
            return Usage(2 * shared, shared, shared)

        monkeypatch.setattr(shutil, "disk_usage", usage)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if ranks is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        shutil.rmtree(tmp_path / "cpu", ignore_errors=True)
        (tmp_path / "cpu.max").unlink(missing_ok=True)
        if quota is not None and version == 2:
            (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        elif quota is not None:
            (tmp_path / "cpu").mkdir()
            (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        monkeypatch.setattr(loading, "_CGROUP", tmp_path)

    return stand_in


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"),
    [(64, None, 4), (64, 8, 4), (4, 2, 2), (4, 1, 4), (3, 2, 1), (2, 1, 2), (1, 1, 1), (1, 2, 0), (2, "?", 2)],
)
def test_cores_are_shared_by_the_ranks_of_a_machine(machine, cores, ranks, workers):
    machine(cores=cores, ranks=ranks)
    assert loading_workers(MB) == (workers, "")
    assert ranks_here() == (ranks if isinstance(ranks, int) else 1)


@pytest.mark.parametrize(
    ("quota", "version", "cores"),
    [
        ("max", 2, 8),
        (200_000, 2, 2),
        (250_000, 2, 2),
        (50_000, 2, 1),
        (1_600_000, 2, 8),
        (300_000, 1, 3),
        (-1, 1, 8),
        ("?", 2, 8),
    ],
)
def test_a_containers_quota_counts(machine, quota, version, cores):
    machine(cores=8, quota=quota, version=version)
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("shared", "ranks", "batch", "workers"),
    [
        (64 * MB, 1, 6 * MB, 2),  # docker's: 32 MB for them, 12 of each
        (64 * MB, 2, 6 * MB, 1),
        (64 * MB, 1, 16 * MB, 1),
        (64 * MB, 1, 16 * MB + 1, 0),
        (2**31, 2, 48 * MB, 4),
        (0, 1, 1, 0),
        (None, 1, 2**40, 4),
    ],
)
def test_batches_in_flight_fit_into_half_of_the_shared_memory(machine, shared, ranks, batch, workers):
    machine(cores=8 * ranks, shared=shared, ranks=ranks)
    found, line = loading_workers(batch)
    assert found == workers and bool(line) == (workers < 4) and "\n" not in line
    if shared is not None:
        assert found == 4 or (found + 1) * 2 * batch * ranks > shared / 2 >= found * 2 * batch * ranks


def test_why_there_are_fewer_is_said(machine):
    machine(cores=4, shared=64 * MB)
    assert loading_workers(12 * MB)[1].startswith(
        "/dev/shm has 64 MB free, and batches of 12.0 MB pass through it: 1 of 4 loading processes for each device."
    )
    assert "0.4 MB pass through it: no loading processes" in (machine(shared=MB), loading_workers(400_000))[1][1]


def module(**options) -> PictureSetDataModule:
    return PictureSetDataModule(ShapePictures(64, 4, 32), None, {"a": 0}, batch_size=16, **options)


def test_a_module_has_those_workers(machine, monkeypatch):
    machine(cores=8, shared=64 * MB)
    data = module()
    assert (data.num_workers, data.remark) == (0, "")  # in memory
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", 64 * 32 * 32 * 3 - 1)
    assert (module().num_workers, module().remark) == (4, "") and module(num_workers=7).num_workers == 7
    machine(cores=8, shared=5 * 4 * 16 * (3 * 32 * 32 + 16))  # for five batches in half of it: two processes and a half
    data = module()
    assert data.num_workers == 4 and not data.remark
    machine(cores=8, shared=2 * 5 * 16 * (3 * 32 * 32 + 16))
    data = module()
    assert data.num_workers == 2 and "2 of 4 loading processes" in data.remark
    assert module(num_workers=3).num_workers == 3 and not module(num_workers=3).remark
    data.train_data.along["tokens"] = torch.zeros(64, 3 * 32 * 32 + 16, dtype=torch.uint8)  # as many bytes again
    assert data.train_dataloader().num_workers == 1


def test_the_processes_of_a_machine_share_the_limit_of_memory(machine, monkeypatch):
    data = ShapePictures(10, 4, 32)
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", 2 * 10 * 32 * 32 * 3)
    for ranks, fits in ((1, True), (2, True), (3, False)):
        machine(ranks=ranks)
        assert data.fits_memory() == fits


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
        ("killed", r"^A loading process was ended by signal Killed, mostly because memory ran out: set num_workers=0"),
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
    for error in (RuntimeError("CUDA out of memory"), UserError("two\nlines")):
        with pytest.raises(type(error), match=str(error)), loader_faults():
            raise error


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are out "
        "of shared memory. Please try to raise your shared memory limit.",
        "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for file "
        "</torch_7_1_0>: No space left on device (28)",
        "unable to write to file </torch_10_2>: No space left on device (28)",
    ],
)
def test_full_shared_memory_is_named(machine, text):
    machine(shared=3 * MB)
    try:
        raise RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly") from RuntimeError(text)
    except RuntimeError as error:
        lines = [worker_fault(error), worker_fault(RuntimeError(text))]
    assert lines[0] == lines[1] and lines[0].startswith("A loading process ended because /dev/shm is full (3 MB free")
    assert "set num_workers=0" in lines[0]
    assert worker_fault(RuntimeError("unable to write to file </data/x>: No space left on device")) is None
    assert "ended unexpectedly" in worker_fault(RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"))
