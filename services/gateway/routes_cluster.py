"""REST routes of models, health and metrics."""

import prometheus_client
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.gateway import translate
from services.gateway.cluster import ClusterView


class Readiness:
    """Whether this process wants new requests; set to draining when it stops."""

    def __init__(self) -> None:
        self.draining = False


def cluster_routes(cluster: ClusterView, readiness: Readiness) -> list[Route]:
    """/v1/models, /healthz, /readyz, /metrics."""

    async def list_models(_: Request) -> JSONResponse:
        models = [translate.model_object(model) for model in await cluster.models()]
        return JSONResponse({"object": "list", "data": models})

    async def get_model(request: Request) -> JSONResponse:
        return JSONResponse(translate.model_object(await cluster.get_model(request.path_params["model_id"])))

    async def healthz(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> JSONResponse:
        reason = "the gateway is stopping" if readiness.draining else await cluster.not_ready_reason()
        if reason:
            return JSONResponse({"status": "not ready", "reason": reason}, 503, {"retry-after": "1"})
        return JSONResponse({"status": "ready"})

    async def metrics(_: Request) -> Response:
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{model_id:path}", get_model, methods=["GET"]),
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]
