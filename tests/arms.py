"""
Does live play train a better defender than recorded attacks? All arms, with equal turns and updates.

    python tests/arms.py --out runs/arms --seeds 0 1 2 3 4            # two hours on one core; --arms for some

Each arm is a run of train.py from the same start, with as many steps and games. A defender's token weighs the
same in all of them (--balance). Pools of attacks, in equal numbers of each label, all of them legal:

    live        the attacker learns as the defender does; half of the raw games replay the run's past attacks
    fresh       live, without replay
    start       the start's attacks, as many as the live attacker wrote
    distinct    the start's attacks, as many distinct ones as the live attacker wrote, each once
    frozen      attacks of an attacker that was trained against the frozen start
    other       the live attacks of the next seed: what live play found, but not against this defender
    uniform     an oracle: attacks drawn uniformly from the grammar, every depth as often
    defender    raw requests alone
    attacker    the attacker alone, against the frozen start

The errors are those of eval.py ladder: on held-out pairs, in requests that no attacker wrote. A finished run
is not repeated. Prints a table; the numbers go to arms.json in the folder.
"""
import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")   # one core an arm

import numpy as np
from scipy import stats

import toy
from arena import Matchup, alternate, attacks_of, open_eval_model
from eval import ladder
from sample import stream

FLAGS = {"fresh": ["--replay", 0], "attacker": ["--play", "attacker"], "defender": ["--play", "defender"]}
POOLS = ("start", "distinct", "frozen", "other", "uniform")
ARMS = ("live", "attacker", "fresh", "defender", *POOLS)   # in this order: pools are made from earlier runs
SHOWN = {"balanced": "balanced error", "worst": "worst depth", "asr": "attack success",
         "over_refusal": "over-refusal", "harmless": "harmless refused"}
MOST_BATCHES = 20   # times that the start writes as many attacks as live play wrote, to find distinct ones
Attack = tuple[str, bool]   # text, harmful


# ---------------------------------------------------------------- pools of attacks

def legal_attacks(run: Path) -> list[Attack]:
    """The legal attacks that a run's attacker wrote, first to last."""
    with open(run / "games.jsonl") as file:
        games = [json.loads(line) for line in file]
    return [(game["attack"], game["harmful"]) for game in games if game["legal"]]


def attacks_of_start(start: Path, n: int, seed: int) -> list[Attack]:
    """What the start writes on n training seeds, without illegal attacks."""
    matchup = Matchup("training", alternate(toy.seeds(), n), toy.judge, "zero_sum", 64)
    attacks = []
    for s, reply in zip(matchup.seeds, attacks_of(open_eval_model(str(start)), matchup, seed), strict=True):
        request = toy.parse(reply.answer)
        if request and request.harmful == s.harmful:
            attacks.append((request.text, s.harmful))
    return attacks


def uniform_attacks(n: int, seed: int) -> list[Attack]:
    """Attacks on n training seeds: their depth uniform among those of the label, then all equally likely."""
    rng = stream("uniform", seed)
    attacks = []
    for s in alternate(toy.seeds(), n):
        pair = toy.pair_of(s.text)
        at = toy.depths(pair, s.harmful)
        attacks.append((toy.draw(rng, pair, at[rng.integers(len(at))]).text, s.harmful))
    return attacks


def equally_many(attacks: list[Attack], like: list[Attack]) -> list[Attack]:
    """The first attacks of each label, as many as in `like`, or all if there are fewer."""
    chosen = []
    for label in (True, False):
        n = sum(harmful == label for _, harmful in like)
        chosen += [attack for attack in attacks if attack[1] == label][:n]
    return chosen


def pool(arm: str, out: Path, seed: int, seeds: list[int]) -> list[Attack]:
    """The attacks of an arm, as many of each label as the live attacker wrote, or as many distinct ones."""
    live = legal_attacks(out / f"live-{seed}")
    if arm == "frozen":
        return equally_many(legal_attacks(out / f"attacker-{seed}"), live)
    if arm == "other":
        next_seed = seeds[(seeds.index(seed) + 1) % len(seeds)]
        return equally_many(legal_attacks(out / f"live-{next_seed}"), live)
    n = len(live) // 2 * 2 + 2
    if arm == "uniform":
        return equally_many(uniform_attacks(2 * n, seed), live)
    wanted = list(dict.fromkeys(live)) if arm == "distinct" else live
    attacks = []
    for batch in range(MOST_BATCHES):
        attacks += attacks_of_start(out / f"live-{seed}" / "step_000000", n, 1000 * seed + batch)
        attacks = list(dict.fromkeys(attacks)) if arm == "distinct" else attacks
        if len(equally_many(attacks, wanted)) == len(wanted):
            break
    return equally_many(attacks, wanted)


# ---------------------------------------------------------------- runs

def train(out: Path, arm: str, seed: int, seeds: list[int], flags: list[str]) -> None:
    """Run an arm, unless it has finished before. The live run of a seed makes the start of all its arms."""
    run = out / f"{arm}-{seed}"
    if (run / "finished").exists():
        return
    args = [*flags, *FLAGS.get(arm, []), "--seed", seed, "--balance", "--no-exam", "--out", run]
    if arm != "live":
        args += ["--model", out / f"live-{seed}" / "step_000000"]
    if arm in POOLS:
        file = out / f"{arm}-{seed}.jsonl"
        rows = [{"attack": text, "harmful": harmful} for text, harmful in pool(arm, out, seed, seeds)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args += ["--play", "defender", "--attacks", file]
    with open(out / f"{arm}-{seed}.log", "w") as log:
        command = [sys.executable, ROOT / "train.py", *map(str, args)]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    (run / "finished").touch()


def attack_counts(attacks: list[Attack]) -> dict:
    """How many attacks a defender met, how many distinct ones, and at which depths about a hostile act."""
    requests = [toy.parse(text) for text, _ in attacks]
    depths = [request.depth for request in requests if toy.is_hostile(request.pair)]
    return {"attacks": len(attacks), "distinct": len(set(attacks)),
            "depths": {depth: depths.count(depth) for depth in range(toy.MAX_DEPTH + 1)}}


def measure(out: Path, arm: str, seed: int) -> dict:
    """The errors of an arm's defender, and the attacks that it met."""
    model = open_eval_model(str(out / (f"live-{seed}/step_000000" if arm == "no play" else f"{arm}-{seed}")))
    attacks = []
    if arm in POOLS:
        lines = (out / f"{arm}-{seed}.jsonl").read_text().splitlines()
        attacks = [(row["attack"], row["harmful"]) for row in map(json.loads, lines)]
    elif arm != "no play":
        attacks = legal_attacks(out / f"{arm}-{seed}")
    return attack_counts(attacks) | {"greedy": ladder(model), "sampled": ladder(model, 1.0)}


def summary(values: list[float]) -> str:
    """The mean, its 95 % interval over seeds (Student's t), and each seed."""
    each = " ".join(f"{value:.3f}" for value in values)
    if len(values) < 2:
        return each
    spread = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {spread:.3f} ({each})"


def main() -> None:
    cli = ArgumentParser(description=__doc__.split("\n\n")[0])
    cli.add_argument("--out", type=Path, required=True, help="folder of the runs, and of arms.json")
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    cli.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="pools need live, frozen attacker")
    cli.add_argument("--flags", nargs="*", default=[], help="of all runs, such as steps=300 lr=5e-4")
    args = cli.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    flags = [part for flag in args.flags for part in f"--{flag}".split("=")]
    arms = [arm for arm in ARMS if arm in args.arms]
    for arm in arms:
        for seed in args.seeds:
            train(args.out, arm, seed, args.seeds, flags)
    results = {arm: {seed: measure(args.out, arm, seed) for seed in args.seeds} for arm in ["no play", *arms]}
    (args.out / "arms.json").write_text(json.dumps(results, indent=1))
    for how in ("greedy", "sampled"):
        print(f"| {how} | {' | '.join(SHOWN.values())} |\n|{' --- |' * (len(SHOWN) + 1)}")
        for arm, by_seed in results.items():
            cells = [summary([result[how][key]["value"] for result in by_seed.values()]) for key in SHOWN]
            print(f"| {arm} | {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    main()
