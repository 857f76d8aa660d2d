"""A server on this machine that Kaggle's real client takes for Kaggle: datasets, uploads, kernels, and their faults.

The client is unmodified: KAGGLE_API_ENVIRONMENT=LOCALHOST makes it call http://localhost, and the proxy of its
environment is this server, for https too. So whatever it would call elsewhere ends here, and is in `strangers`.
"""

import base64
import json
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

KEY = "0123456789abcdef-secret"


class KaggleStandIn:
    """Use it as a context; the attributes are its memory and its faults."""

    def __init__(self) -> None:
        self.datasets: dict[str, list[dict[str, bytes]]] = {}  # "owner/name" → its versions, {file name: content}
        self.requests: list[tuple[str, dict]] = []
        self.strangers: list[str] = []
        self.refused: tuple[str, ...] = ()  # of files that begin so the upload is answered by 400
        self.lost: tuple[str, ...] = ()  # files that begin so are taken, and missing in the version
        self.failing: dict[str, tuple[int, dict]] = {}  # path ending → (HTTP status, body) in place of the answer
        self.late = 0  # so many listings still show the version before
        self.blobs: list[dict] = []

    def __enter__(self) -> "KaggleStandIn":
        handler = type("Handler", (_Handler,), {"kaggle": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables under which the client talks to this server as the user `me`."""
        proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"), self.base)
        user = {"KAGGLE_USERNAME": "me", "KAGGLE_KEY": KEY, "KAGGLE_API_TOKEN": ""}
        folders = {"KAGGLE_CONFIG_DIR": str(home), "HOME": str(home)}
        return {**proxies, "NO_PROXY": "", "no_proxy": "", "KAGGLE_API_ENVIRONMENT": "LOCALHOST", **user, **folders}

    def asked(self, method: str) -> list[dict]:
        return [body for name, body in self.requests if name == method]

    # ---- the services

    def answer(self, method: str, body: dict) -> tuple[int, dict]:
        self.requests.append((method, body))
        for ending, fault in self.failing.items():
            if method.endswith(ending):
                return fault
        return getattr(self, method)(body)

    def _versions(self, body: dict) -> list[dict[str, bytes]] | None:
        return self.datasets.get(f"{body['ownerSlug']}/{body['datasetSlug']}")

    def GetDatasetStatus(self, body: dict) -> tuple[int, dict]:
        # the real one answers 403 for what is not there
        return (200, {"status": "READY"}) if self._versions(body) else (403, {"code": 403, "message": "Forbidden"})

    def GetDataset(self, body: dict) -> tuple[int, dict]:
        return 200, {"currentVersionNumber": len(self._versions(body))}

    def GetDatasetMetadata(self, body: dict) -> tuple[int, dict]:
        return 200, {"info": {"licenses": [{"name": "copyright-authors"}]}}

    def ListDatasetFiles(self, body: dict) -> tuple[int, dict]:
        version = self._versions(body)[-1]
        if self.late > 0:
            self.late -= 1
            version = ([{}, *self._versions(body)])[-2]
        first, per_page = int(body.get("pageToken") or 0), 2
        page = list(version.items())[first : first + per_page]
        files = [{"name": name, "totalBytes": len(content)} for name, content in page]
        more = str(first + per_page) if first + per_page < len(version) else ""
        return 200, {"datasetFiles": files, "nextPageToken": more}

    def StartBlobUpload(self, body: dict) -> tuple[int, dict]:
        self.blobs.append({"name": body["name"], "content": None})
        token = str(len(self.blobs) - 1)
        return 200, {"token": token, "createUrl": f"{self.base}/upload/{token}"}

    def CreateDataset(self, body: dict) -> tuple[int, dict]:
        dataset = f"{body['ownerSlug']}/{body['slug']}"
        if dataset in self.datasets:
            return 200, {"status": "error", "error": "already in use"}
        return self._made(dataset, body["files"])

    def CreateDatasetVersion(self, body: dict) -> tuple[int, dict]:
        return self._made(f"{body['ownerSlug']}/{body['datasetSlug']}", body["body"]["files"])

    def _made(self, dataset: str, files: list[dict]) -> tuple[int, dict]:
        blobs = [self.blobs[int(file["token"])] for file in files]
        content = {b["name"]: b["content"] for b in blobs if not (self.lost and b["name"].startswith(self.lost))}
        self.datasets.setdefault(dataset, []).append(content)
        return 200, {"status": "ok", "url": f"/{dataset}", "ref": f"/{dataset}", "error": ""}

    def DownloadDataset(self, body: dict) -> tuple[int, dict]:
        versions = self._versions(body)
        number = int(body.get("datasetVersionNumber") or len(versions))
        if number > len(versions):
            return 404, {"code": 404, "message": "Not found"}
        owner = f"{body['ownerSlug']}/{body['datasetSlug']}"
        return 302, {"location": f"{self.base}/download/{owner}/{number}"}

    def SaveKernel(self, body: dict) -> tuple[int, dict]:
        return 200, {"ref": f"/{body['slug']}", "url": f"/code/{body['slug']}", "versionNumber": 1, "error": ""}


class _Handler(BaseHTTPRequestHandler):
    kaggle: KaggleStandIn
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self._body() or b"{}")
        if not self._is_here():
            return
        user = base64.b64encode(f"me:{KEY}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {user}":
            self._send(401, {"code": 401, "message": f"Unauthenticated: {self.headers.get('Authorization')}"})
            return
        self._send(*self.kaggle.answer(urlsplit(self.path).path.rpartition("/")[2], body))

    def do_PUT(self) -> None:
        content = self._body()
        if not self._is_here():
            return
        blob = self.kaggle.blobs[int(self.path.rpartition("/")[2])]
        if self.kaggle.refused and blob["name"].startswith(self.kaggle.refused):
            self._send(400, {})
            return
        blob["content"] = content
        self._send(200, {})

    def do_GET(self) -> None:
        if not self._is_here():
            return
        *_, owner, name, number = urlsplit(self.path).path.split("/")
        archive = BytesIO()
        with zipfile.ZipFile(archive, "w") as packed:
            for file, content in self.kaggle.datasets[f"{owner}/{name}"][int(number) - 1].items():
                packed.writestr(file, content)
        self._send(200, archive.getvalue())

    def do_CONNECT(self) -> None:
        self.kaggle.strangers.append(self.path)
        self._send(403, {})

    def _is_here(self) -> bool:
        """Whether the client meant this machine; it sends the whole address, as to any proxy."""
        host = urlsplit(self.path).hostname or self.headers.get("Host", "").split(":")[0]
        if host in ("localhost", "127.0.0.1"):
            return True
        self.kaggle.strangers.append(host)
        self._send(403, {})
        return False

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, answer: dict | bytes) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", answer["location"])
            content = b""
        self.send_header("Content-Type", "application/zip" if isinstance(answer, bytes) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass
