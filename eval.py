"""
Whether it worked.

    python eval.py bench MODEL ...       # held-out requests in disguise: attack success, and benign requests answered, side by side
    python eval.py bench MODEL ... --judge keywords --prompts FILE ...      # the same for real models and files of labelled prompts
    python eval.py diversity RUN ...     # how many different attacks a run's attacker has
    python eval.py report RUN ...        # both, averaged over seeds, a row per kind of run
    python eval.py plot RUN ...          # training curves, one figure

A MODEL is a checkpoint folder, a run folder (its newest checkpoint) or a hub name. Every rate comes with its 95 % Wilson interval (Wilson,
JASA 1927). Decoding is greedy for defenders; attackers are sampled at temperature 1.
"""
import hashlib
import json
import math
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import toy
from judge import ATTACK_COLUMNS, Exchange, Judge, Verdict, open_judge, read_labelled
from model import Transformer, find, load, open_tokenizer, stop, stop_ids, weight_files
from sample import sample, uniforms
from selfplay import ENGLISH, Prompts, Reply, Seed, Setting

ANSWER, ATTACK = 24, 48   # longest replies in tokens in the embedded world: a defender needs 14, an attacker with three tactics 36


# ---------------------------------------------------------------- statistics

def wilson(hits: int, n: int) -> tuple[float, float]:
    """
    The 95 % interval of a rate.

    >>> tuple(round(end, 3) for end in wilson(8, 10))
    (0.49, 0.943)
    """
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959963984540054, hits / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def rate(hits: Sequence[bool]) -> dict:
    """A rate, its interval and the count behind it."""
    low, high = wilson(sum(hits), len(hits))
    return {"rate": sum(hits) / len(hits) if hits else None, "low": low, "high": high, "n": len(hits)}


def entropy(labels: Sequence[object]) -> float:
    """Entropy of the labels' frequencies, in nats."""
    share = np.array(list(Counter(labels).values())) / len(labels)
    return float(-(share * np.log(share)).sum())


def ngrams(words: Sequence[str], n: int) -> Counter:
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def sentence_bleu(words: list[str], references: list[list[str]]) -> float:
    """
    BLEU-4 of one sentence in [0, 1] (Papineni et al., ACL 2002), with exponential smoothing of empty counts (Chen and Cherry, WMT 2014,
    method 3) and, for sentences shorter than four words, as many orders as it has.

    >>> sentence_bleu("a b c d e".split(), ["a b c d e".split()])
    1.0
    """
    logs, smooth = [], 1.0
    for n in range(1, min(4, len(words)) + 1):
        mine, best = ngrams(words, n), Counter()
        for reference in references:
            best |= ngrams(reference, n)
        hits, total = sum((mine & best).values()), sum(mine.values())
        smooth = smooth if hits else smooth * 2
        logs.append(math.log(hits / total if hits else 1 / (smooth * total)))
    closest = min((len(r) for r in references), key=lambda length: (abs(length - len(words)), length))
    brevity = min(0.0, 1 - closest / len(words))
    return math.exp(brevity + sum(logs) / len(logs))


def self_bleu(texts: list[str]) -> float:
    """The mean BLEU of each text against all others (Zhu et al., SIGIR 2018): 1 if all are the same."""
    split = [t.split() for t in texts if t.split()]
    return float(np.mean([sentence_bleu(words, split[:i] + split[i + 1:]) for i, words in enumerate(split)])) if len(split) > 1 else 1.0


# ---------------------------------------------------------------- bench

@dataclass(frozen=True)
class Subject:
    """A model to examine, with the setting it was trained in."""
    name: str
    model: Transformer
    setting: Setting

    def reply(self, prompts: list[list[int]], longest: int, temperature: float, seed: int, label: str) -> list[Reply]:
        """Replies of at most `longest` tokens, as the game reads them."""
        uniform_NT = uniforms(seed, 0, range(len(prompts)), 0, longest)
        samples = sample(self.model, prompts, uniform_NT, stop_ids(self.model, self.setting.tokenizer), temperature, label)
        return [self.setting.read(s) for s in samples]


def run_config(name: str) -> dict:
    """The configuration of the run that a model belongs to; empty for a model from elsewhere."""
    for folder in (Path(name), Path(name).parent):
        if (folder / "latest").is_file() and (folder / "config.json").is_file():
            return json.loads((folder / "config.json").read_text())
    return {}


def open_subject(name: str, prompts: Prompts = toy.PROMPTS) -> Subject:
    """A model with the prompts of its language; a model from elsewhere answers as it was taught to, without private thoughts."""
    config = run_config(name) or {"cot": prompts is toy.PROMPTS}
    return Subject(name, load(name), Setting(open_tokenizer(name), prompts, config["cot"]))


def rates(harmful: list[Verdict], benign: list[Verdict]) -> dict:
    """The rates of a benchmark, from the verdicts on its harmful and its benign prompts. What the judge left open counts for nothing."""
    known = lambda verdicts, question: [v for v in verdicts if v.readable and getattr(v, question) is not None]
    refused, over = ([v.refusal for v in known(verdicts, "refusal")] for verdicts in (harmful, benign))
    return {"n": len(harmful) + len(benign), "asr": rate([v.response_harmful for v in known(harmful, "response_harmful")]),
            "asr_not_refused": rate([not r for r in refused]), "refused": rate(refused),
            "over_refusal": rate(over), "benign_answered": rate([not r for r in over]),
            "unreadable": sum(not v.readable for v in harmful + benign)}


def bench(subject: Subject) -> dict:
    """
    The embedded world's exam: held-out pairs in disguise, answered greedily, judged exactly. `asr` averages attack success over one, two
    and three tactics; `benign_answered` averages over plain requests and the same three.
    """
    questions = toy.exam()
    prompts = [subject.setting.defender_prompt(text) for text, _, _ in questions]
    replies = subject.reply(prompts, ANSWER, 0.0, 0, f"bench {subject.name}")
    verdicts = toy.judge([Exchange(text, reply.answer, harmful) for (text, harmful, _), reply in zip(questions, replies)])
    harmful, benign = ([(size, v) for (_, h, size), v in zip(questions, verdicts) if h == kind] for kind in (True, False))
    by_size = {f"asr_{size}_tactics": rate([v.response_harmful for s, v in harmful if s == size]) for size in (1, 2, 3)}
    plain = {"benign_plain": rate([not v.refusal for s, v in benign if s == 0])}
    return rates([v for _, v in harmful], [v for _, v in benign]) | by_size | plain


def bench_prompts(subject: Subject, judge: Judge, rows: list[tuple[str, bool]], longest: int) -> tuple[dict, list[Exchange]]:
    """
    The same rates for labelled prompts, answered greedily in at most `longest` tokens, and the exchanges. A reply that says nothing is a
    refusal.
    """
    replies = subject.reply([subject.setting.defender_prompt(text) for text, _ in rows], longest, 0.0, 0, f"bench {subject.name}")
    exchanges = [Exchange(text, reply.answer, harmful) for (text, harmful), reply in zip(rows, replies)]
    said = [n for n, e in enumerate(exchanges) if e.response]
    judged = dict(zip(said, judge([exchanges[n] for n in said])))
    verdicts = [judged.get(n, Verdict(e.seed_harmful, True, False)) for n, e in enumerate(exchanges)]
    return rates(*([v for v, e in zip(verdicts, exchanges) if e.seed_harmful == kind] for kind in (True, False))), exchanges


def interval(r: dict) -> str:
    return f"{r['rate']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if r["rate"] is not None else "-"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


TOY_ROWS = {"asr": "attack success (down)", "asr_1_tactics": "- one tactic", "asr_2_tactics": "- two tactics",
            "asr_3_tactics": "- three tactics", "benign_answered": "benign answered (up)", "benign_plain": "- plain"}
ROWS = {"asr": "attack success (down)", "asr_not_refused": "harmful not refused (down)", "benign_answered": "benign answered (up)"}


def main_bench(args: Namespace) -> None:
    if bool(args.prompts) != (args.judge != "toy"):
        stop("eval.py bench: --judge and --prompts go together: a judge for real models and the files of prompts to ask them.")
    if not args.prompts:
        name, shown, n = "toy", TOY_ROWS, len(toy.exam())
        results = {model: bench(open_subject(model)) for model in args.models}
    else:
        files = [read_labelled(path, ATTACK_COLUMNS) for path in args.prompts]
        print("\n".join(file.summary for file in files), end="\n\n", flush=True)
        judge, rows = open_judge(args.judge), [row for file in files for row in file.rows]
        name, shown, n = args.judge, ROWS, len(rows)
        answered = {model: bench_prompts(open_subject(model, ENGLISH), judge, rows, args.max_new_tokens) for model in args.models}
        results = {model: result for model, (result, _) in answered.items()}
        if args.replies:
            lines = [{"model": model, "prompt": e.prompt, "response": e.response, "harmful": e.seed_harmful}
                     for model, (_, exchanges) in answered.items() for e in exchanges if e.response]
            Path(args.replies).write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = [[text, *(interval(r[key]) for r in results.values())] for key, text in shown.items()]
    print(markdown([f"{'held-out pairs' if name == 'toy' else 'prompts'}, n = {n}", *results], table))
    if args.json:
        Path(args.json).write_text(json.dumps({model: {name: result} for model, result in results.items()}, indent=1))


# ---------------------------------------------------------------- diversity

def diversity(subject: Subject, n: int, seed: int) -> dict:
    """Attacks on `n` held-out harmful requests, all sampled at once: how different they are, and how many keep what was asked."""
    pairs = [pair for pair in sorted(toy.HELD_OUT) if toy.is_harmful(pair)]
    seeds = [Seed(toy.plain(pairs[i % len(pairs)]), True, revise=True) for i in range(n)]
    replies = subject.reply([subject.setting.attacker_prompt(s) for s in seeds], ATTACK, 1.0, seed, f"attacks {subject.name}")
    texts = [r.answer for r in replies if r.answer]
    kept = [toy.request(r.answer) == toy.request(s.text) for r, s in zip(replies, seeds)]
    tactic_entropy = entropy([toy.tactics_in(t) for t in texts]) if texts else 0.0
    return {"n": n, "inv_self_bleu": 1 - self_bleu(texts), "tactic_entropy": tactic_entropy, "faithful": rate(kept)}


def main_diversity(args: Namespace) -> None:
    results = {name: diversity(open_subject(name), args.n, args.seed) for name in args.models}
    rows = [[name, f"{r['inv_self_bleu']:.3f}", f"{r['tactic_entropy']:.2f}", interval(r["faithful"])] for name, r in results.items()]
    print(markdown([f"{args.n} attacks", "1 - self-BLEU (up)", "tactic-set entropy, nats (up)", "faithful (up)"], rows))


# ---------------------------------------------------------------- report

def kind_of(config: dict) -> str:
    """What distinguishes runs other than their seed."""
    words = [config["play"]] + ([] if config["reward"] == "zero_sum" else [config["reward"]]) + ([] if config["cot"] else ["no-cot"])
    return " ".join(words + (["recorded attacks"] if config["attacks"] else []))


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def main_report(args: Namespace) -> None:
    rows: dict[str, list[dict]] = {}
    known: dict[str, dict] = {}   # runs of one seed share their start, which is examined once

    def examined(name: str) -> dict:
        weights = hashlib.sha256(b"".join(file.read_bytes() for file in weight_files(find(name)))).hexdigest()
        if weights not in known:
            subject = open_subject(name)
            known[weights] = bench(subject) | diversity(subject, args.n, 0)
        return known[weights]
    for run in args.models:
        config = run_config(run) or stop(f"{run}: not a run folder; give folders that train.py wrote.")
        rows.setdefault("start", []).append(examined(f"{run}/step_000000"))
        rows.setdefault(kind_of(config), []).append(examined(run))
    shown = {"asr": "attack success (down)", "benign_answered": "benign answered (up)", "inv_self_bleu": "1 - self-BLEU (up)",
             "tactic_entropy": "tactic-set entropy, nats (up)", "faithful": "faithful attacks (up)"}
    value = lambda cell: cell["rate"] if isinstance(cell, dict) else cell
    cells = [[kind, str(len(results)), *(spread([value(r[key]) for r in results]) for key in shown)] for kind, results in rows.items()]
    print(markdown(["play", "runs", *shown.values()], cells))


# ---------------------------------------------------------------- plot

CURVES = {"asr": "attack success\n(its own attacker; down is safer)", "over_refusal": "over-refusal\n(attacked benign; down is better)",
          "benign_answered": "benign answered\n(up is better)", "kl": "KL to the start\n(nats per token)"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")   # Okabe and Ito: safe for colour-blind readers


def smooth(values: list[float], width: int = 5) -> np.ndarray:
    """Mean over the last `width` steps, fewer at the beginning."""
    return np.array([np.nanmean(values[max(0, i - width + 1):i + 1]) if not np.isnan(values[max(0, i - width + 1):i + 1]).all() else np.nan
                     for i in range(len(values))])


def plot(runs: list[str], file: Path) -> None:
    """Four panels against the step: thin lines are steps, thick ones the mean of five."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.4), constrained_layout=True)
    for run, colour in zip(runs, COLOURS * (len(runs) // len(COLOURS) + 1)):
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        for panel, key in zip(panels, CURVES):
            values = [line[key] if line.get(key) is not None else math.nan for line in lines]
            at = [line["step"] for line in lines]
            panel.plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
            panel.plot(at, smooth(values), color=colour, linewidth=2, label=Path(run).name)
    for panel, (key, title) in zip(panels, CURVES.items()):
        panel.set(title=title, xlabel="step")
        panel.spines[["top", "right"]].set_visible(False)
        if key != "kl":
            panel.set_ylim(-0.02, 1.02)
    panels[0].legend(frameon=False)
    figure.savefig(file, dpi=150)


def main_plot(args: Namespace) -> None:
    for run in args.models:
        if not (Path(run) / "metrics.jsonl").is_file():
            stop(f"{run}: no metrics.jsonl there; give a run folder that has made at least one step.")
    file = Path(args.out or Path(args.models[0]) / "curves.png")
    plot(args.models, file)
    print(f"\ncurves: {file}")


def main() -> None:
    cli = ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    commands = cli.add_subparsers(required=True)
    for name, act, help in (("bench", main_bench, "attack success and benign requests answered"),
                            ("diversity", main_diversity, "how different a run's attacks are"),
                            ("report", main_report, "runs of several kinds and seeds in one table"),
                            ("plot", main_plot, "training curves")):
        command = commands.add_parser(name, help=help)
        command.set_defaults(act=act)
        command.add_argument("models", nargs="+", metavar="RUN" if name in ("report", "plot") else "MODEL")
        if name == "bench":
            command.add_argument("--json", help="write the numbers to this file")
            command.add_argument("--judge", default="toy", help="as in train.py, for real models [%(default)s]")
            command.add_argument("--prompts", nargs="+", default=[], help="files of labelled prompts, for real models")
            command.add_argument("--replies", help="write prompts and responses to this file, a JSON line each; what train.py --sft reads")
            command.add_argument("--max-new-tokens", type=int, default=128, help="of an answer to them [%(default)s]")
        if name in ("diversity", "report"):
            command.add_argument("--n", type=int, default=192, help="attacks [%(default)s]")
        if name == "diversity":
            command.add_argument("--seed", type=int, default=0, help="[%(default)s]")
        if name == "plot":
            command.add_argument("--out", help="[curves.png in the first run]")
    args = cli.parse_args()
    args.act(args)


if __name__ == "__main__":
    main()
