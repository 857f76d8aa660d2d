"""Two processes train what one does, however they were started, and none goes on without the others."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from alike import assert_curves_alike, assert_weights_alike, values_of
from forked import python
from nbclient import NotebookClient
from on_ranks import children, gone
from test_experiments import SHORT, SMALL
from tiny import assert_same, last

ROOT = Path(__file__).parents[1]
NUMBERS = [*SHORT, *SMALL, "model.dit_module.max_steps=20", "callbacks.save_every_n_steps=12"]
NUMBERS += ["+trainer.log_every_n_steps=1"]
HALVES = ["data.batch_size=4", "trainer.accelerator=cpu"]  # the same batch for two processes together


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What a single process trains. Do not write into it."""
    folder = tmp_path_factory.mktemp("one") / "run"
    finish([start([*NUMBERS, "--output_dir", str(folder)])])
    return folder


def start(words: list[str], program: list[str] | None = None, interpreter: str | None = None) -> subprocess.Popen:
    command = [interpreter or python(), *(program or []), "-m", "vavae_tools.train", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, **pipes)


def finish(processes: list[subprocess.Popen]) -> list[str]:
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def by_flags(words: list[str]) -> list[str]:
    return finish([start([*words, "--devices", "2"])])


def by_torchrun(words: list[str]) -> list[str]:
    return finish([start(words, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])])


def by_torchrun_on_two_nodes(words: list[str]) -> list[str]:
    meet = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    program = ["-m", "torch.distributed.run", *meet]
    return finish([start(words, [*program, f"--node_rank={node}"]) for node in (0, 1)])


def by_a_cell(words: list[str]) -> list[str]:
    words = [*words, "trainer.devices=2"]
    (cell,) = executed(f"from vavae_tools.train import run_experiment; run_experiment(*{words!r})")
    assert any("image/jpeg" in output.get("data", {}) for output in cell.outputs)  # previews
    return [text_of(cell)]


def executed(*cells: str) -> list:
    """The cells, after a kernel went through them."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    return NotebookClient(notebook, timeout=240, allow_errors=True).execute().cells


def text_of(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


WAYS = [by_flags, by_torchrun, by_torchrun_on_two_nodes, by_a_cell]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_two_processes_train_what_one_does(one, here, forked, way):
    said = way([*NUMBERS, *HALVES, "--output_dir", "two"])
    assert sum(text.count("written: two/pipeline") for text in said) == 1
    for tag in ("train/loss", "train/mse", "val/loss"):
        alone, together = (values_of(folder, tag) for folder in (one, Path("two")))
        validation = tag == "val/loss"
        assert len(alone) == 20 or validation
        assert_curves_alike(together, alone, tag, steps_before=20 if validation else 0)
    together = last("two")["state_dict"]
    assert_weights_alike(together, last(one)["state_dict"])
    if way is by_flags:  # resumed, bit by bit
        way([*NUMBERS, *HALVES, "--output_dir", "again", "--resume", "two/checkpoint-12"])
        assert_same(last("again")["state_dict"], together)
        alone = [*NUMBERS, *HALVES, "--devices", "1", "--output_dir", "alone", "--resume", "two/checkpoint-12"]
        assert "2 batches are gathered" in finish([start(alone)])[0]
        assert_weights_alike(last("alone")["state_dict"], together)


LONG = [*SHORT, *SMALL, *HALVES, "model.dit_module.max_steps=100000", "callbacks.save_every_minutes=0.02"]


def until_saved(process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 120
    while not Path("run/checkpoints/last.ckpt").is_file():
        assert (process is None or process.poll() is None) and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("by", ["flags", "torchrun"])
def test_a_rank_that_is_killed_takes_the_others_along(here, rank, by):
    """Once of each kind with interpreters that import all by themselves, as people have it."""
    interpreter = sys.executable if rank else python()
    if by == "flags":
        process = start([*LONG, "--devices", "2", "--output_dir", "run"], interpreter=interpreter)
    else:
        program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        process = start([*LONG, "--output_dir", "run"], program, interpreter)
    until_saved(process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[rank], signal.SIGKILL)
    assert gone(ranks, 15)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    if by == "flags":
        assert said.splitlines()[-1].startswith(f"error: Process {rank + 1} of 2 was ended by signal 9"), said
    assert last("run")  # whole


def test_ctrl_c_lets_all_save_and_end(here):
    process = start([*LONG, "--devices", "2", "--output_dir", "run"])
    until_saved(process)
    ranks = children(process.pid)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and gone(ranks, 0.5)
    (step,) = re.findall(r"Stopped after step ([\d,]+); go on with --resume last", said)
    assert last("run")["global_step"] == int(step.replace(",", ""))


# ---- from a cell

IN_A_CELL = """
import os, torch, lightning as L
from torch.utils.data import DataLoader, TensorDataset
from vavae_tools.training.run import fit

class Line(L.LightningModule):
    fails = False

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        if self.fails and os.environ.get("RANK") == "1" and batch_idx == 2:
            raise LookupError("a fault in the second process")
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.2)

class Points(L.LightningDataModule):
    def train_dataloader(self):
        x = torch.linspace(-1, 1, 64)[:, None]
        return DataLoader(TensorDataset(x, 3 * x + 1), 8)

line = Line()
last = fit(line, Points(), "line", max_epochs=20, devices={"devices": 2, "accelerator": "cpu"})
print(last, round(line.layer.weight.item(), 2), round(line.layer.bias.item(), 2))
"""
FAILS = """
line.fails = True
fit(line, Points(), "fails", max_epochs=20, devices={"devices": 2, "accelerator": "cpu"})
"""


def test_what_a_cell_defines_is_trained_by_two_and_faults_come_back(here, forked):
    trained, failed = executed(IN_A_CELL, FAILS)
    assert "line/checkpoints/last.ckpt 3.0 1.0\n" in text_of(trained)
    bars = [output for output in trained.outputs if output.output_type == "display_data"]
    assert any("training" in output.data["text/plain"] for output in bars)
    (error,) = [output for output in failed.outputs if output.output_type == "error"]
    assert error.evalue.startswith("Process 2 of 2 failed: LookupError: a fault in the second process")
    assert error.evalue.rstrip().endswith("LookupError: a fault in the second process")
    assert "in training_step" in error.evalue


def test_the_stop_button_of_a_notebook(here):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel()
    try:
        words = [*LONG, "trainer.devices=2", "--output_dir", "run"]
        client.execute(f"from vavae_tools.train import run_experiment; print('made', run_experiment(*{words!r}))")
        until_saved()
        ranks = children(manager.provisioner.pid)
        manager.interrupt_kernel()
        said = ""
        while "made run/pipeline" not in said:
            message = client.get_iopub_msg(timeout=60)
            assert message["msg_type"] != "error", message["content"]
            said += message["content"].get("text", "")
        assert "Stopped after step" in said and "made run/pipeline" in said
        assert len(ranks) >= 2 and gone(ranks, 5)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
