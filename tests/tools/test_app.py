"""The web page: what it writes, and a person in front of it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from itertools import pairwise

import pytest

from configuration_gpt2repro import GPT2ReproConfig
from gpt2repro.eval.sample import sample
from gpt2repro.tools.app import MAX_REQUEST, complete, main
from modeling_gpt2repro import GPT2ReproForCausalLM
from tests.conftest import ROOT

# The page must ask nothing of anyone but this machine; audit hooks see every look-up and connection of the process.
WATCHED = """
import runpy, sys
def watch(event, arguments):
    host = {"socket.getaddrinfo": 0, "socket.connect": 1}.get(event)
    if host is not None and isinstance(arguments[host], (str, tuple)):
        name = arguments[host][0] if isinstance(arguments[host], tuple) else arguments[host]
        if name not in ("127.0.0.1", "localhost", "::1"):
            print("reached for", name, flush=True)
sys.addaudithook(watch)
runpy.run_module("gpt2repro.tools.app", run_name="__main__")
"""

WATCH_THE_TEXT = """() => {
    window.seen = [];
    setInterval(() => {
        const text = document.querySelectorAll("textarea")[1].value;
        if (text && text !== window.seen.at(-1)) window.seen.push(text);
    }, 1);
}"""


def test_the_last_text_is_that_of_sample_and_every_text_continues_the_one_before(tiny_model, bpe):
    texts = list(complete(tiny_model, bpe, "The man", temperature=0.9, top_k=20, max_new_tokens=40, seed=3))
    expected = sample(tiny_model, bpe, "The man", num_samples=1, temperature=0.9, top_k=20, max_new_tokens=40, seed=3)
    assert texts[-1:] == expected
    assert len(set(texts)) > 3
    assert all(later.startswith(text) for text, later in pairwise(texts))


def test_temperature_zero_is_greedy_and_top_k_zero_the_whole_vocabulary(tiny_model, bpe):
    greedy = sample(tiny_model, bpe, "A woman", max_new_tokens=9, temperature=0)
    assert list(complete(tiny_model, bpe, "A woman", temperature=0, max_new_tokens=9))[-1:] == greedy
    whole = sample(tiny_model, bpe, "A woman", num_samples=1, max_new_tokens=9, top_k=0, seed=5)
    assert list(complete(tiny_model, bpe, "A woman", top_k=0, max_new_tokens=9, seed=5))[-1:] == whole


def test_closing_the_iterator_stops_the_model(tiny_model, bpe):
    forwards = []

    def count_slowly(*_):  # all 60 take seconds, so that no busy machine is done before the iterator is closed
        forwards.append(1)
        time.sleep(0.1)

    handle = tiny_model.register_forward_hook(count_slowly)
    texts = complete(tiny_model, bpe, "The man", max_new_tokens=60)
    next(texts)
    texts.close()
    handle.remove()
    assert 0 < len(forwards) < 60


def test_a_text_that_does_not_fit_is_an_error_and_not_a_wait(tiny_model, bpe):
    with pytest.raises(ValueError, match="2 tokens and 63 new ones do not fit the model's 64 positions"):
        list(complete(tiny_model, bpe, "The man", max_new_tokens=63))


def test_a_port_that_is_taken_is_one_line(checkpoint, capsys):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([str(checkpoint), "--port", str(port)]) == 1
    expected = f"error: port {port} of 127.0.0.1 is not free: give another one with --port\n"
    assert capsys.readouterr().err.endswith(expected)


@contextmanager
def served(checkpoint):
    """The address of the page in a process of its own; its whole output comes at the end, in the list."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", WATCHED, str(checkpoint), "--port", str(port)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = []
    try:
        output.append(server.stdout.readline())
        yield f"http://127.0.0.1:{port}/", output
    finally:
        server.terminate()
        output.append(server.communicate(timeout=120)[0])


def test_a_request_that_is_too_large_and_an_upload_are_refused(checkpoint):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + bytes(100) + b"\r\n--b--\r\n"
    with served(checkpoint) as (url, _):
        for path, body, kind in (
            ("queue/join", bytes(MAX_REQUEST + 1), "application/json"),
            ("upload", part, "multipart/form-data; boundary=b"),
        ):
            request = urllib.request.Request(f"{url}gradio_api/{path}", body, {"content-type": kind})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=60)
            assert refused.value.code == 413


def test_in_a_browser_a_prompt_becomes_text_token_by_token(bpe, tmp_path):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 1024, "initializer_range": 0.3}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, vocab_size=len(bpe), bos_token_id=0, eos_token_id=None))
    model.save_pretrained(tmp_path)
    bpe.save_pretrained(tmp_path)
    elsewhere, complaints = [], []
    with served(tmp_path) as (url, output), playwright.sync_playwright() as play:
        options = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        browser = play.chromium.launch(executable_path=chromium, args=options)

        def visit(prompt: str):
            page = browser.new_page()
            page.set_default_timeout(180_000)
            page.on("request", lambda request: request.url.startswith(url) or elsewhere.append(request.url))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda line: line.type in ("error", "warning") and complaints.append(line.text))
            page.goto(url)
            page.get_by_label("Prompt").fill(prompt)
            page.get_by_label("number input for Length").fill("600")
            page.evaluate(WATCH_THE_TEXT)
            page.get_by_role("button", name="Complete").click()
            return page

        page = visit("The man")
        page.wait_for_function("window.seen.length > 3", polling=50)
        seen = page.evaluate("window.seen")
        refused = visit("The man holds the ball " * 300)
        refused.get_by_text("do not fit the model's 1024 positions").wait_for()
        refused.get_by_role("button", name="Complete").wait_for()  # and no longer Stop
        browser.close()
    assert all(later.startswith(text) for text, later in pairwise(seen))
    assert seen[0].startswith("The man")
    assert not elsewhere
    assert not complaints, json.dumps(complaints)
    assert url.rstrip("/") in output[0]
    assert "reached for" not in "".join(output), output
