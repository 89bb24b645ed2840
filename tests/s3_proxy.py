"""A proxy in front of a real S3 store that loses replies, answers 500 or drops conditions when told to."""

import contextlib
import hashlib
import hmac
import http.client
import re
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

from jobs.store import Store

CONDITIONS = ("if-none-match", "if-match")
PIECE_BYTES = 1 << 16

Headers = list[tuple[str, str]]


@dataclass
class _Rule:
    """What to do to the next ``times`` requests that match; None is for all that follow."""

    action: Literal["drop_reply", "answer_500", "refuse"]
    method: str
    path: re.Pattern[str]
    times: int | None


class S3Proxy:
    """What a running proxy is told, plus what it did.

    A match is a method, a space, and a regular expression that is searched in the path with its query, as in
    ``"PUT _versions/"``; ``*`` stands for any method. The first rule that matches a request applies.
    """

    def __init__(self, endpoint: str, secret_key: str) -> None:
        self.endpoint = endpoint
        self.log: list[tuple[str, str]] = []
        """Method and path with query of every request, in the order of arrival."""
        self.counts: Counter[str] = Counter()
        """How often each of: forwarded, drop_reply, answer_500, refuse, stripped, unreachable."""
        self._secret_key = secret_key
        self._rules: list[_Rule] = []
        self._strips = False
        self._lock = threading.Lock()

    def drop_reply(self, match: str, times: int | None = 1) -> None:
        """Let the store do what is asked, then close the connection in place of its answer."""
        self._add("drop_reply", match, times)

    def answer_500(self, match: str, times: int | None = 1) -> None:
        """Let the store do what is asked, then answer 500."""
        self._add("answer_500", match, times)

    def refuse(self, match: str, times: int | None = None) -> None:
        """Answer 503 without asking the store."""
        self._add("refuse", match, times)

    def strip_conditional(self) -> None:
        """Take If-None-Match and If-Match out of all requests, signing them anew: a store that ignores conditions."""
        self._strips = True

    def behave(self) -> None:
        """Forget all rules; what was counted stays."""
        with self._lock:
            self._rules.clear()
            self._strips = False

    def _add(self, action: Literal["drop_reply", "answer_500", "refuse"], match: str, times: int | None) -> None:
        method, separator, path = match.partition(" ")
        if not separator or not re.fullmatch(r"[A-Z]+|\*", method):
            raise ValueError(f"a match is a method (or *), a space and a regular expression, not {match!r}")
        with self._lock:
            self._rules.append(_Rule(action, method, re.compile(path), times))

    def decide(self, method: str, path: str) -> str:
        """Note a request; return the action for it."""
        with self._lock:
            self.log.append((method, path))
            for rule in self._rules:
                if rule.method in ("*", method) and rule.path.search(path) and rule.times != 0:
                    if rule.times is not None:
                        rule.times -= 1
                    return rule.action
        return "forwarded"

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def without_conditions(self, method: str, path: str, headers: Headers) -> Headers:
        """Return the headers without conditions, if told to drop them."""
        kept = [(name, value) for name, value in headers if name.lower() not in CONDITIONS]
        if not self._strips or len(kept) == len(headers):
            return headers
        self.count("stripped")
        return sign_again(method, path, kept, self._secret_key)


def sign_again(method: str, path: str, headers: Headers, secret_key: str) -> Headers:
    """Return the headers with a signature of what is left of those that the client signed.

    Source: AWS, "Signature Version 4 signing process", for one request with a payload hash in its headers.

    Raises:
        ValueError: the signature covers the pieces of the body as well.
    """
    values = {name.lower(): " ".join(value.split()) for name, value in headers}
    authorization = values.get("authorization")
    if authorization is None:  # Not signed, or in the query: there the conditions are not covered.
        return headers
    found = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/]+)/(?P<scope>[^,]+), ?SignedHeaders=(?P<names>[^,]+), ?Signature=\w+",
        authorization,
    )
    payload = values.get("x-amz-content-sha256", "")
    if found is None or payload.startswith("STREAMING-AWS4"):
        raise ValueError(f"cannot sign this request again: {authorization!r}, payload {payload!r}")
    signed = [name for name in found["names"].split(";") if name in values]
    names = ";".join(signed)
    target, _, query = path.partition("?")
    parameters = "&".join(sorted(part if "=" in part else f"{part}=" for part in query.split("&") if part))
    lines = [method, target, parameters, *(f"{name}:{values[name]}" for name in signed), "", names, payload]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", values["x-amz-date"], found["scope"], digest])
    key = f"AWS4{secret_key}".encode()
    for part in found["scope"].split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    credential = f"{found['key']}/{found['scope']}"
    anew = f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={names}, Signature={signature}"
    return [(name, anew if name.lower() == "authorization" else value) for name, value in headers]


class _Server(ThreadingHTTPServer):
    """One thread for each connection; all of them end with the server."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, store: tuple[str, int], secret_key: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store
        self.proxy = S3Proxy(f"http://127.0.0.1:{self.server_port}", secret_key)
        self._clients: set[socket.socket] = set()
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._clients.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._clients.discard(request)
        super().shutdown_request(request)

    def break_connections(self) -> None:
        """Shut the clients' connections down, so that the threads that read from them end."""
        with self._lock:
            for client in self._clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, with one connection to the store behind it.

    The base class answers ``Expect: 100-continue`` and keeps the connection open between requests.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = PIECE_BYTES

    def setup(self) -> None:
        super().setup()
        assert isinstance(self.server, _Server)
        self.proxy = self.server.proxy
        self.upstream = http.client.HTTPConnection(*self.server.store, timeout=60)

    def finish(self) -> None:
        self.upstream.close()
        with contextlib.suppress(ConnectionError):
            super().finish()

    def handle(self) -> None:
        # Either side went away within an exchange: all that is left is to close the other.
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            super().handle()

    def handle_expect_100(self) -> bool:
        goes_on = super().handle_expect_100()
        self.wfile.flush()
        return goes_on

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Stay silent: the proxy keeps its own log."""

    def _relay(self) -> None:
        """Handle one request."""
        proxy = self.proxy
        body = self._read_body()
        action = proxy.decide(self.command, self.path)
        if action == "refuse":
            proxy.count(action)
            self._answer(503, "ServiceUnavailable")
            return
        try:
            headers = proxy.without_conditions(self.command, self.path, self.headers.items())
        except ValueError as error:
            self._answer(400, str(error))
            return
        try:
            answer = self._ask_store(headers, body)
            if action != "forwarded":
                answer.read()
        except (OSError, http.client.HTTPException):
            proxy.count("unreachable")
            self.close_connection = True
            return
        # Counted before the client can know of it, so that a test may look at once.
        proxy.count(action)
        if action == "drop_reply":
            self.close_connection = True
        elif action == "answer_500":
            self._answer(500, "InternalError")
        else:
            self._pass_on(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay

    def _is_chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    def _read_body(self) -> bytes:
        """Return the whole body of the request, freed of chunks.

        Raises:
            ConnectionError: the client went away in the middle.
        """
        if not self._is_chunked():
            return self._read(int(self.headers.get("content-length", 0)))
        pieces = []
        while size := int(self.rfile.readline().partition(b";")[0] or b"0", 16):
            pieces.append(self._read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # Trailers.
            pass
        return b"".join(pieces)

    def _read(self, num_bytes: int) -> bytes:
        read = self.rfile.read(num_bytes)
        if len(read) < num_bytes:
            raise ConnectionError("the client went away within a request")
        return read

    def _ask_store(self, headers: Headers, body: bytes) -> http.client.HTTPResponse:
        """Send the request on as it came, its Host header included, since that is signed."""
        kept = self.upstream.sock
        if kept is not None and select.select([kept], [], [], 0)[0]:  # Nothing is due: the store has closed it.
            self.upstream.close()
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            self.upstream.putheader(name, value)
        if self._is_chunked():
            self.upstream.endheaders([body], encode_chunked=True)
        else:
            self.upstream.endheaders(body)
        return self.upstream.getresponse()

    def _pass_on(self, answer: http.client.HTTPResponse) -> None:
        """Send the store's answer back as it came."""
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        while piece := answer.read(PIECE_BYTES):
            self.wfile.write(b"%X\r\n%b\r\n" % (len(piece), piece) if answer.chunked else piece)
        if answer.chunked and self.command != "HEAD":
            self.wfile.write(b"0\r\n\r\n")
        # Close what the store closes, as well as what has no other end than the connection's.
        self.close_connection |= answer.will_close or bool(answer.length)

    def _answer(self, status: int, code: str) -> None:
        """Answer in place of the store."""
        body = f"<Error><Code>{code}</Code><Message>from the proxy of the tests</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def s3_proxy(store: Store) -> Iterator[S3Proxy]:
    """Run a proxy in front of the store until the block ends.

    A client reaches it as ``dataclasses.replace(store, endpoint=proxy.endpoint)``.
    """
    address = urlsplit(store.endpoint)
    if not address.hostname or not address.port:
        raise ValueError(f"the proxy stands in front of http://host:port, not {store.endpoint}")
    server = _Server((address.hostname, address.port), store.secret_key)
    accepting = threading.Thread(target=server.serve_forever, args=(0.05,), name="s3-proxy")
    accepting.start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        server.break_connections()
        server.server_close()
        accepting.join()
