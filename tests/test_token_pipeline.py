"""Tokens from noise: the mathematics of the steps, what is known, lengths and seeds, folders, and files of texts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import refused, same, tiny_pipeline, trained_looking

from vavae_tools.checkpoints.formats import write_any_format
from vavae_tools.data.tokens.code import ASSISTANT, END, TokenCode, byte_tokenizer
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DiT
from vavae_tools.diffusion.objectives import SamplePrediction
from vavae_tools.diffusion.solvers import sample, time_grid
from vavae_tools.pipelines.base import kind_of
from vavae_tools.pipelines.classes import load_pipeline
from vavae_tools.pipelines.text import load_text_pipeline
from vavae_tools.pipelines.tokens import TokenImagePipeline, load_token_pipeline
from vavae_tools.runtime.files import save_model
from vavae_tools.training.denoiser_module import DiffusionModule

SIZE, CELL, CELLS = 16, 4, 16
ALL = [0] * CELLS + [1]
"""Lengths of a training in which all images are full."""
CODE = {"num_tokens": 260, "cell_size": CELL, "channels": 3}
TOKENIZER = byte_tokenizer()
QUICK = {"num_inference_steps": 3}


def models(seed: int = 0, size: int = SIZE, channels: int = 3) -> tuple[DiT, ClassConditioner]:
    torch.manual_seed(seed)
    denoiser = DiT(size, CELL, channels + 1, hidden_size=16, depth=1, num_heads=2, positions="sequence")
    return trained_looking(denoiser).eval(), ClassConditioner(1, 16, dropout=0.0).eval()


def tiny(lengths=ALL, chats=False, time_shift=1.0, size=SIZE, channels=3, seed=0) -> TokenImagePipeline:
    code = {**CODE, "channels": channels}
    return TokenImagePipeline(*models(seed, size, channels), TOKENIZER, code, list(lengths), time_shift, chats)


def with_lengths(**shares: int) -> list[int]:
    """of_3=1, of_9=2: one image of three tokens, two of nine."""
    return [shares.get(f"of_{length}", 0) for length in range(CELLS + 1)]


def predicting(pipe: TokenImagePipeline, prediction) -> list[tuple]:
    """Let (x, t) → the clean image stand in for the denoiser; what it is asked is put down: (x, known, t, kept)."""
    asked = []

    def forward(seen, t, conditioning, kept):
        x, known = seen[:, :-1], seen[:, -1]
        asked.append((x, known, t, kept))
        return torch.cat([prediction(x, t), known[:, None]], dim=1)

    pipe.denoiser.forward = forward
    return asked


def noise(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


EVERYWHERE, NOWHERE = torch.ones(4, SIZE, SIZE), torch.zeros(4, SIZE, SIZE)


# ---- the steps
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_who_knows_the_image_writes_exactly_it(steps, eta):
    pipe, text = tiny(time_shift=3.0), "all is well now!"
    tokens = torch.tensor([list(text.encode())])
    image = pipe.code.draw(tokens, torch.ones(1, CELLS, dtype=torch.bool), SIZE)
    asked = predicting(pipe, lambda x, t: image.expand_as(x))
    written = pipe(num_samples=3, num_inference_steps=steps, eta=eta)
    assert written.texts == [text] * 3
    shifted = SamplePrediction(time_shift=3.0).sample_time(torch.arange(steps) / steps)  # as training's even times
    torch.testing.assert_close(torch.stack([t for _, _, t, _ in asked]), shifted[:, None].expand(-1, 3))
    assert same(written.images, image.expand(3, -1, -1, -1))
    fresh, data = iter([noise(seed=i) for i in range(9)]), noise(seed=20)
    predicting(pipe, lambda x, t: data)
    assert same(pipe.denoise(noise(), EVERYWHERE, NOWHERE, data, time_grid(steps), eta, fresh), data)


@pytest.mark.parametrize("shift", [1.0, 4.0])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_without_fresh_noise_it_is_eulers_method_on_the_flow(share, shift):
    pipe, x, clean = tiny(), noise(), noise(seed=1).sign()
    known = (torch.arange(SIZE) < share * SIZE).float().expand(4, SIZE, SIZE)
    given = known[:, None].bool()

    def best(x, t):  # anything curved, in which pixels look at each other, the known ones too
        return torch.tanh(1.5 * x - x.roll(1, 3) + x.mean((2, 3), keepdim=True) + t.view(-1, 1, 1, 1))

    asked = predicting(pipe, best)
    made = pipe.denoise(x, EVERYWHERE, known, clean, time_grid(6, 1 / shift), eta=0)

    def velocity(x, t, conditioning):
        return (best(torch.where(given, clean, x), t) - x) / (1 - t.view(-1, 1, 1, 1))

    expected = sample(velocity, FlowMatchEulerDiscreteScheduler(shift=shift), x, torch.zeros(4, 1), None, 6)
    expected = torch.where(given, clean, expected)
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-6)
    r = torch.linspace(1, 0, 7)[:-1]  # shares of noise, and shifted: where training was
    torch.testing.assert_close(torch.stack([t[0] for _, _, t, _ in asked]), 1 - shift * r / (1 + (shift - 1) * r))
    assert (made - best(x, torch.zeros(4))).abs().mean() > 0.05


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_share_of_fresh_noise(eta):
    """With one prediction at all times x is normal about t·data with deviation 1 − t, whatever eta, which is why
    training knows it; and the noises of two steps are alike by √(1 − eta²) each."""
    pipe, data, steps = tiny(), noise(64, seed=99), 4
    asked = predicting(pipe, lambda x, t: data)
    fresh = (noise(64, seed=i) for i in range(1, steps))
    everywhere = torch.ones(64, SIZE, SIZE)
    pipe.denoise(noise(64), everywhere, 0 * everywhere, data, time_grid(steps), eta, fresh)
    noises = [(x - t[0] * data) / (1 - t[0]) for x, _, t, _ in asked]
    assert [float(t[0]) for _, _, t, _ in asked] == [0, 0.25, 0.5, 0.75]
    for step, of_step in enumerate(noises):
        assert of_step.mean().item() == pytest.approx(0, abs=0.02)
        assert of_step.var().item() == pytest.approx(1, abs=0.03)
        alike = (of_step * noises[0]).mean().item()
        assert alike == pytest.approx((1 - eta**2) ** (step / 2), abs=0.03)


# ---- what is known
def test_known_cells_are_kept_at_every_step_and_in_the_result():
    pipe, prompts = tiny(), ["two cats", "ab"]
    asked = predicting(pipe, lambda x, t: -torch.ones_like(x))
    written = pipe(prompts, max_new_tokens=5, num_inference_steps=4)
    code, counts = TokenCode(**CODE), [8, 2]
    rows = torch.tensor([list(prompt.encode().ljust(8)) for prompt in prompts])
    there = torch.arange(8) < torch.tensor(counts)[:, None]
    clean, known = code.draw(rows, there, SIZE), code.spread_to_pixels(there.float(), SIZE)
    assert len(asked) == 4
    for x, channel, _, kept in asked:
        assert same(channel, known)  # the extra channel says which
        assert same(x * known[:, None], clean)
        unknown = x[(known == 0)[:, None].expand_as(x)]
        assert not (unknown.abs() == 1).any()
        places = [sorted(row[is_in].tolist()) for row, is_in in zip(*kept, strict=True)]
        assert places == [list(range(13)), list(range(7))]
    assert same(written.known, known)
    assert same(written.images * known[:, None], clean)
    assert written.mask.sum((1, 2)).tolist() == [13 * CELL**2, 7 * CELL**2]
    assert [len(tokens) for tokens in written.tokens] == [13, 7]
    assert [text[:count] for text, count in zip(written.texts, counts, strict=True)] == prompts
    assert (written.images[0, :, 8:12, 0:4] == -1).all()  # the ninth cell, as it was predicted


def test_a_model_goes_on_with_texts_and_token_numbers_alike():
    pipe = tiny()
    by_text = pipe(["two cats ", "täg"], **QUICK)
    by_numbers = pipe([list(b"two cats "), np.array(list("täg".encode()), np.int32)], **QUICK)
    assert by_text.texts == by_numbers.texts and same(by_text.images, by_numbers.images)
    assert by_text.texts[0].startswith("two cats ") and by_text.texts[1].startswith("täg")
    for single in ("two cats ", list(b"two cats ")):  # not a list of letters, nor of prompts
        assert pipe(single, **QUICK).tokens == by_text.tokens[:1]


def test_an_answer_is_told_alone_and_its_prompt_is_the_templates():
    pipe = tiny(with_lengths(of_6=1), chats=True, size=32)  # 64 cells; max_tokens says 16
    pipe.register_to_config(lengths=[0] * 6 + [1] + [0] * 58)
    question = [{"role": "user", "content": "hi?"}]
    templated = TOKENIZER.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    tokens = TOKENIZER(templated, add_special_tokens=False).input_ids
    assert templated == f"<|user|>hi?{END}{ASSISTANT}" and len(tokens) == 6
    answer = [*TOKENIZER("yes!!", add_special_tokens=False).input_ids, TOKENIZER.eos_token_id]
    row = torch.tensor([tokens + answer])
    image = pipe.code.draw(row, torch.ones_like(row, dtype=torch.bool), 32)
    predicting(pipe, lambda x, t: image.expand_as(x))
    written = pipe(["hi?", question, tokens], **QUICK)
    assert written.texts == ["yes!!"] * 3 and written.tokens == [tokens + answer] * 3
    longer = [*question, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]
    assert pipe(longer, **QUICK).tokens[0][:-6] == TOKENIZER.apply_chat_template(
        longer, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert pipe(question, **QUICK).texts == ["yes!!"]  # one chat, not a list of them


# ---- lengths
def lengths_of(pipe: TokenImagePipeline, *arguments, **settings) -> list[int]:
    predicting(pipe, lambda x, t: x)
    return [len(tokens) for tokens in pipe(*arguments, num_inference_steps=1, **settings).tokens]


def test_lengths_are_those_of_training_that_are_longer_than_the_prompt():
    pipe = tiny(with_lengths(of_0=50, of_4=1, of_10=3))
    found = lengths_of(pipe, num_samples=1000)
    assert set(found) == {4, 10} and found.count(10) / 1000 == pytest.approx(0.75, abs=0.055)  # four deviations
    pipe = tiny(with_lengths(of_4=1, of_10=3, of_12=1))
    assert set(lengths_of(pipe, ["abc"], num_samples=60)) == {4, 10, 12}
    found = lengths_of(pipe, ["abcd"], num_samples=1000)
    assert set(found) == {10, 12} and found.count(10) / 1000 == pytest.approx(0.75, abs=0.055)
    # no text of training is longer: it goes on to the last cell
    assert lengths_of(pipe, ["a" * 12, "a" * 15]) == [CELLS, CELLS]


def test_an_answer_is_as_long_as_those_to_prompts_of_its_length():
    pipe = tiny(with_lengths(of_9=1), chats=True)
    pipe.register_to_config(answer_lengths=[[3, 2, 150], [5, 4, 60], [5, 6, 180], [9, 7, 30], [10, 1, 90]])
    assert set(lengths_of(pipe, [[1] * 2], num_samples=20)) == {2 + 2}
    found = lengths_of(pipe, [[1] * 5], num_samples=1000)
    assert set(found) == {5 + 4, 5 + 6} and found.count(11) / 1000 == pytest.approx(0.75, abs=0.055)
    assert set(lengths_of(pipe, [[1] * 9], num_samples=200)) == {9 + 7, 9 + 1}  # 30 chats are too few alone


def test_the_new_tokens_may_be_counted():
    pipe = tiny(with_lengths(of_12=1))  # max_tokens of the training were all cells
    assert lengths_of(pipe, num_samples=2, max_new_tokens=3) == [3, 3]
    assert lengths_of(pipe, ["abc", "a" * 14], max_new_tokens=5) == [8, CELLS]
    fewer = tiny([0, 0, 0, 0, 0, 1])  # trained on five tokens in an image that has 16 cells
    assert lengths_of(fewer, ["abc"], max_new_tokens=9) == lengths_of(fewer) == [5]


@pytest.mark.parametrize(
    ("chats", "arguments", "message"),
    [
        (False, {"prompts": "a" * 16}, "The prompt has 16 tokens, and an image 16 cells: shorten it"),
        (False, {"prompts": [[{"role": "user", "content": "a"}]]}, "was trained on texts without a chat template"),
        (True, {"prompts": None}, "This model answers: give it prompts"),
        (True, {"prompts": [[{"role": "user"}]]}, "is neither a text, nor messages"),
        (False, {"prompts": [[1, 260]]}, "token numbers from 1 to 260; they go from 0 to 259"),
        (False, {"prompts": []}, "No prompts: give one or more"),
        (False, {"num_samples": 0}, "num_samples 0: expected 1 or more"),
        (False, {"eta": 1.1}, "eta 1.1: expected a share of fresh noise from 0 to 1"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(chats, arguments, message):
    assert message in refused(tiny(chats=chats), **arguments)


# ---- seeds
def test_a_text_of_a_seed_is_the_same_whatever_is_made_beside_it():
    pipe = tiny(with_lengths(of_3=1, of_9=1, of_16=2))
    settings = {"num_inference_steps": 5, "seed": 7}
    whole = pipe(num_samples=7, **settings)
    assert len(set(whole.texts)) == 7 and len({len(tokens) for tokens in whole.tokens}) > 1
    made = pipe(num_samples=7, batch_size=3, **settings)
    assert made.texts == whole.texts and same(made.mask, whole.mask)
    torch.testing.assert_close(made.images, whole.images, rtol=0, atol=1e-5)
    assert pipe(numbers=[5, 2], **settings).texts == [whole.texts[5], whole.texts[2]]
    assert pipe(num_samples=7, **{**settings, "seed": 8}).texts != whole.texts
    whole = pipe(["ab", "longer", "c"], num_samples=2, **settings)
    assert [tokens[0] for tokens in whole.tokens] == list(b"aallcc") and len(set(whole.texts)) == 6
    assert pipe(["longer", "c"], numbers=[3, 4], **settings).texts == whole.texts[3:5]


# ---- folders and checkpoints
@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """pipeline/, a training's run/, and a pipeline of images, images/. Do not write into it."""
    folder = tmp_path_factory.mktemp("kept")
    tiny(with_lengths(of_3=1, of_9=1, of_16=2), time_shift=2.0).save_pretrained(folder / "pipeline")
    tiny_pipeline().save_pretrained(folder / "images")
    of_pipeline = {"code": CODE, "lengths": ALL, "time_shift": 2.0, "use_chat_template": False}
    module = DiffusionModule(*models(), SamplePrediction(time_shift=2.0), token_images=of_pipeline)
    state = module.state_dict()
    state |= {name: tensor + 0.3 for name, tensor in state.items() if name.startswith("network.")}
    (folder / "run" / "checkpoints").mkdir(parents=True)
    checkpoint = {"state_dict": state, "hyper_parameters": dict(module.hparams), "epoch": 0, "global_step": 1}
    for name in ("checkpoints/last.ckpt", "checkpoint_epoch_1.pth"):
        write_any_format(checkpoint, folder / "run" / name)
    save_model(TOKENIZER, folder / "run" / "tokenizer")
    return folder


def test_a_checkpoint_of_training_with_its_tokenizer_beside_it(kept, tmp_path, capfd):
    files = [kept / "run" / name for name in ("checkpoints/last.ckpt", "checkpoint_epoch_1.pth")]
    (by_ckpt, by_pth), live = map(load_token_pipeline, files), load_token_pipeline(files[0], ema=False)
    assert capfd.readouterr() == ("", "")
    for pipe in (by_ckpt, by_pth, live):
        assert not pipe.denoiser.training and pipe.config.time_shift == 2.0 and pipe.img_size == SIZE
    expected = tiny(time_shift=2.0)(num_samples=3, **QUICK)  # of the same weights
    assert by_ckpt(num_samples=3, **QUICK).texts == by_pth(num_samples=3, **QUICK).texts == expected.texts
    assert live(num_samples=3, **QUICK).texts != expected.texts
    alone = tmp_path / "a" / "b" / "last.ckpt"
    alone.parent.mkdir(parents=True)
    shutil.copy(kept / "run" / "checkpoints" / "last.ckpt", alone)
    assert "No tokenizer/ in or beside" in refused(load_token_pipeline, alone)
    other = byte_tokenizer()
    other.add_tokens(["word"])
    save_model(other, tmp_path / "a" / "tokenizer")
    assert "has 261 tokens, the model 260" in refused(load_token_pipeline, alone)


def test_who_loads_something_else_is_told_what_it_is(kept, tmp_path):
    kinds = [kind_of(kept / name) for name in ("pipeline", "images", "run/checkpoint_epoch_1.pth")]
    assert kinds == ["TokenImagePipeline", "LatentDiTPipeline", "TokenImagePipeline"] and not kind_of(tmp_path)
    said = refused(load_token_pipeline, kept / "images")
    assert "makes images of classes, expected one that makes texts: --labels" in said
    for load in (load_pipeline, load_text_pipeline):
        for name in ("pipeline", "run/checkpoints/last.ckpt", "run/checkpoint_epoch_1.pth"):
            assert "(in Python load_token_pipeline)" in refused(load, kept / name)
    shutil.copytree(kept / "pipeline", tmp_path / "torn")
    shutil.rmtree(tmp_path / "torn" / "tokenizer")
    assert "No tokenizer/ in or beside" in refused(load_token_pipeline, tmp_path / "torn")
