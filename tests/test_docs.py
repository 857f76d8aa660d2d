"""README and docs are true: options are those that there are, links lead somewhere, commands and examples run."""

import contextlib
import io
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from vavae_tools.__main__ import COMMANDS
from vavae_tools.autoencoders.losses import IMAGE_LOSSES
from vavae_tools.diffusion import SOLVERS
from vavae_tools.recipes.config import compose, read_command_line

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/pages").glob("*.md"))]
OTHERS = {  # of other programs: jupyter, pytest, torchrun, Slurm, theirs in the table of commands
    *("--inplace", "--dist", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"),
    *("--rdzv_backend", "--rdzv_id", "--rdzv_endpoint", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time"),
    *("--img_size", "--data_path", "--use_amp", "--gradient_accumulation_steps", "--epochs"),
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Return the words of each command in a page's blocks, placeholders and brackets left out."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(re.sub(r"\[.*?\]", "", line), comments=True) for line in lines if line and line[0] != "#"]


def test_options_are_those_of_the_recipes():
    made = runpy.run_path(str(ROOT / "docs/options.py"))["page"]()
    assert (ROOT / "docs/pages/options.md").read_text(encoding="utf-8") == made, "run python docs/options.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_options_that_there_are(page, known_flags):
    for words in commands(page):
        if words[:3] == ["python", "-m", "vavae_tools.train"]:
            words = [word for word in words[3:] if word != "…"]
            if "--config" not in words:  # an example's file
                compose(read_command_line([re.sub("…", "x", word) for word in words]))
    text = re.sub(r"\| `[^`]*(torchrun|src/)[^`]*` \|", "", page.read_text(encoding="utf-8"))
    found = set(re.findall(r"(?<![\w-])--[a-z][\w-]+\w(?!…)", text))
    assert not {flag for flag in found if flag not in known_flags | OTHERS and not flag.endswith("_")}


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Every flag of every command."""
    made, said = runpy.run_path(str(ROOT / "docs/options.py"))["page"](), io.StringIO()
    keys = re.findall(r"^\| `([\w.]+)` ", made, re.MULTILINE)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        for place, _ in COMMANDS.values():
            module, function = place.split(":")
            parts = ["list", "inspect", "prune", "convert", "verify", "trust"] if "checkpoints" in module else [""]
            for part in parts:
                patch.setattr("sys.argv", ["command", *part.split(), "--help"])
                with contextlib.suppress(SystemExit):
                    getattr(import_module(f"vavae_tools.{module}"), function)()
    of_benchmarks = (path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    said.write(" ".join(of_benchmarks))
    ends = (f"--{key.rpartition('.')[2]}" for key in keys)
    return {*ends, *(f"--{key}" for key in keys), *re.findall(r"--[a-z][\w-]+", said.getvalue())}


def test_the_commands_of_the_readme_run_one_after_the_other(here, gait, run_main):
    """As they stand, but with a small data set and a few steps."""
    path = re.search(r"<!-- path -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    short = {
        "minimal_training_modification.py": "--image_size 16 --max_epochs 1",
        "vavae_tools.train": "--hidden_size 16 --depth 1 --num_heads 2 --max_steps 2 --previews 0",
        "vavae_tools.sample": "--num_steps 1",
        "--gain": "--steps 2 --seeds 1",
    }
    for line in path[1].splitlines():
        words = shlex.split(line.replace("DIR", str(gait), 1) if "--input_dir" in line else line)
        name = words[2] if words[1] == "-m" else words[1]
        more = short.get("--gain" if "--gain" in words else name, "").split()
        module = import_module(name) if words[1] == "-m" else SimpleNamespace(**runpy.run_path(str(ROOT / name)))
        status, _, err = run_main(module.main, *words[3 if words[1] == "-m" else 2 :], *more)
        assert not status, f"{line}: {err[-2000:]}"
    assert (here / "outputs/evaluation/gain.json").is_file() and len([*here.glob("outputs/samples/ID_*")]) == 3


def test_examples_of_the_architecture_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(SOLVERS), mock.patch.dict(IMAGE_LOSSES):
        exec("\n".join(blocks(ROOT / "docs/pages/architecture.md", "python")), {"__name__": "example"})
