"""What speaks with Kaggle's client, as a program of its own: REQUEST.json in, ANSWER.json out.

Importing the client prints, closes stdin and may end the process, and its bars cannot be silenced: none of that may
happen to a notebook. Needs nothing but the standard library and the client. No answer ever holds a token.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LOOKS = 4
"""How often a version that is there must lack a file before the file counts as lost."""


class Fault(Exception):
    """What went wrong: `kind` is what `sessions.py` makes a line of, `reason` its detail."""

    def __init__(self, kind: str, reason: str = "") -> None:
        super().__init__(reason)
        self.kind = kind


def connect() -> Any:
    """The real client with credentials, or a `Fault` that says what is missing."""
    _take_secrets_of_the_notebook()
    try:
        from kaggle.api.kaggle_api_extended import KaggleApi
    except ImportError as error:
        raise Fault("client", str(error)) from None
    except SystemExit:  # clients up to 2.2.0 sign in as they are imported
        raise Fault("credentials") from None

    class Client(KaggleApi):
        def _upload_file(self, file_name: str, *arguments: Any, **others: Any) -> Any:
            # up to 2.2.4 a file that the server refuses is left out, and the version made without it
            sent = super()._upload_file(file_name, *arguments, **others)
            if sent is None:
                raise Fault("failed", f"the server did not take {file_name}")
            return sent

    client = Client()
    try:
        client.authenticate()
    except SystemExit:
        raise Fault("credentials") from None
    return client


def _take_secrets_of_the_notebook() -> None:
    if any(os.environ.get(name) for name in ("KAGGLE_API_TOKEN", "KAGGLE_KEY")):
        return
    with suppress(Exception):  # not on Kaggle, or no secret of that name
        from kaggle_secrets import UserSecretsClient

        for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
            with suppress(Exception):
                os.environ[name] = UserSecretsClient().get_secret(name)


def push(client: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Create the dataset, or its next version, and see that every file is listed with its size."""
    dataset, folder = request["dataset"], request["folder"]
    there = _is_there(client, dataset)
    if there:
        answer = client.dataset_create_version(folder, request["message"], quiet=True)
    else:
        answer = client.dataset_create_new(folder, public=False, quiet=True)
    if answer.error or str(answer.status).lower() not in ("ok", "none", ""):  # errors come with HTTP status 200
        raise Fault("failed", answer.error or f"status {answer.status}")
    _await_files(client, dataset, request["files"], request["marker"], request["wait"])
    return {"created": not there}


def _is_there(client: Any, dataset: str) -> bool:
    from requests.exceptions import ConnectionError, HTTPError, Timeout

    try:
        client.dataset_status(dataset)
    except HTTPError as error:
        if error.response.status_code not in (403, 404):  # it hides whether what one may not see exists
            raise
        return False
    except (ConnectionError, Timeout) as error:
        raise Fault("network", type(error).__name__) from None
    return True


def _await_files(client: Any, dataset: str, expected: dict[str, int], marker: str, wait: float) -> None:
    """Kaggle processes a version for a while, and lists the one before it meanwhile: `marker` is in this one only."""
    from requests.exceptions import RequestException

    end, pause, looks, lacking = time.monotonic() + wait, 0.2, 0, list(expected)
    while True:
        with suppress(RequestException):  # the files are there: asking again is cheap
            status, found = client.dataset_status(dataset), _listed(client, dataset)
            if status in ("failed", "deleted"):
                raise Fault("lost", f"its new version is {status}")
            if marker in found and status == "ready":
                lacking = [name for name, size in expected.items() if found.get(name) != size]
                looks += 1
            if not lacking:
                return
        if looks == LOOKS:
            sizes = [f"{name} ({expected[name]:,} bytes sent, {found.get(name) or 0:,} there)" for name in lacking]
            raise Fault("lost", ", ".join(sizes[:3]) + (" …" if len(sizes) > 3 else ""))
        if time.monotonic() > end:
            raise Fault("late", f"{wait:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 15)


def _listed(client: Any, dataset: str) -> dict[str, int]:
    found, token = {}, None
    while True:
        page = client.dataset_list_files(dataset, page_token=token, page_size=200)
        found |= {file.name: file.total_bytes for file in page.dataset_files}
        token = page.next_page_token
        if not token:
            return found


def pull(client: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Download and unpack a dataset."""
    from requests.exceptions import HTTPError

    dataset = request["dataset"]
    if not _is_there(client, "/".join(dataset.split("/")[:2])):
        raise Fault("missing")
    try:
        client.dataset_download_files(dataset, path=request["folder"], force=True, quiet=True, unzip=True)
    except HTTPError as error:
        if error.response.status_code == 404:
            raise Fault("missing") from None
        raise
    return {}


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """{"done": …}, or {"fault": its kind, "reason": one line without secrets}."""
    client = None
    try:
        client = connect()
        return {"done": {"push": push, "pull": pull}[request["do"]](client, request)}
    except Fault as fault:
        kind, reason = fault.kind, str(fault)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        kind = "refused" if status == 401 else "failed"
        reason = str(error) if status else f"{type(error).__name__}: {error}"
    known = [*getattr(client, "config_values", {}).items(), *os.environ.items()]
    for secret in {value for name, value in known if str(name).lower().endswith(("key", "token")) and len(value) > 3}:
        reason = reason.replace(secret, "…")
    return {"fault": kind, "reason": (" ".join(reason.split()) or kind)[:300]}


if __name__ == "__main__":
    asked, answered = map(Path, sys.argv[1:])
    answered.write_text(json.dumps(answer_to(json.loads(asked.read_text(encoding="utf-8")))), encoding="utf-8")
