"""
train.py: the loss, the update, whole runs on one and more processes, real models, the memory plan, bad input.

Runs are real processes (launch.py). Several ranks must end with the weights of one.
"""
import ctypes
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

import checkpoint
import eval
import model as model_file
import sample as sampling
import toy
import train
from conftest import byte_tokenizer, measured
from data import pack
from judge import keywords
from kernels import layers, layers_triton
from launch import (WITHOUT_GPUS, free_port, games, largest_difference, metrics, run, succeeds,
                    weights)
from model import Cache, load, new_model, save, score
from sample import open_tokenizer, sample, uniforms
from selfplay import ATTACKER, DEFENDER, ENGLISH, ChatFormat, Experience, Reply, Seed, Turn, play
from train import Config, Ranks, micro_batches, policy_loss, step_line, step_size

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", "3", "--games", "8", "--seed", "5", "--no-exam"]   # and --model, see runs
CPU = torch.device("cpu")
ONE_PROCESS = Ranks(0, 1, CPU)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_run):
    """A folder with one short default run, "one". All runs of this file begin with the model of "sft"."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(sft_run, folder / "sft")
    SMALL.extend(["--model", folder / "sft" / "step_000000"])
    flags = [flag for flag in SMALL if flag != "--no-exam"]
    (folder / "printed").write_text(succeeds(*flags, "--out", folder / "one").stdout)
    return folder


# ---------------------------------------------------------------- the loss

def test_the_gradient_of_the_policy_loss_at_ratio_1_is_minus_advantage_over_tokens():
    logprob_BT = torch.randn(3, 5, requires_grad=True)
    advantage_BT = torch.randn(3, 5)
    mask_BT = torch.rand(3, 5) < 0.6
    policy_loss(logprob_BT, logprob_BT.detach(), advantage_BT, mask_BT, n_tokens=7, clip=0.2).backward()
    measured("gradient against -A/n", (logprob_BT.grad + advantage_BT * mask_BT / 7).abs().max(), 1e-7)


@pytest.mark.parametrize("ratio, advantage, slope", [
    (1.5, 1.0, 0.0), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.0), (1.1, 1.0, -1.1)])
def test_a_ratio_beyond_the_clip_has_no_gradient_if_a_further_move_would_gain(ratio, advantage, slope):
    logprob_BT = torch.tensor([[np.log(ratio)]], requires_grad=True)
    old_BT, advantage_BT = torch.zeros(1, 1), torch.tensor([[advantage]])
    policy_loss(logprob_BT, old_BT, advantage_BT, torch.ones(1, 1, dtype=torch.bool), 1, 0.2).backward()
    measured("gradient", abs(logprob_BT.grad.item() - slope), 1e-6)


def test_the_step_size_warms_up_and_ends_at_a_tenth_of_its_peak():
    cfg = Config(steps=200, lr=1.0)
    assert step_size(cfg, 0) < step_size(cfg, 5) == 1.0 and step_size(cfg, 100) < step_size(cfg, 50)
    measured("last step size over the peak - 0.1", abs(step_size(cfg, 200) - 0.1), 1e-3)


def test_the_line_of_a_step_fits_120_columns():
    values = dict(asr=1.0, asr_raw=1.0, over_refusal=1.0, forfeit=1.0, new_attacks=1.0, depth=5.0, kl=0.123,
                  seconds=123.4)
    assert len(step_line(1000, 1000, values)) <= 120
    assert "attack won   --" in step_line(1, 2, values | {"asr": None})


# ---------------------------------------------------------------- the update

def make_turn(role, prompt, sampled):
    return Turn(role, prompt, sampled.ids, sampled.logprobs, Reply("", "", "x", True))


def some_experiences(model, n=10):
    """Turns that the model sampled, and random advantages of their tokens."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 100, size=rng.integers(2, 9)).tolist() for _ in range(n)]
    replies = sample(model, prompts, uniforms(0, 0, range(n), 0, 9), [1, 2, 3, 4, 5, 6])
    experiences = []
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        turn = make_turn(ATTACKER if i % 3 else DEFENDER, prompt, reply)
        experiences.append(Experience(turn, payoff=1.0, shaping=1.0, harmful=True))
    return experiences, [rng.normal(size=len(e.turn.ids)) for e in experiences]


class KeepGradients(torch.optim.SGD):
    """An optimizer that keeps the gradients and moves nothing."""

    def step(self):
        self.kept = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def gradients(model, experiences, advantage, pairs=(), **settings):
    """The gradients of an update with these settings, and its sums for the log."""
    optimizer = KeepGradients(model.parameters(), lr=0.0)
    old = [np.array(e.turn.logprobs) for e in experiences]
    cfg = Config(**settings)
    sums = train.update(model, optimizer, experiences, old, advantage, list(pairs), cfg, ONE_PROCESS)
    return optimizer.kept, sums


def largest(a, b):
    return max((x - y).abs().max() for x, y in zip(a, b, strict=True))


def test_the_split_into_micro_batches_changes_nothing(tiny):
    experiences, advantage = some_experiences(tiny)
    whole, sums_whole = gradients(tiny, experiences, advantage)
    split, sums_split = gradients(tiny, experiences, advantage, micro_tokens=20)
    assert len(sums_split) > len(sums_whole)
    measured("gradient, one batch against many", largest(whole, split), 1e-6)


def test_recomputed_activations_give_the_same_gradients(tiny):
    experiences, advantage = some_experiences(tiny)
    kept, _ = gradients(tiny, experiences, advantage)
    tiny.recompute = True
    recomputed, _ = gradients(tiny, experiences, advantage)
    tiny.recompute = False
    measured("gradients", largest(kept, recomputed), 1e-6)


def test_the_first_update_has_ratio_1_and_the_sampler_agrees_with_the_trainer(tiny):
    experiences, advantage = some_experiences(tiny)
    _, sums = gradients(tiny, experiences, advantage)
    assert max(part.get("ratio_max", 0) for part in sums) == 1.0
    mismatch = sum(part.get("mismatch", 0) for part in sums)
    measured("mean |sampler - trainer log-probability|", mismatch, 1e-5)


def test_importance_weights_are_ratios_of_at_most_2_where_sampler_and_trainer_differ():
    log_ratio = [0.0, 4e-3, -4e-3, 6e-3, -6e-3, 0.5, -3.0, 0.7, 5.0]
    expected = [1.0, 1.0, 1.0, *np.exp([6e-3, -6e-3, 0.5, -3.0]), 2.0, 2.0]
    weight_BT = train.importance_weight(torch.tensor([log_ratio]))
    measured("weights", (weight_BT - torch.tensor([expected])).abs().max(), 1e-6)


def test_where_the_sampler_drew_from_another_distribution_tokens_count_by_their_ratio(tiny):
    """The sampler says that it drew each token with 1/1.5 of the trainer's probability, then with a third."""
    experiences, advantage = some_experiences(tiny)
    advantage = [1e-3 * values_T for values_T in advantage]   # so small that no gradient is clipped
    alike, sums = gradients(tiny, experiences, advantage)
    assert sum(part.get("corrected", 0) for part in sums) == 0 and sums[-1]["grad_norm"] < 0.5
    for ratio, weight in ((1.5, 1.5), (3.0, 2.0)):
        said = [dataclasses.replace(e, turn=dataclasses.replace(
            e.turn, logprobs=[p - np.log(ratio) for p in e.turn.logprobs])) for e in experiences]
        corrected, sums = gradients(tiny, said, advantage)
        difference = largest(corrected, [weight * g for g in alike]) / max(g.abs().max() for g in alike)
        measured(f"gradient, ratio {ratio}", difference, 1e-4)
        assert sum(part.get("corrected", 0) for part in sums) == pytest.approx(1)


def test_the_supervised_term_is_cross_entropy_and_adds_its_own_gradient(tiny):
    experiences, advantage = some_experiences(tiny, 4)
    pairs = [([5, 6], [7, 8, 9]), ([5], [10])]
    _, sums = gradients(tiny, experiences, [0 * values_T for values_T in advantage], pairs)
    ids_BT, mask_BT = pack(*zip(*pairs, strict=True))
    expected = -score(tiny, ids_BT, mask_BT)[0].sum() / 4
    measured("supervised loss", abs(sum(part.get("loss_sft", 0) for part in sums) - expected), 1e-6)
    assert sums[-1]["grad_norm"] > 0


def gradients_of_each_role(model, experiences, advantage):
    """
    The gradients of an update in which the other role's advantages are 0, attacker first. No gradient is so
    large that it is clipped.
    """
    parts = []
    for role in (ATTACKER, DEFENDER):
        own = [1e-3 * a_T * (e.turn.role == role) for e, a_T in zip(experiences, advantage, strict=True)]
        parts.append(gradients(model, experiences, own)[0])
    return parts


@pytest.mark.parametrize("balance", [False, True])
def test_how_long_the_other_role_talks_changes_a_role_s_gradient_unless_they_are_balanced(balance, tiny):
    """The step once more, but with every answer of the defender four times as often, as if it talked more."""
    experiences, advantage = some_experiences(tiny)
    answers = [(e, a_T) for e, a_T in zip(experiences, advantage, strict=True) if e.turn.role == DEFENDER]
    more = experiences + 3 * [e for e, _ in answers], advantage + 3 * [a_T for _, a_T in answers]
    n_own, n_other = (sum(len(e.turn.ids) for e in experiences if e.turn.role == role)
                      for role in (ATTACKER, DEFENDER))
    steps = [(experiences, advantage), more]
    if balance:
        steps = [(es, train.balance_roles(a, es)) for es, a in steps]
    before, after = [gradients_of_each_role(tiny, *step) for step in steps]
    shrinks = 1.0 if balance else (n_own + n_other) / (n_own + 4 * n_other)
    largest_of = max(g.abs().max() for g in before[0])
    error = largest(after[0], [shrinks * g for g in before[0]]) / largest_of
    measured(f"attacker's gradient, {shrinks:.2f} times what it was; relative error", error, 1e-4)
    grows = 1.0 if balance else 4 * shrinks
    error = largest(after[1], [grows * g for g in before[1]]) / max(g.abs().max() for g in before[1])
    measured(f"defender's gradient, {grows:.2f} times what it was; relative error", error, 1e-4)


def test_balance_changes_nothing_where_one_role_plays(tiny):
    experiences, advantage = some_experiences(tiny)
    numbers = [n for n, e in enumerate(experiences) if e.turn.role == DEFENDER]
    alone = [experiences[n] for n in numbers], [advantage[n] for n in numbers]
    for a_T, balanced_T in zip(alone[1], train.balance_roles(alone[1], alone[0]), strict=True):
        assert np.array_equal(a_T, balanced_T)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_row_is_on_exactly_one_rank_and_all_ranks_make_equally_many_passes(world):
    for n in range(0, 12):
        lengths = np.random.default_rng(n).integers(1, 30, size=n).tolist()
        shares = [micro_batches(dict(enumerate(lengths)), Ranks(rank, world, CPU), 40)
                  for rank in range(world)]
        batches = [batch for share in shares for batch in share]
        assert sorted(row for batch in batches for row in batch) == list(range(n))
        assert len({len(share) for share in shares}) == 1
        for batch in filter(None, batches):
            assert len(batch) * max(lengths[row] for row in batch) <= 40


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_rank_with_most_to_do_does_at_most_115_percent_of_the_mean(world):
    """200 draws: 64 attacks of about 320 and 128 answers of about 570 tokens, and replies of any length."""
    rng = np.random.default_rng(0)
    worst, padding = 0.0, []
    for n in range(200):
        typical = np.concatenate([rng.normal(320, 90, 64), rng.normal(570, 180, 128)])
        drawn = typical if n % 2 else rng.lognormal(5.5, 0.8, 192)
        lengths = drawn.clip(20, 4000).astype(int).tolist()
        work = []
        for rank in range(world):
            batches = filter(None, micro_batches(dict(enumerate(lengths)), Ranks(rank, world, CPU), 16384))
            work.append(sum(len(batch) * max(lengths[row] for row in batch) for batch in batches))
        worst = max(worst, max(work) / np.mean(work))
        padding.append(sum(work) / sum(lengths))
    print(f"\n    {world} ranks: {np.mean(padding):.2f} slots for each token", end="")
    measured("most work of a rank over the mean", worst, 1.15)


def test_an_empty_micro_batch_weighs_nothing(tiny):
    """One row on two ranks: the second rank passes, too, because FSDP's passes are collectives."""
    row = (DEFENDER, [5, 6], [7, 8], [0.5, -0.5])
    (numbers, tensors), = train.packed_batches(tiny, [row], Config(), Ranks(1, 2, CPU))
    ids_BT, mask_BT, advantage_BT = tensors
    logprob_BT, _ = score(tiny, ids_BT, mask_BT)
    loss = policy_loss(logprob_BT, logprob_BT.detach(), advantage_BT, mask_BT, 1, 0.2)
    loss.backward()
    assert numbers == [] and loss.item() == 0.0
    assert not any(p.grad.any() for p in tiny.parameters())
    tiny.zero_grad()


def train_on_random_roles(config, file, rank):
    """
    A hundred updates of a tiny model on random turns: often none on a rank, often all of one role. Each rank
    samples its share of the turns.
    """
    ranks = train.setup(Config(precision="fp32"))
    policy = train.shard(new_model(config, 0), ranks)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    cfg = Config(micro_tokens=30, updates=2)
    for step in range(100):
        rng = np.random.default_rng(step)
        n = int(rng.integers(0, 7))
        prompts = [rng.integers(1, 100, size=rng.integers(2, 9)).tolist() for _ in range(n)]
        mine = list(range(n))[ranks.rank::ranks.world]
        replies = []
        with train.gathered(policy):
            if mine:
                uniform_NT = uniforms(0, step, mine, 0, 6)
                replies = sample(policy, [prompts[i] for i in mine], uniform_NT, [1, 2, 3, 4, 5, 6])
        replies = dict(train.gather_list(list(zip(mine, replies, strict=True)), ranks))
        roles = [ATTACKER if rng.random() < step / 100 else DEFENDER for _ in range(n)]
        turns = [make_turn(roles[i], prompts[i], replies[i]) for i in range(n)]
        experiences = [Experience(turn, 1.0, shaping=1.0, harmful=True) for turn in turns]
        old = train.rescore(policy, experiences, cfg, ranks)
        advantage = [rng.normal(size=len(turn.ids)) for turn in turns]
        train.update(policy, optimizer, experiences, old, advantage, [], cfg, ranks)
    whole = {name: p.full_tensor() if ranks.world > 1 else p for name, p in policy.named_parameters()}
    torch.save({name: p.detach() for name, p in whole.items()}, f"{file}_{rank}")


def test_a_hundred_random_mixes_of_roles_neither_hang_nor_change_the_weights(tmp_path, tiny):
    for world in (1, 3):
        succeeds(ranks=world, instead=partial(train_on_random_roles, tiny.hf_config, tmp_path / f"of{world}"))
    one, three = torch.load(tmp_path / "of1_0"), torch.load(tmp_path / "of3_2")
    difference = largest_difference(one, three)
    measured("weights, 3 processes against 1, after 100 random steps", difference, 1e-5)


# ---------------------------------------------------------------- modes of play

def revised(cfg):
    """Whether all seeds of each pool are for the attacker: harmful, harmful raw, benign, benign raw."""
    pools, _ = toy.read_seeds(cfg.seeds, cfg.attacks, cfg.play, cfg.opponent)
    return [all(seed.revise for seed in pool) for pool in pools]


def test_the_modes_of_play_choose_the_seeds(tmp_path):
    assert revised(Config()) == [True, False, True, False]
    assert revised(Config(play="defender")) == [False, False, False, False]
    attacks = tmp_path / "games.jsonl"
    game = {"step": 1, "game": 0, "seed": "s", "legal": True, "answer": "", "verdict": {}}
    pool = [game | {"attack": "tell a story", "harmful": True}, game | {"attack": None, "harmful": False}]
    attacks.write_text("\n".join(map(json.dumps, pool)))
    pools, _ = toy.read_seeds([], str(attacks), "defender", "")
    assert [seed.text for seed in pools[0]] == ["tell a story"]
    assert len(pools[1]) > 100 and len(pools[2]) > 100


@pytest.mark.parametrize("flags, check", [
    # the zero-sum table takes 4 for a forfeit
    (["--reward", "paper"], lambda line: line["reward_attacker"] >= -2.0),
    (["--play", "attacker"], lambda line: line["reward_defender"] is None),
    (["--play", "defender"], lambda line: line["reward_attacker"] is None),
    (["--updates", "3"], lambda line: line["ratio_max"] > 1),
    # whitened over all tokens of a role, the loss is 0
    (["--credit", "reinforce++"], lambda line: abs(line["loss"]) < 1e-5),
    # a judge of another world: it takes the seed's label for the attack's
    (["--judge", "keywords"], lambda line: line["drift"] in (None, 0.0)),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_every_variant_runs_and_differs_where_it_should(flags, check, runs):
    out = runs / "-".join(flag.strip("-") for flag in flags)
    succeeds(*SMALL, *flags, "--out", out)
    assert all(check(line) for line in metrics(out)), metrics(out)


def test_balance_changes_the_update_and_not_the_games_before_it(runs):
    succeeds(*SMALL, "--balance", "--steps", "1", "--out", runs / "balance")
    succeeds(*SMALL, "--no-balance", "--steps", "1", "--out", runs / "no-balance")
    usual, balanced = (metrics(runs / name)[0] for name in ("no-balance", "balance"))
    print(f"\n    gradient norm {usual['grad_norm']:.4f}, balanced {balanced['grad_norm']:.4f}", end="")
    assert abs(usual["grad_norm"] / balanced["grad_norm"] - 1) > 1e-3
    assert games(runs / "balance") == games(runs / "no-balance")
    succeeds(*SMALL, "--balance", "--steps", "1", "--out", runs / "balance-two", ranks=2)
    difference = largest_difference(weights(runs / "balance", 1), weights(runs / "balance-two", 1))
    measured("balanced weights, 2 processes against 1", difference, 1e-5)


def test_without_thoughts_a_reply_is_well_formed_if_it_says_something(runs):
    succeeds(*SMALL, "--no-cot", "--out", runs / "no-cot")
    played = games(runs / "no-cot")
    said = [bool(game["answer"]) for game in played]
    well_formed = [line["format_defender"] for line in metrics(runs / "no-cot")]
    assert any(said) and np.mean(well_formed) == pytest.approx(np.mean(said))


def test_recorded_attacks_replace_the_attacker(runs):
    succeeds(*SMALL, "--play", "defender", "--attacks", runs / "one" / "games.jsonl", "--out", runs / "pool")
    recorded = {game["attack"] for game in games(runs / "one")}
    played = games(runs / "pool")
    assert sum(game["seed"] in recorded for game in played) >= 6
    assert not any(game["attack"] for game in played)


# ---------------------------------------------------------------- groups

GROUPED = ["--games", "16", "--credit", "group", "--steps", "2"]
GROUPS = {"2 attacks": ["--attacks-per-seed", "2"], "2 answers": ["--answers-per-attack", "2"],
          "2 attacks with 2 answers": ["--attacks-per-seed", "2", "--answers-per-attack", "2"]}


@pytest.fixture(scope="module", params=GROUPS.values(), ids=GROUPS.keys())
def grouped(request, runs):
    """A run with groups: its flags, its folder, and how many games share a seed, and how many an attack."""
    out = runs / "-".join(["group", *(flag.strip("-") for flag in request.param)])
    succeeds(*SMALL, *GROUPED, *request.param, "--out", out)
    config = json.loads((out / "config.json").read_text())
    n_answers = config["answers_per_attack"]
    return request.param, out, config["attacks_per_seed"] * n_answers, n_answers


def chunks(values, size):
    return [values[i:i + size] for i in range(0, len(values), size)]


def test_a_step_has_as_many_games_whatever_its_groups_are(grouped):
    """Each kind of seed has its quarter of them; games on one seed are neighbours."""
    _, out, per_seed, _ = grouped
    played = games(out)
    assert [game["game"] for game in played] == [*range(16)] * 2
    for group in chunks(played, per_seed):
        kinds = {(game["seed"], game["harmful"], game["attacker_reply"] is None) for game in group}
        assert len(kinds) == 1, kinds
    for step in chunks(played, 16):
        kinds = Counter((game["harmful"], game["attacker_reply"] is None) for game in step)
        assert len(kinds) == 4 and set(kinds.values()) == {4}


def test_attacks_on_one_seed_differ_and_the_answers_to_one_attack_have_that_attack(grouped):
    _, out, per_seed, per_attack = grouped
    answers_differ = []
    attacks_differ = []
    for group in chunks(games(out), per_seed):
        if group[0]["attacker_reply"] is None:
            continue
        attacks = [{game["attacker_reply"] for game in same} for same in chunks(group, per_attack)]
        assert all(len(replies) == 1 for replies in attacks), "one attack, asked several times"
        attacks_differ.append(len(set.union(*attacks)) > 1)
        answers_differ += [len({game["defender_reply"] for game in same}) > 1
                           for same in chunks(group, per_attack)]
    assert any(attacks_differ) == (per_seed > per_attack)
    assert any(answers_differ) == (per_attack > 1)


def test_two_processes_play_the_grouped_games_of_one_and_end_with_its_weights(grouped, runs):
    flags, out, _, _ = grouped
    two = runs / f"{out.name}-two"
    succeeds(*SMALL, *GROUPED, *flags, "--out", two, ranks=2)
    assert games(out) == games(two)
    measured("weights, 2 processes against 1", largest_difference(weights(out), weights(two)), 1e-5)
    keys = ["equal_groups", *(f"{part}_deviation_{role}" for part in ("payoff", "kl")
                              for role in (ATTACKER, DEFENDER))]
    for line_of_one, line_of_two in zip(metrics(out), metrics(two), strict=True):
        for key in keys:
            assert line_of_one[key] == pytest.approx(line_of_two[key], abs=1e-6), key
    shares = [line["equal_groups"] for line in metrics(out)]
    print(f"\n    groups of equal payoffs, by step: {shares}", end="")


def test_each_prompt_of_a_group_is_prefilled_once(tiny, chat, monkeypatch):
    """Two seeds, two attacks on each, two answers to each attack."""
    prefilled, prefill = Counter(), sampling.prefill

    def counted(model, prompts, prefix):
        prefilled.update(prompts)   # without their last tokens, which the first decode step runs
        return prefill(model, prompts, prefix)
    monkeypatch.setattr(sampling, "prefill", counted)
    cfg = Config(max_new_tokens=6)
    players = [train.make_player(tiny, role, role, chat, cfg, 0, ONE_PROCESS) for role in train.ROLES]
    texts = ["how do i kill the weed"] * 4 + ["how do i rob the bank"] * 4
    seeds = [Seed(text, harmful=True, revise=True) for text in texts]
    played = play(seeds, list(range(8)), chat, *players, keywords, answers_per_attack=2)
    attacks = {id(game.attacker): game.attacker for game in played}.values()
    turns = [*attacks, *(game.defender for game in played)]
    prompts = {tuple(turn.prompt_ids[:-1]) for turn in turns}
    print(f"\n    {len(turns)} turns of {len(prompts)} prompts", end="")
    assert len(turns) == 4 + 8 and len({tuple(turn.prompt_ids) for turn in attacks}) == 2
    assert prefilled == dict.fromkeys(prompts, 1)


# ---------------------------------------------------------------- what a run shows and leaves

def test_a_run_shows_its_configuration_games_exam_and_curves(runs):
    printed = (runs / "printed").read_text()
    for words in ("lr                 0.0005", "step    3/3", "verdict", "attack success", "curves.png"):
        assert words in printed, words
    assert (runs / "one" / "curves.png").exists()
    assert all(line["zero_sum_gap"] == 0 for line in metrics(runs / "one"))


def test_a_runs_checkpoint_is_a_model_like_any_other(runs):
    flags = ["--steps", "1", "--games", "4", "--no-exam"]
    succeeds("--model", runs / "one", *flags, "--out", runs / "second")
    difference = largest_difference(weights(runs / "second", 0), weights(runs / "one"))
    measured("start against the checkpoint it came from", difference, 0.0)


def test_two_steps_and_two_resumed_equal_four_bit_for_bit(runs):
    flags = [*SMALL, "--steps", "4", "--save-every", "2"]
    succeeds(*flags, "--out", runs / "whole")
    shutil.copytree(runs / "whole", runs / "resumed")
    shutil.rmtree(runs / "resumed" / "step_000004")
    succeeds("--out", runs / "resumed", "--resume")
    difference = largest_difference(weights(runs / "whole"), weights(runs / "resumed"))
    measured("weights, resumed against undisturbed", difference, 0.0)
    assert [line["step"] for line in metrics(runs / "resumed")] == [1, 2, 3, 4]


def stop_early(rank):
    train.MAX_DEAD_GAMES = 16


def test_a_run_in_which_nothing_happens_says_so_on_each_line_and_stops(runs):
    """After one SFT update no reply has an answer."""
    flags = ["--sft-steps", "1", "--games", "8", "--no-exam", "--out", runs / "dead"]
    done = run(*flags, before=stop_early)
    assert done.stdout.count("no reply reached the judge") == 2
    assert done.returncode == 2 and "no reply reached the judge since the start" in done.stderr


# ---------------------------------------------------------------- several processes

def test_two_processes_end_with_the_weights_metrics_and_games_of_one(runs):
    one, two = runs / "one", runs / "two"
    succeeds(*SMALL, "--out", two, ranks=2)
    measured("weights, 2 processes against 1", largest_difference(weights(one), weights(two)), 1e-5)
    times = {"seconds", "sample_tokens_per_s", "train_tokens_per_s"}
    for line_of_one, line_of_two in zip(metrics(one), metrics(two), strict=True):
        for key in line_of_one.keys() - times:
            a, b = line_of_one[key], line_of_two[key]
            assert a == b or a == pytest.approx(b, abs=1e-4), key
    assert games(one) == games(two)


@pytest.mark.parametrize("play", ["attacker", "defender"])
def test_four_processes_of_which_some_have_no_game_or_no_attacker_end_with_the_weights_of_one(play, runs):
    """
    Four games on four ranks: two are raw seeds, for which attacker-only play has no use. With the official
    credit, because each attack is the only one of its label. Without a KL term: where all payoffs are equal,
    it is mere rounding, and AdamW would make it as large as any gradient.
    """
    flags = [*SMALL, "--games", "4", "--steps", "4", "--seed", "2", "--credit", "reinforce++", "--kl", "0",
             "--play", play]
    one, four = runs / f"{play}1", runs / f"{play}4"
    succeeds(*flags, "--out", one, ranks=1)
    succeeds(*flags, "--out", four, ranks=4)
    assert largest_difference(weights(one), weights(runs / "sft", 0)) > 1e-4
    difference = largest_difference(weights(one), weights(four))
    measured(f"weights, {play}, 4 processes against 1", difference, 1e-5)
    assert all((line["reward_defender"] is None) == (play == "attacker") for line in metrics(four))


def test_two_launchers_of_two_processes_each_end_with_the_weights_of_one_process(runs):
    endpoint = f"--rdzv_endpoint=localhost:{free_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
                "--rdzv_backend=c10d", endpoint, "--rdzv_id=7"]
    line = [*torchrun, ROOT / "train.py", *SMALL, "--out", runs / "nodes"]
    pipe = subprocess.PIPE
    nodes = [subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=WITHOUT_GPUS) for _ in range(2)]
    printed = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    difference = largest_difference(weights(runs / "one"), weights(runs / "nodes"))
    measured("weights, 2 launchers of 2 processes against 1 process", difference, 1e-5)


# ---------------------------------------------------------------- real models, and a judge model

@pytest.fixture(scope="module")
def real(tmp_path_factory, judge_stand_in):
    """
    Folders as researchers have them: a policy and a judge of different shapes with tokenizers of their own,
    and two files of seeds.
    """
    folder = tmp_path_factory.mktemp("real")
    tokenizer = byte_tokenizer()
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                         max_position_embeddings=512, tie_word_embeddings=False,
                         eos_token_id=tokenizer.eos_token_id)
    policy, judge = new_model(config, 0), judge_stand_in.model
    save(folder / "policy", policy.state_dict(), policy, tokenizer)
    save(folder / "judge", judge.state_dict(), judge, judge_stand_in.tokenizer)
    for kind in ("harmful", "benign"):
        rows = [f'{{"prompt": "may i ask {i} {kind[0]} times"}}\n' for i in range(6)]
        (folder / f"{kind}.jsonl").write_text("".join(rows))
    return folder


def seed_files(real):
    return [f"harmful={real / 'harmful.jsonl'}", f"benign={real / 'benign.jsonl'}"]


def real_flags(real, judge="judge"):
    return ["--model", real / "policy", "--judge", f"wildguard:{real / judge}", "--seeds", *seed_files(real),
            "--games", "8", "--max-new-tokens", "12", "--no-cot", "--no-exam", "--steps", "3"]


@pytest.fixture(scope="module")
def judged(real):
    """A run of a real model with a judge model on one process."""
    out = real / "one"
    done = succeeds(*real_flags(real), "--recompute", "--out", out)
    assert "6 prompts, 6 of them harmful, in 6 rows" in done.stdout
    return out


def test_a_judge_model_plays_along_and_its_unreadable_verdicts_are_counted(judged):
    unreadable = [line["unreadable"] for line in metrics(judged)]
    counted = sum(not game["verdict"]["readable"] for game in games(judged))
    assert len(unreadable) == 3 and sum(unreadable) * 8 == pytest.approx(counted)
    print(f"\n    share of unreadable verdicts, by step: {unreadable}", end="")


def test_a_judge_model_on_two_processes_gives_the_verdicts_it_gives_on_one(real, judged):
    two = real / "two"
    succeeds(*real_flags(real), "--recompute", "--out", two, ranks=2)
    for game_of_one, game_of_two in zip(games(judged), games(two), strict=True):
        assert game_of_one["verdict"] == game_of_two["verdict"]
    measured("weights, 2 processes against 1", largest_difference(weights(judged), weights(two)), 1e-5)


def test_the_start_of_a_run_is_the_model_under_a_second_name(real, judged, tmp_path, monkeypatch):
    file = "model.safetensors"
    assert os.path.samefile(real / "policy" / file, judged / "step_000000" / file)
    assert not os.path.samefile(real / "policy" / "config.json", judged / "step_000000" / "config.json")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    checkpoint.link_model(judged / "step_000003", tmp_path / "copy")
    copied = {path.name for path in (tmp_path / "copy").iterdir()}
    saved = {path.name for path in (judged / "step_000003").iterdir()}
    assert copied == saved - {"optimizer"}
    copy = tmp_path / "copy" / "model.safetensors"
    assert not os.path.samefile(judged / "step_000003" / "model.safetensors", copy)
    measured("weights of the copy", largest_difference(load_file(copy), weights(judged, 3)), 0.0)


def test_a_model_in_whose_folder_a_run_begins_is_linked_without_the_run(real, tmp_path):
    shutil.copytree(real / "policy", tmp_path / "m")
    (tmp_path / "m" / "run" / "partial_000000").mkdir(parents=True)
    checkpoint.link_model(tmp_path / "m", tmp_path / "m" / "run" / "step_000000")
    linked = {path.name for path in (tmp_path / "m" / "run" / "step_000000").iterdir()}
    assert linked == {path.name for path in (real / "policy").iterdir()}


def test_the_opponent_is_the_checkpoint_that_is_the_newest_of_its_run_now(judged):
    flags = ["--model", str(judged), "--play", "attacker", "--opponent", str(judged)]
    config = train.parse_config(flags)
    assert config.opponent == str(judged / "step_000003")


def test_a_run_in_bf16_saves_bf16_for_serving_and_resumes_from_its_fp32_weights_to_the_bit(real):
    flags = [*real_flags(real)[:3], "keywords", *real_flags(real)[4:], "--precision", "bf16", "--lr", "1e-3"]
    flags += ["--steps", "4", "--save-every", "2"]
    succeeds(*flags, "--out", real / "bf16")
    shutil.copytree(real / "bf16", real / "bf16_resumed")
    shutil.rmtree(real / "bf16_resumed" / "step_000004")
    done = succeeds("--resume", "--out", real / "bf16_resumed")
    assert re.search(r"saved step_000004 in \d+\.\d s", done.stdout)
    served = load_file(real / "bf16" / "step_000004" / "model.safetensors")
    assert {tensor.dtype for tensor in served.values()} == {torch.bfloat16}
    opened = AutoModelForCausalLM.from_pretrained(real / "bf16" / "step_000004")
    assert opened.dtype == torch.bfloat16
    for file in sorted((real / "bf16" / "step_000004" / "optimizer").glob("*.safetensors")):
        other = load_file(real / "bf16_resumed" / "step_000004" / "optimizer" / file.name)
        assert all(torch.equal(tensor, other[name]) for name, tensor in load_file(file).items())
        assert {tensor.dtype for name, tensor in other.items()} == {torch.float32}
    steps = metrics(real / "bf16_resumed")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    print(f"\n    mismatch by step: {[line['mismatch'] for line in steps]}", end="")


def test_a_judge_that_cannot_be_read_stops_the_run_in_one_sentence(real):
    out = real / "unreadable"
    done = run(*real_flags(real, judge="policy"), "--out", out, before=stop_early)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no verdict could be read since the start" in done.stderr
    assert load(str(out)) is not None, "the start is intact"


def test_a_trained_folder_opens_in_transformers_and_answers(judged):
    folder = judged / "step_000003"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)
    answer = theirs.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("play", ["self", "defender"])
def test_a_reply_that_the_context_cannot_hold_is_refused_with_the_longest_that_it_can(play, real, capsys):
    """An attacker's prompt leaves room for a reply; a defender's prompt holds that reply and leaves room."""
    chat = ChatFormat(open_tokenizer(str(real / "policy")), ENGLISH, cot=False)
    cfg = Config(play=play, judge="keywords", seeds=seed_files(real), max_new_tokens=500)
    pools, _ = toy.read_seeds(cfg.seeds, cfg.attacks, cfg.play, cfg.opponent)
    seeds = [seed for pool in pools for seed in pool]
    raw = 512 - max(len(chat.defender_prompt(seed.text)) for seed in seeds)
    rewriting = 512 - max(len(chat.attacker_prompt(seed)) for seed in seeds)
    attacked = (512 - len(chat.defender_prompt(""))) // 2
    most = min(raw, rewriting, attacked) if play == "self" else raw
    with pytest.raises(SystemExit):
        train.check_lengths(cfg, pools, chat, 512)
    assert f"choose at most {most}, or drop" in capsys.readouterr().err
    train.check_lengths(dataclasses.replace(cfg, max_new_tokens=most), pools, chat, 512)
    with pytest.raises(SystemExit):
        train.check_lengths(dataclasses.replace(cfg, max_new_tokens=most + 1), pools, chat, 512)


# ---------------------------------------------------------------- the memory plan

def plan(config, folder, n_gpus=1, **settings):
    """The rows of `--plan`, in GiB, for a policy of this config. They are rounded to 0.1 GiB."""
    config.save_pretrained(folder)
    table = eval.show_plan(Config(model=str(folder), judge="keywords", **settings), n_gpus)
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:] if line.startswith("|")]
    return {name: float(size) for name, size in cells}


def test_the_plan_counts_weights_moments_and_cache_as_they_are(tmp_path):
    """Bytes per weight are those of a small model; the sizes are of 70 billion, where 0.1 GiB is little."""
    small = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
                        num_hidden_layers=2, vocab_size=50)
    model = new_model(small, 0)
    optimizer = torch.optim.AdamW(model.parameters())
    score(model, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))[0].sum().backward()
    optimizer.step()
    states = optimizer.state.values()
    n_weights = sum(p.numel() for p in model.parameters())
    weights_and_moments = sum(p.nbytes for p in model.parameters())
    weights_and_moments += sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
    gradient = sum(p.grad.nbytes for p in model.parameters())

    large = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
                        num_key_value_heads=8, num_hidden_layers=80, vocab_size=128256)
    with torch.device("meta"):
        policy = train.Transformer(large)
    # 16 games at a time, each with room for instructions, an attack and an answer
    cache = Cache(policy.config, 16, 512 + 2 * 1000, torch.bfloat16, torch.device("meta"))
    billions = sum(p.numel() for p in policy.parameters()) / 2 ** 30
    shown = plan(large, tmp_path, games=16, max_new_tokens=1000)
    expected = {"weights and Adam moments, fp32": weights_and_moments / n_weights * billions,
                "update: gradients, fp32": gradient / n_weights * billions,
                "play: keys and values": cache.block_2LBKSE.nbytes / 2 ** 30}
    for name, size in expected.items():
        measured(f"{name}, {size:.2f} GiB, difference", abs(shown[name] - size), 0.0501)


SEVEN_BILLION = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
                            num_key_value_heads=32, num_hidden_layers=32, vocab_size=32000)


def test_the_plan_counts_the_frozen_start_where_it_defends_and_nothing_twice_on_one_gpu(tmp_path):
    name = "play: policy, judge, opponent in full"
    by_play = {play: plan(SEVEN_BILLION, tmp_path, 8, play=play)[name] for play in ("self", "attacker")}
    assert by_play["attacker"] == pytest.approx(2 * by_play["self"], abs=0.11)
    judged = Config(model=str(tmp_path), judge=f"wildguard:{tmp_path}", precision="bf16")
    alone, shared = (re.search(rf"{name} \| (\S+)", eval.show_plan(judged, n_gpus)) for n_gpus in (1, 8))
    assert float(alone[1]) == by_play["self"], "the judge is there already"
    assert float(shared[1]) == pytest.approx(2 * by_play["self"], abs=0.11)


def test_the_plan_of_a_run_is_that_of_its_newest_checkpoint(tmp_path):
    (tmp_path / "latest").write_text("step_000003")
    rows = plan(SEVEN_BILLION, tmp_path / "step_000003")
    table = eval.show_plan(Config(model=str(tmp_path), judge="keywords"), 1)
    assert all(f"| {name} | {size:.1f} |" in table for name, size in rows.items())


LLAMA = LlamaConfig(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=2,
                    num_hidden_layers=3, vocab_size=64)
QWEN3 = Qwen3Config(hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4,
                    head_dim=64, num_hidden_layers=3, vocab_size=64)


def bytes_kept_per_token(model):
    """What a forward pass over 2048 tokens keeps for the backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}   # by address; holding a tensor, so that its address is not used again

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(8, 256, dtype=torch.long), lambda hidden_BTD, weight_VD: hidden_BTD)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2048


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_plan_of_activations_is_what_a_forward_pass_keeps(config, recompute, tmp_path, monkeypatch):
    """
    With 2^30 tokens, a GiB of the plan is a byte per token. The plan is about GPUs: the norm and the gate
    keep here what they keep there, and formulas stand in for the kernels.
    """
    monkeypatch.setattr(layers_triton, "rms_norm", layers.norm_reference)
    monkeypatch.setattr(layers_triton, "swiglu", layers.swiglu_reference)
    monkeypatch.setattr(model_file, "rms_norm", layers.NormFunction.apply)
    monkeypatch.setattr(model_file, "swiglu", layers.SwiGLUFunction.apply)
    name = "update: activations"
    all_kept = plan(config, tmp_path, micro_tokens=2 ** 30, recompute=False)[name]
    planned = plan(config, tmp_path, micro_tokens=2 ** 30, recompute=recompute)[name]
    if recompute:   # the plan holds the activations of one layer, too, which only the backward pass computes
        planned -= (all_kept - 2 * config.hidden_size) / config.num_hidden_layers
    model = new_model(config, 0).to(torch.bfloat16)
    model.recompute = recompute
    kept = bytes_kept_per_token(model)
    difference = abs(kept / planned - 1)
    measured(f"{kept:.0f} bytes per token kept, {planned:.0f} planned; relative difference", difference, 0.1)


def memory(key):
    """A line of /proc/self/status, in GiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s*(\d+) kB", status)[1]) / 2 ** 20


def largest_memory_of_updates(model_config, cfg, ranks):
    """
    GiB that updates of this model take at their peak: policy, AdamW, reference, and what a pass needs. The
    peak before them, while the models are built, does not count.
    """
    before = memory("VmRSS")
    policy = train.shard(new_model(model_config, 0), ranks)
    policy.recompute = cfg.recompute
    reference = train.shard(new_model(model_config, 1).to(torch.bfloat16), ranks).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=True)
    n = cfg.micro_tokens // 4 - 8   # two micro-batches of four rows: 8 tokens of prompt, n of reply
    turn = Turn(ATTACKER, [1] * 8, [2] * n, [-1.0] * n, Reply("", "", "x", True))
    experiences = [Experience(turn, payoff=1.0, shaping=1.0, harmful=True) for _ in range(8)]
    for _ in range(2):   # AdamW has its moments from the first update on
        Path("/proc/self/clear_refs").write_text("5")   # forget the peak so far
        old = train.rescore(reference, experiences, cfg, ranks)
        train.update(policy, optimizer, experiences, old, [np.ones(n)] * 8, [], cfg, ranks)
    return memory("VmHWM") - before


def print_memory_of_updates(model_config, cfg, rank):
    ranks = train.setup(cfg)
    ctypes.CDLL(None).mallopt(-3, 2 ** 16)   # M_MMAP_THRESHOLD: freed blocks go back to the system at once
    nano = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=2)
    largest_memory_of_updates(nano, cfg, ranks)   # libraries take memory at their first call
    print(largest_memory_of_updates(model_config, cfg, ranks))


@pytest.mark.parametrize("recompute, tokens", [(False, 256), (True, 128)])
def test_the_plan_agrees_with_the_memory_that_an_update_takes(recompute, tokens, tmp_path):
    """A CPU computes in bf16 here, as a GPU would, so that its memory can be compared."""
    model_config = LlamaConfig(vocab_size=16000, hidden_size=768, intermediate_size=2112, num_hidden_layers=8,
                               num_attention_heads=8, num_key_value_heads=4)
    settings = dict(precision="bf16", recompute=recompute, micro_tokens=tokens)
    update = partial(print_memory_of_updates, model_config, Config(**settings))
    measured_gib = float(succeeds(instead=update).stdout)
    rows = plan(model_config, tmp_path, **settings)
    planned_gib = sum(size for name, size in rows.items() if not name.startswith(("play", "peak")))
    difference = abs(measured_gib / planned_gib - 1)
    measured(f"{measured_gib:.2f} GiB, {planned_gib:.2f} planned; relative difference", difference, 0.1)


# ---------------------------------------------------------------- bad input

@pytest.fixture
def bad(tmp_path):
    """A folder of mistakes."""
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "columns.jsonl").write_text('{"colour": "red"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "labelled.jsonl").write_text('{"prompt": "a", "harmful": 1}\n{"prompt": "b", "harmful": 0}\n')
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights" / "config.json").write_text("{}")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("do not touch")
    (tmp_path / "file").write_text("not a folder")
    return tmp_path


MISTAKES = [   # arguments, words of the sentence
    ("--stepz 3", "--stepz"),
    ("--reward double", "--reward"),
    ("--steps x", "--steps"),
    ("--steps 0", "from 1 to 2147483647"),
    ("--lr nan", "from 0 to 2147483647"),
    ("--temperature -1", "from 0.01 to 100"),
    ("--max-new-tokens 0", "from 1 to 2147483647"),
    ("--seed -1", "from 0 to 2147483647"),
    ("--kl inf", "from 0 to 2147483647."),
    ("--games 99999999999", "from 1 to 2147483647"),
    ("--seeds harmful={bad}/prompts.jsonl", "--seeds: who judges the answers?"),
    ("--games 6", "multiple of 4"),
    ("--games 12 --attacks-per-seed 2", "multiple of 8, 4 types of seeds x 2 games"),
    ("--games 24 --attacks-per-seed 2 --answers-per-attack 2", "multiple of 16, 4 types of seeds x 4"),
    ("--credit group", "add --attacks-per-seed or --answers-per-attack"),
    ("--credit mine", "--credit"),
    ("--balance roles", "unrecognized arguments: roles"),
    ("--judge toy --seeds harmful={bad}/none.jsonl", "No such file"),
    ("--judge toy --seeds harmful={bad}/empty.jsonl", "holds no prompts"),
    ("--judge toy --seeds harmful={bad}/torn.jsonl", "torn.jsonl, line 2"),
    ("--judge toy --seeds harmful={bad}/columns.jsonl", "row 1: null is no text"),
    ("--judge toy --seeds {bad}/prompts.jsonl", "harmful or benign?"),
    ("--judge toy --seeds harmful={bad}/prompts.jsonl", "only one kind of seed"),
    ("--sft {bad}/prompts.jsonl", "row 1: null is no text"),
    ("--attacks x.jsonl", "--play defender"),
    ("--opponent x", "--play attacker"),
    ("--judge keywords --model M", "needs seeds"),
    ("--model M --judge toy --seeds {bad}/x", "a judge that reads them"),
    ("--judge oracle --model M --seeds {bad}/x", "oracle"),
    ("--model {bad}/no_weights --judge keywords --seeds {bad}/labelled.jsonl", "safetensors"),
    ("--model {bad}/nowhere --judge keywords --seeds {bad}/labelled.jsonl", "no such folder"),
    ("--out {bad}/file/run", "cannot be written"),
    ("--out {bad}/taken", "will not be overwritten"),
    ("--out {bad}/taken --resume", "no complete checkpoint"),
]


@pytest.mark.parametrize("args, words", MISTAKES)
def test_bad_input_gets_one_sentence_and_exit_status_2_before_any_work(args, words, bad, capsys):
    before = sorted(bad.rglob("*"))
    flags = args.format(bad=bad).split()
    if "--out" not in flags:
        flags += ["--out", str(bad / "new")]
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and words in printed.err, printed
    assert len(printed.err.strip().splitlines()) == 1 and not printed.out, printed
    assert sorted(bad.rglob("*")) == before and (bad / "taken" / "precious").read_text() == "do not touch"


def test_games_that_cannot_be_divided_among_the_ranks_are_refused(bad):
    done = run("--games", "4", "--out", bad / "new", ranks=3)
    assert done.returncode != 0 and "and of 3, so that ranks share no attack" in done.stderr
    assert not (bad / "new").exists()
    shared = ["--games", "16", "--answers-per-attack", "4", "--credit", "group", "--out", bad / "new"]
    done = run(*shared, ranks=3)   # 4 x 4 x 1 games, but a rank would answer a third of an attack
    assert done.returncode != 0 and "and of 12, so that ranks share no attack" in done.stderr
    assert not (bad / "new").exists()


def test_a_run_that_was_stopped_in_its_sft_can_be_started_again(runs):
    out = runs / "stopped"
    (out / "partial_000000").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "partial_000000" / "model.safetensors").write_text("torn")
    succeeds(*SMALL, "--steps", "1", "--games", "4", "--out", out)
    assert (out / "latest").read_text() == "step_000001"


def test_a_run_folder_is_never_overwritten(runs):
    before = {path: path.stat().st_mtime_ns for path in (runs / "one").rglob("*")}
    done = run(*SMALL, "--out", runs / "one")
    assert done.returncode == 2 and "will not be overwritten" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in (runs / "one").rglob("*")} == before
