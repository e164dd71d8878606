"""A server of files on this machine, in place of the network."""

import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = bytes(i * 7 % 251 for i in range(300_000))  # of whatever `server.files` has not


class Handler(BaseHTTPRequestHandler):
    """Notes what is asked for, states checksums as Hugging Face's storage does, resumes, and breaks off when told to."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.server.asked.append(("HEAD", self.path))
        body = self.server.files.get(self.path, BODY)
        self.send_response(302)
        self.send_header("Location", "http://127.0.0.1:1/storage")
        if self.path != "/no-sum":
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()

    def do_GET(self):
        server, body = self.server, self.server.files.get(self.path, BODY)
        range_ = self.headers.get("Range")
        server.asked.append(("GET", range_))
        start = int(range_.removeprefix("bytes=").rstrip("-")) if range_ and server.ranges else 0
        if self.path == "/missing" or start >= len(body):
            self.send_error(404 if self.path == "/missing" else 416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        stop = server.break_at if server.break_at is not None else len(body)
        server.break_at = None  # only once
        self.wfile.write(body[start:stop])


@contextlib.contextmanager
def serve():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.files, server.ranges, server.break_at = [], {}, True, None
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
