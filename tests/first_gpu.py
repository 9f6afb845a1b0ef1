"""
One call for the first GPU: what works, how fast, and how much memory. It writes one Markdown file.

    python tests/first_gpu.py --out first_gpu.md      # on a machine with a GPU
    python tests/first_gpu.py --out tiny.md           # without one: tiny shapes, to see that the script works

    tests   the tests; with a GPU, those of the kernels run on it
    toy     a short run of the embedded world
    alone   a model of Qwen2.5-0.5B's shape with random weights, bf16, recomputed activations, no judge model
    judge   the same with a judge model of the same shape
    bench   tests/bench.py: its sections for a GPU, beside floors and goals; meant for eight minutes

Each part is a command of its own. One that fails is written down, and the next one goes on.
"""
import json
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import kernels  # noqa: F401  before torch, which reads the OpenMP setting in there
import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config

from conftest import byte_tokenizer
from model import new_model, save

ON_GPU = torch.cuda.is_available()
SHAPE = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
             num_attention_heads=14, num_key_value_heads=2)   # of Qwen2.5-0.5B
TINY = dict(vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2)
SHOWN = ("step", "seconds", "sample_tokens_per_s", "train_tokens_per_s", "mismatch", "kl", "grad_norm")


# ---------------------------------------------------------------- what runs

def make_model(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """A folder with a model of random weights, as `from_pretrained` would find it."""
    shape = SHAPE if ON_GPU else TINY
    config = Qwen2Config(**shape, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id)
    model = new_model(config, seed)
    save(folder, model.state_dict(), model, tokenizer)


def commands(work: Path) -> dict[str, list[str]]:
    """Each part's command, run in the folder `work`."""
    games, length = ("64", "512") if ON_GPU else ("4", "8")
    seeds = ["--seeds", "harmful=harmful.jsonl", "benign=benign.jsonl"]
    real = [str(ROOT / "train.py"), "--model", "policy", *seeds, "--no-cot", "--precision", "bf16",
            "--recompute", "--games", games, "--max-new-tokens", length, "--steps", "3", "--no-exam"]
    toy_size = ["--steps", "20", "--sft-steps", "200"]   # the SFT runs on the CPU
    if not ON_GPU:
        toy_size = ["--steps", "2", "--sft-steps", "2", "--games", "8"]
    return {
        "tests": ["-m", "pytest", "-q", "-n", "8", "--dist", "loadfile", str(ROOT / "tests")],
        "toy": [str(ROOT / "train.py"), "--no-exam", "--out", "toy", *toy_size],
        "alone": [*real, "--judge", "keywords", "--out", "alone"],
        "judge": [*real, "--judge", "wildguard:judge", "--out", "judge_run"],
        "bench": [str(ROOT / "tests" / "bench.py"), "--json", "bench.json",
                  *([] if ON_GPU else ["step", "--models", "toy-sized"])]}


# ---------------------------------------------------------------- running and writing down

@dataclass
class Done:
    """How a part ended: its status, its seconds, the most memory in use on the GPU (GiB), what it printed."""
    status: int
    seconds: float
    peak_gib: float
    printed: str


def run(arguments: list[str], work: Path) -> Done:
    """Run Python with these arguments, and watch the GPU's memory meanwhile."""
    peaks, ended = [0.0], threading.Event()

    def watch() -> None:
        while ON_GPU and not ended.wait(0.2):
            free, total = torch.cuda.mem_get_info()
            peaks.append((total - free) / 2 ** 30)
    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.time()
    done = subprocess.run([sys.executable, *arguments], cwd=work, capture_output=True, text=True)
    ended.set()
    watcher.join()
    return Done(done.returncode, time.time() - started, max(peaks), done.stdout + done.stderr[-4000:])


def metrics_table(folder: Path) -> str:
    """The steps of a run, a row each."""
    if not (folder / "metrics.jsonl").is_file():
        return ""
    rows = [SHOWN, ["---"] * len(SHOWN)]
    for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
        metrics = json.loads(line)
        rows.append([f"{metrics[key]:.3g}" if metrics[key] is not None else "-" for key in SHOWN])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def section(name: str, arguments: list[str], done: Done, work: Path) -> str:
    """A part as Markdown."""
    command = " ".join(arguments).replace(f"{ROOT}/", "")
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else "none"
    last = "\n".join(done.printed.strip().splitlines()[-120:])   # all rows of the benchmark
    memory = f", {done.peak_gib:.1f} GiB in use on the GPU at most" if ON_GPU else ""
    return (f"## {name}\n\n`python {command}`\n\nstatus {done.status}, {done.seconds:.0f} s{memory}\n\n"
            f"{metrics_table(work / out)}\n```text\n{last}\n```\n\n")


def main() -> None:
    cli = ArgumentParser(description="One call for the first GPU.")
    cli.add_argument("--out", type=Path, default=Path("first_gpu.md"), help="the Markdown file [%(default)s]")
    cli.add_argument("--work", type=Path, default=Path("first_gpu"), help="a new folder [%(default)s]")
    cli.add_argument("--parts", nargs="+", default=["tests", "toy", "alone", "judge", "bench"])
    args = cli.parse_args()
    args.work.mkdir(parents=True)
    for number, name in enumerate(("policy", "judge")):
        make_model(args.work / name, byte_tokenizer(), number)
    for label in ("harmful", "benign"):
        rows = [{"prompt": f"how do i bake {label} bread number {n}"} for n in range(64)]
        (args.work / f"{label}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    device = torch.cuda.get_device_name() if ON_GPU else "no GPU: tiny shapes on a CPU, no number counts"
    report = f"# {device}, torch {torch.__version__}\n\n"
    for name in args.parts:
        arguments = commands(args.work)[name]
        done = run(arguments, args.work)
        report += section(name, arguments, done, args.work)
        args.out.write_text(report, "utf-8")   # after each part: what was measured stays
        print(f"{name}: status {done.status}, {done.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
