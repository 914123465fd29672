"""`python -m services.runtime.healthcheck HOST:PORT`: exit code 0 when the gRPC server there is ready to serve."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 3.0


def check(address: str, timeout_s: float = _TIMEOUT_S) -> str:
    """Why the server at host:port is not ready; empty when it is."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            response = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            return str(error.code().name)
    if response.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def main(arguments: list[str]) -> int:
    """Check one address. Exit code 2: wrong usage."""
    if len(arguments) != 1:
        print("usage: python -m services.runtime.healthcheck HOST:PORT", file=sys.stderr)  # noqa: T201
        return 2
    reason = check(arguments[0])
    if reason:
        print(f"{arguments[0]}: {reason}", file=sys.stderr)  # noqa: T201
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
