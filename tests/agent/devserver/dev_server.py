"""A dev server for tests that misbehaves as asked: `python dev_server.py MODE [flags…]`. The port is $PORT.

It serves what Vite would as far as a probe sees: a page, its entry module, no hot-update client.
"""

from __future__ import annotations

import os
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

mode = sys.argv[1]
requests = 0


class Answers(BaseHTTPRequestHandler):
    """One request."""

    def do_GET(self) -> None:
        global requests
        requests += 1
        if mode == "dies-on-third" and requests == 3:
            os._exit(1)
        if mode == "slow":
            time.sleep(1.0)
        if mode.startswith("status-") and self.path == "/":
            _, status, target = [*mode.split("-"), ""][:3]
            self.send_response(int(status))
            if target:
                self.send_header("Location", target.replace("PORT", os.environ["PORT"]))
            self.end_headers()
            return
        if self.path == "/":
            body, kind, code = PAGE, "text/html", 200
        elif mode == "outdated" and "--force" not in sys.argv:
            body, kind, code = "Outdated Optimize Dep", "text/plain", 504
        elif mode == "broken" and not Path("fixed").exists():
            body, kind, code = "SyntaxError", "text/plain", 500
        else:
            body, kind, code = "export default 1", "text/javascript", 200
        if mode == "endless" and self.path != "/":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(b"x" * 65536)
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


PAGE = '<!doctype html><script type="module" src="/main.js"></script>'
if mode == "socketless":
    PAGE += '<script type="module" src="/@vite/client"></script>'
config = Path("vite.config.ts")
if mode == "crashes-unless-mended" and not (config.exists() and "mended" in config.read_text()):
    mode = "crashes"
if mode == "crashes" and not Path("fixed").exists():
    print("Error: a plugin is broken")
    sys.exit(1)
if mode == "late":
    time.sleep(0.7)
if mode == "never":
    time.sleep(3600)
where = {"elsewhere": 0, "two": 0}.get(mode, int(os.environ.get("PORT", "0")))
server = ThreadingHTTPServer(("127.0.0.1", where), Answers)
if mode == "two":
    other = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
if mode == "https":
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain("certificate.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
