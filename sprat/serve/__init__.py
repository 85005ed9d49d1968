"""Serving: who may ask, how they ask, and what it costs.

FastAPI and uvicorn are imported only when an app is made, so that this package stays cheap to import
and a machine without them gets one clear sentence.
"""

from __future__ import annotations

from sprat.serve.app import create_app
from sprat.serve.config import ServeConfig
from sprat.serve.server import bind_socket, run, serve

__all__ = ["ServeConfig", "bind_socket", "create_app", "run", "serve"]
