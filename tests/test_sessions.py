"""From session to session: Kaggle's real client against a server on this machine, and folders as Kaggle mounts them."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from kaggle_stand_in import KEY, KaggleStandIn
from tiny import contents, refuses

from vavae_tools.kaggle import session as sessions
from vavae_tools.kaggle.session import Unavailable, pull, pull_session, push_session, session_files
from vavae_tools.kaggle_session import main, write_kernel
from vavae_tools.runtime.errors import UserError

RUN = "me/gait-run"


@pytest.fixture(autouse=True)
def kaggle(tmp_path, monkeypatch):
    """The stand-in, and an environment from which nothing else can be reached."""
    home = tmp_path / "home"
    home.mkdir()
    with KaggleStandIn() as kaggle:
        for name, value in kaggle.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        yield kaggle
    assert kaggle.strangers == []


@pytest.fixture(params=["kagglehub", "kaggle"])
def client(request, tmp_path, monkeypatch) -> str:
    """Each of the two clients, as on a machine that lacks the other one."""
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    if request.param == "kaggle":
        without(tmp_path / "blocked", "kagglehub", monkeypatch)
    return request.param


def without(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{package}.py").write_text(f"raise ImportError('no module named {package}')")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def said() -> list[str]:
    return []


def checkpoint(path: Path, step: int, size: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "epoch": step // 10, "state_dict": {"w": torch.full((size,), step)}}, path)


def outputs(folder: Path, vavae: int = 70, dit: int = 300) -> Path:
    """A folder as notebooks 01 to 04 leave it."""
    checkpoint(folder / "vavae/checkpoints/last.ckpt", vavae)
    checkpoint(folder / "vavae/checkpoints/best-006-0.1.ckpt", vavae - 10)
    checkpoint(folder / "vavae/checkpoints/previous.ckpt", vavae - 1)
    checkpoint(folder / "dit/checkpoints/last.ckpt", dit)
    (folder / "dit/checkpoints/checkpoint-100").mkdir(exist_ok=True)
    (folder / "dit/checkpoints/checkpoint-100/training_state.json").write_text('{"global_step": 100, "epoch": 10}')
    for name in (
        *("vavae/lightning_logs/version_0/events.out.tfevents.1", "vavae/vavae/config.json"),
        *("vavae/vavae/diffusion_pytorch_model.safetensors", "vavae/foundation/train.safetensors"),
        *("vavae/reconstructions/0001.png", "latents/latents.json", "latents/train-00000.safetensors"),
        *("data_split/split_info.json", "data_split/train/ID_1/a.jpg", "data_split/val/ID_1/b.jpg"),
        *("samples/ID_1/0.png", "repository/.git/HEAD", "repository/weights.safetensors"),
        "vavae/checkpoints/.last.ckpt.7.partial",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{name} {vavae} {dit}".encode())
    return folder


def steps_in(folder: Path) -> dict[str, int]:
    return {run: torch.load(folder / run / "checkpoints/last.ckpt")["global_step"] for run in ("vavae", "dit")}


# ---- what goes along


def test_what_a_session_needs_and_no_image(tmp_path):
    work = outputs(tmp_path / "work")
    assert session_files(work) == [
        "data_split/split_info.json",
        "dit/checkpoints/last.ckpt",
        "dit/checkpoints/checkpoint-100/training_state.json",
        "latents/latents.json",
        "latents/train-00000.safetensors",
        "vavae/checkpoints/best-006-0.1.ckpt",
        "vavae/checkpoints/last.ckpt",
        "vavae/lightning_logs/version_0/events.out.tfevents.1",
        "vavae/vavae/config.json",
        "vavae/vavae/diffusion_pytorch_model.safetensors",
    ]
    asked_for = set(session_files(work, images=True)) - set(session_files(work))
    assert asked_for == {"data_split/train/ID_1/a.jpg", "data_split/val/ID_1/b.jpg"}


# ---- with the client


def test_created_then_a_version_then_back_again(tmp_path, kaggle, client, said):
    work = outputs(tmp_path / "work")
    checkpoint(work / "dit/checkpoints/best-029-0.2.ckpt", 290, 300_000)  # a large one beside the small
    before = contents(work)
    pushed = push_session(work, RUN, log=said.append)
    assert pushed.steps == {"dit": (300, 30), "vavae": (70, 7)} and contents(work) == before
    assert "pushed a new private dataset, every file is listed whole" in said[1]
    made = kaggle.asked("CreateDataset")[0]
    assert made["isPrivate"] is True and (made["ownerSlug"], made["slug"]) == ("me", "gait-run")
    assert kaggle.asked("CreateDatasetVersion") == []
    stored = kaggle.datasets[RUN][0]
    assert sorted(stored)[1] == "small-files.pack" and sorted(stored)[0].startswith("session-") and len(stored) == 2

    outputs(work, vavae=90)
    kaggle.late = 1  # while Kaggle still processes the version, the one before it is listed
    push_session(work, RUN, "nine epochs", images=True, log=said.append)
    (version,) = kaggle.asked("CreateDatasetVersion")
    assert version["body"]["versionNotes"] == "nine epochs" and len(kaggle.datasets[RUN]) == 2

    said.clear()
    there = tmp_path / "there"
    pulled = pull_session(there, RUN, log=said.append)
    assert pulled.steps == {"dit": (300, 30), "vavae": (90, 9)} == {**pushed.steps, "vavae": (90, 9)}
    assert contents(there) == {path: (work / path).read_bytes() for path in session_files(work, images=True)}
    assert said[0] == f"found {RUN}: dit at step 300 (epoch 30), vavae at step 90 (epoch 9)"
    assert said[-1].endswith("or --resume last")

    pull_session(tmp_path / "older", RUN + "/1", log=said.append)
    assert steps_in(tmp_path / "older") == {"vavae": 70, "dit": 300}
    left_out = "left out: data_split/split_info.json, which is no split without its images; notebook 01 makes the"
    assert said[-4].startswith(left_out) and not (tmp_path / "older/data_split").exists()


def assert_one_line(outcome: tuple[int, str, str], *words: str) -> None:
    status, out, err = outcome
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (status, out, err)
    assert all(word in err for word in words), err
    assert KEY not in out + err and "Traceback" not in err


NO_ROOM, TOO_BIG = {"code": 500, "message": "no room"}, {"status": "error", "error": f"too big {KEY}"}
FAULTS = {
    "a refused file": ({"refused": ("small-files",)}, "was not pushed (", 1),
    "a server error": ({"failing": {"StartBlobUpload": (500, NO_ROOM)}}, "no room", 1),
    "an error with status 200": ({"failing": {"CreateDatasetVersion": (200, TOO_BIG)}}, "too big …", 1),
    "a file lost without a word": ({"lost": ("small-files",)}, "lost something on the way: small-files.pack (", 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_upload_that_fails_is_noticed_and_what_was_there_is_kept(tmp_path, kaggle, client, run_main, fault):
    faults, words, versions = FAULTS[fault]
    work = outputs(tmp_path / "work")
    kaggle.datasets[RUN] = [{"before": b"whole"}]
    vars(kaggle).update(faults)
    arguments = ["push", "--work", work, "--dataset", RUN, "--wait", 2]
    before = contents(work)
    assert_one_line(run_main(main, *arguments), words, "Push again")
    assert kaggle.datasets[RUN][0] == {"before": b"whole"} and len(kaggle.datasets[RUN]) == versions
    assert contents(work) == before


def test_a_version_that_is_never_listed_is_told(tmp_path, kaggle):
    kaggle.datasets[RUN], kaggle.late = [{"before": b"whole"}], 1000
    with pytest.raises(UserError, match=r"took every file, but does not list the new version after 0\.3 s"):
        push_session(outputs(tmp_path / "work"), RUN, wait=0.3, log=lambda line: None)


def test_wrong_credentials(tmp_path, kaggle, client, monkeypatch, run_main, said):
    monkeypatch.setenv("KAGGLE_KEY", "wrong-and-secret")
    work = outputs(tmp_path / "work")
    outcome = run_main(main, "push", "--work", work, "--dataset", RUN)
    assert_one_line(outcome, "Kaggle does not know these credentials", "make a token")
    assert "wrong-and-secret" not in outcome[1] + outcome[2] and kaggle.datasets == {}
    assert pull_session(work, RUN, log=said.append) is None and said[0].startswith("nothing pulled: Kaggle does not")


def test_no_credentials_is_one_line_and_stdin_lives_on(tmp_path, monkeypatch, said):
    monkeypatch.delenv("KAGGLE_KEY")
    assert push_session(outputs(tmp_path / "work"), RUN, log=said.append) is None
    line = "not pushed: no Kaggle credentials are here, or none that work: make a token"
    assert said[-1].startswith(line) and "kaggle" not in sys.modules
    with pytest.raises(Unavailable):
        sessions.push(tmp_path / "work", RUN)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.safetensors").touch()
    call = f"import vavae_tools as vt; print(vt.push_session('model', {RUN!r}), input())"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", call], input="alive", capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[1].startswith(line) and done.stdout.endswith("\nNone alive\n") and not done.stderr


def test_secrets_of_the_notebook_are_taken(tmp_path, kaggle, monkeypatch, said):
    module = tmp_path / "kaggle_secrets.py"
    module.write_text(
        "class UserSecretsClient:\n    def get_secret(self, name):\n"
        f"        return {{'KAGGLE_USERNAME': 'me', 'KAGGLE_KEY': '{KEY}'}}[name]\n"
    )
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert push_session(outputs(tmp_path / "work"), RUN, log=said.append), said
    assert "KAGGLE_KEY" not in os.environ


def test_without_client_or_network_everything_else_goes_on(tmp_path, monkeypatch, said):
    work = outputs(tmp_path / "work")
    closed = "http://127.0.0.1:9"
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, closed)
    assert push_session(work, RUN, log=said.append) is None and pull_session(work, RUN, log=said.append) is None
    assert said[-2].startswith("not pushed: Kaggle cannot be reached (") and "attach its output" in said[-2]
    blocked = tmp_path / "blocked"
    without(blocked, "kagglehub", monkeypatch)
    without(blocked, "kaggle", monkeypatch)
    assert push_session(work, RUN, log=said.append) is None
    assert said[-1].endswith("nor the kaggle client is here (no module named kaggle): pip install kaggle")
    (blocked / "kaggle.py").write_text("raise SystemExit(1)")  # as clients up to 2.2.0 without credentials
    assert push_session(work, RUN, log=said.append) is None
    assert said[-1].startswith("not pushed: no Kaggle credentials are here")
    assert push_session(work, None, log=said.append) is None and "no dataset is named" in said[-1]


def test_the_first_session_pulls_nothing(tmp_path, run_main, said):
    assert pull_session(tmp_path / "work", RUN, log=said.append) is None
    assert said == [f"nothing pulled: there is no dataset {RUN} that you may read: it is made by the first push"]
    assert pull_session(tmp_path / "work", log=said.append) is None
    assert "no earlier session's dataset is attached" in said[1]
    assert_one_line(run_main(main, "pull"), "no earlier session's dataset is attached")


@pytest.mark.parametrize("name", ["run", "me/run", "me/Gait-Run", "me/../../etc", "me/gait\nrun"])
def test_names_that_kaggle_does_not_take(tmp_path, kaggle, name):
    outputs(tmp_path / "work")
    for call in (push_session, pull_session):
        with pytest.raises(UserError, match="expected owner/name, the name of 6 to 50") as error:
            call(tmp_path / "work", name)
        assert not isinstance(error.value, Unavailable)
    assert kaggle.requests == []


def test_nothing_to_push_and_a_damaged_checkpoint(tmp_path, kaggle):
    (tmp_path / "empty").mkdir()
    last = outputs(tmp_path / "work") / "vavae/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:200])
    for work, name, words in (
        ("empty", RUN, r"Nothing to push in .*empty"),
        ("nowhere", RUN, "No such folder: nowhere"),
        ("empty", RUN + "/2", "a version is made, not chosen"),
        ("work", RUN, r"work/vavae/checkpoints/last\.ckpt is damaged"),
    ):
        refuses(words, push_session, work, name, log=lambda line: None)
    assert kaggle.requests == []


# ---- what is attached


@pytest.fixture
def attached(tmp_path) -> Path:
    """A root as /kaggle/input: images, and a pushed session as a dataset."""
    work, folder = outputs(tmp_path / "pushed"), tmp_path / "input/datasets/me/gait-run"
    folder.mkdir(parents=True)
    (tmp_path / "input/pictures/ID_1").mkdir(parents=True)
    files, steps = sessions.pack(work, session_files(work), folder)
    large = "vavae/checkpoints/last.ckpt"  # as older versions pushed it
    shutil.copy(work / large, folder / "vavae__checkpoints__last.ckpt")
    files[large]["stored"] = "vavae__checkpoints__last.ckpt"
    sessions.write_manifest(folder, {"dataset": RUN, "made": 1e9, "steps": steps, "files": files})
    return tmp_path / "input"


def test_an_attached_dataset_is_taken_without_the_client(tmp_path, kaggle, attached, said):
    for number, name in enumerate([None, RUN]):
        work = tmp_path / f"work {number}"
        pulled = pull_session(work, name, [attached], log=said.append)
        assert pulled.source == str(attached / "datasets/me/gait-run") and not pulled.kept
        expected = contents(tmp_path / "pushed")
        for path in session_files(tmp_path / "pushed"):
            if "data_split" not in path:
                assert (work / path).read_bytes() == expected[path]
        assert not list(work.rglob(".*")) and not (work / "vavae/checkpoints/last.ckpt").is_symlink()
    assert kaggle.requests == []
    assert pull_session(tmp_path / "w", "me/another-run", [attached], log=said.append) is None
    whole = contents(work)
    (work / "vavae/checkpoints/last.ckpt").unlink()  # as a pull that was cut off
    shutil.rmtree(work / "dit")
    pull_session(work, None, [attached], log=said.append)
    assert contents(work) == whole


def test_the_output_of_a_notebook_is_taken(tmp_path, attached, said):
    outputs(attached / "notebooks/me/02-vavae", vavae=120)
    pulled = pull(tmp_path / "work", None, [attached], log=said.append)
    assert pulled.source.endswith("02-vavae") and steps_in(tmp_path / "work") == {"vavae": 120, "dit": 300}
    assert (tmp_path / "work/data_split/train/ID_1/a.jpg").is_file()


def test_what_is_newer_here_is_kept_and_what_is_older_replaced(tmp_path, attached, said):
    work = outputs(tmp_path / "work", vavae=80, dit=10)
    before = contents(work)
    pulled = pull_session(work, None, [attached], log=said.append)
    assert steps_in(work) == {"vavae": 80, "dit": 300} and "vavae" in pulled.kept and "dit" not in pulled.kept
    assert any("vavae is newer than what" in line and "(step 80 against step 70)" in line for line in said)
    changed = {path for path, content in contents(work).items() if content != before.get(path)}
    assert changed == {"dit/checkpoints/last.ckpt"}
    (work / "dit/checkpoints/last.ckpt").write_bytes(b"half a file")
    os.utime(work / "dit/checkpoints/last.ckpt", (1, 1))
    pull_session(work, None, [attached], log=said.append)
    assert steps_in(work)["dit"] == 300
    assert pull_session(work, None, [attached], log=said.append).files == ()


@pytest.mark.parametrize("part", ["vavae__checkpoints__last.ckpt", "small-files.pack", "session", "gone"])
def test_what_is_damaged_is_not_put_in_place(tmp_path, attached, part):
    folder, work = attached / "datasets/me/gait-run", outputs(tmp_path / "work", vavae=1, dit=1)
    before = contents(work)
    if part == "gone":
        (folder / "vavae__checkpoints__last.ckpt").unlink()
    else:
        (path,) = folder.glob(f"{part}*")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"gait-run.*(damaged|lacks|cannot be read).*push again, or take the version"):
        pull_session(work, None, [attached], log=lambda line: None)
    assert contents(work) == before


@pytest.mark.parametrize("path", ["../evil.ckpt", "/tmp/evil.ckpt", "a/../../evil.ckpt"])
def test_a_manifest_cannot_write_elsewhere(tmp_path, attached, path):
    (old,) = attached.glob("datasets/me/gait-run/session-*.json")
    manifest = json.loads(old.read_text())
    old.unlink()
    manifest["files"][path] = manifest["files"].pop("vavae/checkpoints/last.ckpt")
    sessions.write_manifest(old.parent, manifest)
    refuses("its manifest cannot be read", pull_session, tmp_path / "deep/work", None, [attached])


# ---- kernels


def by_the_client(*words: str) -> str:
    call = [sys.executable, "-m", "kaggle", *words]
    done = subprocess.run(call, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_client_pushes_the_kernel_that_is_written(kaggle, run_main):
    notebook = Path(__file__).parents[1] / "notebooks/02_vavae_fine_tuning.ipynb"
    arguments = ["kernel", "--notebook", notebook, "--dataset", "me/vavae-tools", RUN, "--output_dir", "kernel"]
    status, out, _ = run_main(main, *arguments)
    assert status == 0 and "next: kaggle kernels push -p kernel" in out
    pushed = by_the_client("kernels", "push", "-p", "kernel")
    assert "successfully pushed" in pushed and "does not resolve" not in pushed
    (sent,) = kaggle.asked("SaveKernel")
    assert sent["slug"] == "me/02-vavae-fine-tuning" and sent["newTitle"] == "02 vavae fine tuning"
    assert sent["machineShape"] == "NvidiaTeslaT4" and sent["enableGpu"] is True and sent["isPrivate"] is True
    assert sent.get("enableInternet", False) is False and sent["datasetDataSources"] == ["me/vavae-tools", RUN]
    assert json.loads(sent["text"])["nbformat"] == 4


def test_the_client_makes_a_dataset_of_the_wheels(kaggle, run_main, tmp_path, monkeypatch):
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"wheel")
    monkeypatch.setattr("vavae_tools.kaggle.wheels._download", lambda *asked: [tmp_path / "a-1-py3-none-any.whl"])
    status, out, _ = run_main(main, "wheels", "--dataset", "me/vavae-tools")
    words = out.partition("next: kaggle ")[2].partition(" (later")[0].split()
    assert status == 0 and words == ["datasets", "create", "-p", "outputs/wheels", "-r", "zip"]
    assert "private Dataset is being created" in by_the_client(*words)
    (sent,) = kaggle.asked("CreateDataset")
    assert (sent["ownerSlug"], sent["slug"], sent["isPrivate"]) == ("me", "vavae-tools", True)
    names = {sent["name"] for sent in kaggle.asked("StartBlobUpload")}
    assert names == {"a-1-py3-none-any.whl", "repository.zip"}


def test_the_whole_path_is_the_kernel_by_default_and_goes_on_from_its_own_output(tmp_path, run_main):
    words = ["kernel", "--dataset", "me/vavae-tools", "me/images"]
    status, out, _ = run_main(main, *words)
    assert status == 0 and "write it again with --kernel_source me/00-kaggle" in out
    status, out, _ = run_main(main, *words, "--kernel_source", "me/00-kaggle")
    assert status == 0 and "write it again" not in out
    metadata = json.loads((tmp_path / "outputs/kernel/kernel-metadata.json").read_text())
    assert metadata["id"] == "me/00-kaggle" and metadata["code_file"] == "00_kaggle.ipynb"
    assert metadata["machine_shape"] == "NvidiaTeslaT4" and metadata["enable_internet"] is False
    assert metadata["dataset_sources"] == ["me/vavae-tools", "me/images"]
    assert metadata["kernel_sources"] == ["me/00-kaggle"]


@pytest.mark.parametrize(
    ("notebook", "others", "words"),
    [
        ("empty.ipynb", {"owner": "me"}, "No notebook empty.ipynb"),
        ("whole.ipynb", {}, "--owner is missing"),
        ("whole.ipynb", {"datasets": ["run"]}, "'run' is no owner/name"),
        ("a.ipynb", {"owner": "me"}, "Kaggle's names have 5 to 50"),
    ],
)
def test_bad_kernels_are_one_line(tmp_path, notebook, others, words):
    for name, text in (("empty", "{}"), ("whole", '{"cells": []}'), ("a", '{"cells": []}')):
        (tmp_path / f"{name}.ipynb").write_text(text)
    refuses(words, write_kernel, notebook, "kernel", **others)
    assert not (tmp_path / "kernel").exists()
