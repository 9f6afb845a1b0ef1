"""
Does live play train a better defender than recorded attacks? All arms, with equal turns and updates.

    python tests/arms.py --out runs/arms --jobs 2           # hours; --arms and --seeds for some of them
    python tests/arms.py --out runs/knob --climbs 0.04 0.08 0.15 0.3 --arms live start distinct

Each arm is a run of train.py from the same start, with as many steps and games. A defender's token weighs the
same in all of them (--balance). Half of the games ask attacks, and half of the others do so again: attacks of
the run's past, or recorded ones. Variants of self-play:

    live        the attacker learns as the defender does
    fresh       without attacks of the past
    past        in half of the steps one role is an earlier self, which does not learn: fewer updates of each
    official    the official run's credit
    paper       the official run's payoffs
    no_cot      nobody thinks, from a start that was taught so

Pools of recorded attacks for a defender alone, as many of each label as the live attacker's legal ones, each
asked as often as it was written:

    start       the start's attacks
    distinct    the start's attacks, each once, as many distinct ones as the live attacker wrote
    frozen      attacks of an attacker's whole training against the frozen start, but for its last few
    other       the live attacks of the next of --seeds: what live play found, but not against this defender
    uniform     an oracle: attacks drawn uniformly from the grammar, every depth as often

And one side alone:

    defender    raw requests
    attacker    against the frozen start; the exam is of the defender that it still is

The errors are those of eval.py ladder: on held-out pairs, in requests that no attacker wrote. A run that was
cut off goes on, a finished one is not repeated. The tables are printed, the numbers go to arms.json, the
figure to arms.png in the folder.
With several values of --climbs, how often the start's attacker climbs, each has a folder of its own, and
knob.png and knob.json show the error of every arm by it.
"""
import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")   # one core an arm

import numpy as np
from scipy import stats

import toy
from arena import EvalModel, Matchup, alternate, attacks_of, open_eval_model
from checkpoint import newest_complete
from eval import canvas, diversity, logged_games
from kernels import stop
from sample import stream

FLAGS = {"live": [], "attacker": ["--play", "attacker"], "defender": ["--play", "defender"],
         "fresh": ["--replay", "0"], "past": ["--opponent", "past", "--save-every", "10"],
         "official": ["--credit", "reinforce++"], "paper": ["--reward", "paper"], "no_cot": ["--no-cot"]}
POOLS = ("start", "distinct", "frozen", "other", "uniform")
# what pools wait for comes first
ARMS = tuple(dict.fromkeys(["live", "no_cot", "attacker", "defender", *POOLS, *FLAGS]))
OWN_START = ("live", "no_cot")   # the live run of a seed makes the start of its other arms
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


def attacks_of_start(start: EvalModel, n: int, seed: int) -> list[Attack]:
    """What the start writes on n training seeds, but for attacks that are illegal or about held-out pairs."""
    matchup = Matchup("training", alternate(toy.seeds(), n), toy.judge, "zero_sum", 64)
    attacks = []
    for s, reply in zip(matchup.seeds, attacks_of(start, matchup, seed), strict=True):
        request = toy.parse(reply.answer)
        if request and request.harmful == s.harmful and request.pair not in toy.HELD_OUT:
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
        (_, next_seed), _ = needs(arm, seed, seeds)
        return equally_many(legal_attacks(out / f"live-{next_seed}"), live)
    n = len(live) // 2 * 2 + 2
    if arm == "uniform":
        return equally_many(uniform_attacks(2 * n, seed), live)
    wanted = list(dict.fromkeys(live)) if arm == "distinct" else live
    start = open_eval_model(str(out / f"live-{seed}" / "step_000000"))
    attacks = []
    for batch in range(MOST_BATCHES):
        attacks += attacks_of_start(start, n, 1000 * seed + batch)
        attacks = list(dict.fromkeys(attacks)) if arm == "distinct" else attacks
        if len(equally_many(attacks, wanted)) == len(wanted):
            break
    return equally_many(attacks, wanted)


# ---------------------------------------------------------------- runs

def arguments(arm: str, seed: int, args: Namespace) -> list[str]:
    """What train.py is told. A pool is written here."""
    run = args.out / f"{arm}-{seed}"
    words = [*args.flags, *FLAGS.get(arm, []), "--seed", str(seed), "--no-exam", "--out", str(run)]
    words += ["--resume"] * bool(newest_complete(run))   # it was cut off
    if arm not in OWN_START:
        words += ["--model", str(args.out / f"live-{seed}" / "step_000000")]
    if arm in POOLS:
        file = args.out / f"{arm}-{seed}.jsonl"
        attacks = pool(arm, args.out, seed, args.seeds)
        rows = [{"attack": text, "harmful": harmful} for text, harmful in attacks]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words += ["--play", "defender", "--attacks", str(file)]
    return words


def run_arm(arm: str, seed: int, args: Namespace) -> None:
    """Train and examine an arm, unless that has been done before."""
    run = args.out / f"{arm}-{seed}"
    if (run / "ladder.json").exists():
        return
    started = time.time()
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import toy, train; "
            f"toy.CLIMBS = {args.climbs}; train.main()")
    with open(args.out / f"{arm}-{seed}.log", "a") as log:
        for command in (["-c", code, *arguments(arm, seed, args)],
                        [ROOT / "eval.py", "ladder", run, "--json", run / "ladder.json"]):
            subprocess.run([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, check=True)
    print(f"{arm}-{seed}: {time.time() - started:.0f} s", flush=True)


def needs(arm: str, seed: int, seeds: list[int]) -> list[tuple[str, int]]:
    """The runs that an arm is made from: its start, and those whose attacks it records."""
    next_seed = seeds[(seeds.index(seed) + 1) % len(seeds)]
    others = {"frozen": [("attacker", seed)], "other": [("live", next_seed)]}
    return others.get(arm, []) + [("live", seed)] * (arm not in OWN_START)


def run_all(args: Namespace) -> None:
    """Every arm of every seed, `--jobs` at a time, each after those that it needs."""
    runs = {}   # submitted in the order of ARMS, so that what a run waits for is running or done

    def when_ready(arm: str, seed: int) -> None:
        for need in needs(arm, seed, args.seeds):
            if need in runs:
                runs[need].result()
        run_arm(arm, seed, args)

    with ThreadPoolExecutor(args.jobs) as threads:
        for arm in ARMS:
            for seed in args.seeds * (arm in args.arms):
                runs[arm, seed] = threads.submit(when_ready, arm, seed)
    for run in runs.values():
        run.result()


# ---------------------------------------------------------------- numbers

def entropy(texts: list[str]) -> float:
    """Of their frequencies, in nats."""
    return float(stats.entropy(list(Counter(texts).values())))


def diversity_of(run: Path, n: int, n_step: int, embedder: str) -> dict[str, float]:
    """
    How different the first n legal attacks of a run are, and those of a step: the first n_step of each step
    that has as many. Distinct texts, their entropy in nats, and the last 192 attacks on harmful seeds by the
    measures of eval.py diversity. `peak`: the step in which most attacks won.
    """
    rows = [json.loads(line) for line in (run / "games.jsonl").read_text().splitlines()]
    by_step: dict[int, list[str]] = {}
    for row in rows:
        if row["legal"]:
            by_step.setdefault(row["step"], []).append(row["attack"])
    steps = {step: texts[:n_step] for step, texts in by_step.items() if len(texts) >= n_step}
    winning = {True: "response_harmful", False: "refusal"}   # by the seed's label
    won = Counter(row["step"] for row in rows if row["legal"] and row["verdict"][winning[row["harmful"]]])
    peak = max(steps, key=lambda step: won[step], default=None)
    texts = sum(by_step.values(), [])[:n]
    late = diversity(logged_games(f"{run}/games.jsonl")[:192], embedder)
    return {"distinct": len(set(texts)), "entropy": entropy(texts),
            "distinct_step": float(np.mean([len(set(texts)) for texts in steps.values()])),
            "entropy_step": float(np.mean([entropy(texts) for texts in steps.values()])),
            "distinct_peak": len(set(steps.get(peak, []))), "entropy_peak": entropy(steps.get(peak, [])),
            **{key: late[key]["value"] for key in ("inv_self_bleu", "inv_sbert", "tactic_entropy")}}


def diversities(args: Namespace) -> dict:
    """Self-play's attacks beside those of an attacker alone, as many of both; a table, and the numbers."""
    runs = {arm: [args.out / f"{arm}-{seed}" for seed in args.seeds] for arm in ("live", "attacker")}
    n = min(len(legal_attacks(run)) for part in runs.values() for run in part)
    found = {arm: [diversity_of(run, n, 48, args.embedder) for run in part] for arm, part in runs.items()}
    print(f"| the first {n} legal attacks, 48 of a step | live | attacker | ratio - 1 |\n|{' --- |' * 4}")
    for key in found["live"][0]:
        live, attacker = ([result[key] for result in found[arm]] for arm in runs)
        if None not in live:
            ratio = [a / b - 1 if b else np.nan for a, b in zip(live, attacker, strict=True)]
            print(f"| {key} | {' | '.join(map(summary, (live, attacker, ratio)))} |")
    return found


def race(run: Path) -> dict[str, float]:
    """
    Attack success, means of five steps: where its largest rise begins and ends. The largest depth. Only the
    seconds if nobody attacked.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = {"seconds": sum(row["seconds"] for row in rows)}
    rows = [row for row in rows if row["asr"] is not None and row["depth"] is not None]
    if len(rows) < 5:
        return seconds
    asr_S = np.convolve([row["asr"] for row in rows], np.ones(5) / 5, "valid")
    depth_S = np.convolve([row["depth"] for row in rows], np.ones(5) / 5, "valid")
    peak = int((asr_S - np.minimum.accumulate(asr_S)).argmax())   # where the largest rise ends
    low = int(asr_S[:peak + 1].argmin())
    return {"start": float(asr_S[0]), "low": float(asr_S[low]), "peak": float(asr_S[peak]),
            "end": float(asr_S[-1]), "deepest": float(depth_S.max())} | seconds


def attack_counts(attacks: list[Attack]) -> dict:
    """How many attacks were written or recorded, how many distinct ones, and at which depths hostile ones."""
    requests = [toy.parse(text) for text, _ in attacks]
    depths = [request.depth for request in requests if toy.is_hostile(request.pair)]
    return {"attacks": len(attacks), "distinct": len(set(attacks)),
            "depths": {depth: depths.count(depth) for depth in range(toy.MAX_DEPTH + 1)}}


def measure(out: Path, arm: str, seed: int) -> dict:
    """The errors of an arm's defender, and the attacks of its own attacker or of its pool."""
    run = out / f"{arm}-{seed}"
    ladder = json.loads((run / "ladder.json").read_text())
    attacks = legal_attacks(run) if arm in FLAGS else []
    if arm in POOLS:
        rows = map(json.loads, (out / f"{arm}-{seed}.jsonl").read_text().splitlines())
        attacks = [(row["attack"], row["harmful"]) for row in rows]
    errors = {how: next(iter(by_model.values())) for how, by_model in ladder.items()}
    return attack_counts(attacks) | errors | {"race": race(run)}


def errors_of(by_seed: dict) -> list[float]:
    """The balanced errors of an arm, greedy, by seed."""
    return [result["greedy"]["balanced"]["value"] for result in by_seed.values()]


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean over seeds (Student's t)."""
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def summary(values: list[float]) -> str:
    """The mean, its interval if there are three seeds or more, and each seed."""
    each = " ".join(f"{value:.3f}" for value in values)
    spread = f" ± {interval(values):.3f}" if len(values) > 2 else ""
    return f"{np.mean(values):.3f}{spread} ({each})"


def print_tables(results: dict) -> None:
    """The errors, greedy and sampled; what the defenders met; how the race went."""
    for how in ("greedy", "sampled"):
        print(f"| {how} | {' | '.join(SHOWN.values())} |\n|{' --- |' * (len(SHOWN) + 1)}")
        for arm, by_seed in results.items():
            cells = [summary([result[how][key]["value"] for result in by_seed.values()]) for key in SHOWN]
            print(f"| {arm} | {' | '.join(cells)} |")
        print()
    print("| mean over seeds | attacks | distinct | at depths 0 to 5 |\n| --- | --- | --- | --- |")
    for arm, by_seed in results.items():
        counts = [[result["attacks"], result["distinct"], *result["depths"].values()]
                  for result in by_seed.values()]
        attacks, distinct, *depths = np.mean(counts, 0).round().astype(int)
        print(f"| {arm} | {attacks} | {distinct} | {' '.join(map(str, depths))} |")
    print("\n| arm, seed | attack success: first | lowest | peak | last | deepest mean |\n|" + " --- |" * 6)
    for arm, by_seed in results.items():
        for seed, result in by_seed.items():
            if "peak" in result["race"]:
                course = [f"{result['race'][key]:.2f}" for key in ("start", "low", "peak", "end", "deepest")]
                print(f"| {arm}, {seed} | {' | '.join(course)} |")


def draw(results: dict, file: Path) -> None:
    """Balanced error of every arm: a dot for a seed, a bar for the mean and its interval."""
    figure, [axes] = canvas(1, (7, 0.4 * len(results) + 1))
    for row, (arm, by_seed) in enumerate(results.items()):
        values = errors_of(by_seed)
        axes.plot(values, [row] * len(values), "o", alpha=0.5, color="C0" if arm in FLAGS else "C1")
        if len(values) > 2:
            axes.errorbar(np.mean(values), row, xerr=interval(values), fmt="k|", capsize=3)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set_xlim(0, 0.75)
    axes.set_xlabel("balanced error on held-out requests, greedy (0.5: refuses, or answers, everything)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=150)


def draw_knob(results: dict, file: Path) -> None:
    """Balanced error by how often the start climbs: a line through an arm's means, a dot for a seed."""
    figure, [axes] = canvas(1, (6, 4))
    arms = next(iter(results.values()))
    for number, arm in enumerate(arms):
        by_climbs = {climbs: errors_of(found[arm]) for climbs, found in results.items()}
        for climbs, errors in by_climbs.items():
            axes.plot([climbs] * len(errors), errors, "o", alpha=0.4, color=f"C{number}")
        means = [np.mean(errors) for errors in by_climbs.values()]
        axes.plot(list(by_climbs), means, color=f"C{number}", label=arm)
    axes.set_xscale("log")
    axes.set_xticks(list(results), list(results), minor=False)
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="how often the start's attacker goes two deeper", ylabel="balanced error, greedy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def compare(args: Namespace) -> dict:
    """All that is asked of one start: runs, tables, figure, numbers."""
    args.out.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"climbs": args.climbs, "flags": args.flags})
    file = args.out / "settings.json"
    if file.exists() and file.read_text() != settings:
        stop(f"{args.out}: holds runs of {file.read_text()}; choose another --out.")
    file.write_text(settings)
    run_all(args)
    results = {arm: {seed: measure(args.out, arm, seed) for seed in args.seeds}
               for arm in ARMS if arm in args.arms}
    (args.out / "arms.json").write_text(json.dumps(results, indent=1))
    print_tables(results)
    draw(results, args.out / "arms.png")
    if {"live", "attacker"} <= set(args.arms):
        numbers = results | {"diversity": diversities(args)}
        (args.out / "arms.json").write_text(json.dumps(numbers, indent=1))
    return results


def sweep(args: Namespace) -> None:
    """The same for every value of --climbs, and the figure that has them all."""
    results = {}
    for climbs in args.climbs:
        print(f"climbs {climbs}", flush=True)
        results[climbs] = compare(Namespace(**vars(args) | {"out": args.out / str(climbs), "climbs": climbs}))
    draw_knob(results, args.out / "knob.png")
    errors = {climbs: {arm: errors_of(by_seed) for arm, by_seed in found.items()}
              for climbs, found in results.items()}
    (args.out / "knob.json").write_text(json.dumps({"seeds": args.seeds, "balanced error": errors}, indent=1))


def main() -> None:
    cli = ArgumentParser(description=__doc__.split("\n\n")[0])
    cli.add_argument("--out", type=Path, required=True, help="folder of the runs, of arms.json and arms.png")
    cli.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    cli.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS,
                     help="all but no_cot need live, and frozen needs attacker")
    cli.add_argument("--climbs", type=float, nargs="+", default=[toy.CLIMBS],
                     help="how often the start's attacker climbs")
    cli.add_argument("--flags", default="", help="of all runs, in one word: '--steps 300 --lr 5e-4'")
    cli.add_argument("--embedder", default="", help="folder of a Sentence-BERT model, for cosines")
    cli.add_argument("--jobs", type=int, default=1, help="runs at a time, a core for each")
    args = cli.parse_args()
    args.flags = args.flags.split()
    if "other" in args.arms and len(args.seeds) == 1:
        stop("--arms other: needs a second seed, whose attacks it records; give two, or leave it out.")
    if len(args.climbs) > 1:
        sweep(args)
    else:
        args.climbs = args.climbs[0]
        compare(args)


if __name__ == "__main__":
    main()
