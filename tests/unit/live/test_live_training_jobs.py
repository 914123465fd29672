"""The training of a run through the REST API."""

import json

import httpx
import pytest

from bench.live.errors import LiveError
from bench.live.training_jobs import TrainingJobs


class FakeApi:
    """Files and jobs in memory, in the shapes of the REST API."""

    def __init__(self):
        self.files, self.jobs = [], {}

    def __call__(self, request):
        path = request.url.path
        if path == "/v1/files":
            self.files.append(request.content)
            return httpx.Response(200, json={"id": f"file-{len(self.files)}"})
        if path == "/v1/fine_tuning/jobs":
            job_id = f"job-{len(self.jobs) + 1}"
            self.jobs[job_id] = {
                "status": "running",
                "trained_tokens": None,
                "lemix": {"trained_tokens": 0},
                "body": json.loads(request.content),
            }
            return httpx.Response(200, json={"id": job_id})
        if path == "/v1/feedback":
            self.files.append(json.loads(request.content)["text"])
            self.jobs.setdefault("feedback", {"status": "running", "lemix": {"trained_tokens": 7}})
            return httpx.Response(200, json={"job_id": "feedback"})
        job_id = path.split("/")[4]
        if job_id not in self.jobs:
            return httpx.Response(404, json={"error": {"message": "no such job"}})
        if path.endswith("/cancel"):
            self.jobs[job_id]["status"] = "cancelled"
        return httpx.Response(200, json=self.jobs[job_id])


@pytest.fixture
def api():
    return FakeApi()


@pytest.fixture
async def jobs(api):
    http = httpx.AsyncClient(transport=httpx.MockTransport(api), base_url="http://server")
    jobs = TrainingJobs(http, "demo", batch_size=1, num_epochs=100, learning_rate=3e-4)
    yield jobs
    await jobs.close()


async def test_tokens_of_all_jobs_add_up(api, jobs):
    file_id = await jobs.upload("docs.jsonl", ["one", "two"])
    first = await jobs.start(file_id)
    second = await jobs.start(file_id)
    await jobs.cancel(first)
    api.jobs[first]["lemix"]["trained_tokens"] = 100
    api.jobs[second]["lemix"]["trained_tokens"] = 50
    assert await jobs.trained_tokens() == 150
    assert api.jobs[first]["status"] == "cancelled"
    assert b'{"text": "one"}\n{"text": "two"}\n' in api.files[0]
    assert api.jobs[first]["body"]["training_file"] == "file-1"
    assert api.jobs[first]["body"]["lemix"] == {"learning_rate": 3e-4}


@pytest.mark.parametrize("status", ["failed", "succeeded"])
async def test_a_job_that_ended_by_itself_spoils_the_run(api, jobs, status):
    job_id = await jobs.start("file-1")
    api.jobs[job_id]["status"] = status
    with pytest.raises(LiveError, match=f"{job_id} {status}"):
        await jobs.trained_tokens()


async def test_an_http_error_is_told(jobs):
    with pytest.raises(LiveError, match=r"POST /v1/fine_tuning/jobs/ghost/cancel answered HTTP 404.*no such job"):
        await jobs.cancel("ghost")


async def test_feedback_is_one_job(api, jobs):
    for text in ("one", "two"):
        await jobs.give(text)
    assert api.files == ["one", "two"]
    assert await jobs.trained_tokens() == 7
