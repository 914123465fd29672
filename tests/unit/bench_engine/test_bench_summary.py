"""What every benchmark writes."""

import json
from datetime import datetime

import pytest

from bench.report.summary import run_facts, write_summary


def test_a_summary_tells_commit_time_and_machine(tmp_path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "new" / "run.json"
    write_summary(path, run_facts() | {"rounds": [1.5]})
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["rounds"] == [1.5]
    assert stored["git_commit"]
    assert stored["machine"]["cores"] >= 1
    assert datetime.fromisoformat(stored["started_at"]).tzinfo is not None
    assert capsys.readouterr().out == f"Wrote {path}\n"
    assert [item.name for item in path.parent.iterdir()] == ["run.json"]


def test_the_page_lies_beside_the_summary(tmp_path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "run.json"
    write_summary(path, {}, "<h1>Run</h1>")
    assert path.with_suffix(".html").read_text(encoding="utf-8") == "<h1>Run</h1>"
    assert capsys.readouterr().out == f"Wrote {path} and {path.with_suffix('.html')}\n"
