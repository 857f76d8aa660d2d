"""Command lines of training: what they mean, where their runs go, and what is said of those that mean nothing."""

import re
import shlex
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from alike import curves
from filelock import FileLock
from test_devices import T4S
from tiny import contents, refused, refuses

from vavae_tools import sample
from vavae_tools import train as command
from vavae_tools.recipes import config as experiments
from vavae_tools.recipes import presets
from vavae_tools.recipes.base import RECIPES
from vavae_tools.recipes.run_folder import kept_config, run_folder
from vavae_tools.runtime.errors import UserError
from vavae_tools.training.config import settings_of
from vavae_tools.training.run import make_loggers

ROOT = Path(__file__).parents[1]


def meant(*words: str, **defaults: str):
    return experiments.compose(experiments.read_command_line(words), **defaults)


# ---- what a line means


def values(*words: str) -> dict:
    """Key → value of what a line means."""
    plan = meant(*words)
    return {"experiment": plan.name, **{key: setting.default for key, setting in settings_of(plan.recipe).items()}}


LINES = {
    "experiment=dit_dino model.rae.encoder_checkpoint_path=F data.data_dir=D data.batch_size=16 trainer.devices=4 "
    "model.dit_module.learning_rate=1e-4 model.dit_module.compile=true trainer=ddp trainer.strategy=fsdp "
    "trainer.accumulate_grad_batches=4 ckpt_path=last": {
        **{"rae.encoder_checkpoint_path": "F", "data.data_dir": "D", "resume": "last", "train.strategy": "fsdp"},
        **{"train.batch_size": 16, "train.lr": 1e-4, "train.compile": True, "train.accelerator": "auto"},
        **{"train.devices": 4, "train.accumulate_grad_batches": 4, "model.hidden_size": [1152, 2048]},
        **{"model.num_classes": 1000, "train.max_steps": 100_000, "objective.time_shift": None},
    },
    "experiment=token_images --data_path D --img_size 64 --batch_size 32 --epochs 100 --use_amp "
    "--gradient_accumulation_steps 4 --resume output/checkpoint_epoch_50.pth": {
        **{"data.data_dir": "D", "data.image_size": 64, "train.batch_size": 32, "train.max_epochs": 100},
        **{"train.accumulate_grad_batches": 4, "train.precision": None, "resume": "output/checkpoint_epoch_50.pth"},
    },
    "experiment=vavae --data_dir DIR --original_vavae FILE --condition_dim 8 --kl_weight 1e-6 --batch_size 16 "
    "--max_epochs 100 --lr 1e-4 --devices 2 --num_nodes 1 --strategy ddp --accelerator gpu --precision 16 "
    "--output_dir outputs --lpips_weights a.pth b.pth --image_size 128x256": {
        **{"loss.lpips_weights": ["a.pth", "b.pth"], "data.image_size": [128, 256]},
        **{"data.data_dir": "DIR", "vavae.original_vavae": "FILE", "vavae.condition_dim": 8, "loss.kl_weight": 1e-6},
        **{"train.batch_size": 16, "train.max_epochs": 100, "train.lr": 1e-4, "train.devices": 2},
        **{"train.strategy": "ddp", "train.accelerator": "gpu", "train.precision": "16", "output_dir": "outputs"},
    },
    "--config configs/train_config.yaml --resume outputs/checkpoint-epoch-10": {
        **{"experiment": "text_to_image", "data.dataset_name": "coco", "train.batch_size": 48, "train.lr": 1e-4},
        **{"train.accumulate_grad_batches": 2, "train.precision": "bf16", "train.save_every_n_steps": 500},
        **{"model.depth": 16, "train.warmup_steps": 500, "resume": "outputs/checkpoint-epoch-10"},
        "output_dir": "./outputs",
    },
    "--lr 1e-4 --batch-size=8 --flips --devices 2 --size S --seed 3 --vavae v --latents_dir 2024 "
    "logger=[tensorboard,wandb]": {
        **{"experiment": "vavae_dit", "train.lr": 1e-4, "seed": 3, "train.batch_size": 8, "data.flips": True},
        **{"train.logger": ["tensorboard", "wandb"]},
        **{"train.devices": 2, "model.size": "S", "vavae.source": "v", "data.latents_dir": "2024"},
    },
    "experiment=text_to_image data.dataset_name=custom data.dataset_path=D training.mixed_precision=no "
    "training.max_grad_norm=0.5 training.prefetch_factor=3 lr_scheduler.type=linear --text_encoder c --vae v": {
        **{"train.precision": "no", "train.gradient_clip": 0.5, "data.prefetch_factor": 3, "data.data_dir": "D"},
        **{"train.schedule": "linear", "text_encoder.name": "c", "vae.name": "v"},
    },
    "experiment=token_dummy training.use_amp=false ema.enabled=false": {
        "train.precision": "32",
        "train.ema_decay": 0,
        "train.max_steps": 1800,
    },
    "experiment=dit_dummy data=shapes model.objective=epsilon callbacks.preview_guidance_scale=2 trainer=gpu "
    "--flips false --model.dit.depth=3 trainer.devices=2": {
        **{"objective.name": "epsilon", "sampling.guidance_scale": 2, "train.accelerator": "gpu"},
        **{"data.flips": False, "model.depth": 3, "train.devices": 2},
    },
    "experiment=rae_decoder --data_dir D --max_epochs 3": {"train.max_steps": None, "train.max_epochs": 3},
    "+trainer.limit_val_batches=3 trainer.detect_anomaly=off lr=5e-5 +trainer.logger=csv": {
        **{"train.trainer": {"limit_val_batches": 3, "detect_anomaly": False}, "train.lr": 5e-5},
        "train.logger": "csv",
    },
    "trainer.limit_train_batches=1.0 trainer.val_check_interval=0.5 trainer.min_epochs=1e1": {
        "train.trainer": {"limit_train_batches": 1.0, "val_check_interval": 0.5, "min_epochs": 10},
    },
    "trainer.max_epochs=3 trainer.check_val_every_n_epoch=2 trainer.log_every_n_steps=5 --early_stopping_patience 4": {
        **{"train.max_epochs": 3, "train.trainer": {"check_val_every_n_epoch": 2}, "train.log_every_n_steps": 5},
        "train.early_stopping_patience": 4,
    },
    "--experiment token_images data.data_dir=D --trainer.check_val_every_n_epoch 2 --mixed_precision bf16 "
    "--steps 7 --learning_rate: 1e-4": {**{"train.max_steps": 7, "train.lr": 1e-4, "train.precision": "bf16"}},
    # a path with = is no key, and a key is no flag's value
    "--resume epoch=003-0.57.ckpt --output_dir runs/lr=1e-4,[x] --flips data.data_dir=a=b": {
        **{"resume": "epoch=003-0.57.ckpt", "output_dir": "runs/lr=1e-4,[x]", "data.flips": True},
        "data.data_dir": "a=b",
    },
    "ckpt_path=logs/runs/x/epoch=003-0.57.ckpt --batch_size 010 --seed 1_000 --flips on init.classes=[03,null,on] "
    "--max_steps 1e5": {
        **{"resume": "logs/runs/x/epoch=003-0.57.ckpt", "train.batch_size": 10, "seed": 1000, "data.flips": True},
        **{"init.classes": ["03", None, "on"], "train.max_steps": 100_000},
    },
}


@pytest.mark.parametrize("line", LINES)
def test_what_a_line_means(line):
    found = values(*line.split())
    assert {key: found[key] for key in LINES[line]} == LINES[line]


PLAIN = ["2024_01_15", "007", "1e5", "on", "2024-01-15", "0x1F", "11:30", "${x}"]  # YAML reads most of them otherwise


@pytest.mark.parametrize("text", [*PLAIN, "[run]", "a: b", "Answer:", "# 1"])
def test_a_text_is_what_was_typed(text, tmp_path):
    (tmp_path / "run.yaml").write_text(f"output_dir: {text if text in PLAIN else repr(text)}\n")
    for words in ([f"output_dir={text}"], ["--output_dir", text], ["--config", str(tmp_path / "run.yaml")]):
        assert values(*words)["output_dir"] == text
    for experiment in ("experiment=text_to_image data.dataset_name=coco", "experiment=token_images data_dir=D"):
        assert values(*experiment.split(), "--prompts", "", "null", text)["sampling.prompts"] == ["", "null", text]


def test_home_and_hours_are_understood_and_a_text_ends_with_its_last_word(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("output_dir: ~/run\nmax_time: 11:30\ndata:\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (["--output_dir=~/run", "max_time=11:30"], ["--config=~/run.yaml"]):
        found = values(*words)
        assert (found["output_dir"], found["train.max_time"]) == (str(Path.home() / "run"), "11:30")
    assert values("--max_time", "0")["train.max_time"] == "0"
    for text, expected in (("|\n  007\n", "007"), (">\n  a\n  b\n", "a b"), ("''", None), ("~", None), ("'[x'", "[x")):
        (tmp_path / "run.yaml").write_text(f"output_dir: {text}\n")
        assert values("--config=~/run.yaml")["output_dir"] == expected


def test_a_scripts_own_default_is_below_a_files(tmp_path):
    (tmp_path / "run.yaml").write_text("output_dir: mine\n")
    for words, expected in (([], "outputs"), (["--config", str(tmp_path / "run.yaml")], "mine")):
        assert meant(*words, output_dir="outputs").recipe.output_dir == expected


def test_a_length_that_is_typed_holds_before_a_files(tmp_path):
    for kept, words, expected in (("max_steps: 9", "--epochs 2", (None, 2)), ("max_epochs: 9", "--steps 2", (2, 9))):
        (tmp_path / "run.yaml").write_text(f"train: {{{kept}}}\n")
        found = values("--config", str(tmp_path / "run.yaml"), *words.split())
        assert (found["train.max_steps"], found["train.max_epochs"]) == expected


def test_each_other_name_of_a_key_is_one_of_some_recipe():
    recipes = [experiments.RecipeSettings(recipe()) for recipe in RECIPES.values()]
    others = [old for old in experiments._aliases()["keys"] if not old.endswith(".")]
    assert others and not [old for old in others if not any(of.home(old) for of in recipes)]


def test_a_file_of_values_is_between_the_experiment_and_what_is_typed(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "experiment: dit_dummy\nmodel:\n  dit_module:\n    learning_rate: 1e-4\n    max_steps: 7\n"
        "  dit:\n    hidden_size: [8, 16]\n"
    )
    found = values("--config", str(path), "model.dit_module.max_steps=9")
    assert found["experiment"] == "dit_dummy" and found["train.max_steps"] == 9
    assert found["train.lr"] == 1e-4 and found["model.hidden_size"] == [8, 16]
    assert values("--config", str(path), "experiment=rae_dit", "data.data_dir=D")["experiment"] == "rae_dit"


WRONG = {
    "experiment=dit_din": "No experiment 'dit_din' (did you mean dit_dino?); there are dit_dino, dit_dummy",
    "trainer=tpu": "there are auto, cpu, gpu, ddp",
    "data.batch_sise=3": "No key 'data.batch_sise'; did you mean train.batch_size?",
    "data.batch_size=0": "data.batch_size is 0, expected a whole number of 1 or more",
    "train.ema_decay=1.5": "train.ema_decay is 1.5, expected a share from 0 to 1",
    "train.schedule=slow": "train.schedule is 'slow', expected one of cosine, linear, constant",
    "model.objective=velocity": "expected one of flow_matching, epsilon, v_prediction, v, sample, x0",
    "experiment=dit_dino": "experiment=dit_dino needs data.data_dir=… (or --data_dir …)",
    "--weight_decay 3": "No --weight_decay; --print_config",
    "--warmup 3": "did you mean train.warmup_steps?",
    "--lrr 3": "No --lrr; did you mean train.lr?",
    "--lr": "--lr needs a value",
    "--lr 1 2": "'2' is neither --flag VALUE nor key=value",
    "--num_classes": "--num_classes could be data.num_classes or model.num_classes",
    "--config": "--config needs a value",
    "--config none.yaml": "--config none.yaml: No such file or directory",
    "model.hidden_size=[1,[]": "model.hidden_size=[1,[] is no list",
    "--max_time 11.5": "--max_time is '11.5', expected hours:minutes, such as 11:30",
    "trainer.callbacks=x": "No trainer.callbacks here, as each experiment has its own: leave it out",
    "trainer.devices=-1": "expected a whole number of 1 or more or auto",
    "trainer.limit_val_batches=abc": "trainer.limit_val_batches is 'abc', expected a whole number or a number",
    "--trainer.min_steps x": "--trainer.min_steps is 'x', expected a whole number",
    "+trainer.detect_anomaly=3": "trainer.detect_anomaly is 3, expected true or false",
    "--num_steps 1000": "--num_steps could be train.max_steps or sampling.num_steps: type the key, as train.max_steps=",
    "--experiment --lr 3": "experiment= needs a name",
    "+trainer.devicez=2": "No key 'trainer.devicez'; did you mean train.devices?",
    "--data_path D --tokenizer bpe": "No --tokenizer here: it is one of experiment=token_images",
    "--resume data.data_dir=D": "--resume needs a value",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_line_that_means_nothing_is_answered_by_one(line):
    assert WRONG[line] in refused(meant, *line.split())


def test_a_file_that_means_nothing_is_named(tmp_path):
    for text, said in (
        ("model:\n  dit:\n    hiden_size: 3\n", "No key 'model.dit.hiden_size'; did you mean model.hidden_size?"),
        ("a: [1", "is no YAML"),
        ("- 1\n", "expected keys and values"),
        ("flags: {lr: 5e-5}\n", "No key 'flags.lr'; did you mean train.lr"),
        ("train: {lr: 1e-4}\ntrain: {seed: 1}\n", "train stands twice"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        refuses(rf"bad\.yaml.*{re.escape(said)}", meant, "--config", str(tmp_path / "bad.yaml"))


def test_help_names_experiments_and_each_key_with_its_meaning():
    for name in (None, *experiments.experiments()):
        text = experiments.help_text(name)
        assert text.startswith("usage: ") and "  --lr [" in text and "  --resume [" in text
        assert all(f"  {experiment}" in text for experiment in experiments.experiments())


# ---- where a run goes


def run_of(name: str, folder: str, *checkpoints: str) -> Path:
    folder = Path("logs/runs") / folder
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(f"name: {name}\n")
    for checkpoint in checkpoints:
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / checkpoint).write_bytes(b"")
    return folder


def test_a_run_has_the_folder_of_its_day_and_time(here):
    now = datetime(2026, 3, 4, 5, 6, 7)
    folder, resume, _ = run_folder(meant(), now)
    assert folder == Path("logs/runs/2026-03-04/05-06-07") and resume is None
    others = {run_folder(meant(), now)[0] for _ in range(3)}  # in the same second
    assert others == {folder.with_name(f"05-06-07-{number}") for number in (2, 3, 4)}
    assert run_folder(meant("hydra.run.dir=mine"))[0] == Path("mine")


def test_a_refused_training_leaves_a_folder_as_it_was(here):
    def kept_where_refused(*words):
        plan = meant(*words)
        folder, _, _ = run_folder(plan)
        with pytest.raises(UserError), kept_config(plan, words, folder):
            raise UserError("such as another model's checkpoint")
        return folder

    assert not kept_where_refused().exists() and not kept_where_refused("output_dir=new").exists()
    run = run_of("vavae_dit", "2026-01-01/10-00-00", "last.ckpt")
    assert kept_where_refused("seed=5", f"resume={run}") == run and (run / "checkpoints" / "last.ckpt").exists()
    assert contents(run / ".hydra") == {"config.yaml": b"name: vavae_dit\n"}
    lock = FileLock(run / ".lock")
    with lock, pytest.raises(UserError, match="Another training writes into"), kept_config(meant(), [], run):
        pass
    assert contents(run / ".hydra") == {"config.yaml": b"name: vavae_dit\n"}
    with pytest.raises(UserError), kept_config(meant(), [], Path("begun")):
        Path("begun/train.log").write_text("begin")
        raise UserError("such as no memory")
    assert Path("begun/.hydra/config.yaml").is_file()


def test_what_the_machine_decides_is_printed(train, monkeypatch):
    monkeypatch.setattr(presets, "find_machine", lambda: T4S)
    shown = yaml.safe_load(train("experiment=vavae", "--print_config", "--max_epochs", "3"))["train"]
    assert (shown["batch_size"], shown["max_epochs"]) == (presets.find_preset().vavae_batch_size, 3)


def test_what_a_run_resumes_from(here):
    first = run_of("dit_dummy", "2026-01-01/10-00-00", "last.ckpt")
    newest = run_of("dit_dummy", "2026-01-02/09-00-00", "last.ckpt")
    run_of("dit_dummy", "2026-01-03/09-00-00")
    run_of("vavae_dit", "2026-01-04/09-00-00", "last.ckpt")
    folder, resume, said = run_folder(meant("experiment=dit_dummy", "ckpt_path=last"))
    assert (folder, resume) == (newest, "last") and str(newest) in said
    for path in (first / "checkpoints" / "last.ckpt", first, first / "checkpoint-5"):
        found, resume, said = run_folder(meant("experiment=dit_dummy", f"ckpt_path={path}"))
        assert (found, resume) == (first, str(path)) and str(first) in said
    assert run_folder(meant("experiment=dit_dummy", "ckpt_path=else.ckpt"))[0].parent.parent == Path("logs/runs")
    none = meant("experiment=text_dummy", "--resume", "last")
    refuses(r"resume=last: no run of text_dummy .*09-00-00 \(vavae_dit\)", run_folder, none)


def test_the_configuration_is_kept_and_read_again(here):
    plan = meant("experiment=dit_dummy", "seed=5", "+trainer.limit_val_batches=3", "--lr", "3e-4")
    with kept_config(plan, ["experiment=dit_dummy", "seed=5"], Path("run")):
        pass
    kept = yaml.safe_load(Path("run/.hydra/config.yaml").read_text())
    assert kept["experiment"] == "dit_dummy" and kept["seed"] == 5 and kept["model"]["hidden_size"] == [96, 192]
    assert yaml.safe_load(Path("run/.hydra/overrides.yaml").read_text()) == ["experiment=dit_dummy", "seed=5"]
    assert meant("--config", "run/.hydra/config.yaml") == plan


def test_the_configuration_of_an_older_version_is_read(tmp_path):
    (tmp_path / "config.yaml").write_text(OLDER)
    found = values("--config", str(tmp_path / "config.yaml"))
    expected = {"experiment": "vavae_dit", "train.lr": 3e-4, "train.max_steps": 6000, "train.precision": "32"}
    expected |= {"vavae.source": "V", "model.hidden_size": 192, "model.qk_norm": True, "train.batch_size": 32}
    expected |= {"objective.cosine_weight": 1.0, "sampling.guidance_scale": 1.25, "train.previews": 8, "seed": 3}
    assert {key: found[key] for key in expected} == expected


OLDER = """name: vavae_dit
task: vavae_tools.training.runs:train_vavae_dit
seed: 3
ckpt_path: null
flags: {lr: model.dit_module.learning_rate, vavae: model.vavae.source}
data: {data_dir: D, latents_dir: L, image_size: null, batch_size: 32, flips: false}
model:
  vavae: {source: V, latents_stats: null}
  dit: {size: null, hidden_size: 192, depth: 6, num_heads: 3, use_qknorm: true, class_dropout_prob: 0.1}
  objective: {cosine_weight: 1.0, time: lognorm, time_shift: 1.0, largest_noise: 1.0, cosine_eps: 0.01}
  dit_module: {learning_rate: 3.0e-4, schedule: cosine, warmup_steps: 100, max_steps: 6000, compile: null}
  init: {weights: null, classes: new, lora_targets: [qkv, proj]}
trainer: {accelerator: auto, devices: auto, precision: 32, gradient_clip_val: 1.0, accumulate_grad_batches: 1}
callbacks: {previews: 8, preview_guidance_scale: 1.25, save_every_minutes: 5.0, max_time: null}
"""


# ---- whole runs


SHORT = ["experiment=dit_dummy", "data.num_images=48", "data.batch_size=8", "callbacks.previews=1", "trainer=cpu"]
SMALL = ["model.dit.hidden_size=[16,32]", "model.dit.depth=[1,1]", "model.dit.num_heads=[2,2]"]


def test_the_dummy_leaves_what_a_lightning_hydra_project_expects(train):
    said = train(*SHORT, *SMALL, "model.dit_module.max_steps=12", "+trainer.log_every_n_steps=2")
    (run,) = Path("logs/runs").glob("*/*")
    assert (run / ".hydra" / "config.yaml").is_file() and (run / "checkpoints" / "last.ckpt").is_file()
    assert len(list((run / "checkpoints").glob("epoch=*.ckpt"))) == 1
    assert {"train/loss", "val/loss", "train/lr", "rae/psnr"} <= curves(run).keys()
    assert "20 dB" in said and f"next: python -m vavae_tools.sample --checkpoint {run / 'pipeline'}" in said
    without_null = command.run_experiment(*SHORT, *SMALL, "train.max_steps=1", "class_dropout_prob=0").parent
    assert without_null != run and list((without_null / "samples").glob("*.png"))
    assert (run / "reconstructions" / "before.png").is_file() and list((run / "samples").glob("*.png"))


NET = ["model.hidden_size=16", "model.depth=1", "model.num_heads=2", "train.batch_size=4"]
FROZEN = ["text_encoder.name=null", "vae.name=null", "train.precision=32"]
ROWS = {
    "dit_dino": (1, [*SMALL, "rae.folder=tiny", "data.data_dir=data_split", "data.batch_size=4"]),
    "train_config": (10, [*NET, *FROZEN, "data.dataset_name=shapes", "data.num_samples=8", "data.image_size=32"]),
    "token_images": (1, [*NET, "--data_path", "zen"]),
    "vavae_dit": (1, [*NET, "output_dir=outputs/dit"]),
}
"""Of the docs' table: a part of each training's line, how long a first one takes, and what makes it tiny."""


def test_commands_of_other_projects_run_as_the_readme_has_them(train, run_main, split_dir, vavae_dir):
    Path("outputs").mkdir()
    Path("data_split").symlink_to(split_dir)
    Path("outputs/vavae").symlink_to(vavae_dir)
    table = (ROOT / "docs/pages/coming_from.md").read_text().split("| theirs | ours |")[1].split("\n\n")[0]
    lines = dict(enumerate(re.findall(r"\| `python -m vavae_tools\.(train .+|sample .+)` \|", table)))
    for part, (epochs, words) in ROWS.items():
        number = next(number for number, line in lines.items() if part in line)
        _, *typed = shlex.split(lines.pop(number))
        quick = ["train.previews=0", "train.accelerator=cpu", "train.max_steps=null"]
        first = typed[: typed.index("--resume")] if "--resume" in typed else typed
        first = [word for word in first if word != "ckpt_path=last"]
        train(*first, *words, *quick, f"train.max_epochs={epochs}")
        assert not torch.distributed.is_initialized()  # trainer=ddp on one device, in a notebook's process
        if first != typed:
            assert "resuming after" in train(*typed, *words, *quick, f"train.max_epochs={epochs + 1}")
    for line in lines.values():
        _, *typed = shlex.split(line.replace(" F ", " outputs/dit/checkpoints/last.ckpt "))
        status, out, err = run_main(sample.main, *typed, "--num_samples", "3", "--num_steps", "2")
        assert not status and "written: 3 images" in out, err


def test_what_a_step_is_made_of_is_compared_on_resuming(train):
    words = [*SHORT, *SMALL, "--output_dir", "run", "train.previews=0"]
    train(*words, "train.max_steps=2")
    words += ["train.max_steps=4", "resume=last", "train.accumulate_grad_batches=2", "train.gradient_clip=9"]
    words += ["objective.time=uniform"]
    found = "accumulate_grad_batches was 1, is 2; gradient_clip was 1.0, is 9.0; objective.time was lognorm, is uniform"
    refuses(re.escape(f"{found}."), train, *words)
    said = train(*words, "--allow_changes")
    assert "changed on going on: accumulate_grad_batches was 1, is 2" in said and "4 steps of 16" in said
    nothing = train(*words)
    assert "Nothing is left to train: run/checkpoints/last.ckpt is at step 4 of 4; take more" in nothing


def test_a_latent_size_or_class_number_that_does_not_fit_is_one_line(train):
    for change, said in (
        ("model.dit_module.latent_size=[768,16,16]", "latent_size=[768, 16, 16] does not fit the latents"),
        ("model.dit.input_size=5", "model.input_size=5 does not fit the latents"),
        ("model.dit.num_classes=3", "num_classes"),
        ("model.dit_module.null_label=7", "model.null_label=7, expected 4"),
        ("objective.name=epsilon objective.cosine_weight=0.5", "No argument 'cosine_weight' of the objective epsilon"),
    ):
        refuses(re.escape(said), train, *SHORT, *SMALL, *change.split())


def test_training_ends_early_where_nothing_gets_better(train):
    still = ["--lr", "1e-12", "train.max_epochs=6", "train.previews=0", "--output_dir", "[run] a=1"]
    said = train(*SHORT, *SMALL, *still, "--early_stopping_patience", "2")
    assert said.startswith("Writing into [run] a=1\n")
    assert "Ended early, after step 18: val/loss was not better than" in said and "(--early_stopping_patience)" in said
    # a run that resumes has its own patience, and a best checkpoint's path is no key
    (best,) = Path("[run] a=1/checkpoints").glob("epoch=*.ckpt")
    resumed = train(*SHORT, *SMALL, *still, "--early_stopping_patience", "3", "--resume", str(best))
    assert "Ended early, after step 24" in resumed


def test_what_a_folder_holds_says_which_experiment_takes_it(train):
    Path("texts/more").mkdir(parents=True)
    Path("texts/more/a.txt").write_text("a")
    said = r"such as a.txt, and no images: .*experiment=token_images takes texts"
    refuses(said, train, "--data_path", "texts", "--img_size", "64", "--epochs", "100", "--use_amp")
    assert not Path("logs").exists()


def test_loggers_by_name_and_always_a_csv(tmp_path):
    assert [type(logger).__name__ for logger in make_loggers("tensorboard", tmp_path)][1:] == ["CSVLogger"]
    refuses("needs the package wandb: pip", make_loggers, "wandb", tmp_path)
