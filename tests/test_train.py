"""The update, the launch, checkpoints and bad input. Distributed behaviour is tested with real processes."""
import ctypes
import json
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

import train
from conftest import byte_tokenizer, measured
from kernels import attention
from launch import finished, start
from model import Cache, load, new_model, save, score
from sample import sample, uniforms
from selfplay import ATTACKER, DEFENDER, Experience, Reply, Turn, pack
from train import Config, Ranks, micro_batches, pack_experiences, policy_loss, schedule, seed_pools, step_line, update

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", "3", "--games", "8", "--sft-steps", "40", "--seed", "5"]
ALONE = Ranks(0, 1, torch.device("cpu"))


def run(*args, ranks=1, exam=False, instead=None):
    return finished(start([*args, *["--no-exam"] * (not exam)], ranks, instead=instead))


def succeeds(*args, **how):
    done = run(*args, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_run):
    """A folder with a warm start and one short default run in it; later runs of the same seed share its warm start."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(sft_run, folder / "warm")
    (folder / "printed").write_text(succeeds(*SMALL, "--out", folder / "one", exam=True))
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
    experiences = [Experience(i, turn, 1.0, 1.0) for i, turn in enumerate(turns)]
    return experiences, [rng.normal(size=len(p.turn.ids)) for p in experiences]


class Still(torch.optim.SGD):
    """An optimizer that keeps the gradients and moves nothing."""

    def step(self):
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def gradients(tiny, experiences, advantage, demos=(), **changed):
    optimizer = Still(tiny.parameters(), lr=0.0)
    sums = update(tiny, optimizer, experiences, [np.array(p.turn.logprobs) for p in experiences], advantage, list(demos), Config(**changed), ALONE)
    return optimizer.kept, sums


def test_the_split_into_micro_batches_changes_nothing(tiny):
    experiences, advantage = some_plays(tiny)
    whole, sums_whole = gradients(tiny, experiences, advantage)
    split, sums_split = gradients(tiny, experiences, advantage, micro_tokens=20)
    assert len(sums_split) > len(sums_whole)
    measured("gradient, one batch against many", max((a - b).abs().max() for a, b in zip(whole, split)), 1e-6)


def test_the_first_update_has_ratio_1_and_the_sampler_agrees_with_the_trainer(tiny):
    experiences, advantage = some_plays(tiny)
    _, sums = gradients(tiny, experiences, advantage)
    assert max(s.get("ratio_max", 0) for s in sums) == 1.0
    n = sum(len(p.turn.ids) for p in experiences)
    measured("mean |sampler - trainer log-probability|", sum(s.get("mismatch", 0) for s in sums) / n, 1e-5)


def test_the_supervised_term_is_cross_entropy_and_adds_its_own_gradient(tiny):
    experiences, advantage = some_plays(tiny, 4)
    demos = [([5, 6], [7, 8, 9]), ([5], [10])]
    _, sums = gradients(tiny, experiences, [0 * a for a in advantage], demos)
    ids_BT, mask_BT = pack(*zip(*demos))
    expected = -score(tiny, ids_BT, mask_BT)[0].sum() / 4
    measured("supervised loss", abs(sum(s.get("loss_sft", 0) for s in sums) - expected), 1e-6)
    assert sums[-1]["grad_norm"] > 0


def test_an_empty_micro_batch_weighs_nothing(tiny):
    ids_BT, mask_BT, advantage_BT = pack_experiences([], [], [[]], torch.device("cpu"))
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


@pytest.mark.parametrize("play", ["attacker", "defender"])
def test_four_processes_of_which_some_have_no_game_or_no_attacker_end_with_the_weights_of_one(play, runs):
    """Four games on four ranks: two have a raw seed, which attacker-only play has no use for."""
    args = ["--games", "4", "--steps", "4", "--sft-steps", "40", "--seed", "5", "--kl", "0", "--play", play]   # AdamW would blow up the KL's rounding
    for ranks in (1, 4):
        succeeds(*args, "--out", runs / f"{play}{ranks}", ranks=ranks)
    assert largest_difference(weights(runs / f"{play}1"), load_file(runs / "warm" / "step_000000" / "model.safetensors")) > 1e-4
    measured(f"weights, {play}, 4 processes against 1", largest_difference(weights(runs / f"{play}1"), weights(runs / f"{play}4")), 1e-5)
    assert all((m["reward_defender"] is None) == (play == "attacker") for m in metrics(runs / f"{play}4"))


def test_two_launchers_of_two_processes_each_end_with_the_weights_of_one_process(runs):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meet = f"--rdzv_endpoint=localhost:{probe.getsockname()[1]}"
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", meet, "--rdzv_id=7", ROOT / "train.py"]
    nodes = [subprocess.Popen([*line, *SMALL, "--no-exam", "--out", runs / "nodes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    measured("weights, 2 launchers of 2 processes against 1 process", largest_difference(weights(runs / "one"), weights(runs / "nodes")), 1e-5)


def draw_roles(config, to, number):
    """A hundred steps of random experiences on a tiny model, of which each rank experiences its share: often nothing, often one role alone."""
    ranks = train.setup(Config(precision="fp32"))
    policy = train.shard(new_model(config, 0), ranks)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    for step in range(100):
        rng = np.random.default_rng(step)
        n = int(rng.integers(0, 7))
        prompts = [rng.integers(1, 160, size=rng.integers(2, 9)).tolist() for _ in range(n)]
        mine = list(range(n))[ranks.rank::ranks.world]
        with train.gathered(policy):
            replies = sample(policy, [prompts[i] for i in mine], uniforms(0, step, mine, 0, 6), [1, 2, 3, 4, 5, 6]) if mine else []
        replies = dict(train.gather_list(list(zip(mine, replies)), ranks))
        turns = [Turn(ATTACKER if rng.random() < step / 100 else DEFENDER, prompts[i], replies[i].ids, replies[i].logprobs, Reply("", "", "x", True)) for i in range(n)]
        experiences = [Experience(i, turn, 1.0, 1.0) for i, turn in enumerate(turns)]
        old = train.rescore(policy, experiences, Config(micro_tokens=30), ranks)
        update(policy, optimizer, experiences, old, [rng.normal(size=len(t.ids)) for t in turns], [], Config(micro_tokens=30, updates=2), ranks)
    torch.save({name: getattr(p, "full_tensor", lambda: p)().detach() for name, p in policy.named_parameters()}, f"{to}_{number}")


def test_a_hundred_random_mixes_of_roles_neither_hang_nor_change_the_weights(tmp_path, tiny):
    for world in (1, 3):
        succeeds(ranks=world, instead=partial(draw_roles, tiny.hf_config, tmp_path / f"of{world}"))
    one, three = torch.load(tmp_path / "of1_0"), torch.load(tmp_path / "of3_2")
    measured("weights, 3 processes against 1, after 100 random steps", largest_difference(one, three), 1e-5)


def test_two_steps_and_two_resumed_equal_four_bit_for_bit(runs):
    args = ["--games", "8", "--sft-steps", "40", "--seed", "5", "--steps", "4", "--save-every", "2"]
    succeeds(*args, "--out", runs / "whole")
    shutil.copytree(runs / "whole", runs / "resumed")
    shutil.rmtree(runs / "resumed" / "step_000004")
    succeeds("--out", runs / "resumed", "--resume")
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


# ---------------------------------------------------------------- real models: a judge model in the loop, and memory

@pytest.fixture(scope="module")
def real(tmp_path_factory, judge_stand_in):
    """Folders as researchers have them: a policy and a judge of different shapes and with tokenizers of their own, and two files of seeds."""
    folder, tokenizer = tmp_path_factory.mktemp("real"), byte_tokenizer()
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                         max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id)
    for name, model, speaker in (("policy", new_model(config, 0), tokenizer), ("judge", judge_stand_in.model, judge_stand_in.tokenizer)):
        save(folder / name, model.state_dict(), model, speaker)
    for kind in ("harmful", "benign"):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps({"prompt": f"may i ask {i} times"}) + "\n" for i in range(6)))
    return folder


def real_run(real, out, *args, **how):
    return run("--model", real / "policy", "--judge", f"wildguard:{real / 'judge'}", "--seeds", real / "harmful.jsonl", real / "benign.jsonl", "--games", "8",
               "--max-new-tokens", "12", "--no-cot", "--out", real / out, *args, **how)


def test_a_judge_model_plays_along_and_its_unreadable_verdicts_are_counted(real):
    done = real_run(real, "one", "--steps", "3", "--max-unreadable", "1", "--recompute")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "6 harmful and 0 benign prompts from column prompt, 0 duplicates dropped" in done.stdout
    games = [json.loads(line) for line in (real / "one" / "games.jsonl").read_text().splitlines()]
    unreadable = [m["unreadable"] for m in metrics(real / "one")]
    assert len(unreadable) == 3 and sum(unreadable) * 8 == pytest.approx(sum(not g["verdict"]["readable"] for g in games))
    print(f"\n    unreadable, a step: {unreadable}", end="")


def test_a_judge_model_on_two_processes_gives_the_verdicts_it_gives_on_one(real):
    done = real_run(real, "two", "--steps", "3", "--max-unreadable", "1", "--recompute", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    games = [[json.loads(line) for line in (real / name / "games.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert [g["verdict"] | {"harm_probability": None} for g in games[0]] == [g["verdict"] | {"harm_probability": None} for g in games[1]]
    measured("weights, 2 processes against 1", largest_difference(weights(real / "one"), weights(real / "two")), 1e-5)


def test_a_judge_that_cannot_be_read_stops_the_run_in_one_sentence(real):
    done = run("--model", real / "policy", "--judge", f"wildguard:{real / 'policy'}", "--seeds", real / "harmful.jsonl", real / "benign.jsonl", "--games", "8",
               "--max-new-tokens", "12", "--no-cot", "--steps", "3", "--out", real / "junk")
    assert done.returncode == 2 and "cannot be read, more than --max-unreadable 0.2" in done.stderr and "Traceback" not in done.stderr
    assert load(str(real / "junk")) is not None, "the start is intact"


def test_a_trained_folder_opens_in_transformers_and_answers(real):
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(real / "one" / "step_000003"), AutoTokenizer.from_pretrained(real / "one" / "step_000003")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert theirs.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("play", ["self", "defender"])
def test_a_reply_that_the_context_cannot_hold_is_refused_with_the_longest_that_it_can(play, real, capsys):
    """Of two turns: the attacker's prompt and its reply, and the defender's, which holds that reply, and its own."""
    given, chat = load(str(real / "policy")), train.ChatFormat(train.open_tokenizer(str(real / "policy")), train.ENGLISH, cot=False)
    cfg = Config(play=play, judge="keywords", seeds=[str(real / "harmful.jsonl"), str(real / "benign.jsonl")], max_new_tokens=500)
    pools = seed_pools(cfg)[0]
    with pytest.raises(SystemExit):
        train.check_lengths(cfg, pools, chat, given)
    most = int(capsys.readouterr().err.split("choose at most ")[1].rstrip(".\n"))
    train.check_lengths(train.dataclasses.replace(cfg, max_new_tokens=most), pools, chat, given)
    with pytest.raises(SystemExit):
        train.check_lengths(train.dataclasses.replace(cfg, max_new_tokens=most + 1), pools, chat, given)
    seeds, attacked = [seed for pool in pools for seed in pool], (512 - len(chat.defender_prompt(""))) // 2
    raw, rewritten = (512 - max(len(ids) for ids in prompts) for prompts in ([chat.defender_prompt(s.text) for s in seeds], [chat.attacker_prompt(s) for s in seeds]))
    assert most == (min(attacked, rewritten) if play == "self" else raw)


@pytest.mark.parametrize("config", [LlamaConfig(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=3, vocab_size=64),
                                    Qwen3Config(hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=64, num_hidden_layers=3, vocab_size=64)],
                         ids=lambda c: c.model_type)
@pytest.mark.parametrize("recompute", [True, False])
def test_the_plan_of_activations_is_what_a_forward_pass_keeps(config, recompute, monkeypatch):
    monkeypatch.setattr(attention, "precision", lambda dtype, device: dtype)   # as on a GPU, for which the plan is
    model, kept = new_model(config, 0).to(torch.bfloat16), {}
    model.recompute, own = recompute, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor   # holding it, so that its address is not used again
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(8, 256, dtype=torch.long), lambda hidden_BTD, weight_VD: hidden_BTD)
    bytes_per_token = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2048
    planned = train.activation_bytes(model.config, recompute) - train.layer_bytes(model.config) * recompute   # the one layer comes in the backward pass
    measured(f"kept {bytes_per_token:.0f}, planned {planned} bytes a token; relative difference", abs(bytes_per_token / planned - 1), 0.1)


def test_the_plan_counts_weights_moments_and_cache_to_the_byte():
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=50)
    model = new_model(config, 0)
    optimizer = torch.optim.AdamW(model.parameters())
    score(model, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))[0].sum().backward()
    optimizer.step()
    plan = train.memory_plan(Config(), config, None, 1)
    assert plan["always"]["policy, fp32 master weights"] == sum(p.nbytes for p in model.parameters()) == plan["backward pass"]["gradients, fp32"]
    assert plan["always"]["Adam moments, fp32"] == sum(s[key].nbytes for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    with torch.device("meta"):
        cache = Cache(model.config, 1, train.CACHE_SLOTS + 4 * train.AHEAD, torch.zeros(1, dtype=torch.long), torch.bfloat16)
    assert plan["play"]["cache of keys and values"] == cache.key_LBKSE.nbytes + cache.value_LBKSE.nbytes


def status(key):
    """A line of /proc/self/status, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def grow(config, cfg, number):
    """Print the resident memory that an update takes at its peak, without what the process takes after an update of a tiny model."""
    ranks, rng = train.setup(cfg), np.random.default_rng(0)
    ctypes.CDLL(None).mallopt(-3, 2 ** 16)   # what is freed goes back to the system, which a run would not do
    for size in (LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2), config):
        before = status("VmRSS")
        policy = train.shard(new_model(size, 0), ranks)
        reference = train.shard(new_model(size, 1).to(torch.bfloat16), ranks).requires_grad_(False)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        reply = [cfg.micro_tokens // 4 - 8] * 8   # two micro-batches of four rows
        turns = [Turn(ATTACKER, [1] * 8, rng.integers(0, 300, size=n).tolist(), [-1.0] * n, Reply("", "", "x", True)) for n in reply]
        experiences = [Experience(i, turn, 1.0, 1.0) for i, turn in enumerate(turns)]
        for _ in range(2):
            Path("/proc/self/clear_refs").write_text("5")   # forget the peak of building it all
            reference_logprob = train.rescore(reference, experiences, cfg, ranks)
            update(policy, optimizer, experiences, reference_logprob, [np.ones(n) for n in reply], [], cfg, ranks)
    print(status("VmHWM") - before)


@pytest.mark.parametrize("recompute, tokens, vocab, width, layers", [(False, 256, 4000, 512, 6), (True, 128, 16000, 768, 8)])
def test_the_plan_agrees_with_the_memory_that_an_update_takes(recompute, tokens, vocab, width, layers):
    config = LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4)
    cfg = Config(precision="bf16", recompute=recompute, micro_tokens=tokens)
    took = int(succeeds(instead=partial(grow, config, cfg)))
    plan = train.memory_plan(cfg, config, None, 1, "cpu")
    planned = sum(plan["always"].values()) + max(sum(plan[phase].values()) for phase in ("backward pass", "its end"))
    print(f"\n    {train.n_parameters(config) / 1e6:.0f}M parameters: {took / 2 ** 20:.0f} MiB taken, {planned / 2 ** 20:.0f} planned", end="")
    measured("relative difference", abs(took / planned - 1), 0.1)


def test_recomputed_activations_give_the_same_gradients(tiny):
    experiences, advantage = some_plays(tiny)
    kept, _ = gradients(tiny, experiences, advantage)
    tiny.recompute = True
    again, _ = gradients(tiny, experiences, advantage)
    tiny.recompute = False
    measured("gradients", max((a - b).abs().max() for a, b in zip(kept, again)), 1e-6)


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
    (out / "partial_000000").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "partial_000000" / "model.safetensors").write_text("tmp_dir")
    succeeds("--steps", "1", "--games", "4", "--sft-steps", "40", "--seed", "5", "--out", out)
    assert (out / "latest").read_text() == "step_000001"


def test_a_run_folder_is_never_overwritten(runs):
    before = {path: path.stat().st_mtime_ns for path in (runs / "one").rglob("*")}
    done = run(*SMALL, "--out", runs / "one")
    assert done.returncode == 2 and "will not be overwritten" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in (runs / "one").rglob("*")} == before


def test_games_that_cannot_be_divided_among_the_ranks_are_refused(bad):
    done = run("--games", "4", "--out", bad / "new", ranks=3)
    assert done.returncode != 0 and "cannot be divided among 3 ranks" in done.stderr and not (bad / "new").exists()
