"""Drives the page in Chromium as a person would, and the server as a process."""

import contextlib
import http.client
import json
import re
import shlex
import shutil
import signal
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taming_jax.evaluation.table import REPORT
from tests import commands

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(prior_workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "run"
    shutil.copytree(prior_workdir, folder)
    (folder / "figures").mkdir(exist_ok=True)
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "figures" / "loss_curves.png")
    report = {
        "features": "FID", "reconstruction": {"psnr": 21.5}, "samples": None, "warnings": [],
        "protocol": {"hash": "of other weights", "images": 8, "split": "test", "samples": 0},
    }  # fmt: skip
    (folder / REPORT).write_text(json.dumps(report))
    return folder


def start_server(workdir, *arguments):
    """Starts the command, and returns its process and the address that it prints."""
    process = commands.start(
        "taming_jax/cli/__main__.py", "playground", "--workdir", workdir, "--port", 0, *arguments
    )
    return process, re.search(r"http://127\.0\.0\.1:\d+/\S*", process.stdout.readline())[0]


def start_upload(address):
    """Opens a connection, and sends the beginning of a request."""
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=60)
    connection.putrequest("POST", "/api/reconstruct")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(2**40))
    connection.endheaders()
    connection.send(b'{"picture": "')
    return connection


@pytest.fixture(scope="module")
def server(workdir):
    """Yields the process of the command, and the address that it prints. It ends cleanly, even in
    the middle of an upload."""
    process, address = start_server(workdir)
    yield process, address
    upload = start_upload(address)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    upload.close()
    assert process.returncode == -signal.SIGINT and not out + err, (out, err)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        try:
            yield playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"there is no Chromium: {error}")


@pytest.fixture
def page(server, browser):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    with contextlib.closing(context):
        page = open_page(context, server[1])
        yield page
        assert page.problems == []


def open_page(context, address):
    """Opens the page, and returns it. Errors in it, and requests to elsewhere, fail the test."""
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.problems = []

    def note_message(message):
        if message.type == "error" and "a status of 400" not in message.text:  # of a refusal
            page.problems.append(message.text)

    def note_request(request):
        if not request.url.startswith(("data:", address.split("#")[0])):
            page.problems.append(request.url)

    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", note_message)
    page.on("request", note_request)
    page.goto(address)
    page.wait_for_selector("#sample .pictures button")
    return page


def send(address, action, values):
    """Sends a request as the page does, and returns the result."""
    request = urllib.request.Request(
        f"{address}api/{action}", json.dumps(values).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def copy(page, section, what):
    page.click(f"#{section} >> text=Copy the {what}")
    page.wait_for_selector(f"#status:has-text('Copied the {what}')")
    return page.evaluate("navigator.clipboard.readText()")


def save_download(page, section, name, folder):
    with page.expect_download() as download:
        page.click(f"#{section} >> text=Download {name} >> nth=-1")
    file = folder / name
    download.value.save_as(file)
    return np.asarray(Image.open(file).convert("L"))


def run_copied(command, folder, monkeypatch):
    """Runs a command that was copied from the page in a folder, and returns its images."""
    monkeypatch.chdir(folder)
    program, *arguments, _ = shlex.split(command)
    assert program == "taming-jax"
    status, _, err = commands.run("taming_jax/cli/__main__.py", *arguments, folder / "images.npz")
    assert status == 0, err
    return np.load(folder / "images.npz")["images"][..., 0]


def drag(page, selector, points):
    """Drags the pointer over an element; the points are fractions of its size."""
    page.locator(selector).scroll_into_view_if_needed()
    box = page.locator(selector).bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=10)
    page.mouse.up()


def read_codes(page):
    return [cell.inner_text() for cell in page.query_selector_all("#codes button")]


def test_samples_are_those_of_the_copied_command(page, tmp_path, monkeypatch):
    page.select_option("#sample [name=class]", label="square")
    page.fill("#sample [name=per_class]", "9")
    page.fill("#sample [name=temperature]", "0.9")
    page.fill("#sample [name=guidance_scale]", "1 2")
    page.fill("#sample [name=seed]", "5")
    page.click("#sample >> button:text-is('Draw')")
    page.wait_for_selector("#sample .pictures button >> nth=8")
    sheet = save_download(page, "sample", "sample.png", tmp_path)
    command = copy(page, "sample", "command")
    images = run_copied(command, tmp_path, monkeypatch)
    assert "--temperature 0.9" in command and "--top-k" not in command and len(images) == 9
    for i, image in enumerate(images):
        row, column = divmod(i, 8)
        part = sheet[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        np.testing.assert_array_equal(part, image)
    assert "guidance_scale=(1.0, 2.0), seed=5)" in copy(page, "sample", "notebook lines")
    page.fill("#sample [name=top_k]", "1000")
    page.click("#sample >> button:text-is('Draw')")
    page.wait_for_selector("#error:has-text('Top-k is 1000; it must be from 1 to 128')")


def test_codes_can_be_replaced_by_pointer_and_keyboard(page, tmp_path):
    page.click("nav >> text=Reconstruct")
    Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save(tmp_path / "line.png")
    page.set_input_files("#edit [name=file]", tmp_path / "line.png")
    page.wait_for_selector("#error-map figcaption:has-text('PSNR')")
    before = read_codes(page)
    page.click("#codes button >> nth=9")
    page.click("#replace [title^='code 77']")
    page.wait_for_selector("#codes button.changed")
    assert read_codes(page) == [*before[:9], "77", *before[10:]]
    page.focus("#codes button >> nth=9")
    for key in ("ArrowDown", "ArrowRight", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    page.focus("#replace .palette button >> nth=0")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    page.wait_for_selector("#codes button.changed >> nth=1")
    assert read_codes(page) == [*before[:9], "77", "1", *before[11:]]
    page.click("text=Undo all changes")
    page.wait_for_selector("#codes button.changed", state="detached")
    assert read_codes(page) == before

    page.click("text=Or draw one")
    drag(page, "#pad", [(0.2, 0.2), (0.8, 0.8), (0.2, 0.8)])
    line = page.get_attribute("#edited a", "href")
    page.click("text=Reconstruct the drawing")
    page.wait_for_selector(f"#edited a:not([href='{line}'])")
    drawing = save_download(page, "edit", "picture.png", tmp_path)
    assert drawing[0, 0] == 0 and drawing[8, 8] > 200 and drawing[12:14, 8].max() > 100

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    page.set_input_files("#edit [name=file]", broken)
    page.wait_for_selector("#error:has-text('The picture cannot be read')")


def test_completions_are_those_of_the_copied_command(page, tmp_path, monkeypatch):
    page.click("#sample .pictures button >> nth=1")
    page.click("text=Complete it")
    assert "does not see kept codes that come later" in page.inner_text("#limits")
    page.click("text=Right half")
    drag(page, "#mask", [(0.05, 0.05), (0.05, 0.5)])  # five more codes to draw
    page.focus("#mask button >> nth=1")
    page.keyboard.press("Space")
    page.click("#complete >> button:text-is('Complete')")
    page.wait_for_selector("#complete .pictures button >> nth=7")
    save_download(page, "complete", "picture.png", tmp_path)
    mask = save_download(page, "complete", "mask.png", tmp_path)
    expected = np.zeros((8, 8), bool)
    expected[:, :4] = True
    expected[:5, 0] = expected[0, 1] = False
    np.testing.assert_array_equal(mask > 127, expected.repeat(2, 0).repeat(2, 1))
    sheet = save_download(page, "complete", "complete.png", tmp_path)
    images = run_copied(copy(page, "complete", "command"), tmp_path, monkeypatch)
    np.testing.assert_array_equal(np.concatenate(list(images), 1), sheet)


def test_the_codebook_and_the_evaluation(page):
    page.click("#sample .pictures button >> nth=1")
    page.click("text=Edit its codes")
    page.wait_for_selector("#codes button")
    code = read_codes(page)[0]
    page.click("nav >> text=Codebook")
    page.wait_for_selector("#usage:has-text('images of the validation split use')")
    page.click(f"#codebook [title^='code {code},']")
    page.wait_for_selector("#places canvas")
    assert re.match(rf"Code {code} is \d+\.\d\d% of the codes", page.inner_text("#code"))
    page.click("nav >> text=Evaluate")
    page.wait_for_selector("#figures img")
    assert "the evaluation report is that of other weights" in page.inner_text("#problem")
    assert re.search(r"psnr +21\.5", page.inner_text("#report"))
    assert "loss curves" in page.inner_text("#figures")


def test_the_page_is_readable_on_a_phone_and_by_a_screen_reader(page):
    page.set_viewport_size({"width": 360, "height": 640})
    page.click("#sample .pictures button >> nth=1")
    page.click("text=Complete it")
    page.click("#complete >> button:text-is('Complete')")
    page.wait_for_selector("#complete .pictures button >> nth=7")
    page.click("#complete .pictures button >> nth=1")
    page.click("#complete >> text=Edit its codes")
    page.click("#codes button >> nth=0")
    for section in ("Sample", "Reconstruct", "Complete", "Codebook", "Evaluate"):
        page.click(f"nav >> text={section}")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, section
        unnamed = page.evaluate(
            """[...document.querySelectorAll("button, input, select, [role]")].filter((x) =>
            !x.ariaLabel && !["status", "alert"].includes(x.role) &&
            !(x.labels?.length ? [...x.labels] : [x]).some((y) =>
              [...y.childNodes].some((z) => z.nodeType === 3 && z.data.trim()))
            ).map((x) => x.outerHTML)"""
        )
        assert unnamed == [], section


def test_the_printed_address_holds_the_token(workdir, browser):
    token = "a+b/c &d=%41#?"
    process, address = start_server(workdir, "--token", token)
    try:
        with contextlib.closing(browser.new_context()) as context:
            page = open_page(context, address)
            assert page.problems == []
            # The page without the token, which is then added.
            page.goto("about:blank")
            page.goto(address.split("#")[0])
            page.wait_for_selector("#error:has-text('The token is missing or wrong')")
            page.goto(address)
            page.wait_for_selector("#sample .pictures button")
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM and not out + err, (out, err)


def test_huge_and_aborted_uploads_do_no_harm(server):
    connection = start_upload(server[1])
    for _ in range(64):
        connection.send(b"A" * 2**20)
    response = connection.getresponse()
    assert response.status == 413 and b"more than 16 MiB" in response.read()
    connection.close()
    start_upload(server[1]).close()
    assert send(server[1], "describe", {})["grid"] == 8


def test_memory_does_not_grow_with_samples(server):
    process, address = server
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        pytest.skip("there is no /proc")

    def draw(seed, **settings):
        request = {"classes": [0], "per_class": 50, "seed": seed} | settings
        assert len(send(address, "sample", request)["pictures"]) == 50
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) / 1024

    before = max(draw(seed) for seed in range(5))
    after = max(draw(seed) for seed in range(20))  # 1,000 samples
    print(f"resident memory before and after 1,000 samples: {before:.0f} and {after:.0f} MiB")
    assert after < before + 30
