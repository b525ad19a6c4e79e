"""The JSON service behind `listener-reward serve`: one judge for many processes, hosts and environments.

- `GET /health`: `{"status": "ok", "rewards": {"listener": ["score"]}, "scorer_version": "..."}`, for UniRL and
  Flow-Factory.
- `POST /compute`: Flow-Factory's remote rewards, and `RemoteReward`.
- `POST /score`: UniRL's reward service (`unirl.answer`).
- The same after `/reference`, `/group` or `/auto`, as in `POST /group/compute`: the scheme that the client wants. A
  server that answers by another replies 409, and `detail` says what to change. Clients that append their paths to a
  base URL, as both hosts' do, need no more than that URL.

JSON both ways, pictures as base64 of PNG, JPEG or WebP: unlike the pickles that reward servers of this field exchange,
nothing that arrives here can run. Paths are not read. There is no authentication, so it listens on this machine only
unless told otherwise.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import selectors
import socket
import sys
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, get_args

import numpy as np

from listener_reward import __version__
from listener_reward.errors import InputError, JudgeError
from listener_reward.media.storyboards import as_picture
from listener_reward.pairs import check_prompts
from listener_reward.reward import Scheme

from .. import unirl
from ..checks import check_no_source
from ..contract import Reward, score
from .collector import ClientGone, GroupCollector
from .schemes import OtherScheme, check_scheme, scheme_of

MAX_BODY = 2**30
"""Larger requests are refused: 1 GiB is about a thousand PNGs of 512 pixels."""

ROUTES = "there are GET /health, POST /compute and POST /score, each also after /reference, /group or /auto"

logger = logging.getLogger(__name__)


def make_server(
    reward: Reward, *, host: str = "127.0.0.1", port: int = 8300, name: str = "listener"
) -> ThreadingHTTPServer:
    """A server that is bound and not yet serving: call its `serve_forever()`.

    Args:
        reward: answers all requests; each in its own thread, so it has to be thread-safe, as `ListenerReward` is. With
            `on_failure="nan"` one image on which the judge broke costs no other its score.
        port: 0 takes a free one, found in `server_address`.
        name: what clients call the reward.

    Raises:
        InputError: the address cannot be had.
    """

    class Handler(_Handler):
        pass

    Handler.reward, Handler.name, Handler.version = staticmethod(reward), name, version_of(reward)
    Handler.retries = Retries()
    try:
        return _Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        fault = error.strerror if isinstance(error, OSError) and error.strerror else error
        other = "port" if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise InputError(f"{host} port {port} cannot be listened on ({fault}); choose another {other}") from error


def version_of(reward: Any) -> str:
    """What UniRL may pin as `expected_scorer_version`: the version of this package, and the judge's name."""
    scorer = reward.reward if isinstance(reward, GroupCollector) else reward
    judge = getattr(scorer, "judge", scorer)
    name = judge if isinstance(judge, str) else getattr(judge, "name", type(judge).__name__)
    return f"listener-reward {__version__} {name}"


def compute(
    reward: Reward,
    body: Any,
    *,
    request: str | None = None,
    scheme: str | None = None,
    gone: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """The response to `POST /compute`: `{"prompt": [...], "image": [base64]}`, or `"video": [[base64 of a frame]]`.

    `rewards` has one number for each prompt. Where one is missing (`null`, for the judge broke on it), or all are,
    there is an `error` too, on which Flow-Factory's client stops; `kind` says whose fault it was. `request` names the
    request for a collector, in which one that comes again takes no second place. `gone` says whether its client has
    hung up.

    Raises:
        OtherScheme: the reward answers by another scheme than the client wants.
    """
    try:
        if not isinstance(body, Mapping) or not isinstance(body.get("prompt"), list):
            raise InputError("prompt is no list; send one prompt for each image")
        images, videos = body.get("image"), body.get("video")
        media = images if images is not None else videos
        if not isinstance(media, list) or (images is not None and videos is not None):
            raise InputError("image or video has to be a list, one of the two")
        check_no_source(**{key: body.get(key) for key in ("condition_images", "condition_videos")})
        check_scheme(reward, scheme, body["prompt"])
        pictures = [_read(item, f"{'image' if images is not None else 'video'}[{i}]") for i, item in enumerate(media)]
        unreadable = [picture for picture in pictures if isinstance(picture, InputError)]
        futures: list[Future[tuple[float, dict[str, float]]]] = []
        if isinstance(reward, GroupCollector):
            check_prompts(body["prompt"], len(pictures))
            futures = [
                reward.submit(picture, prompt, name=None if request is None else f"{request}/{i}")
                for i, (picture, prompt) in enumerate(zip(pictures, body["prompt"], strict=True))
            ]
        if unreadable:
            raise unreadable[0]
        scores, info = (
            reward.wait(futures, gone)
            if isinstance(reward, GroupCollector)
            else score(reward, pictures, body["prompt"], missing=True)
        )
    except OtherScheme:
        raise
    except (InputError, JudgeError) as error:
        return {"rewards": None, "error": str(error), "kind": "input" if isinstance(error, InputError) else "judge"}
    reply: dict[str, Any] = {
        "rewards": _finite(scores),
        "info": {name: _finite(values) for name, values in info.items()},
    }
    if missing := int(np.isnan(scores).sum()):
        reply |= {"error": f"the judge broke on {missing} of {len(scores)} images", "kind": "judge"}
    return reply


def _read(item: Any, field: str) -> Any:
    """The picture, or the `InputError` that it is none."""
    try:
        if isinstance(item, list):
            return as_picture([unirl.decode(frame, f"{field}[{k}]") for k, frame in enumerate(item)], field=field)
        return as_picture(unirl.decode(item, field), field=field)
    except InputError as error:
        return error


def _finite(values: np.ndarray) -> list[float | None]:
    """JSON has no word for NaN."""
    return [None if np.isnan(value) else value for value in values.tolist()]


class Retries:
    """Tells a request that a client sends again from an equal one of another client.

    Flow-Factory's client waits 60 s and then sends the same body again, without a word that it is the same: counted
    twice, its images would fill a group. Two clients may have equal images, too, black ones for instance. The
    difference is that who sends again has hung up before.
    """

    def __init__(self) -> None:
        self._asked: OrderedDict[bytes, list[tuple[str, Any]]] = OrderedDict()  # by body: names and connections
        self._lock = threading.Lock()

    def name(self, body: bytes, connection: Any) -> str:
        """The request's name: that of an equal one whose client has hung up unanswered, or a new one."""
        key = hashlib.sha256(body).digest()
        with self._lock:
            asked = self._asked.setdefault(key, [])
            self._asked.move_to_end(key)
            again = next((k for k, (_, earlier) in enumerate(asked) if hung_up(earlier)), None)
            name = uuid.uuid4().hex if again is None else asked.pop(again)[0]
            asked.append((name, connection))
            while len(self._asked) > 4096:  # of those that nobody sent again
                self._asked.popitem(last=False)
        return name

    def answered(self, body: bytes, name: str, connection: Any) -> None:
        """Forgets a request, unless its client has hung up, and may ask again."""
        key = hashlib.sha256(body).digest()
        with self._lock:
            if not hung_up(connection):
                left = [one for one in self._asked.get(key, []) if one[0] != name]
                if left:
                    self._asked[key] = left
                else:
                    self._asked.pop(key, None)


def hung_up(connection: Any) -> bool:
    """Whether the other side has closed the connection. It must not have sent anything that is yet to be read."""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            return bool(selector.select(0)) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):  # it is closed on this side as well
        return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a rank a connection, all at once at the end of a batch

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up is no fault of the server, and worth no traceback."""
        if isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            logger.info("%s hung up", client_address)
        else:
            logger.exception("a connection of %s failed", client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections, which clients of the field pool
    timeout = 60  # of a silent connection
    reward: Reward
    name: str
    version: str
    retries: Retries

    def do_GET(self) -> None:
        _, path = self._route()
        if path == "/health":
            state = {"status": "ok", "rewards": {self.name: ["score"]}, "scorer_version": self.version}
            self._reply(200, state | {"scheme": scheme_of(self.reward)})
        else:
            self._reply(404, {"detail": ROUTES})

    def do_POST(self) -> None:
        scheme, path = self._route()
        if path not in ("/compute", "/score"):
            self.close_connection = True
            return self._reply(404, {"detail": ROUTES})
        length = self.headers.get("Content-Length", "")
        digits = length.lstrip("0") or "0"
        if not (length.isascii() and length.isdecimal()) or len(digits) > 12 or int(digits) > MAX_BODY:
            self.close_connection = True  # the body stays unread
            return self._reply(
                413 if length.isdecimal() else 411, {"detail": f"send at most {MAX_BODY} bytes, and say how many"}
            )
        raw = self.rfile.read(int(digits))
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            return self._reply(400, {"detail": "the body is not JSON"})
        request = self.retries.name(raw, self.connection)
        identity: dict[str, Any] = {"request": request, "scheme": scheme, "gone": lambda: hung_up(self.connection)}
        try:
            if path == "/compute":
                reply = compute(self.reward, body, **identity)
            else:
                reply = unirl.answer(self.reward, body, name=self.name, version=self.version, **identity)
        except ClientGone:
            self.close_connection = True
            return logger.info("%s hung up before its group was full", self.client_address)
        except OtherScheme as error:
            logger.warning("refused %s: %s", self.client_address, error)
            return self._reply(409, {"detail": str(error)})
        except InputError as error:
            return self._reply(400, {"detail": str(error)})
        except Exception as error:  # a fault of ours: the client hears of it, and the service goes on
            logger.exception("a request failed")
            return self._reply(500, {"detail": f"{type(error).__name__}: {error}"})
        finally:
            self.retries.answered(raw, request, self.connection)
        self._reply(200, reply)

    def _route(self) -> tuple[str | None, str]:
        """The scheme that the path begins with, if any, and the rest of the path."""
        first, _, rest = self.path.removeprefix("/").partition("/")
        return (first, f"/{rest}") if first in get_args(Scheme) else (None, self.path)

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body, allow_nan=False).encode()
        # Of a refusal Flow-Factory's client shows the status line and not the body.
        self.send_response(status, " ".join(body["detail"].split())[:300] if status == 409 else None)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        logger.info(format, *args)
