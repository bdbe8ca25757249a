"""Stands in for the hub: the requests that its client makes to read a repository and to push to one, over local folders."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Hub(http.server.BaseHTTPRequestHandler):
    """One request. What all requests share stands in a subclass that ``serve`` makes."""

    repositories: dict[str, dict[str, Path]]  # name -> branch -> folder
    home: Path  # where what is pushed goes
    asked: list[str]
    large: dict[str, bytes]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/organisation/gated"):
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path)
        if not found or found[1] not in self.repositories:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        name, what, revision, file = found.groups()
        branches = self.repositories[name]
        known = branches | {commit_of(folder): folder for folder in branches.values()}
        folder = known.get(revision or "main")
        if folder is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        commit, files = commit_of(folder), content_of(folder)
        if what == "tree":
            rows: Any = [{"type": "file", "path": p, "size": len(b), "oid": sha1(b)} for p, b in files.items()]
            return self.answer(200, json.dumps(rows).encode())
        if what != "resolve":
            rows = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
            return self.answer(200, json.dumps(rows).encode())
        if file not in files:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self.answer(200, files[file], {"ETag": f'"{sha1(files[file])}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, sent = self.path.partition("?")[0], self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(path)
        if path == "/api/validate-yaml":
            return self.answer(200, b'{"errors": [], "warnings": []}')
        if path == "/api/repos/create":
            return self.create(json.loads(sent))
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?/(preupload|commit|branch|info)/(.+)", path)
        if not found or found[1] not in self.repositories:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        name, what, revision = found.groups()
        if what == "branch":
            target = self.home / name / revision
            shutil.copytree(self.repositories[name]["main"], target)
            self.repositories[name][revision] = target
            return self.answer(200, b"{}")
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                | {"shouldIgnore": False}
                for f in json.loads(sent)["files"]
            ]
            return self.answer(200, json.dumps({"files": files}).encode())
        if what == "info":  # where to put large files
            rows = [
                o | {"actions": {"upload": {"href": self.url(f"large/{o['oid']}"), "header": {}}}}
                for o in json.loads(sent)["objects"]
            ]
            return self.answer(200, json.dumps({"transfer": "basic", "objects": rows}).encode())
        return self.commit(name, self.repositories[name][revision], [json.loads(line) for line in sent.splitlines()])

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/large/")
        self.large[self.path.removeprefix("/large/")] = content
        self.answer(200, b"")

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "somebody-else":
            return self.answer(403, b'{"error": "You have no rights there"}')
        known = name in self.repositories
        if not known:
            (self.home / name / "main").mkdir(parents=True)
            (self.home / name / "private").write_text(str(wanted.get("private") or wanted.get("visibility")))
            self.repositories[name] = {"main": self.home / name / "main"}
        return self.answer(409 if known else 200, json.dumps({"url": self.url(name)}).encode())

    def commit(self, name: str, folder: Path, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (folder / value["path"]).write_bytes(self.large[value["oid"]])
        said = {
            "commitUrl": self.url(f"{name}/commit/{commit_of(folder)}"),
            "commitOid": commit_of(folder),
            "hookOutput": "",
        }
        self.answer(200, json.dumps(said).encode())

    def url(self, path: str) -> str:
        return f"http://{self.headers['Host']}/{path}"

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def sha1(content: bytes) -> str:
    """As git names what it keeps, roughly."""
    return hashlib.sha1(content).hexdigest()


def commit_of(folder: Path) -> str:
    """The commit that a folder is: another whenever a file is another."""
    return sha1(repr(sorted((name, sha1(content)) for name, content in content_of(folder).items())).encode())


@contextlib.contextmanager
def serve(home: Path, **repositories: Path) -> Iterator[tuple[str, type[Hub]]]:
    """A hub that holds ``organisation/<name>`` for each folder given. -> its address, and what its requests share."""
    holds = {f"organisation/{name}": {"main": folder} for name, folder in repositories.items()}
    shared = type("OneHub", (Hub,), {"repositories": holds, "home": home, "asked": [], "large": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), shared) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", shared
        finally:
            server.shutdown()
            thread.join()


def settings(address: str, home: Path, offline: bool = False) -> dict[str, str]:
    """The environment of a process whose hub this is: the client reads it on import."""
    return {
        "HF_HOME": str(home),
        "HF_ENDPOINT": address,
        "HF_TOKEN": "hf_none",
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
    }
