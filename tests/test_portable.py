"""A pipeline's folder that leaves: plain diffusers opens it where the package is not, and samples the same."""

import json
import os
import subprocess
import sys
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from test_text_pipeline import text_pipeline
from test_token_pipeline import tiny as token_pipeline
from tiny import PEOPLE, refuses, same, tiny_pipeline, tiny_vavae, trained_looking

from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DDT
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.export import main as export_main
from vavae_tools.pipelines import portable
from vavae_tools.pipelines.base import kind_of
from vavae_tools.pipelines.classes import LatentDiTPipeline, load_pipeline

CALLS = {
    "classes": {"labels": ["ID_3", "ID_1"], "num_inference_steps": 3, "output_type": "pt"},
    "ddt": {"labels": [0, 2], "num_inference_steps": 3, "output_type": "pt"},
    "text": {"prompt": "a red bird", "num_inference_steps": 3, "output_type": "pt"},
    "tokens": {"num_samples": 2, "num_inference_steps": 3, "seed": 4},
}
ELSEWHERE = """
import sys
class Elsewhere:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("vavae_tools", "lightning"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Elsewhere())
import json, torch
from diffusers import DiffusionPipeline
calls, made = json.loads(sys.argv[1]), {}
for name, call in calls.items():
    seeded = {} if "seed" in call else {"generator": torch.Generator().manual_seed(5)}
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    made[name] = pipe(**call, **seeded).images
    pipe.save_pretrained(f"again/{name}")
torch.save(made, "made.pt")
"""


def pipelines() -> dict:
    torch.manual_seed(0)
    numbers = {"hidden_size": (16, 24), "depth": (1, 1), "num_heads": (2, 2)}
    denoiser = DDT(input_size=8, patch_size=4, in_channels=2, **numbers)
    vae = tiny_vavae(condition_dim=0, num_conditions=0, latents_mean=(0.5, -1.0), latents_std=(2.0, 0.5))
    ddt = vae.eval(), trained_looking(denoiser).eval(), ClassConditioner(PEOPLE, 16).eval(), make_solver("midpoint")
    return {
        "classes": tiny_pipeline(),
        "ddt": LatentDiTPipeline(*ddt),
        "text": text_pipeline(),
        "tokens": token_pipeline(),
    }


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """The folders, and what was made of them by an interpreter that does not find the package."""
    here, made = tmp_path_factory.mktemp("portable"), {}
    for name, pipe in pipelines().items():
        seeded = {} if "seed" in CALLS[name] else {"generator": torch.Generator().manual_seed(5)}
        made[name] = pipe(**CALLS[name], **seeded).images
        pipe.save_pretrained(here / name)
    quiet = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(here / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", ELSEWHERE, json.dumps(CALLS)]
    done = subprocess.run(command, cwd=here, env={**os.environ, **quiet}, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return here, made


@pytest.mark.parametrize("name", CALLS)
def test_where_the_package_is_not_the_samples_are_the_same(there, name):
    here, made = there
    assert same(torch.load(here / "made.pt")[name], made[name])
    files = [path for glob in ("**/*.py", "*.json", "*/config.json") for path in (here / name).glob(glob)]
    for path in files:  # a pipeline that is saved there takes its code along, and tells no folder
        assert (here / "again" / path.relative_to(here)).read_bytes() == path.read_bytes()


def test_where_it_is_no_code_of_a_folder_runs(there):
    folder = there[0] / "classes"
    for path in folder.rglob("*.py"):
        path.write_text("raise SystemExit('code of the folder ran')")
    assert type(load_pipeline(folder)) is type(LatentDiTPipeline.from_pretrained(folder)) is LatentDiTPipeline
    assert kind_of(folder) == "LatentDiTPipeline"
    refuses("makes texts, expected one that makes images of classes", load_pipeline, there[0] / "tokens")


def test_one_file_has_no_two_things_of_one_name(monkeypatch, tmp_path):
    source = portable.flat_source(("vavae_tools.pipelines.base", "digest_of"))
    assert "def weights_digest" in source and "def pixels_of" not in source and "import vavae_tools" not in source
    (tmp_path / "vavae_tools").mkdir()
    one, other = (tmp_path / "vavae_tools" / f"{name}.py" for name in ("one", "other"))
    one.write_text("from vavae_tools.other import g\n\nx = 1\n\n\ndef f():\n    return g() + x\n")
    other.write_text("x = 2\n\n\ndef g():\n    return x\n")
    monkeypatch.setattr(portable, "ROOT", tmp_path / "vavae_tools")
    with pytest.raises(ValueError, match=r"called x, of vavae_tools\.other and vavae_tools\.one: rename one"):
        portable.flat_source(("vavae_tools.one", "f"))


# ---- the hub
@pytest.fixture
def hub(monkeypatch):
    """A stand-in of the hub on this machine, which keeps what it is sent; `private` and `status` are its answers."""

    class Hub(BaseHTTPRequestHandler):
        files, created, private, status, keys = {}, [], True, 200, set()

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            Hub.keys.add(self.headers["Authorization"])
            url, answer = f"http://{self.headers['Host']}/me/gait", {}
            if self.path.endswith("/repos/create"):
                Hub.created.append(json.loads(body))
                answer = {"url": url, "name": "me/gait", "id": "me/gait"}
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                kept = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                answer = {"files": [{"path": file["path"], **kept} for file in asked]}
            elif "/commit/" in self.path:
                for row in map(json.loads, body.splitlines()):
                    if row["key"] == "file":
                        Hub.files[row["value"]["path"]] = b64decode(row["value"]["content"])
                answer = {"commitUrl": f"{url}/commit/1", "commitOid": "1", "success": True}
            self.send(answer)

        def do_GET(self):
            self.send({"id": "me/gait", "private": Hub.private, "sha": "1", "siblings": [], "tags": []})

        def send(self, answer):
            content = json.dumps(answer).encode()
            self.send_response(Hub.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_pipeline_is_uploaded_to_a_private_repository(hub, tmp_path, run_main):
    folder = tmp_path / "run" / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    (tmp_path / "run" / "run.json").write_text('{"global_step": 1200}')
    total = {"generated": 40, "generated_accuracy": 0.925, "validation": 20, "validation_accuracy": 0.95}
    distances = {"frechet_generated": 1.234, "frechet_real": 0.8, "images": 20}
    (tmp_path / "evaluation.json").write_text(json.dumps({"total": total, "distances": distances}))
    words = "--pipeline", str(folder), "--push_to_hub", "me/gait", "--license", "mit"
    words += "--evaluation", str(tmp_path / "evaluation.json")
    status, out, err = run_main(export_main, *words)
    assert status == 0, err
    (created,) = hub.created
    assert created.get("private", created.get("visibility") == "private") and created["name"] == "gait"
    sent = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files == sent and {*hub.keys} == {"Bearer hf_secret"}
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: mit\n")
    assert "- 3 classes (people)" in card and "1,200 steps" in card
    assert "92.5 % on 40 generated images, 95.0 % on 20 real validation images" in card
    assert "1.23, of real training images 0.8, by 20 images of each" in card
    assert str(tmp_path) not in card + out + err and "ID_" not in card and "hf_secret" not in card + out + err

    (folder / "README.md").write_text("mine")
    assert run_main(export_main, *words)[0] == 0 and hub.files["README.md"] == b"mine"
    for fault, said in (({"private": False}, "me/gait is public"), ({"status": 403}, "me/gait is not uploaded (")):
        hub.files.clear()
        for name, value in fault.items():
            setattr(hub, name, value)
        status, out, err = run_main(export_main, *words)
        assert status == 2 and said in err and err.count("\n") == 1 and "hf_secret" not in out + err and not hub.files
        hub.private, hub.status = True, 200
    status, _, err = run_main(export_main, "--pipeline", str(tmp_path), "--push_to_hub", "me/gait")
    assert status == 2 and "expected a pipeline" in err
    (folder / "README.md").unlink()
    status, _, err = run_main(export_main, *words[:-1], str(tmp_path / "run" / "run.json"))
    assert status == 2 and "run.json is no evaluation.json of images" in err and not (folder / "README.md").exists()
