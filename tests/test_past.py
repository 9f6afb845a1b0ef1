"""
--opponent past: in a share of the steps, one role in turn is played by an earlier checkpoint of the run.

Rock-paper-scissors shows what it is for: three kinds of attack, three guards, and an equilibrium that is
known, a third each. Two policies that follow their latest opponent go round in circles.
"""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

import checkpoint
import eval
import toy
import train
from conftest import byte_tokenizer, measured
from launch import games, largest_difference, metrics, run, succeeds, weights
from model import ADAPTER_FILES, load, new_model, save
from selfplay import ATTACKER, DEFENDER, Seed
from test_train import ONE_PROCESS
from train import ROLES, Config, frozen_players


# ---------------------------------------------------------------- who plays

def test_every_earlier_checkpoint_is_drawn_as_often_and_the_roles_take_turns():
    cfg = Config(out="it", save_every=10, opponent="past", opponent_share=1.0)
    drawn = [frozen_players(replace(cfg, seed=seed), {}, 40 + seed % 10) for seed in range(2000)]
    for seed, players in enumerate(drawn):
        assert list(players) == [ROLES[seed % 2]]
    counts = np.unique([folder.name for players in drawn for folder in players.values()], return_counts=True)
    assert counts[0].tolist() == [f"step_{step:06d}" for step in range(0, 50, 10)]
    error = np.abs(counts[1] - 400).max() / (2000 * 0.2 * 0.8) ** 0.5
    measured("largest count minus 400, in deviations", error, 4)


def test_the_share_is_that_of_the_steps():
    cfg = Config(out="it", opponent="past", opponent_share=0.3)
    share = np.mean([bool(frozen_players(cfg, {}, step)) for step in range(2000)])
    measured("share minus 0.3, in deviations of a mean", abs(share - 0.3) / (0.3 * 0.7 / 2000) ** 0.5, 4)


def test_without_opponents_only_the_frozen_start_plays_a_role():
    assert frozen_players(Config(out="it"), {}, 150) == {}
    assert frozen_players(Config(out="it", play="defender"), {}, 150) == {}
    assert frozen_players(Config(out="it", play="attacker"), {}, 150) == {DEFENDER: Path("it/step_000000")}


def crossplay_file(file, weights_of):
    """What eval.py crossplay writes, but for the cells: checkpoints and each role's equilibrium."""
    names = [str(name) for name in weights_of]
    mixtures = {role: [pair[i] for pair in weights_of.values()] for i, role in enumerate(ROLES)}
    file.write_text(json.dumps({"cells": dict.fromkeys(names, {}), "equilibrium": mixtures}))
    return file


def test_crossplays_equilibrium_draws_each_roles_checkpoint_by_its_weight(tmp_path, sft_run):
    start = sft_run / "step_000000"
    shutil.copytree(start, tmp_path / "other")
    file = crossplay_file(tmp_path / "x.json", {start: (1.0, 0.25), tmp_path / "other": (0.0, 0.75)})
    cfg = Config(out="it", opponent=str(file), opponent_share=1.0)
    mixtures = train.read_mixtures(cfg)
    drawn = {role: [] for role in ROLES}
    for step in range(2000):
        for role, folder in frozen_players(cfg, mixtures, step).items():
            drawn[role].append(folder == start)
    assert all(drawn[ATTACKER])
    error = abs(np.mean(drawn[DEFENDER]) - 0.25) / (0.25 * 0.75 / 1000) ** 0.5
    measured("share of a weight of 0.25, in deviations", error, 4)


# ---------------------------------------------------------------- rock-paper-scissors

# of the attacker, by its kind and the defender's guard
PAYOFF = torch.tensor([[0.0, 1.0, -1.0], [-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]])
KL = 0.2


def exploitability_at_the_end(share, seed, steps=1500):
    """
    What best responses gain against the two latest policies, added, as a mean over the last quarter. They are
    softmax policies of three logits; AdamW follows the exact gradient of payoff minus KL * KL to the start.
    """
    cfg = Config(out="it", save_every=25, opponent="past" * (share > 0), opponent_share=share, seed=seed)
    logits = {ATTACKER: torch.tensor([1.0, 0, 0]), DEFENDER: torch.tensor([0, 0.5, 0])}
    optimizers = {}
    for role, logit_3 in logits.items():
        optimizers[role] = torch.optim.AdamW([logit_3.requires_grad_()], 0.05, (0.9, 0.95), weight_decay=0.0)
    saved, gains = {}, []
    for step in range(steps):
        policies = {role: logit_3.softmax(-1) for role, logit_3 in logits.items()}
        if step % cfg.save_every == 0:
            now = {role: policy_3.detach() for role, policy_3 in policies.items()}
            saved[Path("it", f"step_{step:06d}")] = now
        frozen = frozen_players(cfg, {}, step)
        met = {role: saved[frozen[role]][role] if role in frozen else policies[role].detach()
               for role in ROLES}
        values = {ATTACKER: PAYOFF @ met[DEFENDER], DEFENDER: -met[ATTACKER] @ PAYOFF}
        for role in ROLES:
            if role not in frozen:
                kl = (policies[role] * (policies[role] * 3).log()).sum()
                (KL * kl - policies[role] @ values[role]).backward()
                optimizers[role].step()
                optimizers[role].zero_grad()
        attacker, defender = (logits[role].detach().softmax(-1) for role in ROLES)
        gains.append(((PAYOFF @ defender).max() - (attacker @ PAYOFF).min()).item())
    return float(np.mean(gains[-steps // 4:]))


def test_in_rock_paper_scissors_the_latest_policies_cycle_and_the_past_calms_them():
    """
    0 is the equilibrium, 2 is two pure strategies. It takes a KL term and most of the steps: with a KL of
    0.05, or against the past alone (share 1), policies are no calmer than without, and at a share of 0.5 they
    are half as far off. A run's defaults (0.5, and a KL of 0.01) are not shown to help.
    """
    latest = exploitability_at_the_end(0.0, 0)
    past = [exploitability_at_the_end(0.8, seed) for seed in range(2)]
    print(f"\n    latest only {latest:.2f}, past in 80 % of the steps {past[0]:.2f}, {past[1]:.2f}", end="")
    assert latest > 1.0
    measured("the past's share of it", max(past) / latest, 0.4)


# ---------------------------------------------------------------- runs

FLAGS = ["--games", "8", "--seed", "5", "--no-exam", "--steps", "8", "--save-every", "2", "--lr", "1e-3",
         "--opponent", "past", "--opponent-share", "0.7", "--keep", "2", "--max-new-tokens", "40"]
KINDS = {"weights": [], "shared": ["--adapter-rank", "4"],
            "roles": ["--adapter-rank", "4", "--adapters", "roles"]}
each_kind = pytest.mark.parametrize("kind", KINDS)
two_kinds = pytest.mark.parametrize("kind", ["weights", "roles"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_run):
    """A folder with a run of each kind."""
    folder = tmp_path_factory.mktemp("past")
    shutil.copytree(sft_run, folder / "sft")
    FLAGS.extend(["--model", folder / "sft" / "step_000000"])
    for kind, flags in KINDS.items():
        succeeds(*FLAGS, *flags, "--out", folder / kind)
    return folder


def config_of(out):
    settings = json.loads((out / "config.json").read_text())
    return Config(**{name: value for name, value in settings.items() if name not in ("prompts", "files")})


@each_kind
def test_only_the_live_role_learns_in_a_step_against_the_past(kind, runs):
    """A role that does not learn has no reward in the log; raw seeds are asked of a defender that learns."""
    cfg = config_of(runs / kind)
    met = [frozen_players(cfg, {}, step) for step in range(8)]
    assert {role for players in met for role in players} == set(ROLES), "choose another seed"
    for line, players in zip(metrics(runs / kind), met, strict=True):
        for role in ROLES:
            assert (line[f"payoff_deviation_{role}"] is None) == (role in players)
        played = [game for game in games(runs / kind) if game["step"] == line["step"]]
        assert len(played) == (4 if DEFENDER in players else 8)


def redrawn(out, step, role, folder):
    """The replies of a role in a step, in the log and drawn again by the model that a checkpoint opens as."""
    chat = toy.open_chat(str(out), True)
    player = train.make_player(load(str(folder)), role, role, chat, config_of(out), step, ONE_PROCESS)
    played = [game for game in games(out) if game["step"] == step + 1]
    played = [game for game in played if role == DEFENDER or game["attacker_reply"] is not None]
    prompts = [chat.defender_prompt(game["attack"] or game["seed"]) if role == DEFENDER else
               chat.attacker_prompt(Seed(game["seed"], game["harmful"], revise=True)) for game in played]
    samples = player(prompts, [game["game"] for game in played])
    return [game[f"{role}_reply"] for game in played], [chat.parse(sample).text for sample in samples]


@each_kind
def test_the_past_self_plays_as_it_played_then(kind, runs):
    step, role, folder = next((step, role, folder) for step in range(8)
                              for role, folder in frozen_players(config_of(runs / kind), {}, step).items()
                              if folder.name != "step_000000")
    logged, again = redrawn(runs / kind, step, role, folder)
    assert logged == again


@each_kind
def test_all_checkpoints_stay_that_may_be_asked_to_play(kind, runs):
    assert [folder.name[-1] for folder in checkpoint.checkpoints(runs / kind)] == list("02468")


def state(out, kind, step=8):
    """The tensors of a checkpoint, the last one's by default."""
    if kind == "weights":
        return weights(out, step)
    files = (out / f"step_{step:06d}").glob(ADAPTER_FILES)
    return {f"{file.parent.name} {key}": tensor for file in files for key, tensor in load_file(file).items()}


@two_kinds
def test_a_resumed_run_meets_the_same_past(kind, runs):
    resumed = runs / f"{kind}_resumed"
    shutil.copytree(runs / kind, resumed)
    shutil.rmtree(resumed / "step_000006")
    shutil.rmtree(resumed / "step_000008")
    succeeds("--out", resumed, "--resume")
    difference = largest_difference(state(runs / kind, kind), state(resumed, kind))
    measured("resumed against undisturbed", difference, 0.0)


@two_kinds
def test_two_processes_meet_the_same_past(kind, runs):
    flags = [*FLAGS, *KINDS[kind], "--lr", "2e-4", "--steps", "4"]
    one, two = (runs / f"{kind}_of_{ranks}" for ranks in (1, 2))
    succeeds(*flags, "--out", one)
    succeeds(*flags, "--out", two, ranks=2)
    assert games(one) == games(two)
    difference = largest_difference(state(one, kind, 4), state(two, kind, 4))
    measured("2 processes against 1", difference, 1e-5)


def test_the_adapter_of_a_role_that_does_not_learn_stays(runs):
    succeeds(*FLAGS, *KINDS["roles"], "--save-every", "1", "--steps", "4", "--out", runs / "often")
    cfg = config_of(runs / "often")
    met = [frozen_players(cfg, {}, step) for step in range(4)]
    assert any(met[1:]), "choose another seed"
    for step in range(1, 4):
        before, after = state(runs / "often", "roles", step), state(runs / "often", "roles", step + 1)
        for role in ROLES:
            keys = [key for key in before if key.startswith(role)]
            same = all(torch.equal(before[key], after[key]) for key in keys)
            assert keys and same == (role in met[step])


def test_what_crossplay_writes_is_a_mixture(runs, capsys):
    """A run is named by the checkpoint that it had then, so that the weights stay those of the players."""
    file = runs / "crossplay.json"
    eval.main(["crossplay", str(runs / "weights" / "step_000002"), str(runs / "weights"), "--n", "8",
               "--out", str(file)])
    mixtures = train.read_mixtures(Config(opponent=str(file)))
    for role in ROLES:
        folders, chances = mixtures[role]
        assert folders == [runs / "weights" / f"step_{step:06d}" for step in (2, 8)]
        measured(f"chances of the {role}s, their sum minus 1", abs(sum(chances) - 1), 1e-9)


def test_a_run_meets_the_mixture_of_a_crossplay_file(runs):
    folder = runs / "weights" / "step_000004"
    file = crossplay_file(runs / "x.json", {folder: (1.0, 1.0)})
    succeeds(*FLAGS, "--opponent", file, "--opponent-share", "1", "--steps", "2", "--out", runs / "mixture")
    assert [line["frozen"] for line in metrics(runs / "mixture")] == [1, 1]
    for step, role in enumerate(ROLES):
        logged, again = redrawn(runs / "mixture", step, role, folder)
        assert logged == again


# ---------------------------------------------------------------- bad input

def test_an_opponent_with_another_tokenizer_is_refused(tmp_path, runs):
    """It would read the token ids of the model's prompts as other words."""
    tokenizer = byte_tokenizer()
    model = new_model(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                                  num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                                  eos_token_id=tokenizer.eos_token_id), 0)
    save(tmp_path / "other", model.state_dict(), model, tokenizer)
    for play in ("attacker", "defender"):
        done = run("--play", play, "--opponent", tmp_path / "other", "--out", tmp_path / "run")
        assert done.returncode == 2 and "has other tokens than" in done.stderr, done.stderr
        assert not (tmp_path / "run").exists()


def test_what_cannot_be_an_opponent_is_refused_in_one_sentence(tmp_path, runs):
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    gone = crossplay_file(tmp_path / "gone.json", {tmp_path / "nowhere": (1.0, 1.0)})
    start = runs / "sft" / "step_000000"
    half, nan = (crossplay_file(tmp_path / f"{weight}.json", {start: (1.0, weight)})
                 for weight in (0.5, np.nan))
    for flags, words in ((["--opponent", "past", "--play", "attacker"], "are for --play self"),
                         (["--opponent", "runs/x"], "add --play attacker"),
                         (["--opponent", str(bad)], "cannot be read"),
                         (["--opponent", str(tmp_path / "no.json")], "cannot be read"),
                         (["--opponent", str(gone)], "nowhere"),
                         (["--opponent", str(half)], "cannot be read"),
                         (["--opponent", str(nan)], "cannot be read"),
                         (["--opponent", "past", "--opponent-share", "2"], "from 0 to 1")):
        done = run(*flags, "--out", tmp_path / "run")
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
