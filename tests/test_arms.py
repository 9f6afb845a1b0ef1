"""The arms of tests/arms.py get what they are said to get."""
import json
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import arms
import toy
import train
from selfplay import seeds_for_step

SEEDS = [0, 1]
STEPS, GAMES = 4, 32


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Namespace:
    """Two seeds of all arms but the variants of self-play, a few steps each; the arguments of arms.py."""
    folder = tmp_path_factory.mktemp("arms")
    train.main(["--sft-steps", "150", "--steps", "1", "--games", "4", "--no-exam", "--out", f"{folder}/sft"])
    flags = ["--model", f"{folder}/sft/step_000000", "--steps", str(STEPS), "--games", str(GAMES)]
    args = Namespace(out=folder, seeds=SEEDS, flags=flags)
    for arm in ("live", "attacker", "defender", *arms.POOLS):
        for seed in SEEDS:
            train.main(arms.arguments(arm, seed, args))
    return args


def recorded(out: Namespace, arm: str, seed: int) -> list:
    rows = (out.out / f"{arm}-{seed}.jsonl").read_text().splitlines()
    return [(row["attack"], row["harmful"]) for row in map(json.loads, rows)]


def games_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "games.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arm", ["start", "other", "uniform", "frozen"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_pool_has_at_most_as_many_attacks_of_each_label_as_live_play_wrote(out, arm, seed):
    live = Counter(harmful for _, harmful in arms.legal_attacks(out.out / f"live-{seed}"))
    pool = Counter(harmful for _, harmful in recorded(out, arm, seed))
    source = {"other": f"live-{1 - seed}", "frozen": f"attacker-{seed}"}.get(arm)
    print(arm, "live", live, "pool", pool)
    for label in (True, False):
        limit = live[label]
        if source:   # another run may have written fewer
            written = [attack for attack in arms.legal_attacks(out.out / source) if attack[1] == label]
            limit = min(limit, len(written))
        assert pool[label] == limit > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_distinct_pool_has_each_attack_once_and_as_many_as_live_play_found(out, seed):
    live = Counter(harmful for _, harmful in set(arms.legal_attacks(out.out / f"live-{seed}")))
    attacks = recorded(out, "distinct", seed)
    pool = Counter(harmful for _, harmful in attacks)
    print("live", live, "pool", pool)
    assert len(set(attacks)) == len(attacks) and pool == live


@pytest.mark.parametrize("arm", arms.POOLS)
def test_every_attack_of_a_pool_is_legal_and_about_a_training_pair(out, arm):
    for text, harmful in recorded(out, arm, 0):
        request = toy.parse(text)
        assert request.harmful == harmful and request.pair not in toy.HELD_OUT, text


def test_another_seeds_attacks_are_its_first_live_ones(out):
    other = arms.legal_attacks(out.out / "live-1")
    pool = recorded(out, "other", 0)
    for label in (True, False):
        mine = [attack for attack in pool if attack[1] == label]
        assert mine == [attack for attack in other if attack[1] == label][:len(mine)]


def test_uniform_attacks_have_every_depth_of_their_label_as_often():
    attacks = arms.uniform_attacks(6000, seed=0)
    hostile = [toy.parse(text) for text, _ in attacks if toy.is_hostile(toy.pair_of(text))]
    counts = Counter(request.depth for request in hostile)
    for parity in (0, 1):
        shares = np.array([counts[depth] for depth in range(parity, toy.MAX_DEPTH + 1, 2)])
        deviation = abs(shares / shares.sum() - 1 / 3).max() / (2 / 9 / shares.sum()) ** 0.5
        print(parity, shares, f"largest deviation: {deviation:.2f} standard errors")
        assert deviation < 4


@pytest.mark.parametrize("arm", ["live", "defender", *arms.POOLS])
def test_a_defender_answers_as_often_in_every_arm(out, arm):
    games = games_of(out.out / f"{arm}-0")
    by_step = Counter(game["step"] for game in games if game["verdict"] is not None)
    assert by_step == {step: GAMES for step in range(1, STEPS + 1)}


@pytest.mark.parametrize("arm", arms.POOLS)
def test_a_pools_defender_meets_as_many_attacks_as_that_of_self_play(out, arm):
    """Half of all games ask recorded attacks, and half of the others do so, too: there live play replays."""
    pool = set(recorded(out, arm, 0))
    games = games_of(out.out / f"{arm}-0")
    asked = [(game["seed"], game["harmful"]) for game in games if game["recorded"]]
    live = games_of(out.out / "live-0")
    of_live = sum(bool(game["recorded"] or game["attack"]) for game in live if game["step"] > 1)
    shares = len(asked) / len(games), of_live * STEPS / (STEPS - 1) / len(live)
    print(arm, "share of attacks, of the pool's and the live defender's games: {:.2f} {:.2f}".format(*shares))
    assert set(asked) <= pool
    assert abs(shares[0] - 0.75) < 4 * (0.25 / 2 / len(games)) ** 0.5   # half of the games draw: p = 0.5
    assert abs(shares[1] - shares[0]) < 0.15


def test_an_attack_is_asked_as_often_as_it_stands_in_the_file(tmp_path):
    """Two of three harmful rows are one attack: in twelve games that ask them, it is asked eight times."""
    at = [toy.Request(("burn", "castle"), ("king",) * depth).text for depth in (0, 0, 2, 1)]
    rows = [(text, toy.parse(text).harmful) for text in at]
    file = tmp_path / "pool.jsonl"
    lines = [json.dumps({"attack": text, "harmful": harmful}) + "\n" for text, harmful in rows]
    file.write_text("".join(lines))
    pools, _ = toy.read_seeds([], str(file), "defender", "")
    read = [(seed.text, seed.harmful) for pool in pools for seed in pool if seed.recorded]
    assert Counter(read) == Counter(rows)
    asked = [seed.text for step in range(6) for seed in seeds_for_step(pools, 8, seed=0, step=step)
             if seed.recorded and seed.harmful]
    assert Counter(asked) == {at[0]: 8, at[2]: 4}


def test_another_seeds_attacks_need_another_seed(tmp_path, capsys, monkeypatch):
    words = f"arms.py --out {tmp_path / 'runs'} --seeds 4 --arms live other"
    monkeypatch.setattr(arms.sys, "argv", words.split())
    with pytest.raises(SystemExit):
        arms.main()
    assert "needs a second seed" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_all_arms_of_a_seed_start_from_the_live_runs_start(out):
    for arm in ("attacker", "defender", *arms.POOLS):
        config = json.loads((out.out / f"{arm}-1" / "config.json").read_text())
        assert config["model"] == str(out.out / "live-1" / "step_000000")
        assert config["balance"] and config["seed"] == 1


def test_an_arm_waits_for_the_runs_that_it_is_made_from():
    assert arms.needs("live", 0, SEEDS) == []
    assert arms.needs("start", 0, SEEDS) == [("live", 0)]
    assert arms.needs("frozen", 1, SEEDS) == [("attacker", 1), ("live", 1)]
    assert arms.needs("other", 1, SEEDS) == [("live", 0), ("live", 1)]
    order = {arm: i for i, arm in enumerate(arms.ARMS)}
    assert all(order[need] < order[arm] for arm in arms.ARMS for need, _ in arms.needs(arm, 0, SEEDS))


def test_the_race_is_the_largest_rise_of_attack_success_and_the_end(tmp_path):
    asr = [0.5] * 5 + [0.1] * 5 + [0.9] * 5 + [0.0] * 5
    rows = [{"asr": a, "depth": 2.0 * a, "seconds": 1.0} for a in asr]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = arms.race(tmp_path)
    print(found)
    expected = {"start": 0.5, "low": 0.1, "peak": 0.9, "end": 0.0, "deepest": 1.8, "seconds": 20.0}
    assert found == pytest.approx(expected)


def test_the_entropy_of_attacks_by_hand():
    assert arms.entropy(["a", "a", "b", "b"]) == pytest.approx(np.log(2))
    assert arms.entropy(["a"] * 3) == 0


def test_a_run_without_an_attacker_has_no_race(tmp_path):
    rows = [{"asr": None, "depth": None, "seconds": 1.0}] * 8
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert arms.race(tmp_path) == {"seconds": 8.0}


def test_runs_of_other_settings_are_not_taken_for_finished_ones(tmp_path, capsys, monkeypatch):
    (tmp_path / "settings.json").write_text(json.dumps({"climbs": 0.15, "flags": []}))
    words = f"arms.py --out {tmp_path} --climbs 0.3 --seeds 4 --arms defender"
    monkeypatch.setattr(arms.sys, "argv", words.split())
    with pytest.raises(SystemExit):
        arms.main()
    assert '"climbs": 0.15' in capsys.readouterr().err


def test_an_arm_that_was_cut_off_goes_on_and_ends_as_the_whole_one_does(out, tmp_path):
    """The defender's run without its last step and checkpoint, as after a kill."""
    whole = out.out / "defender-0"
    cut = Namespace(out=tmp_path, seeds=SEEDS, flags=[*out.flags, "--save-every", "2"])
    words = arms.arguments("defender", 0, cut)
    words[words.index("--model", len(cut.flags)) + 1] = str(out.out / "live-0" / "step_000000")
    train.main([*words, "--steps", "2"])
    assert "--resume" in arms.arguments("defender", 0, cut) and "--resume" not in words
    train.main([*words, "--resume"])
    ours, theirs = (json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
                    for run in (tmp_path / "defender-0", whole))
    assert ours["step"] == theirs["step"] == STEPS
    assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-5)


def test_a_sweep_has_the_errors_of_every_start_and_repeats_no_finished_run(tmp_path, monkeypatch, capsys):
    for climbs in ("0.1", "0.3"):
        for seed in (4, 5):
            run = tmp_path / climbs / f"defender-{seed}"
            run.mkdir(parents=True)
            number = {"value": float(climbs) + seed}
            shown = dict.fromkeys(arms.SHOWN, number)
            (run / "ladder.json").write_text(json.dumps({"greedy": {"a": shown}, "sampled": {"a": shown}}))
            (run / "games.jsonl").write_text("")
            step = json.dumps({"asr": 0.5, "depth": 1.0, "seconds": 1.0})
            (run / "metrics.jsonl").write_text(f"{step}\n" * 5)
    words = f"arms.py --out {tmp_path} --climbs 0.1 0.3 --seeds 4 5 --arms defender"
    monkeypatch.setattr(arms.sys, "argv", words.split())
    arms.main()
    found = json.loads((tmp_path / "knob.json").read_text())["balanced error"]
    assert found == {"0.1": {"defender": [4.1, 5.1]}, "0.3": {"defender": [4.3, 5.3]}}
    assert (tmp_path / "knob.png").stat().st_size > 1000 and (tmp_path / "0.3" / "arms.json").exists()
    assert "climbs 0.3" in capsys.readouterr().out


def test_the_diversity_of_a_runs_attacks_by_hand(tmp_path):
    """Two steps: four attacks of which two are the same and won, then four different ones that lost."""
    texts = [["king", "king", "bank", "rat"], ["log", "wire", "king", "nail"]]
    rows = []
    for step, words in enumerate(texts, 1):
        for n, word in enumerate(words):
            text = toy.Request(("burn", word)).text
            won = step == 1 and word == "king"
            rows.append({"step": step, "game": n, "seed": text, "attack": text, "harmful": True,
                         "legal": True,
                         "verdict": {"response_harmful": won}})
    (tmp_path / "games.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = arms.diversity_of(tmp_path, 8, 4, "")
    print(found)
    assert found["distinct"] == 6 and found["distinct_step"] == 3.5 and found["distinct_peak"] == 3
    assert found["entropy"] == pytest.approx(-(3 / 8 * np.log(3 / 8) + 5 / 8 * np.log(1 / 8)))
    assert found["entropy_peak"] == pytest.approx(1.5 * np.log(2))
