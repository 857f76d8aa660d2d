"""All that the package does on a card, on an emulated one: `python on_card.py t4 split vavae latents work` prints JSON.

For each of `SCENARIOS` there is {"fault": last lines of a traceback or "", "seconds", "half": what computed in half
precision within `FLOAT32`}; of trainings also "precision", the kind of "weights", "numbers" (the metrics), "written"
(what of `OUTPUT_FOLDERS` there is), and what the `QUIET` steps made the processor wait for ("waits") and copied
("copies"); of sampling "waits" of its steps. Both are {"what @ where": times}.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRAININGS = (
    *("vavae_light", "vavae_full", "dit", "ddt", "rae_decoder", "token_images"),
    *("text_epsilon", "text_v_prediction", "text_flow_matching", "text_not_cached"),
    *("vavae_full_other", "dit_other", "ddt_other", "rae_decoder_other", "token_images_other"),
    "text_flow_matching_other",
)
"""In the card's own precision, and those called other in another that it has."""
SCENARIOS = (
    *("the_card", *TRAININGS, "encoding", "gone_on_with", "sampling", "sampling_of_texts", "sampling_of_tokens"),
    *("half_pipelines", "offloaded_pipelines", "sample_command", "evaluation", "hours"),
)
STEPS, QUIET = 8, range(3, 6)
"""Of a training, one epoch; at the quiet ones nothing is logged, validated, shown, saved or met for the first time."""
OUTPUT_FOLDERS = ("checkpoint-6", "checkpoint_6.pth", "samples-000008.png", "reconstructions-000008.png")
"""Of a training two, one of the first and one of the others."""
FLOAT32 = {
    "autoencoders.losses": (
        *("l1", "gradient", "spectral", "kl"),
        *("hinge_loss", "generator_loss", "adaptive_weight", "PatchDiscriminator.forward"),
    ),
    "autoencoders.lpips": ("_unit", "_distance"),
    "autoencoders.foundation": ("alignment_loss",),
    "diffusion.objectives": ("Objective.loss",),
    "evaluation.metrics": ("psnr", "ssim", "sharpness"),
    "training.autoencoder_module": ("discriminator_accuracy",),
}
"""Functions and methods of the package in which nothing may compute in half precision."""


def main(kind: str, split: str, vavae: str, latents: str, work: str, *names: str) -> None:
    from emulated_card import insert

    card = insert(kind)
    warnings.simplefilter("ignore")
    os.chdir(work)
    with contextlib.redirect_stdout(sys.stderr):
        asked = OnCard(card, kind, Path(split), Path(vavae), Path(latents))
        found = {name: asked.about(name) for name in names or SCENARIOS}
    print(json.dumps(found))


class Trainings:
    """Tiny ones of each kind, in the working folder, with previews, validation and saving.

    Args:
        split, vavae, latents: folders.
        change: how attributes of modules are set: (module, name, value).
    """

    def __init__(self, split: Path, vavae: Path, latents: Path, change: Callable[..., None] = setattr) -> None:
        self.split, self.vavae, self.latents, self.change = split, vavae, latents, change

    def train(self, name: str, out: Path, precision: str | None) -> None:
        of_text = name.startswith("text_")
        train = functools.partial(self.text_to_image, name.removeprefix("text_")) if of_text else getattr(self, name)
        train(out, precision)

    def vavae_light(self, out: Path, precision: str | None, **changes: Any) -> None:
        from vavae_tools.evaluation import classifier
        from vavae_tools.recipes.vavae import fine_tune_vavae

        self.change(classifier, "default_steps", lambda images: 2)
        fine_tune_vavae(
            self.split,
            out,
            self.vavae,
            image_size=24,  # the smallest that the discriminator can judge
            batch_size=3,
            max_epochs=1,
            monitor="ssim",
            previews=1,
            devices={"precision": precision},
            saving={"save_every_n_steps": 6},
            **changes,
        )

    def vavae_full(self, out: Path, precision: str | None) -> None:
        import torch
        from test_foundation import dinov2
        from test_lpips import WIDTHS, taming_file

        from vavae_tools.autoencoders.lpips import load_lpips
        from vavae_tools.recipes import vavae as fine_tuning

        out.mkdir()
        torch.save(taming_file(), out / "lpips.ckpt")
        dinov2().save_pretrained(out / "dino")
        self.change(fine_tuning, "load_lpips", functools.partial(load_lpips, widths=WIDTHS))
        more = {"disc_start": 0, "disc_width": 4, "gradient_checkpointing": True}
        sources = {"lpips_weights": out / "lpips.ckpt", "foundation_model": out / "dino"}
        self.vavae_light(out / "run", precision, recipe="full", **more, **sources)

    def dit(self, out: Path, precision: str | None, **changes: Any) -> None:
        from vavae_tools.recipes.dit import train_dit

        train_dit(
            self.latents,
            self.vavae,
            out,
            {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4},
            batch_size=3,
            flip="half",
            **{"max_steps": STEPS, "previews": 1, "devices": {"precision": precision}, **changes},
            saving={"save_every_n_steps": 6},
        )

    def ddt(self, out: Path, precision: str | None) -> None:
        self._run(
            *(out, precision, "experiment=dit_dummy", "model.dit.hidden_size=[16,32]", "model.dit.depth=[1,1]"),
            *("model.dit.num_heads=[2,2]", "data.num_images=32", "data.val_share=0.2", "data.batch_size=4"),
            *(f"model.dit_module.max_steps={STEPS}", "model.dit_module.gradient_checkpointing=true"),
        )

    def rae_decoder(self, out: Path, precision: str | None) -> None:
        self._run(
            *(out, precision, "experiment=rae_decoder", "data=shapes", "model.rae.folder=tiny", "data.num_images=16"),
            *("data.batch_size=2", "data.val_share=0.2", "model.losses.disc_start=0"),
            *("model.losses.generator_start=1", f"model.decoder_module.max_steps={STEPS}"),
        )

    def text_to_image(self, objective: str, out: Path, precision: str | None) -> None:
        from tiny import tiny_kl

        of = ["data.cache=false"] if objective == "not_cached" else [f"model.objective={objective}"]
        tiny_kl().save_pretrained("kl")
        self._run(
            *(out, precision, "experiment=text_dummy", "vae.name=kl", "data.num_samples=32", "data.image_size=16"),
            *("data.val_share=0.2", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2"),
            *("training.batch_size=4", "sampling.num_steps=2", f"training.max_steps={STEPS}", *of),
        )

    def token_images(self, out: Path, precision: str | None) -> None:
        self._run(
            *(out, precision, "experiment=token_images", "data.data_path=zen", "data.img_size=32"),
            *("data.val_share=0.25", "model.hidden_size=16", "model.depth=1", "model.num_heads=2"),
            *("training.batch_size=2", "sampling.num_steps=2", f"training.max_steps={STEPS}"),
        )

    def _run(self, out: Path, precision: str | None, *words: str) -> None:
        from vavae_tools.train import run_experiment

        every = ["callbacks.previews=1", "callbacks.save_every_n_steps=6", f"output_dir={out}"]
        run_experiment(*words, *every, *(["--precision", precision] if precision else []))


class OnCard(Trainings):
    """The scenarios as methods, in a process with a card, in an empty folder."""

    def __init__(self, card: Any, kind: str, split: Path, vavae: Path, latents: Path) -> None:
        import lightning as L

        from vavae_tools.training.callbacks import progress

        super().__init__(split, vavae, latents)
        self.card = card
        self.other = {"t4": "32", "a100": "16"}[kind]
        self.scaled = {"t4": None, "a100": "16"}[kind]  # the precision with a gradient scaler
        self._expect_float32()
        progress.is_interactive = lambda: True  # a bar, in place of lines that read losses from the card
        fit = L.Trainer.fit

        def watched(trainer: L.Trainer, *arguments: Any, **named: Any) -> None:
            trainer.callbacks.append(self.steps)
            fit(trainer, *arguments, **named)

        L.Trainer.fit = watched

    def about(self, name: str) -> dict[str, Any]:
        base = name.removesuffix("_other")
        precision = self.other if name != base else None
        self.steps = steps = _steps_of(self.card)
        gc.freeze()  # trainings and pipelines look for garbage, and need not look at all that was imported
        began, at = time.process_time(), len(self.card.heard)
        fault = ""
        try:
            found = (self.train(base, Path(name), precision) if base in TRAININGS else getattr(self, name)()) or {}
        except BaseException:
            found, fault = {}, "".join(traceback.format_exc().splitlines(keepends=True)[-16:])
        half = dict(self.card.counted("half", at))
        found = {"fault": fault, "seconds": time.process_time() - began, "half": half, **found}
        if base in TRAININGS:
            found |= {what: getattr(steps, what) for what in ("precision", "weights", "numbers", "waits", "copies")}
            found["written"] = sorted({path.name for path in Path(name).rglob("*") if path.name in OUTPUT_FOLDERS})
        return found

    def _expect_float32(self) -> None:
        """Watch `FLOAT32`, wherever the package's modules have it."""
        homes = {importlib.import_module(f"vavae_tools.{home}"): names for home, names in FLOAT32.items()}
        for home in ("vavae", "rae", "dit", "text_to_image", "token_images"):
            importlib.import_module(f"vavae_tools.recipes.{home}")  # those that take them from there
        ours = [module for name, module in sys.modules.items() if name.startswith("vavae_tools.")]
        for home, names in homes.items():
            for name in names:
                owner, _, name = name.rpartition(".")
                owners = [getattr(home, owner)] if owner else ours
                plain = getattr(owners[0] if owner else home, name)
                for one in owners:
                    for key in [key for key, value in vars(one).items() if value is plain]:
                        setattr(one, key, self._watched(plain))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*arguments: Any, **named: Any) -> Any:
            with self.card.float32_only():
                return function(*arguments, **named)

        return watched

    def the_card(self) -> dict[str, Any]:
        """What the others rely on: it refuses, waits and rounds as a card does."""
        import pytest
        import torch

        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        for mixed in (lambda: there + here, lambda: torch.stack([there, here]), lambda: there.copy_(here) @ here):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        weights = torch.nn.Linear(3, 3)
        assert weights.to("cuda").weight.is_cuda
        waited = {
            lambda: there.sum().item(): 1,
            lambda: there[there > 0]: 1,
            lambda: there.masked_fill(there > 0, 2).index_put_((there > 0,), here[0].to("cuda")): 2,
            lambda: here.to("cuda", non_blocking=True): 1,  # it is not pinned
            lambda: torch.cuda.synchronize(): 1,
            lambda: here.pin_memory().to("cuda", non_blocking=True): 0,
            lambda: torch.where(there > 0, there, 2 * there) + torch.zeros(3, device="cuda"): 0,
        }
        for number, (act, times) in enumerate(waited.items()):
            at = len(self.card.heard)
            act()
            assert self.card.counted("wait", at).total() == times, (number, self.card.heard[at:])
        with self.card.float32_only(), torch.autocast("cuda"):
            at = len(self.card.heard)
            weights(there[None]).float().softmax(1)
            half = [heard.what for heard in self.card.heard[at:] if heard.kind == "half"]
            assert half == ["aten::addmm"], half  # neither the conversion to float32 nor what follows
        return {"half": {}}  # as it shall be

    def encoding(self) -> None:
        from vavae_tools.recipes.dit import encode_split

        encode_split(self.split, self.vavae, "latents", flips=True)

    def gone_on_with(self) -> None:
        """fp16, deterministic: from a checkpoint on, weights, optimiser, schedule and scaler come out bit by bit."""
        from tiny import assert_same, assert_same_training, last

        settings = {"previews": 0, "devices": {"precision": self.scaled, "deterministic": True}}
        self.dit(Path("whole"), None, **settings)
        self.dit(Path("resumed"), None, resume="whole/checkpoint-6", **settings)
        assert_same_training("whole", "resumed")
        whole, resumed = (last(run)["MixedPrecision"] for run in ("whole", "resumed"))
        assert whole["scale"] > 0
        assert_same(whole, resumed)

    def _waits_a_step(self, make: Callable[[int], Any]) -> dict[str, int]:
        """What the processor waits for more often in 4 steps than in 3."""
        at = len(self.card.heard)
        make(3)
        few, at = self.card.counted("wait", at), len(self.card.heard)
        make(4)
        return dict(self.card.counted("wait", at) - few)

    def sampling(self) -> dict[str, Any]:
        from tiny import tiny_dit, tiny_pipeline, trained_looking

        from vavae_tools.diffusion.solvers import solvers_for

        pipe, waits = tiny_pipeline().to("cuda"), {}
        weak = tuple(trained_looking(part).eval().to("cuda") for part in tiny_dit(1))
        guidance = {"guidance_scale": 1.0}, {}, {"guidance_interval": (0.2, 0.7)}
        for name in solvers_for(pipe.objective):
            pipe.swap_solver(name)
            for settings in (*guidance, {"guide": weak}, {"precision": "32"}):
                make = functools.partial(pipe, [0, 2], output_type="pt", **settings)
                waits |= self._waits_a_step(lambda steps: make(num_inference_steps=steps))  # noqa: B023
        return {"waits": waits}

    def sampling_of_texts(self) -> dict[str, Any]:
        from test_text_pipeline import text_pipeline

        from vavae_tools.diffusion.objectives import OBJECTIVES, make_objective
        from vavae_tools.diffusion.solvers import make_solver, solvers_for

        waits = {}
        for objective in OBJECTIVES:
            pipe = text_pipeline(objective).to("cuda")
            for name in solvers_for(make_objective(objective)):
                pipe.scheduler = make_solver(name, make_objective(objective))
                waits |= self._waits_a_step(lambda steps: pipe("green", num_inference_steps=steps))  # noqa: B023
            plain = functools.partial(pipe, "green", guidance_scale=1.0)
            waits |= self._waits_a_step(lambda steps: plain(num_inference_steps=steps))  # noqa: B023
        return {"waits": waits}

    def sampling_of_tokens(self) -> dict[str, Any]:
        from test_token_pipeline import tiny

        pipe = tiny().to("cuda")
        waits = self._waits_a_step(lambda steps: pipe(num_samples=2, num_inference_steps=steps))
        waits |= self._waits_a_step(lambda steps: pipe("all is", num_inference_steps=steps, eta=0.0))
        return {"waits": waits}

    @staticmethod
    def _pipelines() -> list[tuple[Any, tuple[Any, ...]]]:
        """Each kind, and what it is asked for."""
        from test_text_pipeline import text_pipeline
        from test_token_pipeline import tiny
        from tiny import tiny_pipeline

        return [(tiny_pipeline(), ([0, 2],)), (text_pipeline(), ("green",)), (tiny(), ("all is",))]

    def half_pipelines(self) -> None:
        import torch

        for kind in (torch.float16, torch.bfloat16):
            for pipe, asked in self._pipelines():
                pipe.to("cuda", kind)(*asked, num_inference_steps=2)

    def offloaded_pipelines(self) -> None:
        for pipe, asked in self._pipelines():
            pipe.enable_model_cpu_offload()
            for _ in range(2):
                pipe(*asked, num_inference_steps=2)

    def sample_command(self) -> None:
        from vavae_tools import sample

        for number, (pipe, asked) in enumerate(self._pipelines()):
            pipe.save_pretrained(f"pipeline-{number}")
            words = ["--num_samples", "3", "--num_steps", "2", "--output_dir", f"samples-{number}"]
            sys.argv = ["sample", "--checkpoint", f"pipeline-{number}", *words]
            sys.argv += ["--prompt", asked[0]] if number else ["--guide", "pipeline-0"]
            sample.main()

    def hours(self) -> None:
        from vavae_tools.recipes.presets import Preset
        from vavae_tools.recipes.stages import estimate_hours

        dit = {"hidden_size": 48, "depth": 1, "num_heads": 3, "patch_size": 1}
        estimate_hours(Preset("here", image_size=16, vavae_batch_size=2, dit_batch_size=2, dit=dit), self.split)

    def evaluation(self) -> None:
        from test_token_pipeline import tiny
        from tiny import tiny_vavae

        from vavae_tools.data.datasets import ImageDataModule
        from vavae_tools.data.tokens.dataset import TokenImageDataset
        from vavae_tools.evaluation import classifier
        from vavae_tools.evaluation.reconstructions import compare_conditions, evaluate_vavae
        from vavae_tools.evaluation.report import evaluate_images
        from vavae_tools.evaluation.texts import evaluate_tokens

        classifier.default_steps = lambda images: 2
        evaluate_images(self.split / "val", self.split, "evaluation", progress=False)
        images, vae = ImageDataModule(self.split, 16), tiny_vavae().eval().to("cuda")
        evaluate_vavae(vae, images, "evaluation", progress=False)
        compare_conditions(vae, images.val_data)
        texts = TokenImageDataset("zen", img_size=32)
        evaluate_tokens(tiny([0] * 64 + [1], size=32).to("cuda"), texts, texts, "tokens", 2, 2)


def _steps_of(card: Any) -> Any:
    """A callback that counts what `QUIET` steps make the processor wait for, and copy to the card."""
    import lightning as L

    class Steps(L.Callback):
        def __init__(self) -> None:
            self.numbers: dict[str, float] = {}
            self.waits, self.copies = Counter(), Counter()
            self.precision = self.weights = ""
            self._at, self._step = len(card.heard), 0

        def on_train_batch_end(self, *_: Any) -> None:
            self._step += 1
            if self._step in QUIET:
                self.waits += card.counted("wait", self._at)
                self.copies += card.counted("copy", self._at)
            self._at = len(card.heard)

        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            self.precision = trainer.precision
            self.weights = ", ".join(sorted({str(weights.dtype) for weights in module.parameters()}))
            self.numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}

    return Steps()


if __name__ == "__main__":
    main(*sys.argv[1:])
