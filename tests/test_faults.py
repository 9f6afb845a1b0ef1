"""Machines that die, disks that fill_template up, numbers that explode: nothing that was complete is lost, and what is made again is the same."""
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import measured
from launch import finished, start

SMALL = ["--games", "12", "--sft-steps", "40", "--seed", "5", "--max-new-tokens", "24", "--no-exam"]


def run(*args, ranks=1, before=None):
    return finished(start([*SMALL, *args], ranks, before))


def succeeds(*args, **how):
    done = run(*args, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def refused(done, *words):
    """One sentence, status 2."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "step/s" not in line and "it/s" not in line]
    assert len(said) == 1 and all(word in said[0] for word in words), said


def weights(out):
    return load_file(out / (out / "latest").read_text() / "model.safetensors")


def difference(a, b):
    a, b = weights(a), weights(b)
    return max((a[key] - b[key]).abs().max() for key in a)


def steps_logged(out, name="metrics.jsonl"):
    return [json.loads(line)["step"] for line in (out / name).read_text().splitlines()]


def lines_logged(out):
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_run):
    """An undisturbed run of four steps that saved each of them."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(sft_run, folder / "warm")
    succeeds("--steps", "4", "--save-every", "1", "--out", folder / "whole")
    return folder


def halfway(runs, name, step=2):
    """A copy of that run as it was after `step` steps."""
    shutil.copytree(runs / "whole", runs / name)
    for folder in train.checkpoints(runs / name)[step + 1:]:
        shutil.rmtree(folder)
    return runs / name


# ---------------------------------------------------------------- signals

def wait_for(path, timeout=60):
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


@pytest.mark.parametrize("ranks, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_one_rank_ends_all_after_the_step_and_nothing_is_lost(runs, ranks, number):
    out, args = runs / f"asked{ranks}", ["--steps", "60", "--save-every", "100", "--out"]
    asked = start([*SMALL, *args, out], ranks)
    wait_for(out / "games.jsonl")
    os.kill(asked.ranks[-1].pid, number)
    done = finished(asked)
    made = len(steps_logged(out))
    assert done.returncode == 0 and f"{number.name}: stopped after step {made} of 60" in done.stdout and made < 60, done
    assert train.is_complete(out / f"step_{made:06d}") and (out / "latest").read_text() == f"step_{made:06d}"


def test_a_second_signal_ends_a_rank_at_once_even_while_it_waits_for_another(runs):
    asked = start([*SMALL, "--steps", "500", "--out", runs / "twice"], 2)
    wait_for(runs / "twice" / "games.jsonl")
    os.kill(asked.ranks[1].pid, signal.SIGSTOP)   # now rank 0 waits for it
    time.sleep(0.5)
    for _ in range(2):
        os.kill(asked.ranks[0].pid, signal.SIGTERM)
        time.sleep(1.1)
    asked.ranks[0].join(2)
    assert asked.ranks[0].exitcode == 128 + signal.SIGTERM
    asked.ranks[1].kill()


# ---------------------------------------------------------------- numbers that are not finite

def poison(last, number):
    """On the last rank, the loss of updates 2 to `last` is not a number."""
    honest, count = train.policy_loss, iter(range(1000))
    train.policy_loss = lambda *args: honest(*args) * (torch.nan if number == 1 and 2 <= next(count) < 2 * last else 1.0)   # two roles, two calls


def test_an_update_that_is_not_finite_is_skipped_on_all_ranks_and_its_batch_is_kept(runs):
    succeeds("--steps", "4", "--out", runs / "once", ranks=2, before=partial(poison, 2))
    lines = [json.loads(line) for line in (runs / "once" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 0, 0] and lines[1]["loss_attacker"] is None
    assert all(np.isfinite(value) for line in lines for value in line.values() if value is not None)
    turns = [json.loads(line) for line in (runs / "once" / "skipped_000002_1.jsonl").read_text().splitlines()]
    assert turns and all(len(turn["ids"]) == len(turn["advantage"]) == len(turn["logprobs"]) for turn in turns)
    assert all(tensor.isfinite().all() for tensor in weights(runs / "once").values())


def test_three_such_updates_in_a_row_end_the_run_in_one_sentence(runs):
    done = run("--steps", "6", "--save-every", "1", "--out", runs / "never", ranks=2, before=partial(poison, 100))
    refused(done, "step 4: 3 updates in a row", "skipped_*.jsonl")
    assert train.newest_complete(runs / "never").name == "step_000003"
    measured("weights after skipped updates against those before", max(
        (a - b).abs().max() for a, b in zip(weights(runs / "never").values(), load_file(runs / "never" / "step_000001" / "model.safetensors").values())), 0.0)


# ---------------------------------------------------------------- a rank that dies

MISCHIEF = """
import os, sys
sys.path.insert(0, {root!r})
import train
honest = train.whiten
def dies(*args):
    if os.environ["RANK"] == "1":
        raise ValueError("the dog ate it")
    return honest(*args)
train.whiten = dies
train.main()
"""


def test_a_rank_that_fails_ends_all_within_a_minute_with_its_own_error_on_top(runs, tmp_path):
    (tmp_path / "mischief.py").write_text(MISCHIEF.format(root=str(Path(train.__file__).parent)))
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "mischief.py", *SMALL, "--steps", "2",
                           "--out", runs / "failed"], capture_output=True, text=True, timeout=90)
    measured("seconds until all have ended", time.monotonic() - begun, 60)
    assert done.returncode != 0 and re.search(r"\w*Error: .*", done.stderr)[0] == "ValueError: the dog ate it", done.stderr[-5000:]


# ---------------------------------------------------------------- disks

def small_files(size, number):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("size", [3_000_000, 4_500_000], ids=["weights do not fit", "optimizer does not fit"])
def test_a_file_that_cannot_be_written_ends_the_run_in_one_sentence_and_it_goes_on_from_the_last_checkpoint(runs, size, ranks):
    out = halfway(runs, f"full_{size}_{ranks}")
    refused(run("--resume", "--out", out, ranks=ranks, before=partial(small_files, size // (1 + (ranks - 1) * (size > 4_000_000)))), "cannot be written")
    assert train.newest_complete(out).name == (out / "latest").read_text() == "step_000002"
    succeeds("--resume", "--out", out, ranks=ranks)
    measured("weights against an undisturbed run", difference(runs / "whole", out), 1e-5 * (ranks > 1))
    assert steps_logged(out) == [1, 2, 3, 4] and set(steps_logged(out, "games.jsonl")) == {1, 2, 3, 4}


def mount(folder, options):
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs to be root")


def test_a_disk_that_is_full_and_one_that_is_read_only_cost_nothing(runs):
    out, on_disk = runs / "mounted", halfway(runs, "to_mount")
    out.mkdir()
    mount(out, "size=40m")   # room for the start and two checkpoints of 12 MB, not for three
    try:
        shutil.copytree(on_disk, out, dirs_exist_ok=True)
        refused(run("--resume", "--out", out), "No space left on device")
        assert train.newest_complete(out).name == (out / "latest").read_text() == "step_000003"
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        refused(run("--resume", "--out", out), "cannot be written")
        subprocess.run(["mount", "-o", "remount,rw,size=100m", out], check=True)
        succeeds("--resume", "--out", out)
        measured("weights against an undisturbed run", difference(runs / "whole", out), 0.0)
    finally:
        subprocess.run(["umount", out], check=True)


# ---------------------------------------------------------------- checkpoints

def half_a_file(name, folder):
    os.truncate(folder / name, (folder / name).stat().st_size // 2)


def a_missing_file(name, folder):
    next(folder.glob(name)).unlink()


def a_turned_byte(name, folder):
    file = next(folder.glob(name))
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)


DAMAGES = [partial(half_a_file, "model.safetensors"), partial(half_a_file, "tokenizer.json"), partial(half_a_file, "complete.json"), partial(a_missing_file, "optimizer/*"),
           partial(a_missing_file, "complete.json"), partial(a_turned_byte, "optimizer/*"), partial(a_turned_byte, "config.json")]


def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_it_is_used(runs):
    assert all(train.is_complete(folder) for folder in train.checkpoints(runs / "whole"))
    for n, damage in enumerate(DAMAGES):
        out = halfway(runs, f"damaged_{n}", step=3)
        damage(out / "step_000003")
        assert train.newest_complete(out).name == "step_000002", damage
    (out / "metrics.jsonl").write_text((out / "metrics.jsonl").read_text() + '{"step": 5, "as')   # a line that was torn, too
    done = succeeds("--resume", "--out", out)
    assert "step_000003 is not complete" in done.stdout
    measured("weights against an undisturbed run", difference(runs / "whole", out), 0.0)
    assert steps_logged(out) == [1, 2, 3, 4]
    for folder in train.checkpoints(out):
        half_a_file("model.safetensors", folder)
    refused(run("--resume", "--out", out), "no complete checkpoint")


def test_the_newest_checkpoints_and_the_start_are_kept_and_torn_folders_are_cleared_away(runs):
    out = halfway(runs, "kept")
    (out / "partial_000003").mkdir()
    (out / "partial_000003" / "model.safetensors").write_text("torn")
    succeeds("--resume", "--keep", "2", "--out", out)
    assert [folder.name for folder in train.checkpoints(out)] == ["step_000000", "step_000003", "step_000004"] and not list(out.glob("partial_*"))


def test_a_run_goes_on_on_another_number_of_ranks_and_with_the_settings_it_had(runs):
    two = runs / "two"
    succeeds("--steps", "4", "--save-every", "2", "--out", two, ranks=2)
    measured("weights, 2 processes against 1", difference(runs / "whole", two), 1e-5)
    for ranks in (1, 2, 3):
        out = runs / f"from_two_to_{ranks}"
        shutil.copytree(two, out)
        shutil.rmtree(out / "step_000004")
        done = finished(start(["--resume", "--out", out], ranks))   # no other flags: the settings are the run's own
        assert done.returncode == 0, done.stderr[-3000:]
        measured(f"weights, 2 steps on 2 processes and 2 on {ranks}", difference(two, out), 1e-6 if ranks == 2 else 1e-5)
        assert steps_logged(out) == [1, 2, 3, 4]


def test_what_a_resumed_run_may_change_is_said_and_what_it_may_not_is_refused(runs):
    out = halfway(runs, "changed")
    refused(run("--resume", "--out", out, "--model", "other"), "begun with toy")
    assert "command line; was 4" in succeeds("--resume", "--out", out, "--steps", "5").stdout
    assert json.loads((out / "config.json").read_text())["steps"] == 5 and steps_logged(out) == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------- chaos

def says_when_met(file, number):
    """In a rank, before it starts: leave a file once the ranks have met."""
    def setup(cfg, real=train.setup):
        ranks = real(cfg)
        Path(f"{file}_{number}").touch()
        return ranks
    train.setup = setup


def test_after_25_kills_at_random_moments_the_weights_are_those_of_an_undisturbed_run(runs):
    """
    Kills in a start, after a step, and, every second one, in a save. Each hits all ranks, or one, and then the others end by themselves; but
    all where they have not met yet: then only torchrun can know of a death.
    """
    args, rng, out = ["--steps", "60", "--games", "4", "--max-new-tokens", "12", "--save-every", "1", "--keep", "2"], np.random.default_rng(0), runs / "chaos"
    begun, torn = time.monotonic(), 0
    succeeds(*args, "--out", runs / "calm", ranks=2)
    for kill in range(25):
        before, born = train.newest_complete(out), time.time()
        life = start([*SMALL, *args, "--out", out, *["--resume"] * bool(before)], 2, partial(says_when_met, runs / f"met_{kill}"))
        done = int(before.name.removeprefix("step_")) if before else 0
        saving = lambda: any(folder.stat().st_mtime > born for folder in out.glob("partial_*"))
        moment = {0: lambda: True, 2: lambda: lines_logged(out) >= done + 2}.get(kill % 4, saving)   # never late enough for all 60 steps
        while life.ranks[0].is_alive() and not moment():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05 if kill % 4 else 1.0))
        met = len(list(runs.glob(f"met_{kill}_*"))) == 2
        for process in life.ranks if rng.random() < 0.5 or not met else [life.ranks[rng.integers(2)]]:
            process.kill()
        for process in life.ranks:
            process.join(30)
            assert process.exitcode, "it had ended before it was killed, or a rank waits for a dead one"
        after = train.newest_complete(out)
        assert not before or after >= before, "a complete checkpoint was lost"
        torn += bool(list(out.glob("partial_*")))
        shutil.rmtree(life.printed)
    print(f"\n    25 kills in {time.monotonic() - begun:.0f} s, {torn} of them in a save; the last life begins at {after.name}", end="")
    assert torn >= 8
    succeeds(*args, "--resume", "--out", out, ranks=2)
    measured("weights after the kills against the calm run's", difference(runs / "calm", out), 0.0)
    assert steps_logged(out) == list(range(1, 61)) and not list(out.glob("partial_*"))
