"""The chat page: one file, and the policy that lets nothing else run in it.

``chat.html`` holds its own style and script. The Content-Security-Policy admits exactly these two by
their SHA-256 (CSP level 3, section 6.7.3), lets the script talk to this server alone, and forbids
everything else: no image but data URLs, no frame, no form, no base, no foreign code.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

PAGE_FILE = Path(__file__).with_name("chat.html")


@dataclass(frozen=True)
class ChatPage:
    """The page's bytes and the headers that go with them."""

    body: bytes
    csp: str
    etag: str


def load_chat_page(path: Path = PAGE_FILE) -> ChatPage:
    """Read the page and derive its policy.

    Raises:
        ValueError: the file does not hold exactly one ``<style>`` and one ``<script>``.
    """
    text = path.read_text(encoding="utf-8")
    sources = {}
    for tag in ("style", "script"):
        matches = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        if len(matches) != 1 or len(re.findall(rf"<{tag}\b", text)) != 1:
            raise ValueError(f"{path.name} must hold exactly one plain <{tag}>")
        sources[tag] = base64.b64encode(hashlib.sha256(matches[0].encode()).digest()).decode()
    csp = "; ".join(
        [
            "default-src 'none'",
            f"script-src 'sha256-{sources['script']}'",
            f"style-src 'sha256-{sources['style']}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ]
    )
    body = text.encode()
    return ChatPage(body, csp, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
