"""
Processes that die, disks that are full, losses that are not numbers: no complete checkpoint is lost, and a
resumed run ends with the weights of one that nothing disturbed.
"""
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import train
from checkpoint import checkpoints, is_complete, newest_complete, step_number
from conftest import measured
from launch import WITHOUT_GPUS, finished, games, largest_difference, metrics, rows, start, weights
from launch import run as run_train
from launch import succeeds as train_succeeds

SMALL = ["--games", "12", "--seed", "5", "--max-new-tokens", "24", "--no-exam"]   # and --model, see runs


def run(*args, ranks=1, before=None):
    return run_train(*SMALL, *args, ranks=ranks, before=before)


def succeeds(*args, ranks=1, before=None):
    return train_succeeds(*SMALL, *args, ranks=ranks, before=before)


def refused(done, *words):
    """The run ended with status 2 and said why in one sentence with these words."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    sentences = [line for line in lines if not re.search(r"(step|it)/s", line)]   # the rest are progress bars
    assert len(sentences) == 1 and all(word in sentences[0] for word in words), sentences


def steps_logged(out):
    return [line["step"] for line in metrics(out)]


def wait_until(condition, what, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_run):
    """A folder of runs that begin with one SFT model; "whole" is an undisturbed run of four saved steps."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(sft_run, folder / "sft")
    SMALL.extend(["--model", folder / "sft" / "step_000000"])
    succeeds("--steps", "4", "--save-every", "1", "--out", folder / "whole")
    return folder


def first_steps(runs, name, steps=2):
    """A copy of the undisturbed run without the checkpoints after this step."""
    shutil.copytree(runs / "whole", runs / name)
    for folder in checkpoints(runs / name)[steps + 1:]:
        shutil.rmtree(folder)
    return runs / name


def is_undisturbed(runs, out, bound=0.0):
    """The run has ended with the weights and logs of the undisturbed one."""
    difference = largest_difference(weights(runs / "whole"), weights(out))
    measured("weights against an undisturbed run", difference, bound)
    assert steps_logged(out) == [1, 2, 3, 4] and {game["step"] for game in games(out)} == {1, 2, 3, 4}


# ---------------------------------------------------------------- signals

def ignores(process, number):
    """Whether a process ignores this signal now, as train.py does in the second after the first one."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16)
    return bool(mask >> (number - 1) & 1)


@pytest.mark.parametrize("ranks, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_one_rank_ends_all_after_the_step_and_nothing_is_lost(runs, ranks, number):
    """Two signals within a second count as one: on Ctrl-C the terminal sends one and torchrun another."""
    out = runs / f"stopped_{ranks}"
    started = start([*SMALL, "--steps", "60", "--save-every", "100", "--out", out], ranks)
    wait_until((out / "games.jsonl").exists, "the first step")
    os.kill(started.ranks[-1].pid, number)
    wait_until(lambda: ignores(started.ranks[-1], number), "the handler")
    os.kill(started.ranks[-1].pid, number)
    done = finished(started)
    steps = len(steps_logged(out))
    assert done.returncode == 0 and f"{number.name}: stopped after step {steps} of 60" in done.stdout, done
    assert steps < 60 and (out / "latest").read_text() == f"step_{steps:06d}"
    assert is_complete(out / f"step_{steps:06d}")


def test_a_second_signal_ends_a_rank_at_once_even_while_it_waits_for_another(runs):
    """The first signal comes while both ranks run. Then rank 1 stops, and rank 0 waits in a collective."""
    started = start([*SMALL, "--steps", "500", "--out", runs / "twice"], 2)
    wait_until((runs / "twice" / "games.jsonl").exists, "the first step")
    waiting, stopped = started.ranks
    os.kill(waiting.pid, signal.SIGTERM)
    wait_until(lambda: ignores(waiting, signal.SIGTERM), "the handler")
    os.kill(stopped.pid, signal.SIGSTOP)
    wait_until(lambda: not ignores(waiting, signal.SIGTERM), "the end of the handler's second")
    time.sleep(1.0)
    assert waiting.is_alive(), "it should wait for rank 1"
    os.kill(waiting.pid, signal.SIGTERM)
    waiting.join(2)
    assert waiting.exitcode == -signal.SIGTERM
    stopped.kill()


# ---------------------------------------------------------------- losses that are not finite

def poison(updates, rank):
    """On rank 1 the loss of these updates is not a number."""
    update, policy_loss = train.update, train.policy_loss
    started = []

    def counted_update(*args):
        started.append(len(started) + 1)
        return update(*args)

    def poisoned_loss(*args):
        return policy_loss(*args) * (torch.nan if started[-1] in updates else 1.0)

    train.update = counted_update
    if rank == 1:
        train.policy_loss = poisoned_loss


def test_an_update_that_is_not_finite_is_skipped_on_all_ranks(runs):
    out = runs / "one_poisoned"
    succeeds("--steps", "4", "--out", out, ranks=2, before=partial(poison, range(2, 3)))
    lines = metrics(out)
    assert [line["skipped"] for line in lines] == [0, 1, 0, 0] and lines[1]["loss"] is None
    numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert numbers and all(np.isfinite(numbers))
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_three_such_updates_in_a_row_end_the_run_in_one_sentence(runs):
    out = runs / "all_poisoned"
    poisoned = partial(poison, range(2, 100))
    done = run("--steps", "6", "--save-every", "1", "--out", out, ranks=2, before=poisoned)
    refused(done, "step 4: 3 updates in a row", "games.jsonl")
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4], "the last step's games can be read"
    assert newest_complete(out).name == "step_000003"
    difference = largest_difference(weights(out), weights(out, 1))
    measured("weights after skipped updates against those before", difference, 0.0)


# ---------------------------------------------------------------- a rank that fails

FAILING = """
import os, sys
sys.path.insert(0, {root!r})
import train
credit = train.credit
def failing(*args):
    if os.environ["RANK"] == "1":
        raise ValueError("the dog ate it")
    return credit(*args)
train.credit = failing
train.main()
"""


def test_a_rank_that_fails_ends_all_within_a_minute_with_its_own_error_on_top(runs, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(Path(train.__file__).parent)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [*torchrun, script, *SMALL, "--steps", "2", "--out", runs / "failed"]
    began = time.monotonic()
    done = subprocess.run(line, capture_output=True, text=True, timeout=90, env=WITHOUT_GPUS)
    measured("seconds until all have ended", time.monotonic() - began, 60)
    first_error = re.search(r"\w*Error: .*", done.stderr)[0]
    assert done.returncode != 0 and first_error == "ValueError: the dog ate it", done.stderr[-5000:]


# ---------------------------------------------------------------- disks

def limit_file_size(sizes, rank):
    """No file that this rank writes can be larger than its size, in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[rank], sizes[rank]))


ANY = resource.RLIM_INFINITY
LIMITS = {   # bytes per rank. Rank 0 writes the weights, 1.2 MB; all ranks share the optimizer, 3.5 MB
    "weights do not fit": [800_000],
    "optimizer does not fit": [1_500_000],
    "weights do not fit, 2 ranks": [800_000, ANY],
    "one rank's share of the optimizer does not fit": [ANY, 1_000_000],
}


@pytest.mark.parametrize("sizes", LIMITS.values(), ids=LIMITS.keys())
def test_a_file_that_cannot_be_written_ends_the_run_in_one_sentence_and_it_can_be_resumed(runs, sizes):
    ranks = len(sizes)
    out = first_steps(runs, "limit_" + "_".join(map(str, sizes)))
    done = run("--resume", "--out", out, ranks=ranks, before=partial(limit_file_size, sizes))
    refused(done, "cannot be read or written")
    assert newest_complete(out).name == (out / "latest").read_text() == "step_000002"
    succeeds("--resume", "--out", out, ranks=ranks)
    is_undisturbed(runs, out, 0.0 if ranks == 1 else 1e-5)


def mount(folder, options):
    mounting = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if os.geteuid() or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("mounting needs to be root")


def test_a_disk_that_is_full_and_one_that_is_read_only_cost_nothing(runs):
    out = runs / "mounted"
    on_disk = first_steps(runs, "to_mount")
    out.mkdir()
    mount(out, "size=17m")   # holds the start (1.2 MB) and three checkpoints of 4.6 MB, not four
    try:
        shutil.copytree(on_disk, out, dirs_exist_ok=True)
        refused(run("--resume", "--out", out), "No space left on device")
        assert newest_complete(out).name == (out / "latest").read_text() == "step_000003"
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        refused(run("--resume", "--out", out), "cannot be written")
        subprocess.run(["mount", "-o", "remount,rw,size=100m", out], check=True)
        succeeds("--resume", "--out", out)
        is_undisturbed(runs, out)
    finally:
        subprocess.run(["umount", out], check=True)


# ---------------------------------------------------------------- damaged checkpoints

def truncate(pattern, folder):
    """Cut the first file of that name in half."""
    file = next(folder.glob(pattern))
    os.truncate(file, file.stat().st_size // 2)


def remove(pattern, folder):
    next(folder.glob(pattern)).unlink()


DAMAGES = [
    partial(truncate, "model.safetensors"),
    partial(truncate, "tokenizer.json"),
    partial(truncate, "optimizer/*"),
    partial(truncate, "complete.json"),
    partial(remove, "optimizer/*"),
    partial(remove, "complete.json"),
]


def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_it_is_used(runs):
    assert all(is_complete(folder) for folder in checkpoints(runs / "whole"))
    for n, damage in enumerate(DAMAGES):
        out = first_steps(runs, f"damaged_{n}", steps=3)
        damage(out / "step_000003")
        assert newest_complete(out).name == "step_000002", damage
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 5, "as')   # a line that a crash cut short
    done = succeeds("--resume", "--out", out)
    assert "step_000003 is not complete" in done.stdout
    is_undisturbed(runs, out)
    for folder in checkpoints(out):
        truncate("model.safetensors", folder)
    refused(run("--resume", "--out", out), "no complete checkpoint")


def test_a_signal_between_the_question_for_signals_and_the_save_waits_for_the_next_step():
    """main asks once a step; what comes after that must not end the run without a checkpoint."""
    caught = []
    signals = train.gather_list(caught, train.Ranks(0, 1, torch.device("cpu")))
    caught.append("SIGTERM")
    assert signals == []


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_one_that_is_written_now(runs):
    out = first_steps(runs, "later", steps=3)
    truncate("model.safetensors", out / "step_000003")
    (out / "step_000003").rename(out / "step_000009")
    succeeds("--resume", "--steps", "3", "--keep", "1", "--out", out)
    assert newest_complete(out).name == (out / "latest").read_text() == "step_000003"


def test_a_run_that_died_before_it_named_its_first_checkpoint_can_be_resumed(runs):
    out = first_steps(runs, "unnamed", steps=0)
    (out / "latest").unlink()
    (out / "metrics.jsonl").unlink()
    succeeds("--resume", "--out", out)
    is_undisturbed(runs, out)


def test_an_optimizer_state_of_full_size_that_cannot_be_read_ends_the_resume_in_a_sentence(runs):
    out = first_steps(runs, "turned")
    file = next((out / "step_000002").glob("optimizer/*"))
    content = bytearray(file.read_bytes())
    content[20] ^= 1   # in the header
    file.write_bytes(content)
    done = run("--resume", "--out", out)
    assert done.returncode == 2 and "its optimizer state cannot be read" in done.stderr.splitlines()[-1], done
    shutil.rmtree(out / "step_000002")   # as the sentence says
    succeeds("--resume", "--out", out)
    is_undisturbed(runs, out)


def test_the_start_and_the_newest_checkpoints_are_kept_and_partial_folders_are_removed(runs):
    out = first_steps(runs, "kept")
    (out / "partial_000003").mkdir()
    (out / "partial_000003" / "model.safetensors").write_text("torn")
    succeeds("--resume", "--keep", "2", "--out", out)
    assert [step_number(folder) for folder in checkpoints(out)] == [0, 3, 4]
    assert not list(out.glob("partial_*"))


def test_the_state_of_an_optimizer_that_never_stepped_is_zero_and_its_making_moves_nothing():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = checkpoint.optimizer_state(model, optimizer)
    master = {name: state.pop(f"weight.{name}") for name in before}
    assert state.keys() == {"step.weight", "exp_avg.weight", "exp_avg_sq.weight",
                            "step.bias", "exp_avg.bias", "exp_avg_sq.bias"}
    assert not any(tensor.any() for tensor in state.values()) and optimizer.param_groups[0]["lr"] == 0.1
    measured("weights in the state", largest_difference(master, before), 0.0)
    measured("weights", largest_difference(model.state_dict(), before), 0.0)
    assert state["exp_avg.bias"] is optimizer.state[model.bias]["exp_avg"]


# ---------------------------------------------------------------- what a resume may change

def test_a_run_resumes_on_another_number_of_ranks_with_its_own_settings(runs):
    two = runs / "two"
    succeeds("--steps", "4", "--save-every", "2", "--out", two, ranks=2)
    is_undisturbed(runs, two, 1e-5)
    for ranks in (1, 2, 3):
        out = runs / f"from_two_to_{ranks}"
        shutil.copytree(two, out)
        shutil.rmtree(out / "step_000004")
        train_succeeds("--resume", "--out", out, ranks=ranks)   # no other flags: config.json has the settings
        difference = largest_difference(weights(two), weights(out))
        bound = 1e-6 if ranks == 2 else 1e-5
        measured(f"weights, 2 steps on 2 processes and 2 on {ranks}", difference, bound)
        assert steps_logged(out) == [1, 2, 3, 4]


def test_what_a_resume_may_change_is_said_and_what_it_may_not_is_refused(runs):
    out = first_steps(runs, "changed")
    refused(run("--resume", "--out", out, "--model", "other"), "the run was begun with", "begin another run")
    assert re.search(r"steps +5, was 4", succeeds("--resume", "--out", out, "--steps", "5").stdout)
    assert '"steps": 5' in (out / "config.json").read_text() and steps_logged(out) == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------- 25 kills

KILLS = 25
STEPS = 60
CHAOS = ["--steps", str(STEPS), "--games", "4", "--max-new-tokens", "12", "--save-every", "1", "--keep", "2"]


def touch_after_setup(file, rank):
    """Leave a file per rank once the ranks have connected to each other."""
    setup = train.setup

    def setup_and_touch(cfg):
        ranks = setup(cfg)
        Path(f"{file}_{rank}").touch()
        return ranks
    train.setup = setup_and_touch


def saving(out, began):
    """Whether a checkpoint is being written that was begun after this time."""
    try:
        return any(folder.stat().st_mtime > began for folder in out.glob("partial_*"))
    except FileNotFoundError:   # it has just been renamed
        return False


def lines_logged(out):
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def moment_to_kill(kill, out, began):
    """The condition to wait for: in turn at once, during a save, two steps later, during a save."""
    if kill % 4 == 0:
        return lambda: True
    if kill % 4 == 2:
        newest = newest_complete(out)
        steps = step_number(newest) if newest else 0
        return lambda: lines_logged(out) >= steps + 2   # so few that 25 kills come before step 60
    return lambda: saving(out, began)


def kill_once(kill, out, connected, rng):
    """
    Start or resume the run, wait for the moment, and kill one rank or all. If one dies, the others end by
    themselves. Before they have connected, only torchrun would notice a death; then all are killed.
    """
    resume = ["--resume"] if newest_complete(out) else []
    began = time.time()
    started = start([*SMALL, *CHAOS, "--out", out, *resume], 2, partial(touch_after_setup, connected))
    reached: Callable[[], bool] = moment_to_kill(kill, out, began)
    while started.ranks[0].is_alive() and not reached():
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 1.0 if kill % 4 == 0 else 0.05))
    victims = started.ranks
    if rng.random() < 0.5 and len(list(connected.parent.glob(f"{connected.name}_*"))) == 2:
        victims = [started.ranks[rng.integers(2)]]
    for process in victims:
        process.kill()
    for process in started.ranks:
        process.join(30)
        assert process.exitcode, "it ended before it was killed, or it waits for a dead rank"
    shutil.rmtree(started.printed)


def test_after_25_kills_at_random_moments_the_weights_are_those_of_an_undisturbed_run(runs):
    rng = np.random.default_rng(0)
    out = runs / "chaos"
    succeeds(*CHAOS, "--out", runs / "calm", ranks=2)
    began = time.monotonic()
    killed_in_save = 0
    for kill in range(KILLS):
        before = newest_complete(out)
        kill_once(kill, out, runs / f"connected_{kill}", rng)
        after = newest_complete(out)
        assert not before or step_number(after) >= step_number(before), "a complete checkpoint was lost"
        killed_in_save += bool(list(out.glob("partial_*")))
    seconds = time.monotonic() - began
    print(f"\n    {KILLS} kills in {seconds:.0f} s, {killed_in_save} of them in a save", end="")
    print(f"; the last resume begins at {after.name}", end="")
    assert killed_in_save >= 8
    succeeds(*CHAOS, "--resume", "--out", out, ranks=2)
    difference = largest_difference(weights(runs / "calm"), weights(out))
    measured("weights after the kills against the calm run's", difference, 0.0)
    assert steps_logged(out) == list(range(1, STEPS + 1)) and not list(out.glob("partial_*"))
