"""What one sees of a training: curves of all its sessions, and in a cell one figure, lines and bars that are text."""

import nbformat
import pytest
from nbclient import NotebookClient

from vavae_tools.runtime.errors import UserError
from vavae_tools.training.curves import plot_training


def session(run, number, *rows):
    folder = run / "lightning_logs" / f"version_{number}"
    folder.mkdir(parents=True)
    lines = ["epoch,step,throughput/step_ms,train/loss,train/lr,val/loss,val/psnr", *rows]
    (folder / "metrics.csv").write_text("\n".join(lines))


def lines_of(figure):
    """The axis' name → the line's name, or none → its points; marks are steps alone."""
    found = {}
    for ax in figure.axes:
        assert ax.get_xlabel() == "step"
        lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines if line.get_linestyle() == "-"}
        marks = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"]
        found[ax.get_ylabel()] = (list(lines.values()), marks)
    return found


def test_a_resumed_run_continues_where_its_checkpoint_was(tmp_path):
    session(tmp_path, 2, "0,0,9,,,,", "0,1,,4,0.1,,", "0,1,,,,5,20", "1,2,,3,0.2,,", "1,3,,9,0.3,,")
    session(tmp_path, 10, "0,0,9,,,,", "1,3,,2,0.4,,", "1,4,,nan,,,", "1,4,,,,3,22", "1,5")  # cut off
    found = lines_of(plot_training(tmp_path))
    assert found == {
        "loss": ([[[1, 4], [2, 3], [3, 2]], [[1, 5], [4, 3]]], [3]),
        "PSNR, dB": ([[[1, 20], [4, 22]]], [3]),
        "learning rate": ([[[1, 0.1], [2, 0.2], [3, 0.4]]], [3]),
    }


def test_stages_follow_each_other(tmp_path):
    for stage in ("stage1", "stage2"):
        session(tmp_path / stage, 0, "0,1,,4,,,", "0,2,,3,,,")
    assert lines_of(plot_training(tmp_path)) == {"loss": ([[[1, 4], [2, 3], [4, 4], [5, 3]]], [3])}


def test_a_folder_without_curves_is_named(tmp_path):
    with pytest.raises(UserError, match=r"No curves in .*: expected lightning_logs/version_\*/metrics.csv"):
        plot_training(tmp_path)
    (tmp_path / "lightning_logs").mkdir()
    assert lines_of(plot_training(tmp_path)) == {"loss": ([], [])}, "a short run must not end a notebook"


TRAINING = """
import vavae_tools as vt
words = ["experiment=dit_dummy", "data.num_images=48", "data.batch_size=8", "train.max_epochs=4", "train.previews=2"]
words += ["model.hidden_size=[16,16]", "model.depth=[1,1]", "model.num_heads=[2,2]", "sampling.num_steps=2"]
words += ["train.accelerator=cpu", "train.devices=DEVICES", "train.log_every_n_steps=1"]
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_a_saved_cell_has_one_figure_of_curves_lines_and_no_widgets(forked, tmp_path, devices):
    run = f"vt.run_experiment(*words, 'output_dir={tmp_path}/run')"
    cell = nbformat.v4.new_code_cell(TRAINING.replace("DEVICES", str(devices)) + run)
    NotebookClient(nbformat.v4.new_notebook(cells=[cell]), timeout=240).execute()
    kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 1, "one figure of curves, renewed in its place"
    assert kinds.count("image/jpeg") >= 2 and not any("widget" in kind for kind in kinds)
    said = "".join(output.get("text", "") for output in cell.outputs)
    steps = 24 // devices
    assert all(f"validated  epoch {n}, step {n * steps // 4}/{steps}  train/loss" in said for n in (1, 2, 3, 4))
    bars = [output.data["text/plain"] for output in cell.outputs if "text/plain" in output.get("data", {})]
    assert sum(text.startswith("training: 100%") for text in bars) == 1
