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
import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")   # one core an arm

import numpy as np
from scipy import stats

import toy
from arena import alternate, attacks_of, Matchup, open_eval_model
from eval import ladder
from launch import finished, start
from sample import stream

ARMS = {   # flags of train.py; a pool is known by its function below
    "live": [], "fresh": ["--replay", 0], "attacker": ["--play", "attacker"],
    "defender": ["--play", "defender"]}
POOLS = ("start", "distinct", "frozen", "other", "uniform")
SHOWN = {"balanced": "balanced error", "worst": "worst depth", "asr": "attack success",
         "over_refusal": "over-refusal", "harmless": "harmless refused"}
MOST_TRIES = 10   # attacks sampled for the distinct pool, in multiples of those that live play wrote
Attack = tuple[str, bool]   # text, harmful


def legal_attacks(run: Path) -> list[Attack]:
    """The legal attacks that a run's attacker wrote."""
    with open(run / "games.jsonl") as file:
        games = [json.loads(line) for line in file]
    return [(game["attack"], game["harmful"]) for game in games if game["legal"]]


def attacks_of_start(model: str, n: int, seed: int) -> list[Attack]:
    """n attacks on the training seeds by a frozen model, without the illegal ones."""
    matchup = Matchup("training", alternate(toy.seeds(), n), toy.judge, "zero_sum", 64)
    written = [reply.answer for reply in attacks_of(open_eval_model(model), matchup, seed)]
    requests = [(toy.parse(text), s.harmful) for text, s in zip(written, matchup.seeds, strict=True)]
    return [(request.text, harmful) for request, harmful in requests if request and request.harmful == harmful]


def equally_many(pool: list[Attack], like: list[Attack]) -> list[Attack]:
    """The first attacks of a pool, of each label as many as in `like`, or all if there are fewer."""
    chosen = []
    for label in (True, False):
        n = sum(harmful == label for _, harmful in like)
        chosen += [attack for attack in pool if attack[1] == label][:n]
    return chosen


def pool(arm: str, out: Path, seed: int, seeds: list[int]) -> list[Attack]:
    """The attacks of an arm."""
    live = legal_attacks(out / f"live-{seed}")
    model = str(out / f"live-{seed}" / "step_000000")
    if arm == "start":
        return equally_many(attacks_of_start(model, 2 * len(live) // 2 + len(live) // 10 * 2, seed), live)
    if arm == "distinct":
        wanted, found = list(dict.fromkeys(live)), {}
        for i in range(MOST_TRIES):
            found |= dict.fromkeys(attacks_of_start(model, len(live) // 2 * 2, 1000 * seed + i))
            if len(equally_many(list(found), wanted)) == len(wanted):
                break
        return equally_many(list(found), wanted)
    if arm == "frozen":
        return equally_many(legal_attacks(out / f"attacker-{seed}"), live)
    if arm == "other":
        other = seeds[(seeds.index(seed) + 1) % len(seeds)]
        return equally_many(legal_attacks(out / f"live-{other}"), live)
    rng = stream("uniform", seed)
    requests = []
    for text, harmful in alternate_texts(len(live)):
        at = toy.depths(toy.pair_of(text), harmful)
        requests.append(toy.draw(rng, toy.pair_of(text), at[rng.integers(len(at))]))
    return equally_many([(request.text, request.harmful) for request in requests], live)


def alternate_texts(n: int) -> list[Attack]:
    return [(s.text, s.harmful) for s in alternate(toy.seeds(), n + n % 2)]


def train(out: Path, arm: str, seed: int, seeds: list[int], flags: list[str]) -> None:
    """Run an arm, if it has not finished before. The first arm of a seed makes the start of all."""
    run = out / f"{arm}-{seed}"
    if (run / "latest").exists() and json.loads((run / "config.json").read_text())["steps"] == int(
            (run / "latest").read_text().strip()[5:]):
        return
    args = ["--seed", seed, "--balance", "--no-exam", "--save-every", 10 ** 6, *flags, "--out", run]
    if arm != "live":
        args += ["--model", out / f"live-{seed}" / "step_000000"]
    if arm in POOLS:
        attacks = pool(arm, out, seed, seeds)
        file = out / f"{arm}-{seed}.jsonl"
        file.write_text("".join(json.dumps({"attack": text, "harmful": harmful}) + "\n"
                                for text, harmful in attacks))
        args += ["--play", "defender", "--attacks", file]
    done = finished(start([*args, *ARMS.get(arm, [])]), timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]


def summary(values: list[float]) -> str:
    """The mean, its 95 % interval over seeds (Student's t), and each seed."""
    each = " ".join(f"{value:.3f}" for value in values)
    if len(values) < 2:
        return each
    spread = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {spread:.3f} ({each})"


def attack_counts(out: Path, arm: str, seed: int) -> dict:
    """How many attacks a defender met, how many distinct ones, and their depths about hostile acts."""
    file = out / f"{arm}-{seed}.jsonl"
    if arm in POOLS:
        attacks = [(row["attack"], row["harmful"]) for row in map(json.loads, file.open())]
    else:
        attacks = legal_attacks(out / f"{arm}-{seed}")
    requests = [toy.parse(text) for text, _ in attacks]
    depths = [r.depth for r in requests if toy.is_hostile(r.pair)]
    share = {depth: depths.count(depth) / max(1, len(depths)) for depth in range(toy.MAX_DEPTH + 1)}
    return {"attacks": len(attacks), "distinct": len(set(attacks)), "depths": share}


def main() -> None:
    cli = ArgumentParser(description=__doc__.split("\n\n")[0])
    cli.add_argument("--out", type=Path, required=True, help="folder of the runs, and of arms.json")
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    order = ["live", "fresh", "attacker", "defender", *POOLS]
    cli.add_argument("--arms", nargs="+", choices=order, default=order, help="live and attacker come first")
    cli.add_argument("--flags", nargs="*", default=[], help="of all runs, such as steps=300")
    args = cli.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    flags = [part for flag in args.flags for part in f"--{flag}".split("=")]
    for arm in order:
        for seed in args.seeds if arm in args.arms else ():
            train(args.out, arm, seed, args.seeds, flags)
    results = {}
    for arm in ["no play", *args.arms]:
        for seed in args.seeds:
            folder = args.out / (f"live-{seed}/step_000000" if arm == "no play" else f"{arm}-{seed}")
            model = open_eval_model(str(folder))
            counts = {} if arm == "no play" else attack_counts(args.out, arm, seed)
            results.setdefault(arm, {})[seed] = counts | {"greedy": ladder(model), "sampled": ladder(model, 1.0)}
    (args.out / "arms.json").write_text(json.dumps(results, indent=1))
    for how in ("greedy", "sampled"):
        print(f"| {how} | {' | '.join(SHOWN.values())} |\n|{' --- |' * (len(SHOWN) + 1)}")
        for arm, by_seed in results.items():
            cells = [summary([result[how][key]["value"] for result in by_seed.values()]) for key in SHOWN]
            print(f"| {arm} | {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    main()
