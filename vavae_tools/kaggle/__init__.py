"""Kaggle: what is asked of its clients, and what goes from session to session."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import write_json


class Unavailable(UserError):
    """What a notebook can do without: no credentials, no client, no network, nothing from an earlier session."""


def ask(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Have `client.py` do it, and raise what went wrong as one line."""
    asked, answered = folder / "request.json", folder / "answer.json"
    write_json(asked, request)
    environment = {**os.environ, "TMPDIR": str(folder)}  # where the client keeps, for days, what it did not finish
    command = [sys.executable, "-P", str(Path(__file__).with_name("client.py")), str(asked), str(answered)]
    quiet = subprocess.DEVNULL
    status = subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, env=environment, check=False).returncode
    try:
        answer = json.loads(answered.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        answer = {"fault": "failed", "reason": f"the client ended with status {status}"}
    if "done" in answer:
        return answer["done"]
    dataset, reason = request["dataset"], answer["reason"]
    own = "make a token in the settings of your Kaggle account and set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and "
    own += "KAGGLE_KEY, in the environment or as secrets of the notebook. Nothing else needs them"
    unavailable = {
        "client": f"neither kagglehub nor the kaggle client is here ({reason}): pip install kaggle",
        "credentials": f"no Kaggle credentials are here, or none that work: {own}",
        "refused": f"Kaggle does not know these credentials ({reason}): {own}",
        "network": f"Kaggle cannot be reached ({reason}): switch the internet on in the notebook's settings, or save "
        "its version and attach its output to the next session",
        "missing": f"there is no dataset {dataset} that you may read: it is made by the first push",
    }
    if answer["fault"] in unavailable:
        raise Unavailable(unavailable[answer["fault"]])
    failed = {
        "late": f"{dataset}: Kaggle took every file, but does not list the new version after {reason}; the versions "
        f"before are kept. Look later with kaggle datasets files {dataset}, or push again",
        "lost": f"{dataset} has lost something on the way: {reason}. Push again; the versions before are kept, such as "
        f"{dataset}/1 for --dataset of pull",
        "failed": f"{dataset} was not pushed ({reason}); what it held before is kept. Push again",
    }
    if request["do"] == "pull":
        failed["failed"] = f"{dataset} could not be downloaded ({reason}); what is here is as it was. Try it again"
    raise UserError(failed[answer["fault"]])
