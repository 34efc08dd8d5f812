"""A small server that speaks just enough of the Hugging Face hub's protocol to be asked for files: information, HEAD and GET."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

Files = Mapping[str, bytes]


@dataclass
class Hub:
    """What the server has.

    Attributes:
        commits: by repository, the commits with their files; the last is the main branch.
        revisions: by repository, branches and tags -> commit.
        gated: repositories whose files are not given out.
        broken: repositories at which the server fails.
        requests: what it was asked for, as method and path.
    """

    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def add(self, repository: str, files: Files, *revisions: str) -> str:
        """Commit files; ``revisions`` and main then stand for them. Returns the commit."""
        history = self.commits.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository}{len(history)}".encode()).hexdigest()
        history[commit] = dict(files)
        self.revisions.setdefault(repository, {}).update(dict.fromkeys(("main", *revisions), commit))
        return commit

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit that a revision of a repository stands for."""
        known = self.commits[repository]
        return revision if revision in known else self.revisions[repository].get(revision)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that is served while the context lasts, at ``endpoint``."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self._inform("/".join(parts[2:4]), (parts[5:] or ["main"])[0])
        elif parts[2:3] == ["resolve"]:
            self._give("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "", "")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _inform(self, repository: str, revision: str) -> None:
        if repository in self.hub.broken:
            return self._refuse(500, "", "out of order")
        if repository not in self.hub.commits:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        commit = self.hub.commit(repository, revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        names = [{"rfilename": name} for name in self.hub.commits[repository][commit]]
        told = {"_id": "1", "id": repository, "modelId": repository, "sha": commit, "private": False, "siblings": names, "tags": []}
        return self._answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _give(self, repository: str, revision: str, name: str) -> None:
        if repository not in self.hub.commits:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if repository in self.hub.gated:
            return self._refuse(403, "GatedRepo", "Access to this model is restricted")
        commit = self.hub.commit(repository, revision) or ""
        files = self.hub.commits[repository].get(commit, {})
        if name not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        tag = hashlib.sha1(files[name]).hexdigest()
        return self._answer(200, files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._answer(status, b"", headers)

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""
