"""The page for people: what it holds, and that it loads nothing from elsewhere."""

import base64
import hashlib
import re
from importlib import resources

import pytest


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
