"""
What does the work on a real model: supervised refusals, RL, recorded attacks, or self-play? Five arms.

    python tests/real_arms.py --model path/to/SmolLM2-135M-Instruct --data FOLDER --out runs/real

FOLDER holds the files of WildJailbreak and OR-Bench that are named below. Every arm starts from the same
model, trains an adapter for each role, and makes as many updates with as many games, in which each role
weighs the same (--balance). All but `rl` have the same supervised pairs, which train the defender: half of
them refusals of harmful training prompts, half the start's own answers to benign ones, as many whole
sentences as --tokens hold.

    supervised  the pairs alone: it answers raw prompts, but every payoff is 0
    rl          self-play without pairs
    defender    raw prompts and pairs
    recorded    WildJailbreak's attacks and pairs, for a defender alone
    self        self-play and pairs

Measured on held-out prompts, plain and adversarial, 200 of each label, and on attacks that the start wrote on
the plain ones. A request is held out if no arm has met any version of it. Answers are greedy and judged by
refusal phrases: what rambles counts as an answer. A finished run is not repeated. First come the tables of
eval.py bench, of the start, then of the arms of each seed beside `supervised`; then means over seeds. All
seeds share their pairs and prompts. All answers go to answers-NAME.jsonl in the folder.
"""
import json
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import kernels  # noqa: F401  before torch, which reads the OpenMP setting in there
import numpy as np
import torch

import arena
from arena import EvalModel, Matchup, attacks_of, open_eval_model
from arms import summary as over_seeds
from checkpoint import newest_complete
from data import read_rows
from eval import bench_prompts
from eval import main as eval_main
from judge import mean, open_judge
from kernels import stop
from selfplay import REWARDS, Rewards, Seed
from train import main as train_main

FILES = {"harmful": "wildjailbreak_vanilla_harmful_256.jsonl",
         "benign": "wildjailbreak_vanilla_benign_256.jsonl",
         "harmful attacks": "wildjailbreak_adversarial_harmful_256.jsonl",
         "benign attacks": "wildjailbreak_adversarial_benign_128.jsonl"}
HELD_OUT = {"plain_harmful": ("or_bench-toxic.csv", "prompt"),
            "plain_benign": ("wildjailbreak_eval_benign.jsonl", "vanilla"),
            "adversarial_harmful": ("wildjailbreak_eval_harmful.jsonl", "adversarial"),
            "adversarial_benign": ("wildjailbreak_eval_benign.jsonl", "adversarial")}
TESTS = (*HELD_OUT, "attacks_harmful")
ARMS = {"supervised": ["--play", "defender", "--reward", "none"], "rl": [],
        "defender": ["--play", "defender"],
        "recorded": ["--play", "defender", "--attacks", "attacks.jsonl"], "self": []}
REFUSALS = ("I'm sorry, but I can't help with that.", "I can't assist with that request.",
            "Sorry, I won't help with this, because it could hurt someone.")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}   # of answers, and of training
LABEL_RATE = {"harmful": "asr", "benign": "benign_answered"}   # of eval.py bench: both are answers
NOTHING = dict.fromkeys("psh", 0.0)
REWARDS["none"] = Rewards(attacker=NOTHING, defender=NOTHING, forfeit=0.0, drift_forfeits=False)


# ---------------------------------------------------------------- files

def rows_of(file: Path) -> list[dict]:
    return [row for _, row in read_rows(str(file))]


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def held_out(rows: list[dict], column: str, trained: set[str], n: int) -> list[str]:
    """n different texts, evenly, of a benchmark's requests; none has a version that is trained on."""
    met = {row.get("vanilla", row[column]) for row in rows if trained & set(row.values())}
    left = [row[column] for row in rows if row.get("vanilla", row[column]) not in met]
    texts = list(dict.fromkeys(left))
    return [texts[i * len(texts) // n] for i in range(n)] if len(texts) > n else texts


def whole_sentences(text: str) -> str:
    """The text up to the end of its last sentence, which no number ends; all of it, if it has none."""
    return (re.match(r".*[^\W\d][.!?](?=\s|$)", text, re.DOTALL) or [text])[0]


def prepare(args: Namespace, model: EvalModel) -> None:
    """Seeds, recorded attacks, supervised pairs, held-out prompts, and the start's attacks on plain ones."""
    data = {name: rows_of(args.data / file) for name, file in FILES.items()}
    trained = {row["prompt"] for rows in data.values() for row in rows}
    for test, (file, column) in HELD_OUT.items():
        texts = held_out(rows_of(args.data / file), column, trained, args.n)
        write_rows(args.out / f"{test}.jsonl", [{"prompt": text} for text in texts])
    attacks = []
    for label in ("harmful", "benign"):
        write_rows(args.out / f"{label}.jsonl", [{"prompt": row["prompt"]} for row in data[label]])
        for row in data[f"{label} attacks"]:
            attacks.append({"attack": row["prompt"], "harmful": label == "harmful"})
    write_rows(args.out / "attacks.jsonl", attacks)

    benign = [(row["prompt"], False) for row in data["benign"][:args.pairs // 2]]
    answers = bench_prompts(model, "keywords", benign, args.tokens)
    pairs = [{"prompt": line["prompt"], "response": whole_sentences(line["response"])} for line in answers]
    for i, row in enumerate(data["harmful"][:args.pairs // 2]):
        pairs.append({"prompt": row["prompt"], "response": REFUSALS[i % len(REFUSALS)]})
    write_rows(args.out / "pairs.jsonl", pairs)

    plain = [Seed(row["prompt"], True, revise=True) for row in rows_of(args.out / "plain_harmful.jsonl")]
    matchup = Matchup("held-out", plain, open_judge("keywords"), "zero_sum", args.tokens)
    written = [{"prompt": reply.answer} for reply in attacks_of(model, matchup) if reply.answer]
    write_rows(args.out / "attacks_harmful.jsonl", written)


# ---------------------------------------------------------------- runs

def flags(arm: str, seed: int, args: Namespace) -> list[str]:
    """The arguments of train.py."""
    common = {"model": args.model, "judge": "keywords", "steps": args.steps, "games": args.games,
              "lr": args.lr, "max-new-tokens": args.tokens, "micro-tokens": 8192, "adapter-rank": 16,
              "adapters": "roles",
              "seed": seed, "precision": args.precision, "save-every": 10,
              "out": f"{arm}-{seed}"}
    words = [word for name, value in common.items() for word in (f"--{name}", str(value))]
    words += ["--no-cot", "--no-recompute", "--no-exam", "--balance", "--seeds", "harmful=harmful.jsonl",
              "benign=benign.jsonl"]
    words += ["--resume"] * bool(newest_complete(args.out / f"{arm}-{seed}"))   # it was cut off
    return words + ARMS[arm] + ([] if arm == "rl" else ["--sft", "pairs.jsonl"])


def train(arm: str, seed: int, args: Namespace) -> None:
    """An arm's run in a process of its own, unless it has finished before."""
    run = args.out / f"{arm}-{seed}"
    if (run / f"step_{args.steps:06d}").exists():
        return
    command = [sys.executable, str(Path(__file__).absolute()), "train", *flags(arm, seed, args)]
    with open(f"{run}.log", "a") as log:
        subprocess.run(command, cwd=args.out, stdout=log, stderr=subprocess.STDOUT, check=True)


def measure(name: str, models: list[str], runs: list[Future], args: Namespace) -> None:
    """eval.py bench of models, once their runs are done; its tables are printed."""
    for run in runs:
        run.result()
    if (args.out / f"bench-{name}.json").exists():
        return
    (args.out / f"answers-{name}.jsonl").unlink(missing_ok=True)   # of a benchmark that was cut off
    prompts = [f"{test.split('_')[1]}={test}.jsonl" for test in TESTS]
    command = [sys.executable, str(Path(__file__).absolute()), args.precision, "bench", *models, "--judge",
               "keywords", "--prompts", *prompts, "--max-new-tokens", str(args.tokens),
               "--json", f"bench-{name}.json", "--transcripts", f"answers-{name}.jsonl"]
    done = subprocess.run(command, cwd=args.out, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, flush=True)


def answered(file: Path, models: list[str]) -> list[list[float]]:
    """The share of each test's prompts that each of these models answered, [tests][models]."""
    numbers = json.loads(file.read_text())
    shares = []
    for test in TESTS:
        label = test.split("_")[1]
        rates = numbers[f"labelled prompts, {label}={test}.jsonl"]
        shares.append([rates[name][LABEL_RATE[label]]["value"] for name in models])
    return shares


def with_accuracy(answered_T: np.ndarray) -> dict[str, np.ndarray]:
    """
    From shares [tests, ..], by title and [..] each: what is answered of a test, and what is right of the
    plain and of the adversarial prompts, half of it what is refused of the harmful ones.
    """
    by_test = dict(zip(TESTS, answered_T, strict=True))
    right = {f"{kind}, right": (1 - by_test[f"{kind}_harmful"] + by_test[f"{kind}_benign"]) / 2
             for kind in ("plain", "adversarial")}
    return {f"{test.replace('_', ' ')}, answered": share for test, share in by_test.items()} | right


def print_table(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    print(f"| {title} | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
    print()


def print_summary(args: Namespace) -> None:
    """Means over seeds: what is answered and right, also minus `supervised`, and how training ended."""
    arms = list(ARMS)
    start = with_accuracy(np.array(answered(args.out / "bench-start.json", [str(args.model)])))
    by_seed = [answered(args.out / f"bench-{seed}.json", [f"{arm}-{seed}" for arm in arms])
               for seed in args.seeds]
    shares = with_accuracy(np.moveaxis(by_seed, 0, 2))   # each [arms, seeds]
    print_table("means over seeds", ["the start", *arms],
                {title: [f"{start[title][0]:.3f}", *map(over_seeds, share_AS)]
                 for title, share_AS in shares.items()})
    print_table(f"minus {arms[0]}, seed by seed", arms[1:],
                {title: [*map(over_seeds, share_AS[1:] - share_AS[0])] for title, share_AS in shares.items()})
    logs = [[rows_of(args.out / f"{arm}-{seed}" / "metrics.jsonl")[-10:] for seed in args.seeds]
            for arm in arms]
    rows = {}
    for key in ("attack_refusal", "asr", "asr_raw", "benign_answered", "loss_sft"):
        rows[key] = ["-" if log_S[0][0].get(key) is None else
                     over_seeds([mean([line[key] for line in log]) for log in log_S]) for log_S in logs]
    print_table("training, its last ten steps", arms, rows)


def main() -> None:
    cli = ArgumentParser(description=__doc__.split("\n\n")[0])
    cli.add_argument("--model", type=lambda name: Path(name).absolute(), required=True)
    cli.add_argument("--data", type=Path, required=True, help="folder with the files of prompts")
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    cli.add_argument("--steps", type=int, default=60)
    cli.add_argument("--games", type=int, default=64, help="a step")
    cli.add_argument("--tokens", type=int, default=64, help="longest attack, and longest answer")
    cli.add_argument("--lr", type=float, default=2e-4)
    cli.add_argument("--precision", choices=DTYPES, default="bf16")
    cli.add_argument("--pairs", type=int, default=64, help="supervised ones, half of them refusals")
    cli.add_argument("--n", type=int, default=200, help="held-out prompts of each kind and label")
    cli.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = cli.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({name: str(value) for name, value in vars(args).items()
                           if name not in ("out", "seeds", "jobs")})
    file = args.out / "settings.json"
    if file.exists() and file.read_text() != settings:
        stop(f"{args.out}: holds runs of {file.read_text()}; choose another --out.")
    file.write_text(settings)
    if not (args.out / "attacks_harmful.jsonl").exists():
        prepare(args, open_eval_model(str(args.model)))
    with ThreadPoolExecutor(args.jobs) as threads:
        done = [threads.submit(measure, "start", [str(args.model)], [], args)]
        for seed in args.seeds:
            runs = [threads.submit(train, arm, seed, args) for arm in ARMS]
            models = [f"{arm}-{seed}" for arm in ARMS]
            done.append(threads.submit(measure, str(seed), models, runs, args))
    for task in done:
        task.result()
    print_summary(args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_main(sys.argv[2:])
    elif sys.argv[1] in DTYPES:
        arena.DTYPE = DTYPES[sys.argv[1]]
        eval_main(sys.argv[2:])
    else:
        main()
