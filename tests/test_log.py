"""Live logs: what TensorBoard reads, and what W&B would send, is what metrics.jsonl holds, each step once."""
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import train
from launch import WITHOUT_GPUS, metrics, run, succeeds

ROOT = Path(__file__).parent.parent


def flags(sft_run, out, steps, log):
    """A short run from the SFT start, which saves at steps 2 and 4."""
    return ["--model", sft_run / "step_000000", "--games", 4, "--save-every", 2, "--no-exam", "--out", out,
            "--steps", steps, "--log", log]


def forget(out, step):
    """Remove the newest checkpoint: as if the run had been killed right before it was saved."""
    shutil.rmtree(out / f"step_{step:06d}")


def numbers(line):
    """What a line of metrics.jsonl says that is not null."""
    return {key: value for key, value in line.items() if value is not None}


# ---------------------------------------------------------------- TensorBoard

def scalars(folder):
    """{step: {key: value}} as TensorBoard reads it, and how often it holds each step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                      reason="pip install tensorboard")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    lines, counts = {}, {}
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            lines.setdefault(event.step, {})[key] = event.value
    for event in events.Scalars("step"):
        counts[event.step] = counts.get(event.step, 0) + 1
    return lines, counts


def test_tensorboard_reads_what_the_log_says_and_a_resumed_run_writes_no_step_twice(sft_run, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    out = tmp_path / "run"
    succeeds(*flags(sft_run, out, 3, "tensorboard"))
    forget(out, 3)
    succeeds("--resume", "--steps", 4, "--out", out)   # the flag is one of the run's settings
    lines, counts = scalars(out / "tensorboard")
    assert counts == {1: 1, 2: 1, 3: 1, 4: 1}
    logged = metrics(out)
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    for line in logged:
        shown = lines[line["step"]]
        assert shown.keys() == numbers(line).keys()
        assert all(shown[key] == pytest.approx(value, rel=1e-6) for key, value in numbers(line).items())


def test_two_processes_write_one_live_log(sft_run, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    succeeds(*flags(sft_run, tmp_path / "run", 1, "tensorboard"), ranks=2)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert scalars(tmp_path / "run" / "tensorboard")[1] == {1: 1}


# ---------------------------------------------------------------- Weights & Biases

def pieces(content):
    """The records of a W&B file: LevelDB's log format, in blocks of 32 KiB, after 7 bytes of W&B's own."""
    position, whole = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:   # no room for a header: the next block
            position += 32768 - position % 32768
        length, kind = struct.unpack_from("<HB", content, position + 4)   # behind 4 bytes of checksum
        whole += content[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):   # a record in one piece, or its last piece
            yield whole
            whole = b""


def history(file):
    """The lines of a run's history in a W&B file. Keys that begin with _ are W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record
    records = [Record.FromString(piece) for piece in pieces(file.read_bytes())]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json)
             for item in record.history.item} for record in records if record.HasField("history")]


def test_wandb_holds_what_the_log_says_and_nothing_that_was_printed(sft_run, tmp_path):
    pytest.importorskip("wandb", reason="pip install wandb")
    out = tmp_path / "run"
    offline = WITHOUT_GPUS | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    for words in (flags(sft_run, out, 3, "wandb"), ["--resume", "--steps", 4, "--out", out]):
        done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, words)], env=offline,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        if not (out / "step_000004").exists():
            forget(out, 3)
    files = sorted((out / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1, "both parts have one id"
    begun, resumed = map(history, files)
    assert [line["_step"] for line in begun] == [1, 2, 3]
    assert [line["_step"] for line in resumed] == [3, 4], "of step 3, W&B keeps the first"
    for line, shown in zip(metrics(out), begun[:2] + resumed, strict=True):
        assert {key: value for key, value in shown.items() if not key.startswith("_")} == line
    seeds = {json.loads(row)["seed"] for row in (out / "games.jsonl").read_text().splitlines()}
    for file in out.glob("wandb/**/*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not [seed for seed in seeds if seed.encode() in content], f"{file} holds a game"


# ---------------------------------------------------------------- refusals

@pytest.mark.parametrize("log", ["tensorboard", "wandb"])
def test_a_live_log_that_is_not_installed_is_refused_before_any_work(log, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None if name == log else name)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--log", log, "--out", str(tmp_path / "run")])
    sentence = f"--log {log}: is not installed; run pip install {log}, or choose --log json.\n"
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith(sentence)
    assert not (tmp_path / "run").exists()


def test_without_the_flag_neither_package_is_imported(sft_run, tmp_path):
    words = [str(word) for word in flags(sft_run, tmp_path / "run", 1, "json")]
    code = (f"import sys, train; train.main({words}); "
            "print([name for name in ('tensorboard', 'wandb') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=WITHOUT_GPUS, capture_output=True,
                          text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr[-2000:]


def test_a_log_that_does_not_exist_is_refused(tmp_path):
    done = run("--log", "paper", "--out", tmp_path / "run")
    assert done.returncode == 2 and "invalid choice: 'paper'" in done.stderr
