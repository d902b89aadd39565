"""A Hugging Face Hub in memory, on loopback: as much of its HTTP API as the client needs to download and to upload a model.

Files are sent inside the commit (upload mode "regular"); the Hub itself has a store apart for large ones.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

TOKEN = "hf_of_the_test"


class Hub:
    """Its repositories, and what was asked of it.

    Attributes:
      files: ORG/NAME -> path -> content of the newest commit.
      private: names of private repositories: only requests with TOKEN see them.
      gated: names of repositories whose files are not given.
      asked: "METHOD path" of each request, in order.
      broken: names of repositories whose requests get status 503.
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.broken: set[str] = set()

    def revision(self, repo: str) -> str:
        """The commit of a repository: 40 hexadecimal digits, which follow from its files."""
        content = sorted(
            (name, hashlib.sha1(x).hexdigest()) for name, x in self.files[repo].items()
        )
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def put_folder(self, repo: str, folder) -> None:
        """Publishes all files below a local folder."""
        found = (path for path in folder.rglob("*") if path.is_file())
        self.files[repo] = {str(path.relative_to(folder)): path.read_bytes() for path in found}


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if any(repo in path for repo in self.hub.broken):
            self.send(503, {"error": "broken"})
        elif self.command == "POST":
            self.post(path, body)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path):
            self.describe(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.give(*match.groups())
        else:
            self.send(404, {"error": path})

    def describe(self, repo: str, what: str, revision: str):
        if not self.may_see(repo):
            return
        sha = self.hub.revision(repo)
        files = self.hub.files[repo]
        if revision not in ("main", sha):
            self.send(404, {"error": "Invalid rev"}, {"X-Error-Code": "RevisionNotFound"})
        elif what == "revision":
            siblings = [{"rfilename": name} for name in files]
            self.send(200, {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings})
        else:
            of = lambda x: {"type": "file", "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
            self.send(200, [{"path": name, **of(x)} for name, x in files.items()])

    def give(self, repo: str, revision: str, name: str):
        if not self.may_see(repo):
            return
        if repo in self.hub.gated:
            self.send(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return
        content = self.hub.files[repo].get(name)
        if content is None:
            self.send(404, {"error": name}, {"X-Error-Code": "EntryNotFound"})
            return
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.send(200, content, {"ETag": etag, "X-Repo-Commit": self.hub.revision(repo)})

    def may_see(self, repo: str) -> bool:
        known = repo in self.hub.files
        if known and (repo not in self.hub.private or self.has_token()):
            return True
        self.send(401 if not self.has_token() else 404, {}, {"X-Error-Code": "RepoNotFound"})
        return False

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def post(self, path: str, body: bytes):
        if path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif not self.has_token():
            self.send(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            status = 409 if repo in self.hub.files else 200
            if status == 200:
                self.hub.files[repo] = {}
                self.hub.private |= {repo} if asked.get("visibility") == "private" else set()
            host = self.headers["Host"]
            self.send(status, {"url": f"http://{host}/{repo}", "name": repo})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(body)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self.send(200, {"files": [{"path": file["path"], **mode} for file in files]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.hub.files[match[1]][entry["value"]["path"]] = content
            sha = self.hub.revision(match[1])
            url = f"http://{self.headers['Host']}/{match[1]}/commit/{sha}"
            self.send(200, {"success": True, "commitOid": sha, "commitUrl": url})
        else:
            self.send(404, {"error": path})

    def send(self, status: int, content, headers=()):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextlib.contextmanager
def serving():
    """(the Hub, its address) while it is served."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
