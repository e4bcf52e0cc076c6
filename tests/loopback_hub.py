"""The part of the Hugging Face Hub that fetching and uploading a repository touch, on loopback, for its real client."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

MAIN, OLDER = "a" * 40, "b" * 40
WEIGHTS = bytes(range(256)) * 16
FILES = {
    MAIN: {
        "config.json": b'{"draft_length": 4}',
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"pickle",
        "README.md": b"read me",
        "run.py": b"print()",
    },
    OLDER: {"config.json": b'{"draft_length": 3}', "model.safetensors": b"old weights"},
}
"""What every repository of the organisation `org` holds, by commit."""

CLIENT_CHUNK_BYTES = 10 * 2**20
"""What the client writes to disk at once: what it holds of a chunk is lost with the connection."""

TOKEN = "hf_good"
READ_ONLY_TOKEN = "hf_read"

READ = re.compile(r"/api/models/(?P<repository>\w+/\w+)/(?P<call>revision|tree)/(?P<revision>[^/]+)")
FILE = re.compile(r"/(?P<repository>\w+/\w+)/resolve/(?P<revision>\w+)/(?P<name>.+)")
WRITE = re.compile(r"/api/models/(?P<repository>\w+/\w+)/(?P<call>preupload|commit|branch)/(?P<revision>[^/]+)")
BATCH = re.compile(r"/(?P<repository>\w+/\w+)\.git/info/lfs/objects/batch")


def is_large(name: str) -> bool:
    """Returns whether the Hub keeps the file outside git."""
    return name.endswith((".safetensors", ".bin"))


def grown(name: str, content: bytes) -> bytes:
    """Returns the content of a file that is too large for one chunk."""
    return content * (2 * CLIENT_CHUNK_BYTES // len(content)) if is_large(name) else content


def digest(name: str, content: bytes) -> str:
    """Returns what the Hub names the content by: SHA-256 outside git, git's digest inside it."""
    if is_large(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """One repository of `org` for every way to fail; `user` is who `TOKEN` belongs to, and may write."""

    requests: list[str]
    commits: dict[str, dict[str, bytes]]
    branches: dict[str, dict[str, str]]  # per repository
    large_files: dict[str, bytes]
    is_cut: set[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = self.record()
        match = READ.fullmatch(url) or FILE.fullmatch(url)
        if match is None:
            return self.refuse(404, "RepoNotFound")
        repository, authorized = match["repository"], self.token() == TOKEN
        if repository == "org/missing" or (repository == "org/private" and not authorized):
            return self.refuse(401, "RepoNotFound")
        if repository == "org/forbidden":
            return self.refuse(403, None)
        if repository == "org/expired":
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if repository == "org/broken":
            return self.refuse(418, None)
        revisions = self.branches.get(repository)
        if revisions is None:
            if not repository.startswith("org/"):
                return self.refuse(404, "RepoNotFound")
            revisions = {"main": MAIN, "v1": OLDER}
        commit = revisions.get(match["revision"], match["revision"])
        if commit not in self.commits:
            return self.refuse(404, "RevisionNotFound")
        if match.re is FILE:
            if repository == "org/gated" and not authorized:
                return self.refuse(403, "GatedRepo")
            return self.send_file(repository, commit, match["name"])
        files = self.commits[commit]
        if match["call"] == "revision":
            return self.answer({"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        tree = [
            {"type": "file", "path": name, "size": len(content), "oid": digest(name, content)}
            for name, content in files.items()
        ]
        return self.answer(tree)

    def do_POST(self) -> None:
        url = self.record()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if url == "/api/validate-yaml":
            valid = b"license: forbidden" not in body
            message = {"errors": [{"message": '"license" must be one of a list'}]}
            return self.answer({} if valid else message, HTTPStatus.OK if valid else HTTPStatus.BAD_REQUEST)
        if self.token() not in (TOKEN, READ_ONLY_TOKEN):
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if url == "/api/repos/create":
            wanted = json.loads(body)
            return self.create(f"{wanted['organization']}/{wanted['name']}")
        match = WRITE.fullmatch(url) or BATCH.fullmatch(url)
        if match is None or match["repository"] not in self.branches:
            return self.refuse(404, "RepoNotFound")
        if match.re is BATCH:
            return self.offer_uploads(json.loads(body)["objects"])
        if match["call"] == "branch":
            self.branches[match["repository"]].setdefault(match["revision"], MAIN)
            return self.answer({})
        if match["revision"] not in self.branches[match["repository"]]:
            return self.refuse(404, "RevisionNotFound")
        if match["call"] == "preupload":
            return self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        return self.commit(match["repository"], match["revision"], [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        url = self.record()
        wanted = url.rsplit("/", 1)[1]
        length = int(self.headers["Content-Length"])
        if "/cut/" in url and url not in self.is_cut:
            self.is_cut.add(url)
            self.rfile.read(length // 2)
            self.close_connection = True
            return None
        content = self.rfile.read(length)
        if hashlib.sha256(content).hexdigest() != wanted:
            return self.refuse(400, None, "content does not match its digest")
        self.large_files[wanted] = content
        return self.answer({})

    def create(self, repository: str) -> None:
        if self.token() == READ_ONLY_TOKEN or not repository.startswith("user/"):
            return self.refuse(403, None, "You don't have the rights to create a model under this namespace")
        url = {"url": f"{self.address()}/{repository}"}
        if repository in self.branches:
            return self.answer(url, HTTPStatus.CONFLICT)
        self.branches[repository] = {"main": MAIN}
        return self.answer(url)

    def offer_uploads(self, objects: list[dict[str, Any]]) -> None:
        folder = "cut" if "user/cut" in self.path else "whole"
        offers = [
            wanted | {"actions": {"upload": {"href": f"{self.address()}/upload/{folder}/{wanted['oid']}"}}}
            for wanted in objects
        ]
        return self.answer({"transfer": "basic", "objects": offers})

    def commit(self, repository: str, revision: str, lines: list[dict[str, Any]]) -> None:
        files: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[repository][revision] = commit
        return self.answer({"commitUrl": f"{self.address()}/{repository}/commit/{commit}", "commitOid": commit})

    def send_file(self, repository: str, commit: str, name: str) -> None:
        content = self.commits[commit].get(name)
        if content is None:
            return self.refuse(404, "EntryNotFound")
        if repository == "org/breaking":
            content = grown(name, content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(name, content)}"', "Accept-Ranges": "bytes"}
        if repository == "org/damaged":
            # of the right size, which is all that the Hub's client looks at
            content = content[:-1] + b"!"
        if self.command == "GET" and repository == "org/cut":
            self.close_connection = True
            return None
        first = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(asked[1])
            self.requests.append(f"{name} from byte {first}")
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        breaks = repository == "org/breaking" and first == 0 and is_large(name)
        self.send_response(HTTPStatus.PARTIAL_CONTENT if first else HTTPStatus.OK)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: CLIENT_CHUNK_BYTES * 3 // 2] if breaks else content[first:])
            self.close_connection = True
        return None

    def record(self) -> str:
        url = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {url}")
        return url

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def answer(self, content: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str | None, message: str | None = None) -> None:
        self.send_response(status)
        for name, value in (("X-Error-Code", code), ("X-Error-Message", message)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test's output clean."""


@contextlib.contextmanager
def running_hub() -> Iterator[tuple[str, type[Hub]]]:
    """Yields the address of a Hub of its own and the class that holds what it knows."""
    state: dict[str, Any] = {"requests": [], "commits": dict(FILES), "branches": {}, "large_files": {}, "is_cut": set()}
    handler = type("RecordingHub", (Hub,), state)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def talk_to(endpoint: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the client of this process, which has read its settings already, talk to a Hub, with a cache of its own."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(directory / "no_token"))
