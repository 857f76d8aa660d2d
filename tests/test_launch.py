"""A process for each device: what they know, what becomes of their words, and that none is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import python
from on_ranks import alive, gone

from vavae_tools.runtime import launch
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.launch import call_on_ranks, several_processes
from vavae_tools.runtime.machine import Machine

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def test_each_knows_its_place_and_the_first_ones_result_comes_back(tmp_path):
    said = "defined in a test"
    found = call_on_ranks("on_ranks:place", {"folder": str(tmp_path), "what": lambda: said.upper()}, 3)
    assert found == (["0", "0", "3", "3", "0"], "DEFINED IN A TEST", sys.argv)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        str(rank): f"{rank} {rank} 3 3 0" for rank in range(3)
    }


def test_nccl_does_without_shared_memory_where_there_is_too_little(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NCCL_SHM_DISABLE", raising=False)

    def told(count: int, free: float, machine: Machine) -> tuple[dict[str, str], str]:
        monkeypatch.setattr("vavae_tools.runtime.machine.find_machine", lambda: machine)
        monkeypatch.setattr(launch.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        return launch._without_shared_memory(count, str(tmp_path)), capsys.readouterr().out

    t4s = Machine("t4", 2, "Tesla T4")
    given, said = told(2, 64e6, t4s)
    assert given == {"NCCL_SHM_DISABLE": "1"} and f"{tmp_path} has 64 MB free, of which NCCL may need 80: " in said
    assert told(1, 1e6, t4s) == told(2, 81e6, t4s) == told(2, 1e6, Machine("cpu", 1, "CPU")) == ({}, "")
    monkeypatch.setenv("NCCL_SHM_DISABLE", "0")
    assert told(2, 1e6, t4s) == ({}, "")


@pytest.mark.parametrize(
    ("rank", "how", "error", "message", "said"),
    [
        (0, "user", UserError, "^no space$", ""),
        (1, "user", UserError, r"^no space \(process 2 of 2\)$", ""),
        (1, "fault", SystemExit, "^1$", "LookupError: a fault of ours\n(process 2 of 2)\n"),
        (1, "raise", SystemExit, "^1$", "LookupError: a fault of ours\n(process 2 of 2)\n"),
        (1, "abort", SystemExit, "^1$", "LookupError: a fault of ours\n(process 2 of 2)\n"),
        (1, "signal", UserError, "^Process 2 of 2 was ended by signal 9", ""),
        (1, "exit", SystemExit, "^3$", "gone without a word\n"),
    ],
)
def test_one_that_fails_ends_the_others_and_says_why(forked, capfd, rank, how, error, message, said):
    with pytest.raises(error, match=message):
        call_on_ranks("on_ranks:fail", {"rank": rank, "how": how}, 2)  # ten minutes, were the other one not ended
    assert capfd.readouterr().err.endswith(said)


def test_the_stop_button_ends_them_all(forked, tmp_path, monkeypatch, capfd):
    pressed = []

    def interrupt(seconds):
        here = threading.current_thread() is threading.main_thread()  # an earlier test's thread may sleep, too
        if here and len(list(tmp_path.iterdir())) == 2 and not pressed:
            pressed.append(True)
            raise KeyboardInterrupt
        really_sleep(seconds)

    really_sleep = time.sleep
    monkeypatch.setattr(launch.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        call_on_ranks("on_ranks:sleep", {"folder": str(tmp_path)}, 2)
    assert len(pressed) == 1 and not any(alive(int(path.name)) for path in tmp_path.iterdir())


def test_ranks_hear_of_the_stop_button_in_a_background_job_too(tmp_path, monkeypatch, capfd):
    """Where the one that starts them ignores SIGINT, as shells have it for what ends in &, they would, too."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        test_the_stop_button_ends_them_all(None, tmp_path, monkeypatch, capfd)
    finally:
        signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize(("number", "interpreter"), [(signal.SIGTERM, python()), (signal.SIGKILL, sys.executable)])
def test_none_outlives_the_one_that_started_them(tmp_path, number, interpreter):
    call = f"call_on_ranks('on_ranks:sleep', {{'folder': {str(tmp_path)!r}}}, 2)"
    program = f"from vavae_tools.runtime.launch import call_on_ranks; {call}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with subprocess.Popen([interpreter, "-c", program], env=environment, stderr=subprocess.DEVNULL) as process:
        while len(list(tmp_path.iterdir())) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) != 0
    assert gone([int(path.name) for path in tmp_path.iterdir()])


def test_how_many_processes_are_started(monkeypatch):
    assert several_processes("cpu", 1) is None and several_processes("cpu", "auto") is None
    assert several_processes("cpu", 3) == 3
    assert several_processes("cpu", 3, 2) is None  # torchrun starts several machines
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # one of several already
    assert several_processes("cpu", 2) is None


def test_lines_bars_and_images_come_into_the_cell(forked, monkeypatch, capsys):
    monkeypatch.setattr(launch, "in_notebook", lambda: True)
    shown, texts = [], []
    monkeypatch.setattr("IPython.display.display", lambda data, **where: texts.append((data["text/plain"], where)))
    assert call_on_ranks("on_ranks:tell", {"folder": "x"}, 2, show=shown.append) == "x"
    assert capsys.readouterr().out == "a line of process 0\n"
    assert "counting: 100%" in texts[-1][0] and "3/3" in texts[-1][0]
    assert len({where["display_id"] for _, where in texts}) == 1  # each in the place of the one before
    assert [where["update"] for _, where in texts] == [False] + [True] * (len(texts) - 1)
    assert len(shown) == 1 and torch.equal(shown[0], torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2))


def test_a_fault_in_a_cell_brings_its_last_lines(forked, monkeypatch):
    monkeypatch.setattr(launch, "in_notebook", lambda: True)
    with pytest.raises(UserError, match=r"^Process 2 of 2 failed: LookupError: a fault of ours(.|\n)*in fail\n"):
        call_on_ranks("on_ranks:fail", {"rank": 1, "how": "fault"}, 2)
