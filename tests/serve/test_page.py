"""The page for people: what it holds, and that it loads nothing from elsewhere."""

import base64
import hashlib
import re
import shutil
import subprocess
from importlib import resources

import pytest

from tests.serve.conftest import PATIENCE_S


@pytest.fixture(scope="module")
def page(server):
    return server.ask("GET", "/")


def test_the_page_loads_nothing_from_elsewhere(page):
    text = page.body.decode()
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert not re.search(r"https?://|\bsrc=|@import|url\(", text)
    assert re.findall(r'href="([^"]*)"', text) == ["data:,"]


def test_the_page_may_run_its_own_script_alone(page):
    policy = page.headers["content-security-policy"]
    (script,) = re.findall("<script>(.*?)</script>", page.body.decode(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


def test_what_the_page_asks_for_is_there(server):
    text = resources.files("vhead.serve.page").joinpath("page.html").read_text()
    names = set(re.findall(r"found\.(vhead_\w+)", text))
    assert len(names) == 4
    metrics = server.ask("GET", "/metrics").body.decode()
    for name in names:
        assert re.search(rf"^{name} ", metrics, re.MULTILINE), name
    body = {"rollouts": [{"prompt": "What?", "completion": " Thät."}], "returns": ["values", "reward", "tokens"]}
    (score,) = server.post("/score", body).json["scores"]
    assert len(score["values"]) == len(score["token_offsets"])
    assert score["token_offsets"][-1][1] == len(" Thät.")


def test_every_element_that_the_script_writes_to_is_on_the_page():
    text = resources.files("vhead.serve.page").joinpath("page.html").read_text()
    written = set(re.findall(r'\bat\("(\w+)"\)', text))
    assert len(written) > 10
    assert written <= set(re.findall(r'id="(\w+)"', text))


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def test_a_browser_shows_what_is_served_and_a_text_s_tokens_in_colours(server, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs Chromium")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom",
        "--virtual-time-budget=6000", f"http://127.0.0.1:{server.port}/#score",
    ]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    shown = dict(re.findall(r'id="(\w+)"[^>]*>([^<]+)<', page))
    assert (shown["name"], shown["step"]) == ("demo", "120")
    rollout = {"prompt": "Question: What is 17 + 25?\n", "completion": "17 + 25 = 42. The answer is 42."}
    (score,) = server.post("/score", {"rollouts": [rollout], "returns": ["values", "reward", "tokens"]}).json["scores"]
    assert float(shown["reward"]) == pytest.approx(score["reward"], rel=1e-4)
    tokens = re.findall(r'<span title="value ([^"]+)" style="background-color: rgba\([^"]+\);">([^<]+)</span>', page)
    assert "".join(text for _, text in tokens) == rollout["completion"]
    assert [float(value) for value, _ in tokens] == pytest.approx(score["values"], rel=1e-4)
    assert not shown["shared"].startswith("-"), "a share is never below nothing"
