"""Command lines of training: what they mean, where their runs go, and what is said of those that mean nothing."""

import os
import re
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny import same

from vavae_tools.recipes import config as experiments
from vavae_tools.recipes.config import compose, help_text, keep_config, read_command_line, run_folder
from vavae_tools.runtime.errors import UserError
from vavae_tools.train import run_experiment
from vavae_tools.training.callbacks.checkpointing import LastCheckpoint

ROOT = Path(__file__).parents[1]


def meant(*words: str):
    return compose(read_command_line(words))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(experiments.RUN_FOLDER, "")  # so that it is put back as it was, whatever a run leaves there
    monkeypatch.delenv(experiments.RUN_FOLDER)
    return tmp_path


# ---- what a line means


def test_the_lines_of_the_specification():
    config = meant(
        *["experiment=dit_dino", "model.rae.encoder_checkpoint_path=F", "data.data_dir=D", "data.batch_size=16"],
        *["model.dit_module.learning_rate=1e-4", "model.dit_module.compile=true", "trainer=ddp", "trainer.devices=4"],
        *["trainer.strategy=fsdp", "trainer.accumulate_grad_batches=4", "ckpt_path=last"],
    )
    assert config.model.rae.encoder_checkpoint_path == "F" and config.data.data_dir == "D"
    assert config.data.batch_size == 16 and config.model.dit_module.learning_rate == 1e-4
    assert config.model.dit_module.compile is True and config.ckpt_path == "last"
    expected = {"accelerator": "auto", "devices": 4, "strategy": "fsdp", "accumulate_grad_batches": 4}
    assert {name: config.trainer[name] for name in expected} == expected


def test_the_published_model_is_the_default_of_rae():
    dit = OmegaConf.to_container(meant("experiment=dit_dino", "data.data_dir=D").model, resolve=True)
    assert dit["dit"]["hidden_size"] == [1152, 2048] and dit["dit"]["depth"] == [28, 2]
    assert dit["dit"]["num_heads"] == [16, 16] and dit["dit"]["num_classes"] == 1000
    module = dit["dit_module"]
    assert (module["ema_decay"], module["learning_rate"], module["warmup_steps"]) == (0.9995, 2e-4, 5000)
    assert (module["max_steps"], module["null_label"], module["latent_size"]) == (100_000, 1000, [768, 16, 16])


def test_the_null_label_follows_the_number_of_classes():
    config = meant("experiment=dit_dino", "data.data_dir=D", "model.dit.num_classes=31")
    assert OmegaConf.to_container(config, resolve=True)["model"]["dit_module"]["null_label"] == 31


def test_flags_stand_for_keys_and_hold():
    config = meant("--lr", "1e-4", "--batch-size=8", "--flips", "--devices", "2", "--size", "S", "--seed", "3")
    assert config.name == "vavae_dit" and config.model.dit_module.learning_rate == 1e-4
    assert config.data.batch_size == 8 and config.data.flips is True and config.trainer.devices == 2
    assert config.model.dit.size == "S" and config.seed == 3
    assert meant("--flips", "false").data.flips is False


def test_every_experiment_can_be_deterministic_and_computes_as_the_machine_does_best():
    for name in experiments.experiments():
        data = [] if name.endswith("dummy") else ["--data_dir", "D"]
        data += ["--dataset_name", "folder"] if name == "text_to_image" else []
        config = meant(f"experiment={name}", *data, "--deterministic")
        assert config.trainer.deterministic is True, name
        assert OmegaConf.to_container(config, resolve=True)["trainer"]["precision"] is None, name
        assert config.get("training", {}).get("use_amp", True) is True, name
    for option in ("auto", "cpu", "ddp", "gpu"):
        assert meant(f"trainer={option}").trainer.deterministic is False


def test_a_file_of_values_is_between_the_experiment_and_what_is_typed(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "experiment: dit_dummy\nmodel:\n  dit_module:\n    learning_rate: 1e-4\n    max_steps: 7\n"
        "  dit:\n    hidden_size: [8, 16]\n"
    )
    config = meant("--config", str(path), "model.dit_module.max_steps=9")
    assert config.name == "dit_dummy" and config.model.dit_module.max_steps == 9
    assert config.model.dit_module.learning_rate == 1e-4 and list(config.model.dit.hidden_size) == [8, 16]
    assert meant("--config", str(path), "experiment=rae_dit", "data.data_dir=D").name == "rae_dit"


def test_what_lightning_knows_besides_can_be_added():
    assert meant("+trainer.limit_val_batches=3").trainer.limit_val_batches == 3


WRONG = {
    "experiment=dit_din": "No experiment=dit_din; did you mean dit_dino?; there are dit_dino, dit_dummy",
    "trainer=tpu": "there are auto, cpu, ddp, gpu",
    "data.batch_sise=3": "No key 'data.batch_sise'; did you mean data.batch_size?",
    "model.dit_module.learning_rat=1": "did you mean model.dit_module.learning_rate?",
    "learning_rate=1": "did you mean model.dit_module.learning_rate?",
    "data.batch_size=abc": "data.batch_size is 'abc', expected a whole number such as 32",
    "data.batch_size=1.5": "data.batch_size is 1.5, expected a whole number",
    "model.dit_module.gradient_checkpointing=7": "gradient_checkpointing is 7, expected true or false",
    "model.dit_module.learning_rate=high": "learning_rate is 'high', expected a number",
    "experiment=dit_dino": "experiment=dit_dino needs data.data_dir=… (or --data_dir …)",
    "--learning_rat 3": "No --learning_rat",
    "--lrr 3": "No --lrr; did you mean --lr?",
    "--lr": "--lr needs a value",
    "--config": "--config needs a value",
    "--config none.yaml": "--config none.yaml: No such file or directory",
    "trainer.devices=[1": "trainer.devices=[1",
    "~seed": "a key cannot be taken away",
    "word": "'word' is neither --flag VALUE nor key=value",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_line_that_means_nothing_is_answered_by_one(line):
    with pytest.raises(UserError) as error:
        meant(*line.split())
    assert WRONG[line] in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_means_nothing_is_named(tmp_path):
    for text, said in (
        ("model:\n  dit:\n    hiden_size: 3\n", "No key 'model.dit.hiden_size'; did you mean model.dit.hidden_size?"),
        ("a: [1", "is no YAML"),
        ("- 1\n", "expected keys and values"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=re.escape(said)) as error:
            meant("--config", str(tmp_path / "bad.yaml"))
        assert "bad.yaml" in str(error.value)


@pytest.mark.parametrize("name", [None, *experiments.experiments()])
def test_help_names_experiments_flags_and_keys(name):
    text = help_text(name)
    assert text.startswith("usage: ") and "learning_rate: " in text and "--resume" in text
    for experiment in experiments.experiments():
        assert f"  {experiment}" in text


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
    folder.mkdir(parents=True)
    assert run_folder(meant(), now)[0] == Path("logs/runs/2026-03-04/05-06-07-2")
    assert run_folder(meant("--output_dir", "mine"))[0] == Path("mine")
    assert run_folder(meant("hydra.run.dir=mine"))[0] == Path("mine")


def test_last_is_the_newest_run_of_the_same_experiment_with_a_checkpoint(here):
    run_of("dit_dummy", "2026-01-01/10-00-00", "last.ckpt")
    newest = run_of("dit_dummy", "2026-01-02/09-00-00", "last.ckpt")
    run_of("dit_dummy", "2026-01-03/09-00-00")
    run_of("vavae_dit", "2026-01-04/09-00-00", "last.ckpt")
    folder, resume, said = run_folder(meant("experiment=dit_dummy", "ckpt_path=last"))
    assert (folder, resume) == (newest, "last") and str(newest) in said
    assert run_folder(meant("experiment=dit_dummy", "--resume", "last"))[0] == newest


def test_last_without_a_run_says_so(here):
    run_of("vavae_dit", "2026-01-04/09-00-00", "last.ckpt")
    with pytest.raises(UserError, match=r"ckpt_path=last: no run of dit_dummy .*09-00-00 \(vavae_dit\)"):
        run_folder(meant("experiment=dit_dummy", "ckpt_path=last"))


def test_a_checkpoint_of_a_run_goes_on_in_its_folder(here):
    folder = run_of("dit_dummy", "2026-01-01/10-00-00", "last.ckpt")
    for path in (folder / "checkpoints" / "last.ckpt", folder, folder / "checkpoint-5"):
        found, resume, said = run_folder(meant("experiment=dit_dummy", f"ckpt_path={path}"))
        assert (found, resume) == (folder, str(path)) and str(folder) in said
    assert run_folder(meant("experiment=dit_dummy", "ckpt_path=else.ckpt"))[0].parent.parent == Path("logs/runs")


def test_the_configuration_is_kept_and_the_other_processes_are_told(here):
    config = meant("experiment=dit_dummy", "seed=5")
    keep_config(config, ["experiment=dit_dummy", "seed=5"], Path("run"))
    kept = OmegaConf.load("run/.hydra/config.yaml")
    assert kept.name == "dit_dummy" and kept.seed == 5 and kept.model.dit.hidden_size == [96, 192]
    assert OmegaConf.load("run/.hydra/overrides.yaml") == ["experiment=dit_dummy", "seed=5"]
    assert os.environ[experiments.RUN_FOLDER] == "run"
    assert run_folder(config)[0] == Path("run")


# ---- whole runs


@pytest.fixture
def train(here, monkeypatch, capsys):
    from vavae_tools.train import main

    def train(*words: str) -> str:
        monkeypatch.delenv(experiments.RUN_FOLDER, raising=False)
        monkeypatch.setattr(sys, "argv", ["train", *words])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return train


SHORT = ["experiment=dit_dummy", "data.num_pictures=48", "data.batch_size=8", "callbacks.previews=1", "trainer=cpu"]
SMALL = ["model.dit.hidden_size=[16,32]", "model.dit.depth=[1,1]", "model.dit.num_heads=[2,2]"]


def values_of(run: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for folder in sorted((run / "lightning_logs").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        if tag in events.Tags()["scalars"]:
            found += [event.value for event in events.Scalars(tag)]
    return found


def test_the_dummy_leaves_what_a_lightning_hydra_project_expects(train):
    said = train(*SHORT, *SMALL, "model.dit_module.max_steps=12", "+trainer.log_every_n_steps=2")
    (run,) = Path("logs/runs").glob("*/*")
    assert re.fullmatch(r"logs/runs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", run.as_posix())
    assert (run / ".hydra" / "config.yaml").is_file() and (run / "checkpoints" / "last.ckpt").is_file()
    assert len(list((run / "checkpoints").glob("epoch=*.ckpt"))) == 1
    for tag in ("train/loss", "val/loss", "train/lr", "rae/psnr"):
        assert values_of(run, tag), tag
    assert "20 dB" in said and f"next: python -m vavae_tools.sample --checkpoint {run / 'pipeline'}" in said
    assert (run / "reconstructions" / "before.png").is_file() and list((run / "samples").glob("*.png"))


def test_each_run_of_a_notebook_has_its_own_folder(here):
    short = [*SHORT, *SMALL, "model.dit_module.max_steps=1", "callbacks.previews=0"]
    made = {run_experiment(*short).parent for _ in range(2)}
    assert len(made) == 2 == len(list(Path("logs/runs").glob("*/*")))


def test_ckpt_path_last_goes_on_bit_by_bit(train, monkeypatch):
    numbers = [*SHORT, *SMALL, "model.dit_module.max_steps=10"]
    train(*numbers, "--output_dir", "whole")
    run, step_ends = Path("whole"), LastCheckpoint.on_train_batch_end

    def stop(self, trainer, *others):
        self._stop = trainer.global_step == 6
        step_ends(self, trainer, *others)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_end", stop)
        assert "Stopped after step 6" in train(*numbers)
    said = train(*numbers, "ckpt_path=last")
    (short,) = Path("logs/runs").glob("*/*")
    assert f"ckpt_path=last: going on with {short}" in said and "going on after step 6 of 10" in said
    weights = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, short)
    ]
    assert all(same(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_latent_size_or_class_number_that_does_not_fit_is_one_line(train):
    for change, said in (
        ("model.dit_module.latent_size=[768,16,16]", "latent_size 768×16×16 does not fit the encoder, whose latents"),
        ("model.dit.input_size=5", "set model.dit.in_channels=64 model.dit.input_size=4"),
        ("model.dit.num_classes=3", "num_classes"),
        ("model.dit_module.null_label=7", "model.dit_module.null_label=7, but the model has 4 classes"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            train(*SHORT, *SMALL, change)


@pytest.mark.parametrize("word", ["lr=5e-5", "flags.lr=5e-5", "+flags.lr=5e-5", "~flags.lr"])
def test_what_a_flag_stands_for_is_no_key(word):
    """It was taken, and training went on at the default rate."""
    with pytest.raises(UserError, match=r"did you mean model\.dit_module\.learning_rate\?"):
        compose(read_command_line(["experiment=vavae_dit", "data.data_dir=x", "model.vavae.source=y", word]))


def test_a_printed_configuration_is_read_again(tmp_path):
    words = ["experiment=vavae_dit", "data.data_dir=x", "model.vavae.source=y", "--lr", "3e-4"]
    config = compose(read_command_line(words))
    (tmp_path / "mine.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    again = compose(read_command_line(["experiment=vavae_dit", "--config", str(tmp_path / "mine.yaml")]))
    assert again.model == config.model and again.model.dit_module.learning_rate == 3e-4
    (tmp_path / "wrong.yaml").write_text("flags: {lr: 5e-5}\n")
    with pytest.raises(UserError, match=r"wrong.yaml: No key 'flags.lr'; did you mean model.dit_module.learning_rate"):
        compose(read_command_line([*words, "--config", str(tmp_path / "wrong.yaml")]))
