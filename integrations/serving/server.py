"""`make_server`: a reward behind an address, from its first request to its last."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

from listener_reward.errors import InputError, missing

from ..contract import Reward
from .auth import check_exposure
from .limits import Limits
from .metrics import Metrics

if fault := missing("serve", "a server"):
    raise fault

import uvicorn

from .app import create_app
from .protocol import Protocol
from .service import Service

logger = logging.getLogger(__name__)


def make_server(
    reward: Reward,
    *,
    host: str = "127.0.0.1",
    port: int = 8300,
    name: str = "listener",
    api_key: str | None = None,
    insecure: bool = False,
    allow_hosts: Iterable[str] = (),
    limits: Limits | None = None,
) -> Server:
    """A server that is bound and not yet serving: call its `serve_forever()`.

    Args:
        reward: answers all requests; each in its own thread, so it has to be thread-safe, as `ListenerReward` is. With
            `on_failure="nan"` one image on which the judge broke costs no other its score. Around a `BatchingJudge` the
            metrics have what the judge does.
        host: an address of this machine.
        port: 0 takes a free one, found in `server_address`.
        name: what clients call the reward.
        api_key: the token that clients have to send. An address that others can reach needs one.
        insecure: listens beyond this machine without a token, too.
        allow_hosts: names that clients call this server by, beside those of this machine; "*" allows every name.
        limits: what a request may have, and how many are under way.

    Raises:
        InputError: the address cannot be had, or must not be without a token.
    """
    listening = _bound(host, port)
    try:
        check_exposure(host, api_key, insecure)
        service = Service(reward, name=name, limits=limits or Limits(), metrics=Metrics())
        return Server(service, create_app(service, host=host, token=api_key, names=allow_hosts), listening)
    except BaseException:
        listening.close()
        raise


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens: who comes before the first `accept` waits."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)  # a rank a connection, all at once at the end of a batch
    except (OSError, OverflowError) as error:
        listening.close()
        fault = error.strerror if isinstance(error, OSError) and error.strerror else error
        other = "port" if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise InputError(f"{host} port {port} cannot be listened on ({fault}); choose another {other}") from error
    return listening


class Server:
    """Bound, and serving while `serve_forever` runs. A context: at its end the address is free again."""

    def __init__(self, service: Service, app: Any, listening: socket.socket):
        self.service, self._listening = service, listening
        self.server_address: tuple[Any, ...] = listening.getsockname()
        config = uvicorn.Config(
            app,
            http=cast(Any, partial(Protocol, limits=service.limits)),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=service.limits.idle_seconds,
        )
        self._running = _Running(config, service)
        self._stopped = threading.Event()

    def serve_forever(self) -> None:
        """Serves until `shutdown`, or until SIGTERM or Ctrl-C where this is the main thread.

        What is under way then is answered, what comes is told to come again, and a second Ctrl-C ends at once.
        """
        try:
            self._running.run(sockets=[self._listening])
        finally:
            self.service.close()
            self._stopped.set()

    def shutdown(self) -> None:
        """From another thread: ends as SIGTERM does, and returns when it has."""
        self._running.end()
        self._stopped.wait()

    def server_close(self) -> None:
        self._listening.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.server_close()


class _Running(uvicorn.Server):
    """uvicorn's server, which goes on to listen until all that is under way is answered, and ends with 0."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()

    def end(self) -> None:
        """From another thread."""
        self.should_exit = True
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._ended.set)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, which raises the signal again at the end: the process would not end with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def main_loop(self) -> None:
        self._loop, ticks = asyncio.get_running_loop(), 0
        while not await self.on_tick(ticks % 10):
            ticks += 1
            with suppress(TimeoutError, asyncio.TimeoutError):  # which are one from Python 3.11 on
                await asyncio.wait_for(self._ended.wait(), 0.1)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logger.info("ending: %d requests are under way", len(self.service.gate))
        draining = asyncio.create_task(self.service.drained())
        while not (draining.done() or self.force_exit):
            await asyncio.sleep(0.01)
        draining.cancel()
        for server in self.servers:
            server.close()
        for listening in sockets or []:
            listening.close()
        for connection in list(self.server_state.connections):
            with suppress(Exception):  # one that is broken is closed below
                connection.shutdown()
        for _ in range(100):  # the answers' last bytes
            if not self.server_state.tasks or self.force_exit:
                break
            await asyncio.sleep(0.01)
        for connection in list(self.server_state.connections):
            cast(Any, connection).transport.abort()
        await asyncio.sleep(0)
