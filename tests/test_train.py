"""The update, the launch, checkpoints and bad input. Distributed behaviour is tested with real processes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import measured
from model import score
from sample import sample, uniforms
from selfplay import ATTACKER, DEFENDER, Play, Reply, Turn, pack
from train import Config, Ranks, micro_batches, pack_plays, policy_loss, schedule, seed_pools, step_line, update

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", "3", "--games", "8", "--warm-steps", "40", "--seed", "5"]
ALONE = Ranks(0, 1, torch.device("cpu"))


def run(*args, ranks=0, cwd=ROOT):
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0", "--standalone"] if ranks else []
    return subprocess.run([sys.executable, *launch, str(ROOT / "train.py"), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=500,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def succeeds(*args, **how):
    done = run(*args, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one short default run in it; later runs of the same seed share its warm start."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "printed").write_text(succeeds(*SMALL, "--out", folder / "one"))
    return folder


def weights(run_folder):
    return load_file(run_folder / (run_folder / "latest").read_text() / "model.safetensors")


def metrics(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a, b):
    return max((a[key] - b[key]).abs().max() for key in a)


# ---------------------------------------------------------------- the loss

def test_the_gradient_of_the_policy_loss_at_ratio_1_is_minus_advantage_over_tokens():
    logprob_BT = torch.randn(3, 5, requires_grad=True)
    advantage_BT, mask_BT = torch.randn(3, 5), torch.rand(3, 5) < 0.6
    policy_loss(logprob_BT, logprob_BT.detach(), advantage_BT, mask_BT, n_tokens=7, clip=0.2).backward()
    measured("gradient against -A/n", (logprob_BT.grad + advantage_BT * mask_BT / 7).abs().max(), 1e-7)


@pytest.mark.parametrize("ratio, advantage, slope", [(1.5, 1.0, 0.0), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.0), (1.1, 1.0, -1.1)])
def test_a_ratio_beyond_the_clip_has_no_gradient_if_moving_on_would_gain(ratio, advantage, slope):
    logprob_BT = torch.tensor([[np.log(ratio)]], requires_grad=True)
    policy_loss(logprob_BT, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1, dtype=torch.bool), 1, 0.2).backward()
    measured("gradient", abs(logprob_BT.grad.item() - slope), 1e-6)


def some_plays(tiny, n=10):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 160, size=rng.integers(2, 9)).tolist() for _ in range(n)]
    replies = sample(tiny, prompts, uniforms(0, 0, range(n), 0, 9), [1, 2, 3, 4, 5, 6])
    turns = [Turn(ATTACKER if i % 3 else DEFENDER, p, r.ids, r.logprobs, Reply("", "", "x", True)) for i, (p, r) in enumerate(zip(prompts, replies))]
    plays = [Play(i, turn, 1.0, 1.0) for i, turn in enumerate(turns)]
    return plays, [rng.normal(size=len(p.turn.ids)) for p in plays]


class Still(torch.optim.SGD):
    """An optimizer that keeps the gradients and moves nothing."""

    def step(self):
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def gradients(tiny, plays, advantage, demos=(), **changed):
    optimizer = Still(tiny.parameters(), lr=0.0)
    sums = update(tiny, optimizer, plays, [np.array(p.turn.logprobs) for p in plays], advantage, list(demos), Config(**changed), ALONE)
    return optimizer.kept, sums


def test_the_split_into_micro_batches_changes_nothing(tiny):
    plays, advantage = some_plays(tiny)
    whole, sums_whole = gradients(tiny, plays, advantage)
    split, sums_split = gradients(tiny, plays, advantage, micro_tokens=20)
    assert len(sums_split) > len(sums_whole)
    measured("gradient, one batch against many", max((a - b).abs().max() for a, b in zip(whole, split)), 1e-6)


def test_the_first_update_has_ratio_1_and_the_sampler_agrees_with_the_trainer(tiny):
    plays, advantage = some_plays(tiny)
    _, sums = gradients(tiny, plays, advantage)
    assert max(s.get("ratio_max", 0) for s in sums) == 1.0
    n = sum(len(p.turn.ids) for p in plays)
    measured("mean |sampler - trainer log-probability|", sum(s.get("mismatch", 0) for s in sums) / n, 1e-5)


def test_the_supervised_term_is_cross_entropy_and_adds_its_own_gradient(tiny):
    plays, advantage = some_plays(tiny, 4)
    demos = [([5, 6], [7, 8, 9]), ([5], [10])]
    _, sums = gradients(tiny, plays, [0 * a for a in advantage], demos)
    ids_BT, mask_BT = pack(*zip(*demos))
    expected = -score(tiny, ids_BT, mask_BT)[0].sum() / 4
    measured("supervised loss", abs(sum(s.get("loss_sft", 0) for s in sums) - expected), 1e-6)
    assert sums[-1]["grad_norm"] > 0


def test_an_empty_micro_batch_weighs_nothing(tiny):
    ids_BT, mask_BT, advantage_BT = pack_plays([], [], [[]], torch.device("cpu"))
    logprob_BT, _ = score(tiny, ids_BT, mask_BT)
    assert policy_loss(logprob_BT, logprob_BT.detach(), advantage_BT, mask_BT, 1, 0.2).item() == 0.0


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_row_lands_on_exactly_one_rank_and_all_ranks_make_equally_many_passes(world):
    for n in range(0, 12):
        lengths = np.random.default_rng(n).integers(1, 30, size=n).tolist()
        parts = [micro_batches(lengths, Ranks(r, world, torch.device("cpu")), 40) for r in range(world)]
        assert sorted(i for part in parts for batch in part for i in batch) == list(range(n))
        assert len({len(part) for part in parts}) == 1
        assert all(len(b) * max(lengths[i] for i in b) <= 40 for part in parts for b in part if b)


def test_the_step_size_warms_up_and_ends_at_a_tenth():
    rate = schedule(Config(steps=200))
    assert rate(0) < rate(5) == 1.0 and rate(100) < rate(50)
    measured("last step size over the peak - 0.1", abs(rate(200) - 0.1), 1e-3)


def test_the_line_of_a_step_fits_120_columns():
    line = dict(asr=1.0, over_refusal=1.0, benign_answered=1.0, forfeit=1.0, reward_attacker=-4.0, kl=0.123, seconds=123.4)
    assert len(step_line(1000, 1000, line)) <= 120 and "--" in step_line(1, 2, line | {"asr": None})


# ---------------------------------------------------------------- modes are choices of seeds

def test_the_modes_of_play_choose_the_seeds(tmp_path):
    assert [all(s.revise for s in pool) for pool in seed_pools(Config())[0]] == [True, False, True, False]
    assert not any(s.revise for pool in seed_pools(Config(play="defender"))[0] for s in pool)
    (tmp_path / "games.jsonl").write_text('{"attack": "tell a story", "harmful": true}\n{"attack": null, "harmful": false}\n')
    pools = seed_pools(Config(play="defender", attacks=str(tmp_path / "games.jsonl")))[0]
    assert [s.text for s in pools[0]] == ["tell a story"] and len(pools[1]) > 100 and len(pools[2]) > 100


# ---------------------------------------------------------------- launch

def test_two_processes_end_with_the_weights_and_metrics_of_one(runs):
    succeeds(*SMALL, "--out", runs / "two", ranks=2)
    measured("weights, 2 processes against 1", largest_difference(weights(runs / "one"), weights(runs / "two")), 1e-5)
    for one, two in zip(metrics(runs / "one"), metrics(runs / "two"), strict=True):
        for key in one.keys() - {"seconds", "sample_tokens_per_s", "train_tokens_per_s"}:
            assert one[key] == two[key] or one[key] == pytest.approx(two[key], abs=1e-4), key
    games = [[json.loads(line) for line in (runs / name / "games.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert games[0] == games[1]


def test_nothing_hangs_when_a_rank_has_no_game_to_learn_from(runs):
    """Four games on four ranks: two of them have a raw seed, and no attacker turn."""
    succeeds("--games", "4", "--steps", "1", "--warm-steps", "40", "--seed", "5", "--play", "attacker", "--out", runs / "four", ranks=4)
    assert metrics(runs / "four")[0]["reward_defender"] is None


def test_two_steps_and_two_resumed_equal_four_bit_for_bit(runs):
    args = ["--games", "8", "--warm-steps", "40", "--seed", "5", "--steps", "4", "--save-every", "2"]
    succeeds(*args, "--out", runs / "whole")
    subprocess.run(["cp", "-r", runs / "whole", runs / "resumed"], check=True)
    (runs / "resumed" / "latest").write_text("step_000002")
    subprocess.run(["rm", "-r", runs / "resumed" / "step_000004"], check=True)
    succeeds(*args, "--out", runs / "resumed", "--resume")
    measured("weights, resumed against undisturbed", largest_difference(weights(runs / "whole"), weights(runs / "resumed")), 0.0)
    assert [m["step"] for m in metrics(runs / "resumed")] == [1, 2, 3, 4]


@pytest.mark.parametrize("flags, check", [
    (["--reward", "paper"], lambda m: all(line["reward_attacker"] >= -2.0 for line in m)),   # the zero-sum table takes 4 for a forfeit
    (["--no-cot"], lambda m: all(line["format_defender"] == 1.0 for line in m)),             # nothing to get wrong
    (["--play", "attacker"], lambda m: all(line["reward_defender"] is None for line in m)),
    (["--play", "defender"], lambda m: all(line["reward_attacker"] is None for line in m)),
    (["--updates", "3"], lambda m: all(line["ratio_max"] > 1 for line in m))], ids=lambda f: " ".join(f) if isinstance(f, list) else "")
def test_every_variant_runs_and_differs_where_it_should(flags, check, runs):
    out = runs / "-".join(f.strip("-") for f in flags)
    succeeds(*SMALL, *flags, "--out", out)
    assert check(metrics(out)), metrics(out)


def test_a_recorded_pool_takes_the_place_of_the_attacker(runs):
    succeeds(*SMALL, "--play", "defender", "--attacks", runs / "one" / "games.jsonl", "--out", runs / "pool")
    games = [json.loads(line) for line in (runs / "pool" / "games.jsonl").read_text().splitlines()]
    recorded = {json.loads(line)["attack"] for line in (runs / "one" / "games.jsonl").read_text().splitlines()}
    assert sum(g["seed"] in recorded for g in games) >= 6 and not any(g["attack"] for g in games)


def test_a_run_shows_its_configuration_games_tables_and_curves(runs):
    printed = (runs / "printed").read_text()
    for words in ("lr              0.0002", "toy world", "command line", "step    3/3", "verdict", "against its own attacker", "| attack success (down) |", "curves.png"):
        assert words in printed, words
    assert (runs / "one" / "curves.png").exists() and all(line["zero_sum_gap"] == 0 for line in metrics(runs / "one"))


def test_a_runs_checkpoint_is_a_model_like_any_other(runs):
    succeeds("--model", runs / "one", "--steps", "1", "--games", "4", "--out", runs / "again")
    measured("start against the checkpoint it came from", largest_difference(load_file(runs / "again" / "step_000000" / "model.safetensors"), weights(runs / "one")), 0.0)


# ---------------------------------------------------------------- bad input

@pytest.fixture
def bad(tmp_path):
    """A folder of mistakes."""
    (tmp_path / "empty_harmful.jsonl").write_text("")
    (tmp_path / "torn_harmful.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "columns_harmful.jsonl").write_text('{"colour": "red"}\n')
    (tmp_path / "nameless.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "only_harmful.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights" / "config.json").write_text("{}")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("do not touch")
    (tmp_path / "file").write_text("not a folder")
    return tmp_path


@pytest.mark.parametrize("args, words", [
    ("--stepz 3", "--stepz"), ("--reward double", "--reward"), ("--steps x", "--steps"), ("--judge keywords --model M --seeds {bad}/none.jsonl", "no such file"),
    ("--seeds {bad}/empty_harmful.jsonl", "holds no prompts"), ("--seeds {bad}/torn_harmful.jsonl", "torn_harmful.jsonl, line 2"),
    ("--seeds {bad}/columns_harmful.jsonl", "line 1: none of the columns"), ("--seeds {bad}/nameless.jsonl", "harmful or benign?"),
    ("--seeds {bad}/only_harmful.jsonl", "no benign seed"), ("--judge keywords --model M", "needs seeds"), ("--model {bad}/no_weights", "safetensors"),
    ("--model {bad}/nowhere", "no such folder"), ("--out {bad}/file/run", "cannot be written"), ("--games 6", "multiple of 4"), ("--steps 0", "greater than 0"),
    ("--attacks x.jsonl", "--play defender"), ("--sft {bad}/only_harmful.jsonl", "prompt and response"), ("--out {bad}/taken", "will not be overwritten"),
    ("--out {bad}/taken --resume", "no complete checkpoint"), ("--judge oracle --model M --seeds {bad}/x", "oracle")])
def test_bad_input_gets_one_sentence_and_exit_status_2_before_any_work(args, words, bad, monkeypatch, capsys):
    before = sorted(bad.rglob("*"))
    out = [] if "--out" in args else ["--out", str(bad / "new")]
    monkeypatch.setattr(sys, "argv", ["train.py", *args.format(bad=bad).split(), *out])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and words in printed.err and len(printed.err.strip().splitlines()) == 1 and not printed.out, printed
    assert sorted(bad.rglob("*")) == before and (bad / "taken" / "precious").read_text() == "do not touch"


def test_a_run_that_was_stopped_in_its_warm_start_can_be_started_again(runs):
    out = runs / "stopped"
    (out / "step_000000").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "step_000000" / "model.safetensors").write_text("half")
    succeeds("--steps", "1", "--games", "4", "--warm-steps", "40", "--seed", "5", "--out", out)
    assert (out / "latest").read_text() == "step_000001"


def test_a_run_folder_is_never_overwritten(runs):
    before = {path: path.stat().st_mtime_ns for path in (runs / "one").rglob("*")}
    done = run(*SMALL, "--out", runs / "one")
    assert done.returncode == 2 and "will not be overwritten" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in (runs / "one").rglob("*")} == before


def test_games_that_cannot_be_divided_among_the_ranks_are_refused(bad):
    done = run("--games", "4", "--out", bad / "new", ranks=3)
    assert done.returncode != 0 and "cannot be divided among 3 ranks" in done.stderr and not (bad / "new").exists()
