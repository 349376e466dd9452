"""A stand-in for the Hugging Face Hub: as much of its API as a push of small files takes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Hub:
    """Repositories by name, each with its files."""

    address: str = ""
    token: str = "right"
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        if token != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "me":
                return 403, {"error": "You have no\nrights there"}
            if name in self.repos:
                return 409, {"error": "exists", "url": f"{self.address}/{name}"}
            self.repos[name], self.private[name] = {}, asked["visibility"] == "private"
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        owner, name, *rest = path.removeprefix("/api/models/").split("?")[0].split("/")
        repo = f"{owner}/{name}"
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        if rest[:1] == ["preupload"]:
            files = json.loads(body)["files"]
            said = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            return 200, {"files": said}
        if rest[:1] == ["commit"]:
            self._commit(self.repos[repo], [json.loads(line) for line in body.splitlines()])
            return 200, {
                "commitUrl": f"{self.address}/{repo}/commit/1",
                "commitOid": "1",
                "hookOutput": "",
                "success": 1,
            }
        if rest[:1] == ["tree"]:
            return 200, [{"type": "file", "path": path, "size": 1, "oid": "1"} for path in self.repos[repo]]
        siblings = [{"rfilename": path} for path in self.repos[repo]]
        return 200, {"id": repo, "private": self.private[repo], "siblings": siblings, "tags": [], "sha": "1"}

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at an address of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, said = hub.answer(self.command, self.path, self.headers.get("Authorization", ""), body)
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
