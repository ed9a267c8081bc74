"""Tests of the playground's server: what it refuses, whom it serves, and the queue."""

import asyncio
import base64
import io
import json
import re
import shutil
import socket
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from taming_jax import playground
from taming_jax.errors import UserError
from taming_jax.playground import server
from taming_jax.run import load_run
from tests import commands

SENTENCE = re.compile(r"[^\n]{15,700}[.?]")


@pytest.fixture(scope="module")
def page(prior_workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "run"
    shutil.copytree(prior_workdir, folder)
    return server.Server(load_run(folder))


@pytest.fixture
def client(page):
    return TestClient(page.app, "http://localhost:8765")


def refuse(response, status, words=""):
    """Asserts that a response is an error in one sentence."""
    text = response.text
    assert response.status_code == status, (response.status_code, text)
    assert SENTENCE.fullmatch(text) and "Traceback" not in text and words in text, text
    assert response.headers["content-type"].startswith("text/plain")


def test_the_page_and_its_files(client):
    for path, kind in (("/", "html"), ("/page.css", "css"), ("/page.js", "javascript")):
        response = client.get(path)
        assert response.status_code == 200 and kind in response.headers["content-type"]
        assert "default-src 'none'" in response.headers["content-security-policy"]
        # The page loads nothing from elsewhere.
        assert "http:" not in response.text and "https:" not in response.text
    description = client.post("/api/describe", json={}).json()
    assert description["grid"] == 8 and description["factor"] == 2
    names = [name for name, _, _ in description["settings"]]
    assert names == ["temperature", "top_k", "top_p", "guidance_scale"]
    assert "left to right" in description["limits"]
    assert client.post("/api/queue", json={}).json() == {"waiting": 0}


def make_broken_pictures():
    """Yields files that are not pictures, damaged, or too large when they are decoded."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    png = file.getvalue()
    yield from (b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"<svg/>", b"%PDF-1.7", b"\0" * 1000)
    for size in range(1, len(png), len(png) // 20):
        yield png[:size]
    for kind in ("JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, kind)
        yield file.getvalue()[:60]
    for kind in ("EPS", "ICO", "ICNS"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, kind)
        yield file.getvalue()
    header = png[8:33]  # the chunk with the size, for a picture of 60,000 x 60,000 pixels
    body = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + header[16:21]
    bomb = png[:8] + header[:4] + body + zlib.crc32(body).to_bytes(4, "big") + png[33:]
    yield bomb


def make_bad_requests():
    """Yields the path, the body, and the expected status of bad requests."""
    codes = [[0] * 8] * 8
    for path in (
        "/etc/passwd", "/..%2f..%2fetc%2fpasswd", "/config.json", "/figures/loss.png", "/%00",
        "/api/", "/api/run", "/api/__init__", "/api/_draw", "/api/sample/1", "/api/sample%2f..",
        "/page.js/", "/page.py", "/../server.py", "/favicon.ico", "/api/description",
        "/api/is_stopped",
    ):  # fmt: skip
        yield path, {}, (404, 405)
    for body in (
        b"", b"{", b"[]", b"1", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b"{}{}",
        b'{"seed": NaN}', b'{"temperature": Infinity}', b'{"seed": ' + b"9" * 5000 + b"}",
    ):  # fmt: skip
        yield "/api/sample", body, (400,)
    values = {
        "seed": ("1", 1.5, True, None, [], {}, -1, 2**32, 10**30),
        "classes": (1, "0", [-1], [10**9], ["0"], [0.5], [[0]], {"0": 1}, None, [10**30]),
        "per_class": (0, -5, 65, 10**12, 1.5, "8", None, [8], True),
        "temperature": (-1, "hot", [1], 1e400, {}, True),
        "top_k": (0, -1, 10**6, 1.5, "5", [5]),
        "top_p": (0, -0.5, 1.01, "x", [0.9]),
        "guidance_scale": (2, [-1], [1, 2, 3], ["1"], "2", [None], [1e400]),
        "decoding_steps": (4, 0, "8", 10**9), "decoding_order": ("random", 1, "confidence"),
        "choice_temperature": (1, "x"), "size": ("512x512", None), "devices": (1,),
        "workdir": ("/",), "out": ("/tmp/x.png",), "__class__": (1,), "": (1,),
        "sampling": ({},), "picture": (1,), "keep": (1, ["x"]), "codes": ("x",),
    }  # fmt: skip
    for name, choices in values.items():
        for value in choices:
            yield "/api/sample", {"classes": [0], name: value}, (400,)
    for grid in (
        [], [[0]], [[0] * 8] * 7, [[0] * 8] * 7 + [[0] * 7], [[-1] * 8] * 8, [[128] * 8] * 8,
        [["0"] * 8] * 8, [[0.5] * 8] * 8, [[10**30] * 8] * 8, 5, "codes", None, [None] * 8,
        [[[0]] * 8] * 8, [[True] * 8] * 8,
    ):  # fmt: skip
        yield "/api/decode", {"codes": grid}, (400,)
    picture = base64.b64encode(next(iter([make_picture()]))).decode()
    for grid in ([], [[True] * 8] * 7, [[1] * 8] * 8, [["x"] * 8] * 8, None, [[None] * 8] * 8):
        yield "/api/complete", {"picture": picture, "keep": grid}, (400,)
    keep = [[True] * 8] * 4 + [[False] * 8] * 4
    for classes in ([0, 1], [7], [-1]):
        yield "/api/complete", {"picture": picture, "keep": keep, "classes": classes}, (400,)
    for content in make_broken_pictures():
        text = base64.b64encode(content).decode()
        yield "/api/reconstruct", {"picture": text}, (400,)
        yield "/api/complete", {"picture": text, "keep": keep}, (400,)
    for text in (
        "",
        "****",
        "é",
        "a",
        picture[:-3] + "*",
        5,
        None,
        ["x"],
        "data:image/png," + picture,
    ):
        yield "/api/reconstruct", {"picture": text}, (400,)
    yield "/api/reconstruct", {"picture": "A" * server.MAX_BODY}, (413,)
    yield "/api/decode", {"codes": codes, "picture": "A" * server.MAX_BODY}, (413,)


def make_picture():
    file = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_bad_requests_get_a_sentence(page):
    client = TestClient(page.app, "http://localhost:8765", raise_server_exceptions=True)
    count = 0
    for path, body, statuses in make_bad_requests():
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        response = client.post(path, content=content, headers=headers, follow_redirects=False)
        assert response.status_code in statuses, (path, body, response.status_code, response.text)
        refuse(response, response.status_code)
        count += 1
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        refuse(client.request(method, "/api/sample", follow_redirects=False), 405)
        count += 1
    assert count >= 200
    response = client.post("/api/sample", json={"classes": [0]})
    assert response.status_code == 200 and len(response.json()["pictures"]) == 1


def test_only_the_page_on_this_computer_may_send_requests(page):
    client = TestClient(page.app, "http://localhost:8765")

    def send(**headers):
        headers = {"content-type": "application/json"} | headers
        return client.post("/api/describe", content=b"{}", headers=headers)

    for host in ("localhost:8765", "127.0.0.1:8765", "localhost", "[::1]:8765", "127.1.2.3:80"):
        assert send(host=host).status_code == 200, host
    # Websites whose names were redirected to this computer.
    for host in ("attacker.example:8765", "{a}.example", "localhost.example", "[", ""):
        refuse(send(host=host), 403, "localhost")
    # Another website may send these types without permission, but not JSON.
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refuse(send(**{"content-type": kind}), 415)


def test_a_token_is_required_if_there_is_one(prior_workdir):
    page = server.Server(load_run(prior_workdir), "correct horse")
    client = TestClient(page.app, "http://birds.example:8765")
    assert client.get("/").status_code == 200  # the page itself is no secret
    for header in ("", "Bearer", "Bearer null", "Bearer correct hors", "correct horse", "Bearer é"):
        headers = {"authorization": header.encode()}
        refuse(client.post("/api/describe", json={}, headers=headers), 401, "token")
    headers = {"authorization": "Bearer correct horse"}
    assert client.post("/api/describe", json={}, headers=headers).status_code == 200


def test_an_error_in_the_program_is_a_sentence_without_details(page, monkeypatch):
    monkeypatch.setattr(page._playground, "usage", lambda request: 1 / 0)
    client = TestClient(page.app, "http://localhost", raise_server_exceptions=False)
    refuse(client.post("/api/usage", json={}), 500, "its console shows why")


class Client:
    """Stands for a request. Its client disconnects after `patience` checks."""

    def __init__(self, patience=10**6):
        self.patience = patience

    async def is_disconnected(self):
        self.patience -= 1
        return self.patience < 0


@pytest.fixture
def blocked(page, monkeypatch):
    """Returns an event that lets the actions of a page go on, and the list of those that ran."""
    release, ran = threading.Event(), []

    def act(request):
        assert release.wait(60)
        ran.append((request.seed, page._playground.is_stopped()))
        return {"seed": request.seed}

    monkeypatch.setattr(page._playground, "usage", act)
    yield release, ran
    release.set()


def call(page, seed, client=None):
    return page._run(client or Client(), "usage", {"seed": seed})


def test_requests_take_turns_in_the_order_of_their_arrival(page, blocked):
    release, ran = blocked

    async def send():
        tasks = [asyncio.ensure_future(call(page, seed)) for seed in range(5)]
        await asyncio.sleep(0.1)
        assert not ran
        release.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(send()) == [{"seed": seed} for seed in range(5)]
    assert ran == [(seed, False) for seed in range(5)]


def test_a_request_whose_client_disconnects_is_dropped(page, blocked):
    release, ran = blocked

    async def send():
        first = asyncio.ensure_future(call(page, 0))
        await asyncio.sleep(0.1)
        with pytest.raises(HTTPException):
            await call(page, 1, Client(1))
        release.set()
        await first
        return await call(page, 2)

    assert asyncio.run(send()) == {"seed": 2}
    assert ran == [(0, False), (2, False)]


def test_a_running_request_whose_client_disconnects_is_told_to_stop(page, blocked):
    release, ran = blocked

    async def send():
        with pytest.raises(HTTPException):
            await call(page, 0, Client(1))
        release.set()
        await call(page, 1)

    asyncio.run(send())
    assert ran == [(0, True), (1, False)]


def test_a_full_queue_refuses_requests(page, client, monkeypatch):
    monkeypatch.setattr(page, "_waiting", server.MAX_WAITING)
    refuse(client.post("/api/usage", json={}), 503, "32 requests are waiting; try again later.")
    assert client.post("/api/queue", json={}).json() == {"waiting": 32}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "birds.example"])
def test_other_computers_need_a_token(host):
    with pytest.raises(UserError, match="--token"):
        server.check_address(host, None)
    with pytest.raises(UserError, match="8 or more"):
        server.check_address(host, "short")
    server.check_address(host, "long enough")


def test_addresses_of_this_computer_need_no_token():
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        server.check_address(host, None)


def test_the_command_names_a_package_that_is_missing(prior_workdir, monkeypatch):
    monkeypatch.delitem(sys.modules, "taming_jax.playground.server")
    monkeypatch.delattr(playground, "server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, _, err = commands.run_here(
        "taming_jax/cli/__main__.py", "playground", "--workdir", prior_workdir
    )
    assert status == 2 and "pip install 'taming_jax[playground]'" in err


def test_the_command_reports_addresses_that_it_cannot_use(prior_workdir):
    command = "taming_jax/cli/__main__.py", "playground", "--workdir", prior_workdir
    status, _, err = commands.run_here(*command, "--host", "0.0.0.0")
    assert status == 2 and "is open to other computers" in err and "Traceback" not in err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, err = commands.run_here(*command, "--port", taken.getsockname()[1])
        assert status == 2 and "choose another --port" in err
    status, _, err = commands.run_here(*command, "--port", 70_000)
    assert status == 2 and "from 0 to 65535" in err
    status, _, err = commands.run_here(*command[:-1], prior_workdir / "none", "--port", 0)
    assert status == 2 and "there is no folder" in err
