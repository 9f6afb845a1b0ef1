"""The script for the first GPU runs through on tiny shapes, and writes down what fails, too."""
import json
import sys

import pytest

import first_gpu


def test_the_script_runs_through_without_a_gpu(tmp_path, monkeypatch):
    """The tests and the benchmark, minutes long, are left out here."""
    monkeypatch.setattr(first_gpu, "ON_GPU", False)
    out = tmp_path / "report.md"
    monkeypatch.setattr(sys, "argv", ["first_gpu.py", "--out", str(out), "--work", str(tmp_path / "work"),
                                      "--parts", "toy", "alone", "judge"])
    first_gpu.main()
    report = out.read_text("utf-8")
    assert report.count("status 0") == 3 and report.startswith("# no GPU: tiny shapes on a CPU")
    for run, steps in (("toy", 2), ("alone", 3), ("judge_run", 3)):
        logged = (tmp_path / "work" / run / "metrics.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["step"] for line in logged] == list(range(1, steps + 1))
    assert report.count("| 3 | ") == 2


@pytest.mark.parametrize("part", ["toy", "bench"])
def test_a_part_that_fails_is_written_down_and_the_next_one_goes_on(tmp_path, monkeypatch, part):
    commands = {part: ["-c", "raise SystemExit('no such device')"], "last": ["-c", "print('still here')"]}
    monkeypatch.setattr(first_gpu, "commands", lambda work: commands)
    out = tmp_path / "report.md"
    monkeypatch.setattr(sys, "argv", ["first_gpu.py", "--out", str(out), "--work", str(tmp_path / "work"),
                                      "--parts", part, "last"])
    first_gpu.main()
    report = out.read_text("utf-8")
    assert "status 1" in report and "no such device" in report and "still here" in report
