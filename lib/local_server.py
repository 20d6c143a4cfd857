"""A small web server: one request a connection, with time limits, and none from other sites."""

import contextlib
import ipaddress
import json
import os
import re
import socket
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from lib.cli import UserError

HEADERS = {"Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; "
           "script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
           "Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff",
           "Referrer-Policy": "no-referrer", "Cache-Control": "no-store", "Connection": "close"}


class Server(ThreadingHTTPServer):
    """A thread for each connection. Raises UserError when it cannot listen there."""

    allow_reuse_address = os.name != "nt"                # Windows would let two programs listen

    def __init__(self, host: str, port: int, handler: type["Handler"]):
        self.host, self.address_family = host, socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), handler)
        except OSError as error:
            raise UserError(f"cannot listen on {host}, port {port} ({error.strerror}): choose another --port "
                            "or --host") from None
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def server_bind(self):                               # without asking the network for this machine's name
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):      # a client that went away
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """What all requests share; a subclass adds do_GET and do_POST, which begin with `accepts`."""

    protocol_version, server_version, sys_version = "HTTP/1.1", "vision-gpt", ""
    timeout = 20                                         # seconds for which nothing comes or goes
    deadline = 60                                        # seconds until the whole request is there
    max_bytes = 32 << 20                                 # of a body

    def setup(self):
        super().setup()
        self.alarm = threading.Timer(self.deadline, self.hang_up)
        self.alarm.daemon = True
        self.alarm.start()

    def hang_up(self):
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def finish(self):
        self.alarm.cancel()
        super().finish()

    def log_message(self, *args):                        # what is sent here is nobody else's business
        pass

    def reply(self, status: int, content: bytes | dict, kind: str = "application/json") -> None:
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def accepts(self) -> bool:
        """Whether the request is one to answer; if not, the reason has been sent.

        A browser may be sent here by a page of another site, either openly, which Origin tells, or by a name
        of that site that points to this machine, so only addresses and this machine's own names are known.
        """
        host, origin, status = self.headers.get("Host", ""), self.headers.get("Origin"), 403
        name, length = re.sub(r":\d*$", "", host).strip("[]").lower(), self.headers.get("Content-Length", "")
        if not is_address(name) and name not in ("localhost", self.server.host, socket.gethostname().lower()):
            reason = f"open this page by its address, {self.server.url}, not by the name {name!r}"
        elif origin and urlsplit(origin).netloc != host:
            reason = f"requests from another site, {origin}, are refused"
        elif self.command != "POST":
            return True
        elif not re.fullmatch("[0-9]{1,15}", length):
            status, reason = 411, "send the bytes as the body, with a Content-Length"
        elif int(length) > self.max_bytes:
            status, reason = 413, f"this has {int(length) >> 20} MB; the limit is {self.max_bytes >> 20} MB"
        else:
            return True
        self.reply(status, dict(error=reason))
        while self.rfile.read1(1 << 16):                 # else the reply may be lost with what is unread
            pass
        return False

    def handle_expect_100(self) -> bool:                 # curl asks before it sends much
        return self.accepts() and super().handle_expect_100()

    def read_body(self) -> bytes:
        """The whole body. Raises ConnectionError when the client goes away or is too slow."""
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError
        self.alarm.cancel()
        return body


def is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False
