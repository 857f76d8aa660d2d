"""What speaks with Kaggle's clients, as a program of its own: REQUEST.json in, ANSWER.json out, without tokens.

Importing the kaggle client prints, closes stdin and may end the process, and the bars of both cannot be silenced.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class Fault(Exception):
    """What went wrong: a kind, of which `session.py` makes a line, and a detail."""


class Hub:
    def __init__(self) -> None:
        import kagglehub
        from kagglehub.clients import build_kaggle_client
        from kagglehub.config import get_kaggle_credentials

        credentials = get_kaggle_credentials()
        if credentials is None and "KAGGLE_KERNEL_RUN_TYPE" not in os.environ:
            raise Fault("credentials")
        self.hub, self.api, self.settings = kagglehub, build_kaggle_client, vars(credentials) if credentials else {}

    def upload(self, dataset: str, folder: str, message: str, new: bool) -> None:
        self.hub.dataset_upload(dataset, folder, message)

    def download(self, dataset: str, folder: str) -> str:
        owner, name, *version = dataset.split("/")
        handle = "/".join([owner, name, *(["versions", *version] if version else [])])
        return self.hub.dataset_download(handle, force_download=True, output_dir=folder)


class Client:
    """The kaggle client, where kagglehub is not."""

    def __init__(self) -> None:
        try:
            from kaggle.api.kaggle_api_extended import KaggleApi

            self.kaggle = KaggleApi()
            self.kaggle.authenticate()
        except SystemExit:  # clients up to 2.2.0 sign in as they are imported
            raise Fault("credentials") from None
        self.api, self.settings = self.kaggle.build_kaggle_client, self.kaggle.config_values

    def upload(self, dataset: str, folder: str, message: str, new: bool) -> None:
        metadata = {"title": dataset.split("/")[1], "id": dataset, "licenses": [{"name": "copyright-authors"}]}
        (Path(folder) / "dataset-metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
        if new:
            answer = self.kaggle.dataset_create_new(folder, public=False, quiet=True)
        else:
            answer = self.kaggle.dataset_create_version(folder, message, quiet=True)
        if answer.error or str(answer.status).lower() not in ("ok", "none", ""):  # errors come with HTTP status 200
            raise Fault("failed", answer.error or f"status {answer.status}")

    def download(self, dataset: str, folder: str) -> str:
        self.kaggle.dataset_download_files(dataset, path=folder, force=True, quiet=True, unzip=True)
        return folder


def connect() -> Hub | Client:
    if not any(os.environ.get(name) for name in ("KAGGLE_API_TOKEN", "KAGGLE_KEY")):
        with suppress(Exception):  # not on Kaggle, or no secret of that name
            from kaggle_secrets import UserSecretsClient

            for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
                with suppress(Exception):
                    os.environ[name] = UserSecretsClient().get_secret(name)
    with suppress(ImportError):
        return Hub()
    try:
        return Client()
    except ImportError as error:
        raise Fault("client", str(error)) from None


def push(client: Hub | Client, request: dict[str, Any]) -> dict[str, Any]:
    """Create the dataset, or its next version, and see that every file is listed with its size."""
    dataset = request["dataset"]
    new = _status(client, dataset) is None
    client.upload(dataset, request["folder"], request["message"], new)
    _await_files(client, dataset, request["files"], request["marker"], request["wait"])
    return {"created": new}


def pull(client: Hub | Client, request: dict[str, Any]) -> dict[str, Any]:
    if _status(client, request["dataset"]) is None:
        raise Fault("missing")
    try:
        return {"folder": str(client.download(request["dataset"], request["folder"]))}
    except Exception as error:
        if _http_status(error) == 404:
            raise Fault("missing") from None
        raise


def _http_status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _status(client: Hub | Client, dataset: str) -> str | None:
    """Return what Kaggle does with a dataset, such as "ready"; None where there is none that one may see."""
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetStatusRequest
    from requests.exceptions import ConnectionError, HTTPError, Timeout

    request = ApiGetDatasetStatusRequest()
    request.owner_slug, request.dataset_slug = dataset.split("/")[:2]
    try:
        with client.api() as api:
            return api.datasets.dataset_api_client.get_dataset_status(request).status.name.lower()
    except HTTPError as error:
        if error.response.status_code not in (403, 404):  # it hides whether what one may not see exists
            raise
        return None
    except (ConnectionError, Timeout) as error:
        raise Fault("network", type(error).__name__) from None


def _await_files(client: Hub | Client, dataset: str, expected: dict[str, int], marker: str, wait: float) -> None:
    """Kaggle processes a version for a while, and lists the one before it meanwhile: `marker` is in this one only."""
    from requests.exceptions import RequestException

    end, pause, status, found = time.monotonic() + wait, 0.2, None, {}
    while time.monotonic() < end and status not in ("failed", "deleted"):
        with suppress(RequestException, Fault):  # the files are there: asking again is cheap
            status, found = _status(client, dataset), _listed(client, dataset)
        if status == "ready" and all(found.get(name) == size for name, size in expected.items()):
            return
        time.sleep(pause)
        pause = min(2 * pause, 15)
    if status != "ready" or marker not in found:
        raise Fault("late", f"{wait:g} s ({status})")
    lacking = [name for name, size in expected.items() if found.get(name) != size]
    raise Fault("lost", ", ".join(f"{n} ({expected[n]:,} bytes sent, {found.get(n) or 0:,} there)" for n in lacking))


def _listed(client: Hub | Client, dataset: str) -> dict[str, int]:
    from kagglesdk.datasets.types.dataset_api_service import ApiListDatasetFilesRequest

    request, found = ApiListDatasetFilesRequest(), {}
    request.owner_slug, request.dataset_slug = dataset.split("/")
    request.page_size, request.page_token = 200, ""
    while True:
        with client.api() as api:
            page = api.datasets.dataset_api_client.list_dataset_files(request)
        found |= {file.name: file.total_bytes for file in page.dataset_files}
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Return {"done": …}, or {"fault": its kind, "reason": one line without secrets}."""
    client = None
    try:
        client = connect()
        return {"done": {"push": push, "pull": pull}[request["do"]](client, request)}
    except Fault as fault:
        kind, reason = (*fault.args, "")[:2]
    except Exception as error:
        status = _http_status(error)
        kind = "refused" if status == 401 else "failed"
        reason = str(error) if status else f"{type(error).__name__}: {error}"
    for name, secret in [*os.environ.items(), *(client.settings if client else {}).items()]:
        if name.lower().endswith(("key", "token")) and len(str(secret)) > 3:
            reason = reason.replace(str(secret), "…")
    return {"fault": kind, "reason": (" ".join(reason.split()) or kind)[:300]}


if __name__ == "__main__":
    asked, answered = map(Path, sys.argv[1:])
    answered.write_text(json.dumps(answer_to(json.loads(asked.read_text(encoding="utf-8")))), encoding="utf-8")
