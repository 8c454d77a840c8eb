"""Whatever this package asks of a server outside goes through here: a judge, a rollout engine.

A server may be slow, busy, mistaken or hostile. So the time of an answer is bounded by the clock and not by the silence
between two bytes, its size and its nesting are bounded, a wish to be asked later is granted up to a minute, nothing is
redirected (a key would go along), and what a server says is shown without the key and without control characters. All
that goes wrong is a :class:`ServerError` of one line.
"""

from __future__ import annotations

import base64
import html
import http.client
import json
import os
import queue
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar

from stable_rlhf.show.progress import mark, printable

T = TypeVar("T")

ANSWER_BYTES = 16 << 20  # of an answer, unless a request says otherwise
_PAUSE_MOST = 60.0  # seconds until the next try, whatever Retry-After says
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # HTTP statuses after which the same request may succeed
_REFUSAL_BYTES = 1 << 16  # of an answer that is no success: more says nothing more
_SHOWN = 300  # characters of what a server says in an error
_BLOCK = 1 << 16
_TELLING = 8  # first letters of a key that are masked with what follows them

# Names of environment variables and of request fields whose values nobody but their owner should see.
SECRET_NAME = re.compile(
    r"TOKEN(?!IZERS|S\b|S_)|SECRET|KEY|PASS|AUTH|CRED|JWT|COOKIE|BEARER|PRIVATE|_PWD?$", re.IGNORECASE
)
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/\s]*|[^/\s:]+:(?!\d+/)\S*)@")  # a password may hold a slash


class ServerError(ValueError):
    """A server outside did not do what was asked: one line that names it, the cause and what to do."""


class _TooLarge(Exception):
    pass


def without_credentials(text: str) -> str:
    """``text`` with ``user:password@`` taken out of every address in it."""
    return _CREDENTIALS.sub("***@", text)


def has_credentials(text: str) -> bool:
    """Whether an address in ``text`` holds a user or a password."""
    return _CREDENTIALS.search(text) is not None


def short(value: Any) -> str:
    """A value out of an answer, for an error: short, however large or deep it is."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return repr(value)[:80]


def check_address(setting: str, address: str) -> None:
    """Refuse what is no address of a server: ``http://host:port/path``, without credentials, query or fragment.

    Raises:
        ValueError: names the setting and what is wrong, and shows no credentials.
    """
    scheme, separator, rest = address.partition("://")
    redacted = printable(f"{scheme}{separator}***@{rest.rpartition('@')[2]}" if "@" in rest else address, lines=False)
    if "@" in rest:
        raise ValueError(
            f"{setting}: {redacted!r} holds credentials, and settings are written into every record of a run: leave "
            "them out of the address"
        )
    try:
        parts = urllib.parse.urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not re.fullmatch(r"[!-~]+", address) or parts.query or parts.fragment:
        raise ValueError(
            f"{setting} must be an address without query, http://host:port or http://host:port/path (https:// as "
            f"well), got {redacted!r}"
        )


def read_key(setting: str, variable: str, *, default: str) -> str | None:
    """The key in an environment variable, None where it is not set.

    Raises:
        ValueError: it is not set though another variable than the ``default`` one (or "": none) was named, or it holds
            what no header can carry; the value is never shown.
    """
    key = os.environ.get(variable, "").strip()
    if variable not in ("", default) and not key:
        raise ValueError(f"{setting}: the environment variable that it names is not set (a name belongs here, no key)")
    if not re.fullmatch(r"[ -~]*", key):
        raise ValueError(f"{setting}: the environment variable that it names holds characters that no key has")
    return key or None


class Server:
    """A server that answers HTTP with JSON.

    Args:
        what: What it is to us, for errors: ``judge``, ``vLLM server``.
        address: http://host:port/path; paths of requests are added to it.
        setting: The setting that holds the address.
        key: Sent as bearer token, or as it is where it begins with ``Basic`` or ``Bearer``; never shown.
        timeout: Seconds until an answer must be whole, from the first byte that is sent; ``timeout_setting``: the
            setting that holds them.
        retries: Tries again where the server is busy, fails, or does not answer in time.
        pause: Seconds until the first of them; they double from try to try, and Retry-After may lengthen them to a
            minute.
    """

    def __init__(
        self, what: str, address: str, *, setting: str, key: str | None = None, timeout: float, timeout_setting: str,
        retries: int, pause: float = 1.0,
    ) -> None:  # fmt: skip
        check_address(setting, address)
        self.address = address.rstrip("/")
        self.name = f"{what} {self.address}"
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self._setting, self._timeout_setting = setting, timeout_setting
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key:
            self._headers["Authorization"] = key if key.startswith(("Basic ", "Bearer ")) else f"Bearer {key}"
        self._secret = _secret(key) if key else None
        self._tls = ssl.create_default_context() if self.address.startswith("https:") else None

    def shown(self, text: str) -> str:
        """What a server said, as it may be shown: in one line, short, without the key and control characters."""
        for once_more in (text, " ".join(printable(text, lines=False).split())):
            text = self._secret.sub("***", once_more) if self._secret else once_more
        text = without_credentials(text)
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"

    def error(self, problem: str) -> ServerError:
        """``problem`` as an error that names the server."""
        return ServerError(f"{self.name}: {problem}")

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, read: Callable[[Any], T] = lambda answer: answer, *,
        limit: int = ANSWER_BYTES, hints: Mapping[int, str] | None = None, stop: threading.Event | None = None,
    ) -> T:  # fmt: skip
        """POST ``body`` (GET without one), and what ``read`` makes of the answer's JSON ({} when it has none).

        ``read`` raises ValueError for an answer that is not what was asked. ``hints``: what to do, by HTTP status.
        ``limit``: bytes that the answer may have. ``stop``: nothing is waited for any more once it is set.

        Raises:
            ServerError: no answer, a refusal, or an answer that is too long, no JSON, or not what was asked.
        """
        stop = stop or threading.Event()
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, self._headers)
        for tried in range(self.retries + 1):
            wished = 0.0
            try:
                status, reason, headers, content = self._exchange(request, limit, stop)
            except _TooLarge:
                raise self.error(
                    f"the answer to {path} has more than {limit:,} bytes; is it the right server?"
                ) from None
            except (OSError, http.client.HTTPException, zlib.error) as error:  # URLError and TimeoutError are OSErrors
                problem = self.shown(str(getattr(error, "reason", error)) or type(error).__name__)
            except ValueError as error:  # such as a host's name that is none
                raise self.error(f"{path} cannot be asked for: {self.shown(str(error))}") from None
            else:
                if 200 <= status < 300:
                    return self._read(path, content, read)
                said = self.shown(content.decode(errors="replace"))
                problem = f"{status} {self.shown(reason)}" + (f": {said}" if said else "")
                if 300 <= status < 400:
                    where = self.shown(headers.get("Location", "")) or "nowhere"
                    raise self.error(f"{path} is answered with {status} and sends to {where}; give the address that "
                                     f"answers itself as {self._setting}")  # fmt: skip
                if status not in _PASSING:
                    hint = (hints or {}).get(status)
                    raise self.error(f"{path} is refused: {problem}" + (f"; {hint}" if hint else ""))
                wished = _seconds(headers.get("Retry-After", ""))
            if tried < self.retries and stop.wait(min(_PAUSE_MOST, max(self.pause * 2**tried, wished))):
                break
        raise self.error(
            f"no answer to {path}, tried {tried + 1} times; the last: {problem}; is it up? {self._setting} says where "
            f"it is, {self._timeout_setting} ({self.timeout:g}) how many seconds an answer may take"
        )

    def ask_all(
        self, path: str, bodies: Iterable[Mapping[str, Any]], read: Callable[[int, Any], T], *, at_once: int,
        advance: Callable[[], None], limit: int = ANSWER_BYTES,
    ) -> list[T]:  # fmt: skip
        """:meth:`ask` for every body, ``at_once`` at a time; the first error ends them all. ``read`` gets a body's
        place besides."""
        stop = threading.Event()
        with ThreadPoolExecutor(at_once) as pool:
            futures = {
                pool.submit(self.ask, path, body, partial(read, place), limit=limit, stop=stop): place
                for place, body in enumerate(bodies)
            }
            results: dict[int, T] = {}
            try:
                for done in as_completed(futures):
                    results[futures[done]] = done.result()
                    advance()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)  # else all that wait would still be asked
                raise
        return [results[place] for place in range(len(results))]

    def _exchange(
        self, request: urllib.request.Request, limit: int, stop: threading.Event
    ) -> tuple[int, str, Any, bytes]:
        """One request and its answer, in a thread of its own: only so is its whole time bounded, from the look-up of
        the name to the last byte."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        held = _Held()

        def talk() -> None:
            try:
                answer.put(_talk(request, self.timeout, limit, held, self._tls))
            except Exception as error:
                answer.put(error)

        threading.Thread(target=talk, daemon=True).start()
        ends = time.monotonic() + self.timeout
        late = TimeoutError(f"no whole answer within {self.timeout:g} s")
        try:
            while True:
                with suppress(queue.Empty):
                    reply = answer.get(timeout=min(0.2, max(0.0, ends - time.monotonic())))
                    break
                if stop.is_set():
                    raise TimeoutError("another request has failed")
                if time.monotonic() >= ends:
                    raise late
                mark()  # nobody hangs here: this wait has an end of its own
        finally:
            held.end()
        if isinstance(reply, Exception):
            cause = getattr(reply, "reason", reply)
            if isinstance(cause, TimeoutError) and cause.errno is None:  # the socket's own limit: the same time
                raise late
            raise reply
        return reply

    def _read(self, path: str, content: bytes, read: Callable[[Any], T]) -> T:
        def refuse(name: str) -> Any:
            raise ValueError(f"{name} is no number")

        try:
            parsed = json.loads(content, parse_constant=refuse) if content.strip() else {}
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else self.shown(str(error))
            said = self.shown(content[:_BLOCK].decode(errors="replace"))
            raise self.error(f"the answer to {path} is not JSON ({why}): {said}") from None
        try:
            return read(parsed)
        except ValueError as error:
            raise self.error(f"the answer to {path} is not what was asked for: {self.shown(str(error))}") from None


class _Held:
    """The sockets of one request, to be ended from another thread: who still reads has nothing to read any more."""

    def __init__(self) -> None:
        self._lock, self._sockets, self._ended = threading.Lock(), list[socket.socket](), False

    def connection(self, kind: Callable[..., Any], host: str, **settings: Any) -> Any:
        """A connection whose socket is held before anything is read from it."""
        connection = kind(host, **settings)
        connect = connection._create_connection

        def create(*where: Any, **how: Any) -> socket.socket:
            opened: socket.socket = connect(*where, **how)
            with self._lock:
                if self._ended:
                    opened.close()
                    raise TimeoutError("too late")
                self._sockets.append(opened.dup())
            return opened

        connection._create_connection = create
        return connection

    def end(self) -> None:
        with self._lock:
            self._ended = True
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()


def _talk(
    request: urllib.request.Request, timeout: float, limit: int, held: _Held, tls: ssl.SSLContext | None
) -> tuple[int, str, Any, bytes]:
    opener = urllib.request.OpenerDirector()  # neither redirects nor raises for a status
    for handler in (urllib.request.ProxyHandler(), _HTTP(held), _HTTPS(held, tls)):
        opener.add_handler(handler)
    with opener.open(request, timeout=timeout) as response:
        content, success = bytearray(), 200 <= response.status < 300
        most = limit if success else _REFUSAL_BYTES
        while len(content) <= most and (block := response.read1(_BLOCK)):
            content += block
        if len(content) > most:
            if success:
                raise _TooLarge
        elif response.length or (response.length is None and not response.chunked and not content):
            raise http.client.IncompleteRead(bytes(content), response.length)
        return response.status, response.reason, response.headers, _unpacked(bytes(content), response.headers, most)


def _unpacked(content: bytes, headers: Any, most: int) -> bytes:
    """The content of an answer that was packed though nobody asked for that, as proxies do."""
    kind = (headers.get("Content-Encoding") or "identity").strip().lower()
    if kind in ("identity", ""):
        return content
    if kind not in ("gzip", "x-gzip", "deflate"):
        raise http.client.HTTPException(f"the answer is packed as {kind!r}")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    unpacked = unpacker.decompress(content, most + 1)
    if len(unpacked) > most:
        raise _TooLarge
    if not unpacker.eof:
        raise http.client.HTTPException("the answer is packed and ends too early")
    return unpacked


class _HTTP(urllib.request.HTTPHandler):
    def __init__(self, held: _Held) -> None:
        super().__init__()
        self._held = held

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(self._held.connection, http.client.HTTPConnection), request)


class _HTTPS(urllib.request.HTTPSHandler):
    def __init__(self, held: _Held, tls: ssl.SSLContext | None) -> None:
        super().__init__(context=tls)
        self._held, self._tls = held, tls

    def https_open(self, request: urllib.request.Request) -> Any:
        connection = partial(self._held.connection, http.client.HTTPSConnection)
        return self.do_open(connection, request, context=self._tls)


def _seconds(wished: str) -> float:
    """Retry-After as seconds from now: a number, or a date."""
    try:
        seconds = float(wished)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(wished).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if seconds > 0 else 0.0  # NaN as well


def _secret(key: str) -> re.Pattern[str]:
    """Every form in which a server may give the key back, its beginning alone among them."""
    bare = key.removeprefix("Bearer ").removeprefix("Basic ").strip()
    words = {key, bare}
    if key.startswith("Basic "):
        with suppress(ValueError):
            login = base64.b64decode(bare, validate=True).decode()
            words |= {login, login.partition(":")[2]}
    forms: set[str] = set()
    for word in filter(None, words):
        raw = word.encode()
        packed = {raw.hex(), *(encode(raw).decode() for encode in (base64.b64encode, base64.urlsafe_b64encode))}
        if len(word) >= 2 * _TELLING:
            forms.add("".join(map(_letter, word[:_TELLING])) + r"[^\s\"'<>]*")
        forms |= {"".join(map(_letter, word)), *map(re.escape, packed), *(re.escape(p.rstrip("=")) for p in packed)}
    return re.compile("|".join(sorted(forms, key=len, reverse=True)), re.IGNORECASE)


def _letter(letter: str) -> str:
    """A pattern of one letter of a key as text, address, JSON or HTML writes it, who escapes what differs."""
    code, plain = ord(letter), re.escape(letter)
    forms = [plain, re.escape(html.escape(letter)), re.escape(urllib.parse.quote(letter, safe="")), f"%{code:02x}",
             rf"\\{plain}", rf"\\u{code:04x}", f"&#x0*{code:x};", f"&#0*{code};"]  # fmt: skip
    if letter == " ":
        forms.append(r"\+")
    return f"(?:{'|'.join(dict.fromkeys(forms))})"
