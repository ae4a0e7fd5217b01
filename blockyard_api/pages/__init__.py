"""The platform's own pages, for visitors: an app that starts, one that cannot be shown, and why."""

import secrets
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

_templates = Environment(
    loader=PackageLoader("blockyard_api", "pages"), autoescape=True, undefined=StrictUndefined, auto_reload=False
)
Header = tuple[bytes, bytes]


def loading(title: str, probe: str) -> tuple[bytes, Sequence[Header]]:
    """Render the page that turns into the app once `probe` (a path) answers 204."""
    nonce = secrets.token_urlsafe(16)
    return _render("loading.html", nonce, title=title, probe=probe)


def problem(title: str, message: str, *, retry: bool, retry_after: int | None = None) -> tuple[bytes, Sequence[Header]]:
    """Render a page that says what is wrong; with `retry` it offers to try again, by itself after `retry_after` s."""
    nonce = secrets.token_urlsafe(16)
    return _render("problem.html", nonce, title=title, message=message, retry=retry, retry_after=retry_after)


def _render(template: str, nonce: str, **values: object) -> tuple[bytes, Sequence[Header]]:
    body = _templates.get_template(template).render(nonce=nonce, **values).encode()
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'"
    )
    return body, (
        (b"Content-Type", b"text/html; charset=utf-8"),
        (b"Cache-Control", b"no-store"),
        (b"Content-Security-Policy", policy.encode()),
        (b"X-Content-Type-Options", b"nosniff"),
        (b"Referrer-Policy", b"same-origin"),
    )
