"""The REST application: routes, errors, what surrounds every request."""

import re
import uuid

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lemix.errors import ErrorCode, LemixError
from services.gateway import metrics, problems
from services.gateway.application import Application
from services.gateway.config import Limits
from services.gateway.http_body import BodyLimit, discard
from services.gateway.routes_cluster import Readiness, cluster_routes
from services.gateway.routes_inference import inference_routes
from services.gateway.routes_training import training_routes

_RETRY_AFTER_S = 1.0
#: Refused requests whose bodies are read on at once; one more is answered at once. Each may hold a connection for the
#: seconds that `discard` allows.
_MAX_DISCARDS = 64
_ECHOABLE = re.compile(r"[\x21-\x7e]{1,128}")


def create_app(application: Application, readiness: Readiness, limits: Limits) -> Starlette:
    """The ASGI app over the application layer."""
    return Starlette(
        routes=[
            *inference_routes(application.generation),
            *training_routes(application.training),
            *cluster_routes(application.cluster, readiness),
        ],
        middleware=[
            Middleware(
                _Surroundings,
                max_requests=limits.max_concurrent_requests + limits.spare_http_requests,
                max_body_bytes=max(limits.max_body_bytes, limits.max_file_bytes),
            ),
            Middleware(BodyLimit, max_body_bytes=limits.max_body_bytes, max_file_bytes=limits.max_file_bytes),
        ],
        exception_handlers={
            LemixError: problems.on_lemix_error,
            problems.HttpProblem: problems.on_http_problem,
            HTTPException: problems.on_http_exception,
            Exception: problems.on_unexpected,
        },
    )


class _Surroundings:
    """Counts and bounds requests and gives every answer an x-request-id, the client's own if it sent one."""

    def __init__(self, app: ASGIApp, max_requests: int, max_body_bytes: int) -> None:
        """max_requests: in progress at once; one more is answered with 429, its body thrown away. max_body_bytes: the
        largest body that any route takes."""
        self._app = app
        self._max_requests = max_requests
        self._max_body_bytes = max_body_bytes
        self._num_requests = 0
        self._num_discards = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if _ECHOABLE.fullmatch(sent) else uuid.uuid4().hex
        status = 499  # nothing was answered: the client went away

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).setdefault("x-request-id", request_id)
            await send(message)

        metrics.HTTP_IN_FLIGHT.inc()
        try:
            run = self._run if self._num_requests < self._max_requests else self._refuse
            await run(scope, receive, observed)
        finally:
            metrics.HTTP_IN_FLIGHT.dec()
            # The handler's name, not the path: clients must not be able to make up label values.
            route = getattr(scope.get("endpoint"), "__name__", "unknown")
            metrics.HTTP_REQUESTS.labels(route, str(status)).inc()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._num_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_requests -= 1

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._discard(scope, receive)
        error = LemixError(
            ErrorCode.OVERLOADED,
            f"{self._max_requests} REST requests are in progress already",
            retry_after_s=_RETRY_AFTER_S,
        )
        answer = await problems.on_lemix_error(Request(scope), error)
        answer.headers["connection"] = "close"  # its body may be unread, and connections are what is scarce
        await answer(scope, receive, send)

    async def _discard(self, scope: Scope, receive: Receive) -> None:
        # Reading on would tell a client that waits for "100 Continue" to send the body.
        if self._num_discards >= _MAX_DISCARDS or "expect" in Headers(scope=scope):
            return
        self._num_discards += 1
        try:
            await discard(receive, self._max_body_bytes)
        finally:
            self._num_discards -= 1
