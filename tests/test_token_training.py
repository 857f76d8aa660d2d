"""Training on token images: the command as people type it, what goes on exactly, and what many processes share."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from alike import assert_weights_alike
from tiny import assert_same_training, last

from vavae_tools import train
from vavae_tools.data.tokens.dataset import TokenImageDataset
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DiT
from vavae_tools.diffusion.objectives import SamplePrediction
from vavae_tools.pipelines.tokens import load_token_pipeline
from vavae_tools.runtime.draws import Draws
from vavae_tools.training.denoiser_module import DiffusionModule

ROOT = Path(__file__).parents[1]
TINY = ("model.hidden_size=16", "model.depth=1", "model.num_heads=2", "sampling.num_steps=2", "callbacks.previews=0")
TYPED = ("experiment=token_images", "--data_path", "zen", "--img_size", "32", "--batch_size", "2", *TINY)
"""18 texts of at most 64 cells to train, one to validate"""


@pytest.fixture
def run(here, run_main):
    def train_here(*words) -> str:
        status, said, err = run_main(train.main, *TYPED, *words)
        assert status == 0, err
        return said

    return train_here


def test_the_command_as_it_is_typed_and_gone_on_with_from_a_pth(run, here):
    words = ["--gradient_accumulation_steps", 4, "--max_grad_norm", 1.0, "--use_amp", "--lr", 0.01, "--warmup_steps", 1]
    words += ["--save_every_n_epochs", 2, "--epochs", 4]
    said = run(*words, "--output_dir", "whole", "callbacks.previews=1", "sampling.prompts=[Beautiful]")
    # 18 images are 9 batches of 2, of which 8 make the 2 steps of an epoch
    assert "8 steps of 8, 4 epochs" in said and "float32" in said
    assert sorted(path.name[-5:] for path in Path("whole").glob("checkpoint_epoch_*.pth")) == ["2.pth", "4.pth"]
    assert len(list(Path("whole/checkpoints").glob("epoch=*.ckpt"))) == 1
    assert len(re.findall("^  Beautiful", said, re.M)) == 1 and Path("whole/samples/samples-000008.png").is_file()
    assert Path("whole/samples/samples-000008.txt").read_text().count("Beautiful") == 1
    assert "next: python -m vavae_tools.sample --checkpoint whole/pipeline" in said
    rates = [state["last_epoch"] for state in last("whole")["lr_schedulers"]]
    assert last("whole")["global_step"] == 8 and rates == [8]
    run(*words, "--output_dir", "resumed", "--resume", "whole/checkpoint_epoch_2.pth")
    assert_same_training("whole", "resumed")
    made = load_token_pipeline("resumed/pipeline")(num_samples=2, num_inference_steps=2)
    assert made.texts == load_token_pipeline("whole/checkpoint_epoch_4.pth")(num_samples=2, num_inference_steps=2).texts
    assert json.loads(Path("whole/pipeline/model_index.json").read_text())["code"]["num_tokens"] == 260


def test_chats_are_learnt_and_answered(run, here):
    chats = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}] for n in range(8)]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    run("--data_path", "chats.jsonl", "--use_chat_template", "training.max_steps=3", "--output_dir", "run")
    pipe = load_token_pipeline("run/pipeline")
    made = pipe("say 3", num_inference_steps=2)
    prompt = pipe.text_tokens.prompt([{"role": "user", "content": "say 3"}])
    assert made.tokens[0][: len(prompt)] == prompt and len(made.tokens[0]) == len(prompt) + 2  # a figure and the end


def test_two_processes_make_the_steps_of_one(run, here, forked):
    """Though they have different numbers of cells, of which the loss is the mean."""
    words = ["training.max_steps=6", "training.learning_rate=0.01", "training.warmup_steps=1"]
    run(*words, "--output_dir", "one", "--batch_size", 4)
    run(*words, "--output_dir", "two", "--devices", 2, "--accelerator", "cpu")
    assert_weights_alike(last("two")["state_dict"], last("one")["state_dict"])


def test_bad_input_is_one_line(fault, here, run):
    fault = partial(fault, train.main, *TYPED)
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes("schön".encode("latin-1"))
    assert "empty.txt is empty" in fault("--data_path", "empty.txt")
    assert "line 1, is no UTF-8" in fault("--data_path", "latin.txt")
    assert "260 tokens need 9 bits" in fault("data.channels=1", "--cell_size", 2)
    assert "img_size 30 is no multiple of cell_size 4" in fault("--img_size", 30)
    assert "max_tokens 65" in fault("--max_tokens", 65)
    run("training.max_steps=1", "--save_every_n_steps", 1, "--output_dir", "small")
    said = fault("training.max_steps=2", "model.hidden_size=32", "--resume", "small/checkpoint_1.pth")
    assert "small/checkpoint_1.pth is of another model" in said and "(16," in said
    assert "samples = 21, here it is" in fault("--max_tokens", 20, "--resume", "small/checkpoint_1.pth")


# ---- the module


def module(**changes) -> DiffusionModule:
    torch.manual_seed(0)
    code = {"num_tokens": 260, "cell_size": 4, "channels": 3}
    denoiser = DiT(32, 4, 4, 16, 1, 2, positions="sequence")
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return DiffusionModule(
        denoiser, ClassConditioner(1, 16, 0.0), SamplePrediction(), token_images={"code": code}, **changes
    )


def batch(of: DiffusionModule, *places: int) -> dict:
    """Texts by their place among all, the shortest first."""
    data = TokenImageDataset("zen", 32)
    by_length = sorted(range(len(data)), key=lambda index: len(data.tokens_of(index)))
    return of.on_before_batch_transfer(data.get_batch([by_length[place] for place in places]), 0)


def test_beginnings_are_some_first_cells_and_never_all():
    learnt = module(prompt_share=0.5)
    mask = torch.zeros(4096, 32, 32)
    mask[:, :4, :20] = 1  # five cells
    given = learnt.beginnings(mask, Draws(0, 0, torch.arange(4096)))
    counts = learnt.code.mask_to_cells(given).sum(1)
    assert torch.equal(given, given * mask) and counts.max() == 4
    share = counts.bincount(minlength=5) / 4096  # half of them none, the others none to four alike
    torch.testing.assert_close(share, torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]), atol=0.03, rtol=0)
    first = learnt.code.mask_to_cells(given).int()
    assert (first.diff(dim=1)[:, :4] <= 0).all()  # from the first on, without a gap


def test_padding_changes_nothing():
    learnt = module().eval()
    short = batch(learnt, 0)
    beside = batch(learnt, 0, -1)  # a longer text makes more cells be computed
    assert beside["kept"].indices.shape[1] > short["kept"].indices.shape[1] == short["mask"].sum() / 16
    noise = torch.randn(1, 3, 32, 32)
    conditioning, t = torch.zeros(2, 16), torch.tensor([0.3, 0.3])
    one = learnt.objective(learnt.network["denoiser"], short["clean"], conditioning[:1], noise, t[:1], short["mask"])
    clean, mask = beside["clean"], beside["mask"] * torch.tensor([1.0, 0.0])[:, None, None]
    both = learnt.objective(
        learnt.network["denoiser"], clean, conditioning, noise.expand(2, -1, -1, -1), t, mask, kept=beside["kept"]
    )
    torch.testing.assert_close(one[0], both[0])
