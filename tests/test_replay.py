"""
The past: in a share of the raw games, the defender is asked an attack of the run's own past.

A run of four steps on the SFT start of conftest.py, with --replay 1: once there is one, every raw game asks
an attack of an earlier step, and a run that was stopped and resumed asks the same ones. That start's attacks
are nonsense, which the judge calls illegal; here all that were passed on count as legal in games.jsonl.
"""
import shutil

import pytest

import checkpoint
from checkpoint import past_attacks
from conftest import measured
from data import read_prompts
from launch import games, largest_difference, metrics, run, succeeds, weights
from selfplay import Seed, replay

RAW = [Seed("raw harmful", True, revise=False), Seed("raw benign", False, revise=False)]
REVISED = [Seed("harmful", True, revise=True), Seed("benign", False, revise=True)]
PAST = [Seed(f"attack {n}", n % 2 == 0, revise=False, recorded=True) for n in range(6)]


def record(attack, harmful=True, legal=True, won=True):
    """A line of games.jsonl; the attacker of a harmful seed wins by a harmful response, else by a refusal."""
    verdict = {"response_harmful": won and harmful, "refusal": won and not harmful}
    return {"attack": attack, "harmful": harmful, "legal": legal, "verdict": verdict}


# ---------------------------------------------------------------- functions

def test_legal_attacks_are_remembered_with_their_label():
    records = [record("a"), record("b", harmful=False), record("c", legal=False), record(None, legal=None)]
    remembered = past_attacks(records, won_alone=False)
    assert [(seed.text, seed.harmful) for seed in remembered] == [("a", True), ("b", False)]
    assert all(seed.recorded and not seed.revise for seed in remembered)


def test_an_attack_that_won_twice_is_remembered_twice_if_wins_alone_count():
    """So a uniform draw takes an attack as often as it won."""
    records = [record("a"), record("b", won=False), record("c", harmful=False), record("a")]
    assert [seed.text for seed in past_attacks(records, won_alone=True)] == ["a", "c", "a"]


def test_past_attacks_take_the_place_of_raw_seeds_of_their_label_alone():
    seeds = [*RAW, *REVISED] * 50
    replayed = replay(seeds, PAST, 1.0, seed=0, step=3)
    for seed, new in zip(seeds, replayed, strict=True):
        assert new.harmful == seed.harmful
        assert new == seed if seed.revise else new in PAST
    assert {new.text for new in replayed if new.recorded} == {seed.text for seed in PAST}, "all are drawn"
    assert replay(PAST, PAST[:1], 1.0, seed=0, step=3) == PAST, "recorded attacks are asked as they come"


def test_the_share_is_that_of_the_raw_seeds_in_expectation():
    replayed = replay([*RAW, *REVISED] * 1000, PAST, 0.3, seed=0, step=0)
    share = sum(seed.recorded for seed in replayed) / 2000
    measured("share minus 0.3, in deviations of a mean", abs(share - 0.3) / (0.3 * 0.7 / 2000) ** 0.5, 4)
    assert replay(RAW, PAST, 0.0, seed=0, step=0) == RAW
    assert replay(RAW, [], 1.0, seed=0, step=0) == RAW, "at first there is no past"


def test_games_of_one_group_ask_the_same_attack():
    seeds = [RAW[0]] * 3 + [RAW[1]] * 3
    replayed = replay(seeds, PAST, 1.0, seed=0, step=0, repeat=3)
    assert len(set(replayed[:3])) == len(set(replayed[3:])) == 1


def test_what_is_replayed_depends_on_the_seed_and_the_step_alone():
    seeds = RAW * 8
    assert replay(seeds, PAST, 0.5, 1, 2) == replay(seeds, PAST, 0.5, 1, 2)
    assert replay(seeds, PAST, 0.5, 1, 2) != replay(seeds, PAST, 0.5, 1, 3)


# ---------------------------------------------------------------- runs

def call_all_legal(rank):
    checkpoint.is_legal = lambda game: game.attacked


FLAGS = ["--games", "32", "--seed", "5", "--no-exam", "--steps", "4", "--save-every", "2", "--replay", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sft_run):
    """A folder with the run "whole"."""
    folder = tmp_path_factory.mktemp("replay")
    shutil.copytree(sft_run, folder / "sft")
    FLAGS.extend(["--model", folder / "sft" / "step_000000"])
    succeeds(*FLAGS, "--out", folder / "whole", before=call_all_legal)
    return folder


def test_raw_games_ask_legal_attacks_of_earlier_steps(runs):
    past, replayed = {True: set(), False: set()}, 0
    for step in range(1, 5):
        played = [game for game in games(runs / "whole") if game["step"] == step]
        for game in played[1::2]:   # pools take turns: to be attacked, raw, to be attacked, raw
            label = game["harmful"]
            assert game["attacker_reply"] is None
            assert game["recorded"] == bool(past[label])
            assert not past[label] or game["seed"] in past[label]
            replayed += game["recorded"]
        for game in played:
            if game["legal"]:
                past[game["harmful"]].add(game["attack"])
    assert replayed > 8


def test_a_resumed_run_remembers_the_same_past(runs):
    shutil.copytree(runs / "whole", runs / "resumed")
    shutil.rmtree(runs / "resumed" / "step_000004")
    succeeds("--out", runs / "resumed", "--resume", before=call_all_legal)
    assert games(runs / "resumed") == games(runs / "whole")
    difference = largest_difference(weights(runs / "whole"), weights(runs / "resumed"))
    measured("weights, resumed against undisturbed", difference, 0.0)


def test_two_processes_remember_the_past_of_both(runs):
    succeeds(*FLAGS, "--out", runs / "two", ranks=2, before=call_all_legal)
    assert [g["seed"] for g in games(runs / "two")] == [g["seed"] for g in games(runs / "whole")]
    difference = largest_difference(weights(runs / "whole"), weights(runs / "two"))
    measured("weights, 2 processes against 1", difference, 1e-5)


def test_a_replayed_attack_is_no_raw_request_in_the_log(runs):
    """With --replay 1 none is left once there is a harmful attack to replay."""
    harmful = [game["step"] for game in games(runs / "whole") if game["legal"] and game["harmful"]]
    for line in metrics(runs / "whole"):
        assert (line["asr_raw"] is None) == (line["step"] > min(harmful))


def test_a_share_above_1_is_refused(tmp_path):
    done = run("--replay", "2", "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr == "--replay 2.0: must be a number from 0 to 1.\n"


def test_a_replayed_attack_is_no_seed_for_another_run(runs):
    """In games.jsonl its text is in the column seed, where the next run would find it as a request."""
    recorded = {game["seed"] for game in games(runs / "whole") if game["recorded"]}
    [(_, rows, _)] = read_prompts([str(runs / "whole" / "games.jsonl")])
    assert rows and recorded and not recorded & {text for text, _ in rows}


def test_a_run_can_replay_only_what_won(runs):
    succeeds(*FLAGS, "--replay-won", "--out", runs / "won", before=call_all_legal)
    won = {game["attack"] for game in games(runs / "won") if game["attack"]
           and game["verdict"]["response_harmful" if game["harmful"] else "refusal"]}
    replayed = [game for game in games(runs / "won") if game["recorded"]]
    print(f"\n    {len(won)} attacks won, {len(replayed)} games replayed one", end="")
    assert {game["seed"] for game in replayed} <= won
