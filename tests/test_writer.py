"""Samples to files, of all pipelines: resumed, shared among processes, never mixed with samples of other settings."""

import functools
import json
import threading
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from test_text_pipeline import SENTENCES, text_pipeline
from test_token_pipeline import SIZE as TEXT_SIZE
from test_token_pipeline import tiny, with_lengths
from tiny import SIZE, contents, perturb_projections, refused, tiny_dit, tiny_pipeline, tiny_vavae, trained_looking
from torch.distributed import HashStore

from vavae_tools.data.images import ImageFolder, channels_of
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.pipelines import writer
from vavae_tools.pipelines.classes import LatentDiTPipeline
from vavae_tools.pipelines.writer import write_prompt_samples, write_samples, write_texts
from vavae_tools.runtime.ranks import Ranks

KINDS = ("png", "npz", "prompts", "texts")
QUICK = {"num_inference_steps": 3}
LABELS = [0, 1, 2] * 4


def pipeline(kind: str, seed: int = 0):
    if kind == "texts":
        return tiny(with_lengths(of_3=1, of_9=1, of_16=2), seed=seed)
    pipe = text_pipeline() if kind == "prompts" else tiny_pipeline()
    if seed:
        trained_looking(pipe.denoiser, seed=seed)
    return pipe


def write(kind: str, pipe, folder: Path, count: int = 11, **options):
    """A set in batches of 4, of which the last one is of 3."""
    options = {"overwrite": False, "batch_size": 4, **QUICK, **options}
    if kind == "prompts":
        return write_prompt_samples(pipe, options.pop("prompts", SENTENCES), folder, count, **options)
    if kind == "texts":
        return write_texts(pipe, folder, options.pop("prompts", ["ab", "täg"]), count, **options)
    return write_samples(pipe, LABELS[:count], folder, format=kind, **options)


def samples(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name not in ("samples.json", "grid.png")}


@pytest.fixture
def calls(monkeypatch):
    """How many samples each call of a pipeline is asked for; it fails with the call after `until` of them."""
    made = []

    def follow(pipe, until=None):
        call = type(pipe).__call__

        @functools.wraps(call)
        def counted(self, *arguments, **named):
            if len(made) == until:
                raise KeyboardInterrupt
            made.append(len(named.get("labels") or named.get("prompt") or named.get("numbers")))
            return call(self, *arguments, **named)

        made.clear()
        monkeypatch.setattr(type(pipe), "__call__", counted)
        return made

    yield follow


# ---- whole sets
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_equals_never_interrupted(kind, tmp_path, monkeypatch, calls):
    pipe, parts = pipeline(kind), tmp_path / "parts"
    write(kind, pipe, tmp_path / "whole")
    with monkeypatch.context(), pytest.raises(KeyboardInterrupt):
        calls(pipe, until=2)
        write(kind, pipe, parts)
    there = sorted(path for path in parts.rglob("*0*") if path.suffix in (".png", ".npy", ".jsonl"))
    assert there and not (parts / "texts.jsonl").exists() and not list(parts.glob("*.npz"))
    there[-1].unlink()  # a batch of which a part, or all, is lost
    there[0].with_name(f".{there[0].name}.1.partial").write_bytes(b"half")
    monkeypatch.undo()
    made = calls(pipe)
    write(kind, pipe, parts, batch_size=None)  # as it was
    assert made == [4, 3] and contents(parts) == contents(tmp_path / "whole")
    write(kind, pipe, parts, batch_size=3)
    assert made == [4, 3] and samples(parts) == samples(tmp_path / "whole")


def together(work, count: int = 2) -> None:
    """Call work(ranks) as several processes do, which have nothing in common but a store and the disk.

    Threads stand in for them: test_sample_command.py has the processes, and each takes its seconds to start.
    """
    store, failed = HashStore(), []

    def of(rank: int) -> None:
        try:
            work(Ranks(rank, count, rank, store))
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=of, args=(rank,), daemon=True) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not failed and not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_make_the_same_bytes_as_one(kind, tmp_path):
    write(kind, pipeline(kind), tmp_path / "one")
    pipes, done = [pipeline(kind) for _ in range(4)], []

    def work(ranks: Ranks, folder: Path) -> None:
        write(kind, pipes[ranks.rank], folder, ranks=ranks)
        if ranks.rank == 0:  # which returns when all are done
            done.append(contents(folder))

    together(lambda ranks: work(ranks, tmp_path / "two"))
    together(lambda ranks: work(ranks, tmp_path / "two"))  # all is there: nobody waits for anybody
    together(lambda ranks: work(ranks, tmp_path / "four"), count=4)  # more than there are batches
    assert done == [contents(tmp_path / "one")] * 3


@pytest.mark.parametrize("kind", ["png", "prompts"])
def test_more_images_later_are_those_of_a_larger_set(kind, tmp_path, calls):
    pipe = pipeline(kind)
    write(kind, pipe, tmp_path / "whole")
    write(kind, pipe, tmp_path / "more", 6)
    made = calls(pipe)
    write(kind, pipe, tmp_path / "more")
    assert made == [4, 3]
    made, whole = samples(tmp_path / "more"), samples(tmp_path / "whole")
    assert made.keys() == whole.keys()
    assert all(abs(pixels(made[name]) - pixels(whole[name])).max() <= 1 for name in whole)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png))).astype(int)


# ---- samples of other settings
CHANGES = {
    "png": [
        ({"guidance_scale": 3.0}, "cfg_scale or guide_scale 1.25 there, 3.0 here"),
        ({"guidance_interval": (0.1, 1.0)}, "cfg_interval 0.0,1.0 there, 0.1,1.0 here"),
        ({"guide": tiny_dit(1)}, "another guide"),
        ({"names": ["anna", "ben", "carl"]}, "folder of 0 ID_1 there, anna here"),
    ],
    "npz": [({"seed": 1}, "seed 0 there, 1 here"), ({"count": 2}, "labels 0,1,2 there, 0,1 here")],
    "prompts": [
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"negative_prompt": "blue"}, "negative_prompt None there, blue here"),
        ({"prompts": ["a ring"]}, "prompt of 00000.png a red circle there, a ring here"),
    ],
    "texts": [
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"eta": 0.5}, "eta 1.0 there, 0.5 here"),
        ({"prompts": ["cd"]}, "prompts ab,täg there, cd here"),
        ({"pipe": tiny(with_lengths(of_9=1))}, "another model"),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_other_settings_are_refused_and_replaced(kind, tmp_path):
    pipe, out = pipeline(kind), tmp_path / "out"
    write(kind, pipe, out)
    mine = out / ("ID_1" if kind == "png" else "") / "drawn_by_hand.png"
    mine.write_bytes(b"mine")
    before, other = contents(out), pipeline(kind, seed=11)
    both = [({"num_inference_steps": 2}, "num_steps 3 there, 2 here"), ({"pipe": other}, "another model")]
    for change, message in (*both, *CHANGES[kind]):
        said = refused(write, kind, **{"pipe": pipe, "folder": out, **change})
        unit = "texts" if kind == "texts" else "images"
        expected = f"out holds {unit} of other settings ({message}): name another --output_dir, or replace them by"
        assert expected in said, said
    assert contents(out) == before
    write(kind, other, out, 5, overwrite=True)
    write(kind, other, tmp_path / "new", 5)
    assert contents(out) == {**contents(tmp_path / "new"), str(mine.relative_to(out)): b"mine"}
    (out / "samples.json").write_text("{")
    assert "samples.json, which says how they were made, is missing or damaged" in refused(write, kind, other, out)
    for path in out.rglob("*"):
        if path.is_file() and path != mine:
            path.unlink()
    write(kind, pipe, out)  # nothing is left to mix with


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_keeps_its_precision(kind, tmp_path, monkeypatch, capsys):
    pipe = pipeline(kind)
    write(kind, pipe, tmp_path, precision="bf16")
    before = contents(tmp_path)
    assert json.loads(before["samples.json"])["settings"]["precision"] == "bf16"
    assert "(precision bf16 there, 32 here)" in refused(write, kind, pipe, tmp_path, precision="32")
    capsys.readouterr()
    write(kind, pipe, tmp_path)
    said = capsys.readouterr().err
    assert "resuming in bf16, as what is there was made; --overwrite --precision 32 makes it anew in float32\n" in said
    assert contents(tmp_path) == before
    record = json.loads(before["samples.json"])
    del record["settings"]["precision"]  # as before there was a choice: float32
    (tmp_path / "samples.json").write_text(json.dumps(record))
    monkeypatch.setattr(writer, "precision_for", lambda pipe, name: name or "bf16")  # as on a GPU
    write(kind, pipe, tmp_path)
    assert json.loads((tmp_path / "samples.json").read_text())["settings"]["precision"] == "32"


def test_pngs_and_an_npz_stand_beside_each_other(tmp_path):
    pipe, options = tiny_pipeline(), {"overwrite": False, "batch_size": 4, **QUICK}
    pngs = write_samples(pipe, LABELS, tmp_path, seed=3, **options)
    (npz,) = write_samples(pipe, LABELS, tmp_path, seed=3, format="npz", **options)
    assert npz == tmp_path / f"samples_12x{SIZE}x{SIZE}x3.npz" and not (tmp_path / ".parts").exists()
    with np.load(npz) as arrays:
        assert arrays.files == ["arr_0", "arr_1"] and arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], [np.asarray(Image.open(path)) for path in pngs])
        assert arrays["arr_1"].dtype == np.int64 and arrays["arr_1"].tolist() == LABELS
    with ZipFile(npz) as archive:
        assert archive.testzip() is None and {info.compress_type for info in archive.infolist()} == {ZIP_STORED}
    (fewer,) = write_samples(pipe, LABELS[:6], tmp_path, seed=3, format="npz", **options)
    assert npz.is_file() and fewer.name == f"samples_6x{SIZE}x{SIZE}x3.npz"  # it stands beside
    write_samples(pipe, [1], tmp_path, seed=4, **options)  # the same model: other seeds stand beside
    (other,) = write_samples(pipe, [0, 1, 1], tmp_path, format="npz", **{**options, "overwrite": True})
    assert list(tmp_path.glob("*.npz")) == [other] and all(path.is_file() for path in pngs)
    write_samples(pipe, [0, 1], tmp_path, **{**options, "overwrite": True, "num_inference_steps": 2})
    assert sorted(samples(tmp_path)) == ["ID_1/seed0_00000.png", "ID_2/seed0_00000.png"]  # of the old ones none is left


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_another_kind_of_pipeline_are_left_alone(kind, tmp_path):
    for other in KINDS:
        if {kind, other} <= {"png", "npz"} or kind == other:
            continue
        write(other, pipeline(other), tmp_path / other, 2)
        before = contents(tmp_path / other)
        for overwrite in (False, True):
            said = refused(write, kind, pipeline(kind), tmp_path / other, overwrite=overwrite)
            assert "of another kind of pipeline (samples.json): name another --output_dir" in said
        assert contents(tmp_path / other) == before


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("png", {"num_inference_steps": 0}, "at least one step"),
        ("png", {"count": 0}, "No labels"),
        ("gif", {}, "No format 'gif'; there are png, npz"),
        ("png", {"names": ["anna"]}, "has 1 names, the model 3 classes: write one line for each, from label 0 (ID_1)"),
        ("texts", {"count": 0}, "num_samples 0: expected"),
        ("texts", {"prompts": ["a", "a" * 16]}, "The prompt has 16 tokens"),
    ],
)
def test_settings_that_cannot_be_leave_nothing_behind(kind, change, message, tmp_path):
    assert message in refused(write, kind, pipeline(kind), tmp_path / "out", overwrite=True, **change)
    assert not (tmp_path / "out").exists()


# ---- images of classes
def test_written_samples_can_be_read_back(tmp_path):
    pipe, labels = tiny_pipeline(), [0, 1, 2, 0, 1, 0]
    written = write_samples(pipe, labels, tmp_path / "samples", seed=5, **QUICK)
    names = ["ID_1/seed5_00000.png", "ID_2/seed5_00000.png", "ID_3/seed5_00000.png", "ID_1/seed5_00001.png"]
    assert [path.relative_to(tmp_path / "samples").as_posix() for path in written[:4]] == names
    data = ImageFolder(tmp_path / "samples", SIZE, progress=False)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert len({bytes(image) for image in data.in_memory().numpy()}) == 6  # none is made twice
    named = write_samples(pipe, ["ID_2", 0], tmp_path / "named", names=["anna", "ben", "carl"], **QUICK)
    assert [path.parent.name for path in named] == ["ben", "anna"]
    # an image follows from seed, label and number
    other = write_samples(pipe, [2, 1, 2], tmp_path / "other", seed=5, batch_size=1, **QUICK)
    assert abs(pixels(written[2].read_bytes()) - pixels(other[0].read_bytes())).max() <= 1
    assert write_samples(pipe, [2], tmp_path / "other", seed=6, **QUICK)[0].read_bytes() != other[0].read_bytes()


def test_grey_images_that_are_not_square_are_read_back_in_grey(tmp_path):
    statistics = {"latents_mean": (0.5, -1.0), "latents_std": (2.0, 0.5)}
    vae = perturb_projections(tiny_vavae(in_channels=1, out_channels=1, **statistics)).eval()
    denoiser, conditioner = tiny_dit(input_size=(8, 12))
    pipe = LatentDiTPipeline(vae, trained_looking(denoiser).eval(), conditioner.eval(), make_solver())
    written = write_samples(pipe, [0, 1, 2, 0], tmp_path, seed=5, **QUICK)
    assert [Image.open(path).mode for path in written] == ["L"] * 4 and channels_of(tmp_path) == 1
    noise = pipe.noise(5, torch.tensor([0, 1_000_003, 2 * 1_000_003, 1]))
    made = pipe([0, 1, 2, 0], latents=noise, output_type="pt", **QUICK).images
    data = ImageFolder(tmp_path, (16, 24), channels=1, progress=False)
    assert torch.equal(data.in_memory()[[data.paths.index(path) for path in written]], made)
    (npz,) = write_samples(pipe, [0, 1, 2, 0], tmp_path, seed=5, format="npz", **QUICK)
    assert npz.name == "samples_4x16x24x3.npz"
    assert np.array_equal(np.load(npz)["arr_0"], made.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())


# ---- texts
def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_texts_as_lines_with_their_prompts_and_a_grid(tmp_path):
    pipe, prompts = tiny(), ["täg ", "b\u2028"]
    path = write_texts(pipe, tmp_path / "out", prompts, 5, seed=2, **QUICK)
    assert sorted(contents(path.parent)) == ["grid.png", "samples.json", "texts.jsonl"]
    asked = [prompts[i % 2] for i in range(5)]
    texts = pipe(asked, seed=2, **QUICK).texts
    assert lines(path) == [{"text": text, "prompt": prompt} for text, prompt in zip(texts, asked, strict=True)]
    assert '"prompt": "täg "' in path.read_bytes().decode()  # as it is, not \u00e4
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.mode == "RGB" and grid.size == (5 * TEXT_SIZE + 4 * 2, TEXT_SIZE)
        first = np.asarray(grid)[:4, :4].transpose(2, 0, 1).ravel()
    assert (first / 127.5 - 1).tolist() == pipe.code.cells(torch.tensor("täg ".encode()[0])).tolist()
    own = lines(write_texts(pipe, tmp_path / "own", **QUICK))
    assert len(own) == 100 and own[0].keys() == {"text"}
    with Image.open(tmp_path / "own" / "grid.png") as grid:
        assert grid.size == (8 * TEXT_SIZE + 7 * 2,) * 2
    chats, question = tiny(with_lengths(of_4=1), chats=True), [{"role": "user", "content": "hi"}]
    answered = lines(write_texts(chats, tmp_path / "chats", question, 2, **QUICK))
    assert [row["prompt"] for row in answered] == [question] * 2
