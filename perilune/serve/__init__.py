"""HTTP: one application that routers join.

app        errors as JSON, limits of bodies and requests, /health
recommend  POST /v1/recommend

Nothing here is loaded before it is called; FastAPI comes with `pip install 'perilune[serve]'`.
"""

from perilune.serve.app import MAX_BODY_BYTES, create_app, listen, run_app
from perilune.serve.recommend import recommend_router

__all__ = ["MAX_BODY_BYTES", "create_app", "listen", "recommend_router", "run_app"]
