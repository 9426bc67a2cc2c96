"""A Hub on loopback: it answers the calls of the real client that make, fill and read a model repository."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


class StubHub:
    """What was put up lies in `files` (of main), `branches`, `private` and `commits`; `requests` is what was asked.

    `trouble(method, path)` may return a status to answer with, "drop" to hang up amid the body, or "hang" to never
    answer. Only the owner `me` may write.
    """

    def __init__(self):
        self.token = "hf_" + hashlib.sha256(str(id(self)).encode()).hexdigest()[:30]
        self.files, self.private, self.blobs, self.commits, self.requests = {}, {}, {}, [], []
        self.branches, self.squashed = {}, []  # by repository and name
        self.trouble = lambda method, path: None
        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def env(self):
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1"}

    @property
    def constants(self):
        """What a process that has imported huggingface_hub must set in its `constants`."""
        address = "/{repo_id}/resolve/{revision}/{filename}"
        return {"ENDPOINT": self.url, "HF_HUB_DISABLE_XET": True, "HUGGINGFACE_CO_URL_TEMPLATE": self.url + address}

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self):
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                trouble = hub.trouble(self.command, path)
                if trouble == "hang":
                    hub.released.wait()
                if trouble in ("hang", "drop"):
                    self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
                    self.close_connection = True
                    return
                body = self.body()
                try:
                    status, content, headers = (trouble, {"error": "out of order"}, {}) if trouble else hub.reply(
                        self.command, path, body, self.headers.get("Authorization"), urlsplit(self.path).query
                    )  # fmt: skip
                except KeyError as missing:
                    code = missing.args[1] if len(missing.args) == 2 else "EntryNotFound"
                    status, content, headers = 404, {"error": f"no {missing}"}, {"X-Error-Code": code}
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def body(self):
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            do_GET = do_HEAD = do_POST = do_PUT = answer

        return Handler

    def reply(self, method, path, body, authorization, query=""):
        """(status, JSON or bytes, headers) of one call. A KeyError is a 404."""
        path = path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets")  # one name, one repository
        if path == "/":
            return 200, {}, {}
        if match := re.fullmatch(r"/lfs/(\w+)", path):  # a signed address: no token goes there
            if hashlib.sha256(body).hexdigest() != match[1]:
                return 400, {"error": "another sha256"}, {}
            self.blobs[match[1]] = body
            return 200, {}, {}
        if authorization != f"Bearer {self.token}":
            return 401, {"error": "Invalid credentials in Authorization header"}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if not name.startswith("me/"):
                return 403, {"error": "You don't have the rights to create a model under this namespace"}, {}
            status = 409 if name in self.files else 200
            self.files.setdefault(name, {})
            self.private.setdefault(name, asked.get("visibility") == "private" or asked.get("private", False))
            return status, {"url": f"{self.url}/{name}"}, {}
        if path == "/api/validate-yaml":
            metadata = json.loads(body)["content"].split("---\n")[1]
            good = isinstance(yaml.safe_load(metadata), dict)
            return (200 if good else 400), {"errors": [] if good else [{"message": "no YAML"}], "warnings": []}, {}
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            self.files[match[1]]
            objects = []
            for wanted in json.loads(body)["objects"]:
                action = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
                objects.append(wanted if wanted["oid"] in self.blobs else {**wanted, "actions": action})
            return 200, {"objects": objects, "transfer": "basic"}, {}
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            files = self._branch(match[1], match[2])
            data = files[match[3]]
            return 200, data, {"ETag": f'"{self._oid(data)}"', "X-Repo-Commit": self._head(files)}
        match = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/([^/]*)(?:/([^/]*)(?:/(.*))?)?)?", path)
        repo, call, branch = match[1], match[2], match[3] or "main"
        if call == "auth-check":
            return 200, {}, {}
        if call == "branch":
            status = 409 if (repo, branch) in self.branches else 200
            self.branches.setdefault((repo, branch), dict(self.files[repo]))
            return status, {}, {}
        files = self._branch(repo, branch)
        if call == "super-squash":
            self.squashed.append((repo, branch))
            return 200, {}, {}
        if call == "tree":
            entries = [{"type": "file", "path": n, "size": len(d), "oid": self._oid(d)} for n, d in files.items()]
            if "recursive=true" in query.lower():
                return 200, entries, {}
            folder = f"{match[4]}/" if match[4] else ""
            entries = {entry["path"].removeprefix(folder): entry for entry in entries
                       if entry["path"].startswith(folder)}  # fmt: skip
            if folder and not entries:
                raise KeyError(folder)
            folders = [{"type": "directory", "path": folder + name, "size": 0, "oid": "0" * 40}
                       for name in dict.fromkeys(path.split("/")[0] for path in entries if "/" in path)]  # fmt: skip
            return 200, folders + [entry for path, entry in entries.items() if "/" not in path], {}
        if call == "preupload":
            return 200, {"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png", ".npy")) else "regular",
                 "oid": self._oid(files[file["path"]]) if file["path"] in files else None}
                for file in json.loads(body)["files"]
            ]}, {}  # fmt: skip
        if call == "commits":
            return 200, [{"title": title} for title in reversed(self.commits)], {}
        if call == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            if lines[0]["value"].get("parentCommit") not in (None, self._head(files)):
                return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
            self.commits.append(lines[0]["value"]["summary"])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "deletedFile":
                    del files[value["path"]]
                elif line["key"] == "deletedFolder":
                    for name in [name for name in files if name.startswith(value["path"].rstrip("/") + "/")]:
                        del files[name]
                else:
                    lfs = line["key"] == "lfsFile"
                    files[value["path"]] = self.blobs[value["oid"]] if lfs else base64.b64decode(value["content"])
            head = self._head(files)
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/{head}", "commitOid": head}, {}
        if call in (None, "revision"):
            return 200, {"id": repo, "sha": self._head(files), "siblings": [{"rfilename": n} for n in files]}, {}
        raise KeyError(path)

    def _branch(self, repo, branch):
        """The files of a branch, or of the newest commit of main by its hash."""
        if repo not in self.files:
            raise KeyError(repo, "RepoNotFound")
        if branch in ("main", self._head(self.files[repo])):
            return self.files[repo]
        if (repo, branch) not in self.branches:
            raise KeyError(branch, "RevisionNotFound")
        return self.branches[repo, branch]

    def _head(self, files):
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def _oid(self, data):
        """What git calls a file: sha1 of a regular one, sha256 of one in large file storage."""
        sha256 = hashlib.sha256(data).hexdigest()
        return sha256 if sha256 in self.blobs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
