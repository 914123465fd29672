"""A running cluster and the calls of a user, for end-to-end tests. Blocking code: a cluster needs no event loop."""

import asyncio
import json
import time
from contextlib import contextmanager

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.cluster import LocalCluster
from lemix.v1 import cluster_service_pb2 as cluster_pb2
from lemix.v1 import cluster_service_pb2_grpc as cluster_grpc

#: Longest any single wait may take, seconds.
PATIENCE_S = 30.0


def eventually(condition, what, timeout_s=PATIENCE_S):
    """Wait for a true value of `condition()` and return it."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
    return value


@contextmanager
def running(config):
    """The cluster, started, and stopped at the end; logs go into the report of a failed start."""
    cluster = LocalCluster(config)
    asyncio.run(cluster.start())
    try:
        with (
            httpx.Client(base_url=cluster.url, timeout=PATIENCE_S, trust_env=False) as http,
            grpc.insecure_channel(cluster.grpc_address) as channel,
        ):
            yield User(cluster, http, cluster_grpc.ClusterServiceStub(channel))
    finally:
        asyncio.run(cluster.stop())


class User:
    """What a user of the cluster does."""

    def __init__(self, cluster, http, stub):
        self.cluster = cluster
        self.http = http
        self.model = cluster.config.model_path.name
        self._stub = stub

    def status(self):
        """The cluster's public state."""
        return self._stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=PATIENCE_S)

    def all_ready(self):
        """Whether every node may get work and the gateway serves."""
        nodes = self.status().nodes
        serving = self.http.get("/readyz").status_code == 200
        return serving and sum(node.ready for node in nodes) == self.cluster.config.num_nodes

    def post_chat(self, text, **values):
        """The response to a chat, whatever its status."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **values}
        return self.http.post("/v1/chat/completions", json=body)

    def chat(self, text, **values):
        """A whole chat answer."""
        response = self.post_chat(text, **values)
        assert response.status_code == 200, response.text
        return response.json()

    @contextmanager
    def chat_stream(self, text, **values):
        """The chunks of a streamed chat, as they come."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "stream": True, **values}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            yield events(response)

    def upload(self, num_examples, length=48):
        """Store a training file; returns its id."""
        text = "the cat sat on the mat and looked at the moon. " * 20
        lines = [json.dumps({"text": text[i : i + length]}) for i in range(num_examples)]
        files = {"file": ("cats.jsonl", "\n".join(lines).encode())}
        response = self.http.post("/v1/files", files=files, data={"purpose": "fine-tune"})
        assert response.status_code == 200, response.text
        return response.json()["id"]

    def create_job(self, file_id, epochs=1, **values):
        """Start an online job; returns its id."""
        body = {"model": self.model, "training_file": file_id, "hyperparameters": {"n_epochs": epochs}, **values}
        response = self.http.post("/v1/fine_tuning/jobs", json=body)
        assert response.status_code == 200, response.text
        return response.json()["id"]

    def job(self, job_id):
        """The job now."""
        response = self.http.get(f"/v1/fine_tuning/jobs/{job_id}")
        assert response.status_code == 200, response.text
        return response.json()

    def job_ended(self, job_id):
        """The job once it has ended, None before."""
        job = self.job(job_id)
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None


def events(response):
    """Data of server-sent events, without the final [DONE]."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def metric(port, name, **labels):
    """Value of a service's metric; 0 before it was first set."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5, trust_env=False).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
