"""
What does the work on a real model: supervised refusals, RL, recorded attacks, or self-play? Five arms.

    python tests/real_arms.py --model path/to/SmolLM2-135M-Instruct --data FOLDER --out runs/real

FOLDER holds WildJailbreak's files (`FILES`). Every arm starts from the same model, trains an adapter, and
makes as many updates with as many games, in which each role weighs the same (--balance). All but `rl` have
the same supervised pairs: half of them refusals of harmful training prompts, half the start's own answers
to benign ones, as many whole sentences as --tokens hold.

    supervised  the pairs alone: it answers raw prompts, but every payoff is 0, and distance costs nothing
    rl          self-play without pairs
    defender    raw prompts and pairs
    recorded    WildJailbreak's attacks and pairs, for a defender alone
    self        self-play and pairs

Measured on held-out prompts that no arm has met, plain and adversarial, 200 of each label, and on attacks
that the start wrote on the plain ones. Answers are greedy and judged by refusal phrases. A finished run is
not repeated. The tables are those of eval.py bench, the start apart, then the arms of each seed beside
`supervised`; all answers go to answers-NAME.jsonl in the folder. The last table has means over seeds.
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
import torch

import arena
from arena import EvalModel, Matchup, attacks_of, open_eval_model
from arms import summary as over_seeds
from checkpoint import newest_complete
from eval import bench_prompts
from eval import main as eval_main
from judge import open_judge
from selfplay import REWARDS, Rewards, Seed
from train import main as train_main

FILES = {"harmful": "wildjailbreak_vanilla_harmful_256.jsonl",
         "benign": "wildjailbreak_vanilla_benign_256.jsonl",
         "harmful attacks": "wildjailbreak_adversarial_harmful_256.jsonl",
         "benign attacks": "wildjailbreak_adversarial_benign_128.jsonl",
         "harmful test": "wildjailbreak_eval_harmful.jsonl", "benign test": "wildjailbreak_eval_benign.jsonl"}
ARMS = {"supervised": ["--play", "defender", "--reward", "none", "--kl", "0"], "rl": [], "defender": ["--play", "defender"],
        "recorded": ["--play", "defender", "--attacks", "attacks.jsonl"], "self": []}
REFUSALS = ("I'm sorry, but I can't help with that.", "I can't assist with that request.",
            "Sorry, I won't help with this, because it could hurt someone.")
TESTS = ("plain_harmful", "plain_benign", "adversarial_harmful", "adversarial_benign", "attacks_harmful")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}   # of answers, and of training
NOTHING = dict.fromkeys("psh", 0.0)
REWARDS["none"] = Rewards(attacker=NOTHING, defender=NOTHING, forfeit=0.0, drift_forfeits=False)


# ---------------------------------------------------------------- files

def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def held_out(data: dict[str, list[dict]], label: str, n: int) -> list[dict]:
    """The first n rows with different plain texts of the benchmark, none of them in a training file."""
    trained = {row["prompt"] for name, rows in data.items() if "test" not in name for row in rows}
    first = {}
    for row in data[f"{label} test"]:
        if not trained & {row["vanilla"], row["adversarial"]}:
            first.setdefault(row["vanilla"], row)
    return list(first.values())[:n]


def whole_sentences(text: str) -> str:
    """The text up to its last full stop; all of it, if it has none."""
    return (re.match(r".*[.!?]", text, re.DOTALL) or [text])[0]


def prepare(args: Namespace, model: EvalModel) -> None:
    """Seeds, recorded attacks, supervised pairs, held-out prompts, and the start's attacks on plain ones."""
    data = {name: rows_of(args.data / file) for name, file in FILES.items()}
    attacks = []
    for label in ("harmful", "benign"):
        write_rows(args.out / f"{label}.jsonl", [{"prompt": row["prompt"]} for row in data[label]])
        for row in data[f"{label} attacks"]:
            attacks.append({"attack": row["prompt"], "harmful": label == "harmful"})
        for column, kind in (("vanilla", "plain"), ("adversarial", "adversarial")):
            test = held_out(data, label, args.n)
            write_rows(args.out / f"{kind}_{label}.jsonl", [{"prompt": row[column]} for row in test])
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


def answered(file: Path, test: str) -> list[float]:
    """The share of a test's prompts that each model of a benchmark answered, in their order."""
    by_model = json.loads(file.read_text())[f"labelled prompts, {test.split('_')[1]}={test}.jsonl"]
    key = "asr" if test.endswith("harmful") else "benign_answered"
    return [rates[key]["value"] for rates in by_model.values()]


def print_summary(args: Namespace) -> None:
    """What the start answers, and each arm in the mean over seeds."""
    print(f"| answered | the start | {' | '.join(ARMS)} |\n|{' --- |' * (len(ARMS) + 2)}")
    for test in TESTS:
        [start] = answered(args.out / "bench-start.json", test)
        by_seed = [answered(args.out / f"bench-{seed}.json", test) for seed in args.seeds]
        cells = [over_seeds(list(rates)) for rates in zip(*by_seed, strict=True)]
        print(f"| {test.replace('_', ' ')} | {start:.3f} | {' | '.join(cells)} |")


def main() -> None:
    cli = ArgumentParser(description=__doc__.split("\n\n")[0])
    cli.add_argument("--model", type=lambda name: Path(name).absolute(), required=True)
    cli.add_argument("--data", type=Path, required=True, help="folder with WildJailbreak's files")
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
