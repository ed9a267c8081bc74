"""A small server with the part of the Hugging Face hub's interface that uploads and downloads use:
repositories in memory, some of them private, commits, large files, and tokens."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = ".safetensors"


class HubServer(ThreadingHTTPServer):
    """`tokens` are the tokens that it accepts. `repositories` maps names to their commits, oldest
    first, which map file names to contents; `private` names those that need a token."""

    daemon_threads = True

    def __init__(self, tokens=("secret",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = tokens
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def get_commit(self, name: str, revision: str) -> dict[str, bytes] | None:
        """Returns the files of a commit, named by `main` or its hash."""
        commits = self.repositories[name]
        if revision == "main":
            return commits[-1]
        return next((x for i, x in enumerate(commits) if hash_commit(name, i) == revision), None)


def hash_commit(name: str, number: int) -> str:
    return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        """Prints nothing."""

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code=None):
        headers = {"X_Error_Code": code} if code else {}
        self.answer({"error": code or "refused"}, status, **headers)

    @property
    def has_token(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return token in self.server.tokens

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        body, server = self.read_body(), self.server
        server.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self.answer({"name": "user"}) if self.has_token else self.refuse(401)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if parts[0] == "objects":
            if self.command == "PUT":
                server.objects[parts[1]] = body
            return self.answer()
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        name = name.removesuffix(".git")
        hidden = name in server.private and not self.has_token
        if name == "user/broken":
            return self.refuse(503)
        if name == "user/gated":
            return self.refuse(403, "GatedRepo")
        if name not in server.repositories or hidden:
            return self.refuse(401 if hidden else 404, "RepoNotFound")
        if "info/lfs/objects/batch" in path:
            return self.accept_objects(json.loads(body))
        if parts[0] == "api":
            return self.handle_model(name, parts[4:], body)
        commit = server.get_commit(name, parts[3])
        content = (commit or {}).get("/".join(parts[4:]))
        if content is None:
            return self.refuse(404, "EntryNotFound")
        number = next(i for i, x in enumerate(server.repositories[name]) if x is commit)
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(content, X_Repo_Commit=hash_commit(name, number), ETag=f'"{etag}"')

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815  (names of http.server)

    def create(self, values):
        if not self.has_token:
            return self.refuse(401)
        name = f"{values.get('organization') or 'user'}/{values['name']}"
        if values.get("organization") not in (None, "user"):
            return self.refuse(403)
        if name in self.server.repositories:
            return self.answer({"url": f"{self.server.address}/{name}"}, 409)
        self.server.repositories[name] = [{}]
        if values.get("private") or values.get("visibility") == "private":
            self.server.private.add(name)
        return self.answer({"url": f"{self.server.address}/{name}"})

    def accept_objects(self, values):
        objects = []
        for x in values["objects"]:
            href = f"{self.server.address}/objects/{x['oid']}"
            objects.append(x | {"actions": {"upload": {"href": href}}})
        self.answer({"transfer": "basic", "objects": objects})

    def handle_model(self, name, rest, body):
        commits = self.server.repositories[name]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.server.get_commit(name, revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        number = next(i for i, x in enumerate(commits) if x is commit)
        kind = rest[0] if rest else ""
        if kind in ("", "revision"):
            files = [{"rfilename": file} for file in commit]
            info = {"id": name, "sha": hash_commit(name, number), "siblings": files, "tags": []}
            return self.answer(info | {"private": name in self.server.private})
        if kind == "tree":
            return self.answer([describe_file(file, x) for file, x in commit.items()])
        if not self.has_token:
            return self.refuse(401)
        if kind == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": x["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if x["path"].endswith(LARGE) else "regular",
                }
                for x in files
            ]  # fmt: skip
            return self.answer({"files": modes})
        assert kind == "commit", kind
        new = dict(commits[-1])
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                new[value["path"]] = self.server.objects[value["oid"]]
        commits.append(new)
        oid = hash_commit(name, len(commits) - 1)
        url = f"{self.server.address}/{name}/commit/{oid}"
        return self.answer({"success": True, "commitOid": oid, "commitUrl": url})


def describe_file(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if path.endswith(LARGE):
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return entry


@contextlib.contextmanager
def serve():
    """Runs a server while the context lasts."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
