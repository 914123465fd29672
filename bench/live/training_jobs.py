"""The online training of a run, through the REST API like anybody's."""

import json
from collections.abc import Sequence
from typing import Any

import httpx

from bench.live.errors import LiveError

_TIMEOUT_S = 60.0


def connect(url: str) -> httpx.AsyncClient:
    """A client of the REST API at `url`."""
    return httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False)


class TrainingJobs:
    """Jobs over stored files, or pieces of text as feedback, and what they have trained so far."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        model: str,
        *,
        batch_size: int,
        num_epochs: int,
        learning_rate: float,
        accumulation: int = 1,
    ) -> None:
        self._http = http
        self._model = model
        self._hyperparameters = {"n_epochs": num_epochs, "batch_size": batch_size}
        self._lemix: dict[str, float | int] = {"learning_rate": learning_rate}
        if accumulation > 1:
            self._lemix["gradient_accumulation_steps"] = accumulation
        self._jobs: list[str] = []

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def upload(self, name: str, texts: Sequence[str]) -> str:
        """Store texts as a training file; returns its id."""
        content = "".join(json.dumps({"text": item}) + "\n" for item in texts).encode()
        response = await self._http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": (name, content, "application/jsonl")}
        )
        return str(_checked(response)["id"])

    async def start(self, file_id: str) -> str:
        """Start a job over a stored file; returns its id."""
        body = {
            "model": self._model,
            "training_file": file_id,
            "hyperparameters": self._hyperparameters,
            "lemix": self._lemix,
        }
        job_id = str(_checked(await self._http.post("/v1/fine_tuning/jobs", json=body))["id"])
        self._jobs.append(job_id)
        return job_id

    async def give(self, text: str) -> None:
        """Hand over a piece of text as feedback."""
        response = await self._http.post("/v1/feedback", json={"model": self._model, "text": text})
        job_id = str(_checked(response)["job_id"])
        if job_id not in self._jobs:
            self._jobs.append(job_id)

    async def cancel(self, job_id: str) -> None:
        """Stop a job."""
        _checked(await self._http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel"))

    async def trained_tokens(self) -> int:
        """Labels trained by all jobs of this run. Raises LiveError when a job failed or ran out of examples."""
        total = 0
        for job_id in self._jobs:
            job = _checked(await self._http.get(f"/v1/fine_tuning/jobs/{job_id}"))
            if job["status"] in ("failed", "succeeded"):
                why = job.get("error") or "its examples ran out, so the backlog was empty"
                raise LiveError(f"training job {job_id} {job['status']}: {why}")
            total += int(job["lemix"]["trained_tokens"])  # OpenAI's own field is null until the end
        return total


def _checked(response: httpx.Response) -> Any:
    if response.status_code != 200:
        request = response.request
        raise LiveError(
            f"{request.method} {request.url.path} answered HTTP {response.status_code}: {response.text[:300]}"
        )
    return response.json()
