"""Files are whole or as before; checkpoints are read without trusting them; errors are one line."""

import errno
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from tiny import contents, names, refuses

from vavae_tools.runtime.errors import Stopped, UserError, run_command
from vavae_tools.runtime.files import atomic_write, hardlink_duplicates, local_folder, read_checkpoint


def test_written_whole_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    for text in ("first", "second"):
        with atomic_write(path) as partial:
            assert partial.parent == path.parent and partial != path  # renaming works on one file system only
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert names(path.parent) == ["b.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_an_error_leaves_the_former_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("former")
    with pytest.raises(type(error)), atomic_write(path) as partial:
        partial.write_text("half of the n")
        raise error
    assert path.read_text() == "former" and names(tmp_path) == ["file.txt"]


# ---- folders of weights


@pytest.mark.parametrize(
    "wanted",
    [
        ["vae/diffusion_pytorch_model.safetensors"],
        [
            "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
            "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
        ],
        ["model.fp16.safetensors"],
        ["vae/diffusion_pytorch_model.fp16-00001-of-00001.safetensors"],
        ["pytorch_model.bin"],
        [],
    ],
)
def test_a_repository_of_the_hub_gives_the_first_form_of_weights_that_it_has(tmp_path, monkeypatch, wanted):
    there = ["vae/config.json", "vocab.txt", *wanted]
    others = ["unet/diffusion_pytorch_model.safetensors", "README.md", "v1-5-pruned.safetensors"]
    later = ["vae/diffusion_pytorch_model.bin"] if wanted and "bin" not in wanted[0] else []

    def snapshot_download(name, allow_patterns):
        assert name == "owner/name"
        for path in huggingface_hub.utils.filter_repo_objects([*there, *others, *later], allow_patterns=allow_patterns):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_folder("owner/name", of="a VAE", instead="download it", part="vae") == tmp_path
    assert sorted(contents(tmp_path)) == sorted(there)


# ---- checkpoints of others


def test_a_missing_checkpoint_names_what_is_there(tmp_path):
    (tmp_path / "best-003-0.1000.ckpt").touch()
    refuses(r"No checkpoint .*last\.ckpt; there is .*best-003-0\.1000\.ckpt", read_checkpoint, tmp_path / "last.ckpt")
    refuses("No checkpoint", read_checkpoint, tmp_path)
    torch.save(torch.zeros(3), tmp_path / "w.pt")
    refuses("holds a Tensor, expected a dict", read_checkpoint, tmp_path / "w.pt")


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.arange(1000.0)}}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"No checkpoint.\n" * 10, whole[:64] + bytes(400) + whole[464:]):
        path.write_bytes(content)
        refuses(r"last\.ckpt is damaged or no checkpoint", read_checkpoint, path)


# ---- what a command says


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("No split in\n  a: make one"), 2, "error: No split in a: make one\n"),
        (KeyboardInterrupt(), 130, "error: stopped by the user\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "error: No space left on the disk (out/x)."),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "error: Not allowed to write or read here"),
    ],
)
def test_errors_are_one_line_and_a_status(capsys, error, status, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    said = capsys.readouterr().err
    assert ended.value.code == status and said.startswith(line) and said.count("\n") == 1


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("import vavae_tools as vt\nvt.load_pipeline('nowhere')", "error: No checkpoint nowhere: python -m vavae"),
        ("from vavae_tools.runtime.errors import Stopped\nraise Stopped('Stopped at 3')", "Stopped at 3"),
    ],
)
def test_in_a_notebooks_cell_an_error_is_its_line(capsys, cell, said):
    pytest.importorskip("IPython.core.interactiveshell").InteractiveShell().run_cell(cell)
    out = capsys.readouterr().out
    assert out.startswith(said) and out.count("\n") == 1


def test_stopped_in_good_order_is_no_error_and_bugs_keep_their_traceback(capsys):
    def main(error: Exception):
        raise error

    run_command(lambda: main(Stopped("Stopped after step 3; go on with --resume last")))
    assert capsys.readouterr().out == "Stopped after step 3; go on with --resume last\n"
    for error in (ZeroDivisionError(), OSError(errno.EBADF, "bug")):
        with pytest.raises(type(error)):
            run_command(lambda error=error: main(error))


SCRIPT = """
from pathlib import Path
from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import run_command
def main():
    for i in range(20000):
        log(f"line {i} ×\\udcfc")
    Path("ended").touch()
run_command(main)"""


def test_with_no_reader_left_a_command_goes_on_to_its_end(here):
    """`command | head -1`"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], **pipes)
    assert process.stdout.readline().startswith("line 0")
    process.stdout.close()
    assert (process.stderr.read(), process.wait(30)) == ("The reader of the output has gone: it goes on without\n", 0)
    assert (here / "ended").is_file()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-", "| tail -1"])
def test_what_streams_cannot_take_ends_no_command(here, monkeypatch, closed):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (here / "script.py").write_text(SCRIPT)
    command = f"{sys.executable} script.py {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and (here / "ended").is_file()
    assert done.stdout.endswith("line 19999 \\xd7\\udcfc\n") or ">&-" in closed


def test_equal_files_of_two_folders_take_the_room_of_one(tmp_path):
    for folder, content in (("kept", b"weights"), ("copies", b"weights"), ("others", b"wEights")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.safetensors").write_bytes(content)
    hardlink_duplicates(tmp_path / "kept", tmp_path / "copies")
    hardlink_duplicates(tmp_path / "kept", tmp_path / "others")
    kept = tmp_path / "kept" / "a.safetensors"
    assert [kept.samefile(tmp_path / folder / kept.name) for folder in ("copies", "others")] == [True, False]
    assert (tmp_path / "others" / kept.name).read_bytes() == b"wEights"
    assert len(list((tmp_path / "copies").iterdir())) == 1
