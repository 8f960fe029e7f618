"""A server that speaks to the real client of the Hugging Face Hub: repositories, uploads, commits, downloads.

It knows what `huggingface_hub` asks for while a model is pushed and loaded (repos/create, preupload, LFS batch and
upload, commit, info, tree, resolve); everything else is 404. Faults are put in by `hub.faults`.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import ModelCardData

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png")
MODEL = r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)"


def git_oid(content: bytes) -> str:
    """The name that git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Files of the last commit by path; every commit keeps its own."""

    owner: str
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        listing = "".join(f"{path}{git_oid(files[path])}" for path in sorted(files))
        oid = hashlib.sha1(f"{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.heads[branch] = oid
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.heads.get(revision, revision))


class Hub(ThreadingHTTPServer):
    """The server and what it holds.

    Args:
        tokens: user names by token; an empty name may read only.
        faults: asked for every request `(method, path)`; an (HTTP status, message) is the answer, "close" ends the
            connection without one.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = {"hf_me": "me", "hf_reader": ""}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: Callable[[str, str], tuple[int, str] | str | None] = lambda method, path: None
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"  # another host, as that of the Hub

    def handle_error(self, request, client_address):
        """A client that has gone is no error of the server."""


class Handler(BaseHTTPRequestHandler):
    """One request; the routes are in `ROUTES`."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def respond(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path))
        if fault := self.server.faults(self.command, path):
            if fault == "close":
                self.close_connection = True
                return None
            return self.refuse(*fault)
        for method, pattern, name in ROUTES:
            if self.command in method and (found := re.fullmatch(pattern, path)):
                places = found.groupdict()
                if "repo" in places and (refusal := self.check_access(places["repo"], name)):
                    return self.refuse(*refusal)
                return getattr(self, name)(**places)
        return self.refuse(404, f"no route {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

    @property
    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.server.tokens.get(token)

    def check_access(self, repo: str, name: str):
        """Why this user may not do this."""
        held = self.server.repositories.get(repo)
        if "Authorization" in self.headers and self.user is None:
            return 401, "Invalid credentials in Authorization header"
        if held is None or (held.private and self.user != held.owner):
            return (404 if self.user else 401), "Repository not found", "RepoNotFound"
        if name in ("preupload", "batch", "commit", "branch") and self.user != held.owner:
            return 403, "You don't have the rights to push to this repository"
        return None

    def answer(self, content, status: int = 200, **headers: str):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str = ""):
        extra = {"X_Error_Code": code} if code else {}
        self.answer({"error": message}, status, X_Error_Message=message, **extra)

    def create(self):
        asked = json.loads(self.body)
        if not self.user:
            return self.refuse(401 if self.user is None else 403, "Invalid username or password.")
        repo = f"{asked.get('organization') or self.user}/{asked['name']}"
        url = {"url": f"{self.server.address}/{repo}"}
        if repo.partition("/")[0] != self.user:
            return self.refuse(403, f"You don't have the rights to create a model under the namespace {repo}")
        if repo in self.server.repositories:
            return self.answer(url | {"error": "You already created this model repo"}, 409)
        made = self.server.repositories[repo] = Repository(self.user, asked.get("visibility") == "private")
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return self.answer(url)

    def validate_card(self):
        """The client asks this before it commits a README.md."""
        head = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            ModelCardData(**yaml.safe_load(head[1]))
        except (TypeError, ValueError, yaml.YAMLError) as error:
            return self.answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return self.answer({"errors": [], "warnings": []})

    def branch(self, repo: str, branch: str):
        held = self.server.repositories[repo]
        if branch in held.heads:
            return self.refuse(409, "Reference already exists")
        held.heads[branch] = held.heads["main"]
        return self.answer({})

    def preupload(self, repo: str, revision: str):
        there = self.server.repositories[repo].files(revision) or {}
        files = []
        for item in json.loads(self.body)["files"]:
            path = item["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            old = there.get(path)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if mode == "lfs" else git_oid(old)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.answer({"files": files})

    def batch(self, repo: str):
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.objects:
                item["actions"] = {"upload": {"href": f"{self.server.address}/storage/{item['oid']}"}}
        return self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "the content is not what was announced")
        self.server.objects[oid] = self.body
        return self.answer(b"")

    def commit(self, repo: str, revision: str):
        lines = [json.loads(line) for line in self.body.splitlines()]
        held = self.server.repositories[repo]
        there = held.files(revision)
        if there is None:
            return self.refuse(404, "Invalid rev id", "RevisionNotFound")
        files = dict(there)
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[path] = self.server.objects[line["value"]["oid"]]
            elif line["key"] == "deletedFile":
                del files[path]
        oid = held.commit(revision, files)
        return self.answer({"commitUrl": f"{self.server.address}/{repo}/commit/{oid}", "commitOid": oid})

    def info(self, repo: str, revision: str = "main"):
        held = self.server.repositories[repo]
        files = held.files(revision)
        if files is None:
            return self.refuse(404, "Invalid rev id", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in files]
        sha = held.heads.get(revision, revision)
        return self.answer({"id": repo, "sha": sha, "private": held.private, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str = ""):
        files = self.server.repositories[repo].files(revision)
        if files is None:
            return self.refuse(404, "Invalid rev id", "RevisionNotFound")
        inside = {path: content for path, content in files.items() if path.startswith(folder and folder + "/")}
        if folder and not inside:
            return self.refuse(404, f"{folder} does not exist", "EntryNotFound")
        rows = [{"type": "file", "path": p, "size": len(c), "oid": git_oid(c)} for p, c in inside.items()]
        return self.answer(rows)

    def resolve(self, repo: str, revision: str, file: str):
        held = self.server.repositories[repo]
        files = held.files(revision)
        if files is None:
            return self.refuse(404, "Invalid rev id", "RevisionNotFound")
        head = {"X_Repo_Commit": held.heads.get(revision, revision)}
        if file not in files:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", **head)
        content = files[file]
        if not file.endswith(LFS_SUFFIXES):
            return self.answer(content, ETag=f'"{git_oid(content)}"', **head)
        oid = hashlib.sha256(content).hexdigest()
        head |= {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content))}
        return self.answer(b"", 302, Location=f"{self.server.storage}/{oid}", **head)

    def fetch(self, oid: str):
        return self.answer(self.server.objects[oid], ETag=f'"{oid}"')


ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_card"),
    ("POST", rf"{MODEL}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", r"/(?P<repo>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", "batch"),
    ("POST", rf"{MODEL}/commit/(?P<revision>.+)", "commit"),
    ("POST", rf"{MODEL}/branch/(?P<branch>.+)", "branch"),
    ("PUT", r"/storage/(?P<oid>\w+)", "store"),
    ("GET HEAD", r"/storage/(?P<oid>\w+)", "fetch"),
    ("GET HEAD", MODEL, "info"),
    ("GET HEAD", rf"{MODEL}/revision/(?P<revision>.+)", "info"),
    ("GET HEAD", rf"{MODEL}/tree/(?P<revision>[^/]+)", "tree"),
    ("GET HEAD", rf"{MODEL}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", "tree"),
    ("GET HEAD", r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
)


def start_hub() -> Hub:
    """A running server; `hub.shutdown()` and `hub.server_close()` end it."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return hub


def client_environment(hub: Hub, folder, token: str | None = "hf_me") -> dict[str, str]:
    """What a process needs in its environment to take `hub` for the Hub, with caches of its own in `folder`."""
    found = {
        "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder),
        "HF_MODULES_CACHE": f"{folder}/modules", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
    }  # fmt: skip
    return found | ({"HF_TOKEN": token} if token else {})


def use_hub(hub: Hub, folder, monkeypatch, token: str | None = "hf_me") -> None:
    """Let this process take `hub` for the Hub: what the client has read from its environment already is changed."""
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    for name, value in client_environment(hub, folder, token).items():
        monkeypatch.setenv(name, value)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    changed = {
        "ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": f"{folder}/hub", "HF_TOKEN_PATH": f"{folder}/token",
    }  # fmt: skip
    for name, value in changed.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    # between the tries of a request that failed
    monkeypatch.setattr(_http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
