"""The web server of the playground: three static files, and one endpoint per action.

Actions are POST requests with a JSON object. They run one after the other, in the order in which
they arrive. An error is one sentence of plain text with a status from 400 on.
"""

import asyncio
import hmac
import importlib.resources
import ipaddress
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from taming_jax.config.serialization import from_dict
from taming_jax.errors import UserError, say
from taming_jax.playground import actions
from taming_jax.run import Run

MAX_BODY = 16 * 2**20  # bytes of a request
MAX_DISCARDED = 4 * MAX_BODY  # bytes that are read, so that the client reads the refusal
MAX_WAITING = 32  # requests that are read, wait, or run
READ_SECONDS = 60  # for the body of a request
POLL_SECONDS = 0.2
FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}  # fmt: skip


class Server:
    """Serves the page of a run. If `token` is set, actions require it."""

    def __init__(self, run: Run, token: str | None = None):
        self._playground, self._token = actions.Playground(run), token
        self._worker = ThreadPoolExecutor(1, "playground")
        self._waiting = 0
        self.is_ending: Callable[[], bool] = lambda: False
        folder = importlib.resources.files("taming_jax.playground")
        self._files = {name: (folder / (name or "page.html")).read_text("utf-8") for name in FILES}
        self.app = Starlette(
            routes=[
                Route("/api/{action}", self.call, methods=["POST"]),
                Route("/{name}", self.send_file),
                Route("/", self.send_file),
            ],
            exception_handlers={HTTPException: refuse, UserError: refuse, Exception: refuse},
        )
        self.app.router.redirect_slashes = False

    async def send_file(self, request: Request) -> Response:
        name = request.path_params.get("name", "")
        if name not in FILES:
            raise HTTPException(404)
        return Response(self._files[name], media_type=FILES[name], headers=HEADERS)

    async def call(self, request: Request) -> Response:
        """Runs an action, and returns its result."""
        self._check_client(request)
        name = request.path_params["action"]
        if name == "describe":
            return JSONResponse(self._playground.description, headers=HEADERS)
        if name == "queue":
            return JSONResponse({"waiting": self._waiting}, headers=HEADERS)
        if name not in actions.ACTIONS:
            raise HTTPException(404)
        if self._waiting >= MAX_WAITING:
            raise HTTPException(503, f"{self._waiting} requests are waiting; try again later.")
        self._waiting += 1
        try:
            values = await self._wait(asyncio.ensure_future(read_json(request)))
            result = await self._run(request, name, values)
        finally:
            self._waiting -= 1
        return JSONResponse(result, headers=HEADERS)

    def _check_client(self, request: Request) -> None:
        """Raises HTTPException if the request may come from elsewhere than the page."""
        if self._token is None:
            # DNS rebinding: another website can make its name point to this computer.
            if not is_local(request.headers.get("host", "").rsplit(":", 1)[0].strip("[]")):
                raise HTTPException(
                    403, "open this page as localhost or 127.0.0.1, or start it with --token."
                )
        else:
            expected = f"Bearer {self._token}".encode()
            if not hmac.compare_digest(request.headers.get("authorization", "").encode(), expected):
                raise HTTPException(
                    401, "the token is missing or wrong; open the address that the command printed."
                )
        # Other websites cannot send this type without permission.
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            raise HTTPException(415, "the content type must be application/json.")

    async def _run(self, request: Request, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Runs an action after those that came before, unless its client disconnects."""
        stop = threading.Event()

        def work() -> dict[str, Any]:
            if stop.is_set():
                raise actions.Stopped
            self._playground.is_stopped = stop.is_set
            return getattr(self._playground, name)(from_dict(actions.Request, values))

        future = asyncio.get_running_loop().run_in_executor(self._worker, work)
        try:
            return await self._wait(future, request.is_disconnected)
        finally:
            stop.set()

    async def _wait(
        self, future: asyncio.Future[Any], is_unwanted: Callable[[], Awaitable[bool]] | None = None
    ) -> Any:
        """Returns a result, or cancels it if the server ends or `is_unwanted` says so."""
        try:
            while not (await asyncio.wait([future], timeout=POLL_SECONDS))[0]:
                if self.is_ending() or (is_unwanted and await is_unwanted()):
                    raise HTTPException(503, "the playground has ended.")
            return future.result()
        finally:
            future.cancel()


async def read_json(request: Request) -> dict[str, Any]:
    """Reads the JSON object in the body of a request. Raises HTTPException if it is too large, slow
    or invalid."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MAX_BODY:
                    body += chunk
                elif size > MAX_DISCARDED:
                    break
    except TimeoutError:
        raise HTTPException(408, f"the request took more than {READ_SECONDS} seconds.") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection was closed before the end.") from None
    if size > MAX_BODY:
        raise HTTPException(
            413, f"the request has more than {MAX_BODY // 2**20} MiB; send a smaller picture."
        )
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise HTTPException(400, "the request must be a JSON object.")
    return values


async def refuse(request: Request, error: Exception) -> Response:
    """Returns an error as a sentence. The console shows the traceback of an unexpected one."""
    status, sentence = 500, "the playground failed; its console shows why."
    if isinstance(error, HTTPException):
        status, sentence = error.status_code, error.detail
        if status in (404, 405):
            sentence = f"{request.url.path} does not exist, or does not accept {request.method}."
    elif isinstance(error, UserError):
        status, sentence = 400, str(error)
    return PlainTextResponse(sentence, status, HEADERS)


def is_local(host: str) -> bool:
    """Returns whether a host is this computer and cannot be reached from others."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, token: str | None) -> None:
    """Raises UserError if other computers can reach the host and there is no token."""
    if not is_local(host) and token is None:
        raise UserError(
            f"--host {host} is open to other computers, so anyone who can reach this one could use "
            "the run and keep the processor busy; set --token to a secret of 8 or more "
            "characters, which the page then requires."
        )
    if token is not None and (len(token) < 8 or not token.isascii() or token != token.strip()):
        raise UserError("--token must have 8 or more ASCII characters, with no space at its ends.")


def open_socket(host: str, port: int) -> socket.socket:
    """Opens the socket of the server. Raises UserError if the address cannot be used."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}; it must be from 0 to {2**16 - 1}.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).split(" (")[0]  # without a repetition of the address
        raise UserError(
            f"port {port} of {host} cannot be used ({reason}); choose another --port."
        ) from error


def serve(run: Run, listener: socket.socket, token: str | None = None) -> None:
    """Serves the page of a run until SIGINT or SIGTERM, which then ends this process."""
    page = Server(run, token)
    server = uvicorn.Server(
        uvicorn.Config(
            page.app, log_level="warning", lifespan="off", ws="none", server_header=False,
            timeout_graceful_shutdown=2,
        )
    )  # fmt: skip
    page.is_ending = lambda: server.should_exit
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # all addresses of this computer
        host = socket.gethostname()
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    if token:
        address += f"#token={quote(token, safe='')}"
    say(f"The playground of {run.workdir} is at {address} until you press Ctrl-C.")
    server.run(sockets=[listener])
