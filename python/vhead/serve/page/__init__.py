"""`GET /`: a page that shows what is served, and scores a text typed into it."""

import base64
import hashlib
import re
from importlib import resources

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response


def router() -> APIRouter:
    """The route. The page holds nothing of the server's; what it shows, it asks for with the reader's key."""
    routes = APIRouter(tags=["page"])
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    headers = {"content-security-policy": _policy(page), "x-content-type-options": "nosniff"}

    @routes.get("/", summary="A page for people", response_class=HTMLResponse)
    async def show() -> Response:
        """Shows the models, the queue, the throughput and the step, and scores a text with its tokens coloured."""
        return HTMLResponse(page, headers=headers)

    return routes


def _policy(page: str) -> str:
    """Lets the page run its own script and style alone, and speak with this server alone."""
    own = {tag: _digest(page, tag) for tag in ("script", "style")}
    return (
        f"default-src 'none'; script-src {own['script']}; style-src {own['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(page: str, tag: str) -> str:
    contents = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
