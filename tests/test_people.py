"""Training images decoded as other people."""

import shutil

import numpy as np
import torch
from PIL import Image
from tiny import SIZE, refuses, tiny_vavae

from vavae_tools import sample
from vavae_tools.autoencoders.vavae import reconstruct_images
from vavae_tools.autoencoders.weights import load_vavae
from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.pipelines.people import write_as_people


def test_others_images_are_decoded_with_each_persons_vector(split_dir, vavae_dir, tmp_path):
    written = write_as_people(vavae_dir, split_dir, tmp_path / "all", progress=False)
    train = ImageDataModule(split_dir, SIZE, progress=False).train_data  # eight of each of three people
    names = [f"ID_{label}/{n:05d}.png" for label in (1, 2, 3) for n in range(16)]
    assert [path.relative_to(tmp_path / "all").as_posix() for path in written] == names
    batch, label = train.get_batch(range(len(train))), 1
    others = batch["labels"] != label
    own = batch["labels"][others]
    expected = reconstruct_images(load_vavae(vavae_dir), batch["images"][others], own, torch.full_like(own, label))
    made = {np.asarray(Image.open(path)).tobytes() for path in written[16:32]}
    assert made == {image.permute(1, 2, 0).numpy().tobytes() for image in expected}
    few = write_as_people(vavae_dir, split_dir, tmp_path / "few", 3, progress=False)
    first = [path for path in written if int(path.stem) < 3]
    assert [path.read_bytes() for path in few] == [path.read_bytes() for path in first]


def test_the_command_and_what_it_refuses(split_dir, vavae_dir, tmp_path, run_main, fault):
    words = ["--checkpoint", vavae_dir, "--as_people", split_dir, "--output_dir", tmp_path / "out"]
    status, out, err = run_main(sample.main, *words)
    assert not status and f"written: 48 images of 3 people ({tmp_path}/out/ID_1 …)\nnext: python -m" in out, err
    assert out.endswith(f"--data_dir {split_dir} --gain\n")
    assert "out holds images already: name another --output_dir" in fault(sample.main, *words)
    shutil.rmtree(tmp_path / "out")
    tiny_vavae(condition_dim=0, num_conditions=0).save_pretrained(tmp_path / "plain")
    refuses("has no vectors of people: fine-tune one", write_as_people, tmp_path / "plain", split_dir, tmp_path / "out")
    shutil.copytree(split_dir / "train/ID_1", tmp_path / "one/train/ID_1")
    refuses("of one person alone", write_as_people, vavae_dir, tmp_path / "one", tmp_path / "out")
    assert not (tmp_path / "out").exists()
