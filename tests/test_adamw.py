"""AdamW on 16 + 16 bits: nothing of a small update is lost, alone, split among ranks, and over a checkpoint."""
from functools import partial

import torch
from safetensors.torch import load_file

import train
from conftest import measured
from kernels.adamw import SplitAdamW, join, reference, split
from launch import finished, start


def test_a_master_weight_survives_being_split_and_its_high_half_is_the_nearest_bf16():
    master = torch.cat([torch.randn(100_000) * scale for scale in (1e-30, 1e-3, 1.0, 1e30)])
    high, low = split(master)
    assert torch.equal(join(high, low), master)
    assert ((high.float() - master).abs() <= (master.bfloat16().float() - master).abs()).all()


def test_the_reference_is_torchs_adamw():
    w, g = torch.randn(50, dtype=torch.float64), torch.randn(3, 50, dtype=torch.float64)
    theirs, ours, m, v = torch.nn.Parameter(w.clone()), w, torch.zeros_like(w), torch.zeros_like(w)
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for n in range(3):
        theirs.grad = g[n].clone()
        optimizer.step()
        ours, m, v = reference(ours, g[n], m, v, n + 1, 1e-2, (0.9, 0.95), 1e-8)
    measured("weights against torch.optim.AdamW, fp64", (ours - theirs).abs().max(), 1e-12)


def test_updates_of_reinforcement_learning_size_are_not_lost_where_bf16_loses_them():
    start_, generator = (torch.randn(300, 300, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16(), torch.Generator().manual_seed(1)
    ours, exact, plain = (torch.nn.Parameter(start_.to(dtype, copy=True)) for dtype in (torch.bfloat16, torch.float64, torch.bfloat16))
    how = dict(lr=5e-7, betas=(0.9, 0.95))
    optimizers = [SplitAdamW([ours], **how), *(torch.optim.AdamW([p], weight_decay=0.0, **how) for p in (exact, plain))]
    for _ in range(100):
        gradient = (torch.randn(300, 300, generator=generator) * 1e-3 + 5e-4).bfloat16()
        for p, optimizer in zip((ours, exact, plain), optimizers):
            p.grad = gradient.to(p.dtype)
            optimizer.step()
    went = exact.detach() - start_
    error = [((p - start_.double() - went).norm() / went.norm()).item() for p in (join(ours.detach(), optimizers[0].state[ours]["low"]).double(), plain.detach().double())]
    print(f"\n    of the way of 100 updates at 5e-7, bf16 weights miss {error[1]:.1%}", end="")
    assert error[1] > 0.9
    measured("what 16 + 16 bits miss", error[0], 5e-3)


def test_it_trains_on_two_ranks_as_on_one_and_resumes_to_the_bit(tmp_path, warm):
    train.shutil.copytree(warm, tmp_path / "warm")

    def run(name, *args, ranks=1):
        done = finished(start(["--warm-steps", "40", "--seed", "5", "--games", "12", "--max-new-tokens", "24", "--optim", "split", "--steps", "4", "--save-every", "2", "--no-exam",
                               "--out", tmp_path / name, *args], ranks))
        assert done.returncode == 0, done.stderr[-3000:]

    def weights(name):
        return load_file(tmp_path / name / "step_000004" / "model.safetensors")
    run("one")
    run("two", ranks=2)
    train.shutil.rmtree(tmp_path / "one" / "step_000004")
    before = tmp_path / "one" / "step_000002"
    train.shutil.copytree(tmp_path / "one", tmp_path / "again")
    for name in ("one", "again"):
        run(name, "--resume")
    run_whole = partial(run, "whole")
    run_whole()
    one, again, whole, two = weights("one"), weights("again"), weights("whole"), weights("two")
    assert before.exists() and all(torch.equal(one[key], whole[key]) and torch.equal(one[key], again[key]) for key in one)
    moved = torch.cat([(one[key] - load_file(warm / "step_000000" / "model.safetensors")[key].bfloat16()).flatten().abs() for key in one]).float().mean()
    measured("mean difference of bf16 weights, 2 processes against 1, over the mean way", torch.cat([(one[k] - two[k]).flatten().abs() for k in one]).float().mean() / moved, 0.01)
