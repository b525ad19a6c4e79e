"""The routes of `listener-reward serve`: one judge for many processes, hosts and environments.

- `GET /health`: `{"status": "ok", "rewards": {"listener": ["score"]}, "scorer_version": "..."}`, for UniRL and
  Flow-Factory.
- `POST /compute`: Flow-Factory's remote rewards, and `RemoteReward`.
- `POST /score`: UniRL's reward service (`unirl.answer`).
- The same after `/reference`, `/anchors`, `/group` or `/auto`, as in `POST /group/compute`: the scheme that the client
  wants. A server that answers by another replies 409, and `detail` says what to change. Clients that append their paths
  to a base URL, as both hosts' do, need no more than that URL.
- `POST /v1/compare` and `POST /v1/rank`: the judge itself, typed.
- `GET /ready`, `GET /metrics`, `GET /openapi.json`, and `GET /docs`, which shows the latter.

JSON both ways, pictures as base64 of PNG, JPEG or WebP: unlike the pickles that reward servers of this field exchange,
nothing that arrives here can run. Paths and URLs are not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from listener_reward import __version__
from listener_reward.errors import missing
from listener_reward.reward import Scheme

if fault := missing("serve", "a server"):
    raise fault

from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from .auth import App, Guard
from .page import docs_page
from .replies import Reply, refusal
from .schemas import (
    CompareRequest,
    ComputeReply,
    ComputeRequest,
    HealthReply,
    RankingReply,
    RankRequest,
    ReadyReply,
    Refusal,
    ScoreReply,
    ScoreRequest,
    VerdictReply,
)
from .service import Service, Work

ROUTES = (
    "there are GET /health, POST /compute and POST /score, each also after /reference, /anchors, /group or /auto, POST "
    "/v1/compare and /v1/rank, and GET /ready, /metrics, /openapi.json and /docs"
)

SCHEMES: tuple[str | None, ...] = (None, *get_args(Scheme))

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": why}
    for status, why in {
        400: "No request, by its detail.",
        401: "The API key is missing or wrong.",
        403: "A web page of another origin asks.",
        408: "The request did not come in time.",
        413: "Past a limit: bytes, pictures, pixels or prompt.",
        415: "The body is said to be something else than JSON.",
        421: "The Host is none of this server's names.",
        500: "The judge broke.",
        503: "Not now; Retry-After says when.",
        504: "The time that the client gave is over.",
    }.items()
}


def create_app(service: Service, *, host: str, token: str | None = None, names: Iterable[str] = ()) -> App:
    """The ASGI application of a service; for the other arguments see `auth.Guard`."""
    api = FastAPI(
        title="listener-reward",
        version=__version__,
        description="A judge of images as a reward. Pictures are base64 of image files, without a data: prefix.",
        docs_url=None,  # pages that load scripts from elsewhere
        redoc_url=None,
        dependencies=[] if token is None else [Security(HTTPBearer(auto_error=False))],
    )
    api.add_exception_handler(404, _no_route)

    def post(
        path: str, work: Work, body: type[BaseModel], answer: type[BaseModel], shown: bool, extra: Any = None
    ) -> None:
        async def endpoint(request: Request) -> Response:
            return await service.answer(request, work)

        api.post(
            path,
            name=path,
            summary=(body.__doc__ or "").strip().splitlines()[0],
            response_class=JSONResponse,
            responses={200: {"model": answer}, **REFUSALS, **(extra or {})},
            include_in_schema=shown,
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": body.model_json_schema()}},
                }
            },
        )(endpoint)

    async def health(request: Request) -> Response:
        """What answers here, and by which scheme; hosts ask this first."""
        return Reply(200, service.health(request.scope["authorized"]))

    async def ready() -> Response:
        """Whether a request would be taken now."""
        under_way = len(service.gate)
        fine = not service.gate.closing and under_way < service.limits.waiting
        return Reply(200 if fine else 503, {"ready": fine, "under_way": under_way})

    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(service.metrics.page(), media_type=service.metrics.content_type)

    async def docs() -> Response:
        headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(docs_page(api.openapi()), headers=headers)

    other = {409: {"model": Refusal, "description": "The server answers by another scheme."}}
    invalid = {422: {"model": Refusal, "description": "A field is missing, unknown or of another type."}}
    for scheme in SCHEMES:
        base, shown = f"/{scheme}" if scheme else "", scheme is None
        api.get(f"{base}/health", responses={200: {"model": HealthReply}}, include_in_schema=shown)(health)
        post(f"{base}/compute", service.compute(scheme), ComputeRequest, ComputeReply, shown, other)
        post(f"{base}/score", service.score(scheme), ScoreRequest, ScoreReply, shown, other)
    post("/v1/compare", service.compare, CompareRequest, VerdictReply, True, invalid)
    post("/v1/rank", service.rank, RankRequest, RankingReply, True, invalid)
    api.get("/ready", responses={200: {"model": ReadyReply}, 503: {"model": ReadyReply}})(ready)
    api.get("/metrics", response_class=Response)(metrics)
    api.get("/docs", include_in_schema=False)(docs)
    return Counted(Guard(api, host=host, token=token, names=names), service)


async def _no_route(request: Request, error: Exception) -> Response:
    return refusal(404, ROUTES)


class Counted:
    """An ASGI application whose answers are counted by route and status."""

    def __init__(self, app: App, service: Service):
        self.app, self.metrics = app, service.metrics
        paths = ("/health", "/compute", "/score")
        self._known = {f"/{scheme}{path}" if scheme else path: path for scheme in SCHEMES for path in paths}
        self._known |= {
            path: path for path in ("/v1/compare", "/v1/rank", "/ready", "/metrics", "/openapi.json", "/docs")
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        route = self._known.get(scope.get("path", ""), "other")

        async def sends(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        if scope["method"] == "POST" and route != "other":
            with self.metrics.request_seconds.labels(route).time():
                await self.app(scope, receive, sends)
        else:
            await self.app(scope, receive, sends)
