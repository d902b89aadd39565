"""A Google Cloud Storage in memory, on loopback: as much of its API as TensorFlow and TensorStore use.

Their own emulators leave out the preconditions (`ifGenerationMatch`) by which TensorStore commits. TensorFlow
has no setting for another host, so a proxy that ends its TLS leads it here.
"""

import contextlib
import dataclasses
import datetime
import http.server
import itertools
import json
import re
import ssl
import subprocess
import sys
import threading
import urllib.parse

HOSTS = ("www.googleapis.com", "storage.googleapis.com")


@dataclasses.dataclass(frozen=True)
class Blob:
    """An object of the store: it is replaced whole, never appended to."""

    data: bytes
    generation: int
    written: datetime.datetime


class Store:
    """The objects of all buckets, and what was asked of it.

    Attributes:
      blobs: (bucket, name) -> Blob.
    """

    def __init__(self):
        self.blobs: dict[tuple[str, str], Blob] = {}
        self.lock = threading.RLock()
        self._generations = itertools.count(1)

    def write(self, bucket: str, name: str, data: bytes) -> dict:
        """Puts an object, whatever was there; its description."""
        with self.lock:
            written = datetime.datetime.now(datetime.UTC)
            self.blobs[bucket, name] = Blob(data, next(self._generations), written)
            return self.describe(bucket, name)

    def describe(self, bucket: str, name: str) -> dict:
        blob = self.blobs[bucket, name]
        time = blob.written.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        numbers = dict(size=str(len(blob.data)), generation=str(blob.generation), metageneration="1")
        return dict(kind="storage#object", bucket=bucket, name=name, updated=time) | numbers

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(n for b, n in self.blobs if b == bucket and n.startswith(prefix))


class _Refused(Exception):
    """An answer other than 200."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, *_):
        pass

    def do_CONNECT(self):
        """A proxy's request: answer in the name of the host that is asked for."""
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", buffering=0)

    def finish(self):
        super().finish()
        if isinstance(self.connection, ssl.SSLSocket):  # the server closes the one beneath it alone
            self.connection.close()

    def _handle(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        self.body = self._read_body()
        bucket, name = r"/storage/v1/b/([^/]+)", r"/o/(.+)"
        routes = (
            ("GET", bucket, self._bucket),
            ("GET", f"{bucket}/o/?", self._list),
            ("GET", f"{bucket}{name}", self._get),
            ("GET", r"/([^/]+)/(.+)", self._read),
            ("DELETE", f"{bucket}{name}", self._delete),
            ("POST", f"/upload{bucket}/o", self._upload),
            ("PUT", f"/upload{bucket}/o", self._continue),
            ("POST", f"{bucket}{name}/rewriteTo/b/([^/]+){name}", self._copy),
        )
        try:
            for method, pattern, answer in routes:
                match = re.fullmatch(pattern, url.path)
                if match and method == self.command:
                    with self.server.store.lock:
                        return answer(*map(urllib.parse.unquote, match.groups()))
            raise _Refused(404)
        except _Refused as refused:
            (status,) = refused.args
            message = json.dumps({"error": {"code": status, "message": self.path}})
            self._reply(b"" if status == 304 else message.encode(), status)

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, body: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _reply_json(self, answer: dict):
        self._reply(json.dumps(answer).encode(), Content_Type="application/json")

    def _check(self, bucket: str, name: str):
        """The preconditions: the generation that the client thinks is there (0: none)."""
        blob = self.server.store.blobs.get((bucket, name))
        generation = str(blob.generation if blob else 0)
        if self.query.get("ifGenerationMatch", generation) != generation:
            raise _Refused(412)
        if self.query.get("ifGenerationNotMatch") == generation:
            raise _Refused(304 if self.command == "GET" else 412)

    def _existing(self, bucket: str, name: str) -> Blob:
        self._check(bucket, name)
        blob = self.server.store.blobs.get((bucket, name))
        if blob is None:
            raise _Refused(404)
        return blob

    def _bucket(self, bucket):
        answer = {"kind": "storage#bucket", "id": bucket, "name": bucket}
        self._reply_json(answer | {"location": "US", "storageClass": "STANDARD"})

    def _list(self, bucket):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        start, end = self.query.get("startOffset", ""), self.query.get("endOffset")
        limit, after = int(self.query.get("maxResults", 1000)), self.query.get("pageToken", "")
        items, prefixes, count, last = [], [], 0, ""
        for name in self.server.store.names(bucket, prefix):
            rest = name[len(prefix) :]
            folder = delimiter and delimiter in rest
            entry = prefix + rest.split(delimiter)[0] + delimiter if folder else name
            if entry <= after or name < start or (end and name >= end) or entry == last:
                continue
            if count == limit:
                break
            count, last = count + 1, entry
            if folder:
                prefixes.append(entry)
            else:
                items.append(self.server.store.describe(bucket, name))
        else:
            last = ""
        answer = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        self._reply_json(answer | ({"nextPageToken": last} if last else {}))

    def _get(self, bucket, name):
        if self.query.get("alt") == "media":
            return self._read(bucket, name)
        self._existing(bucket, name)
        self._reply_json(self.server.store.describe(bucket, name))

    def _read(self, bucket, name):
        blob = self._existing(bucket, name)
        known = {"X-Goog-Generation": str(blob.generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._reply(blob.data, **known)
        size = len(blob.data)
        first, last = wanted.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            raise _Refused(416)
        known["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._reply(blob.data[start:stop], 206, **known)

    def _delete(self, bucket, name):
        self._existing(bucket, name)
        del self.server.store.blobs[bucket, name]
        self._reply(b"", 204)

    def _copy(self, bucket, name, to_bucket, to_name):
        blob = self._existing(bucket, name)
        written = self.server.store.write(to_bucket, to_name, blob.data)
        self._reply_json({"kind": "storage#rewriteResponse", "done": True, "resource": written})

    def _upload(self, bucket):
        if "upload_id" in self.query:
            return self._continue(bucket)
        name = self.query["name"]
        self._check(bucket, name)
        if self.query["uploadType"] == "resumable":
            session = f"s{len(self.server.sessions)}"
            self.server.sessions[session] = (name, self.query, bytearray())
            host, secure = self.headers["Host"], isinstance(self.connection, ssl.SSLSocket)
            path = f"/upload/storage/v1/b/{bucket}/o?upload_id={session}"
            return self._reply(b"", Location=f"http{'s' * secure}://{host}{path}")
        self._reply_json(self.server.store.write(bucket, name, self.body))

    def _continue(self, bucket):
        """A piece of a resumable upload; the object is there when the last piece is."""
        name, self.query, received = self.server.sessions[self.query["upload_id"]]
        received += self.body
        total = self.headers.get("Content-Range", "/").rpartition("/")[2]
        if total in ("", str(len(received))):
            self._check(bucket, name)
            return self._reply_json(self.server.store.write(bucket, name, bytes(received)))
        range_ = {"Range": f"bytes=0-{len(received) - 1}"} if received else {}
        self._reply(b"", 308, **range_)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    disable_nagle_algorithm = True

    def handle_error(self, request, client_address):
        """A client that was killed is no fault of the store's."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def __init__(self, store: Store, tls: ssl.SSLContext):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store, self.tls = store, tls
        self.sessions: dict[str, tuple[str, dict, bytearray]] = {}


@contextlib.contextmanager
def serve(folder):
    """A running store and the environment variables that lead its clients to it.

    Args:
      folder: pathlib.Path of an empty folder, for the certificate (made by the command openssl).

    Yields:
      (Store, environment of a process that is to use it).
    """
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    names = ",".join(f"DNS:{host}" for host in HOSTS)
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=emulator -addext subjectAltName={names}"
    )
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    store = Store()
    server = _Server(store, tls)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {
        "STORAGE_EMULATOR_HOST": address,  # google-cloud-storage, by which Orbax lists
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore
        "https_proxy": address,  # TensorFlow
        "no_proxy": "127.0.0.1,localhost",
        "CURL_CA_BUNDLE": str(certificate),
        "NO_GCE_CHECK": "true",  # TensorFlow must not look for Google's metadata server
        "GCS_RETRY_CONFIG_MAX_RETRIES": "2",
    }
    try:
        yield store, environment
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
