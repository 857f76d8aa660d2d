"""A training that a notebook starts as a program of its own."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vavae_tools.errors import UserError
from vavae_tools.training import processes
from vavae_tools.training.processes import run_as_program, several_devices_from_a_cell

WRITE = "vavae_tools.data.gait:write_gait_dataset"


def test_lines_arrive_and_the_path_comes_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = {"output_dir": tmp_path / "gait", "people": 1, "pictures": 1, "size": 16, "workers": 1}
    assert run_as_program(WRITE, arguments) == tmp_path / "gait"
    assert (tmp_path / "gait" / "ID_1" / "walk_001.jpg").is_file()


def test_a_fault_is_shown_and_passed_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="status 2"):
        run_as_program(WRITE, {"output_dir": tmp_path / "gait", "people": 0})
    assert "error: " in capfd.readouterr().out


@pytest.mark.parametrize("in_notebook, devices, elsewhere", [(True, 2, True), (True, 1, False), (False, 2, False)])
def test_only_several_devices_in_a_notebook_need_a_program(
    monkeypatch: pytest.MonkeyPatch, in_notebook: bool, devices: int, elsewhere: bool
) -> None:
    @several_devices_from_a_cell
    def run(folder: str, devices: dict | None = None, show: object = None) -> Path:
        return Path("here")

    handed_over = []
    monkeypatch.setattr(processes, "run_as_program", lambda *task: handed_over.append(task) or Path("elsewhere"))
    if in_notebook:
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1)))
    else:
        monkeypatch.delitem(sys.modules, "IPython", raising=False)

    assert run("x", devices={"devices": devices}, show=print) == Path("elsewhere" if elsewhere else "here")
    if elsewhere:
        assert handed_over == [(f"{__name__}:run", {"folder": "x", "devices": {"devices": 2}})]
