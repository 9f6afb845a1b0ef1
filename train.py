r"""
Train one model against itself: it attacks, it defends, a judge scores, REINFORCE updates it from both sides.

    seeds -> attack -> answer -> verdict -> payoff per turn -> return per token -> advantage -> loss -> AdamW

    python train.py                           # the embedded world, minutes on a CPU: attack success falls
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-7B-Instruct \
        --judge wildguard:allenai/wildguard --seeds harmful=harmful.jsonl benign=benign.jsonl

Self-RedTeam (Liu et al., arXiv 2506.07468) as its official run executes it, without a critic or an adaptive
KL, but for the credit: theirs is `--credit reinforce++`. `main`, at the end, is all of it in numbered phases.
"""
from kernels import CommandLine, check_number, stop  # before torch, which reads the OpenMP setting in there
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from argparse import BooleanOptionalAction, RawDescriptionHelpFormatter
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
from data import pack, read_prompts, read_rows, text_of
from judge import check_judge, open_judge
from kernels.logprob import head_bytes, importance_weight
from model import (Transformer, find_checkpoint, load, newest_step, open_empty, read_weights, refuse_damage,
                   run_config, save, score)
from sample import Sample, sample, stop_ids, stream, uniforms
from selfplay import (ATTACKER, CREDITS, DEFENDER, REWARDS, ChatFormat, Experience, Player, Seed,
                      credit, experiences_of, game_metrics, nothing_happened, parse_reply, play, replay,
                      seed_pools, seeds_for_step, show_game)

# Functions import toy, transformers and FSDP when they run: it takes seconds, and --help should not wait.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves without it
# ---------------------------------------------------------------- configuration
PLAYS = {"self": (ATTACKER, DEFENDER), "attacker": (ATTACKER,), "defender": (DEFENDER,)}  # who learns

def opt(default: object, source: str, help: str, choices: Iterable | None = None) -> Field:
    return field(default=default, metadata={"source": source, "help": help, "choices": choices})

@dataclass(frozen=True)
class Config:
    """Every flag: its default, where that comes from, what it means. Ranks divide --games among them."""
    model: str = opt("toy", "ours", "folder of a checkpoint or run, or hub name; toy: made here by SFT")
    judge: str = opt("toy", "ours", "toy, a name in judge.JUDGES, or FORMAT:MODEL (judge.FORMATS)")
    seeds: list[str] = opt((), "ours", "files of seeds; a column labels them, or harmful=FILE benign=FILE")
    play: str = opt("self", "paper", "attacker: against the frozen start; defender: raw seeds", PLAYS)
    opponent: str = opt("", "ours", "a checkpoint that plays the role that does not learn, frozen")
    attacks: str = opt("", "ours", "recorded attacks, such as a games.jsonl, for --play defender")
    reward: str = opt("zero_sum", "ours", "payoff table in selfplay.py", REWARDS)
    credit: str = opt("centred", "ours", "what becomes of returns; the official run: reinforce++", CREDITS)
    balance: bool = opt(False, "ours", "let both roles weigh the same in the loss, however long they talk")
    replay: float = opt(0.0, "ours", "share of raw games that ask a past attack of this run, if it has any")
    replay_won: bool = opt(False, "ours", "with --replay: only attacks that won, as often as they did")
    cot: bool = opt(True, "paper", "think in private before writing")
    sft: str = opt("", "paper", "a JSONL file of prompt/response pairs for a supervised term")
    sft_coef: float = opt(1.0, "paper", "weight of the supervised term")
    steps: int = opt(200, "paper", "rounds of play and update")
    games: int = opt(128, "paper", "games a step, over all ranks; a multiple of 4 x attacks x answers")
    attacks_per_seed: int = opt(1, "paper", "attacks on each seed; in --credit group, 1 teaches no attacker")
    answers_per_attack: int = opt(1, "paper", "answers to an attack; in --credit group, 1 teaches none")
    updates: int = opt(1, "ours", "optimizer updates a step; the official run makes 6")
    lr: float = opt(5e-7, "paper", "AdamW step size at its peak")
    kl: float = opt(0.01, "paper", "what a nat of log-ratio to the reference costs")
    clip: float = opt(0.2, "paper", "PPO clip of the ratio")
    temperature: float = opt(1.0, "paper", "of sampling and of scoring")
    max_new_tokens: int = opt(2048, "paper", "longest reply in tokens")
    micro_tokens: int = opt(16384, "ours", "most tokens, padding included, in one pass of one rank")
    sft_steps: int = opt(600, "ours", "supervised updates of the toy model before it plays")
    seed: int = opt(0, "ours", "of everything random")
    save_every: int = opt(100, "paper", "steps between checkpoints; the last step is always saved")
    keep: int = opt(5, "ours", "newest checkpoints that stay, besides step_000000")
    exam: bool = opt(True, "ours", "end with the held-out exam of the embedded world, and with the curves")
    out: str = opt("", "ours", "run folder [runs/JUDGE-PLAY-SEED]")
    resume: bool = opt(False, "ours", "continue the run in --out, with its settings")
    precision: str = opt("bf16", "paper", "of arithmetic; master weights are fp32", ("bf16", "fp32"))
    recompute: bool = opt(True, "ours", "compute activations again in the backward pass: less memory")
    plan: int = opt(0, "ours", "do not train: print what each of this many GPUs would have to hold")

# Other defaults; the toy world's win over those without a GPU
NO_GPU = {"games": 32, "max_new_tokens": 64, "micro_tokens": 1024, "precision": "fp32", "recompute": False}
TOY_WORLD = NO_GPU | {"steps": 250, "games": 128, "lr": 5e-4, "kl": 0.1, "replay": 0.5, "balance": True}
LIMITS = {  # of a number: by its type, and of some by name
    int: (1, 2 ** 31 - 1), "seed": (0, 2 ** 31 - 1), "plan": (0, 1_000_000), "replay": (0, 1),
    float: (0, 1_000_000), "temperature": (0.01, 100)}

def parse_args(argv: list[str] | None) -> dict[str, object]:
    """The flags that the user gave, by the name of their field."""
    defaults = f"Defaults without a GPU: {NO_GPU}\n\nDefaults of the toy world: {TOY_WORLD}"
    cli = CommandLine(description=__doc__, epilog=defaults, formatter_class=RawDescriptionHelpFormatter,
                      allow_abbrev=False)
    special = {bool: {"action": BooleanOptionalAction}, list[str]: {"nargs": "+"}}
    for f in fields(Config):
        kind = special.get(f.type, {"type": f.type, "choices": f.metadata["choices"]})
        text = f"{f.metadata['help']} [{f.default}, {f.metadata['source']}]"
        cli.add_argument("--" + f.name.replace("_", "-"), default=None, help=text, **kind)
    return {name: value for name, value in vars(cli.parse_args(argv)).items() if value is not None}

def parse_config(argv: list[str] | None = None) -> tuple[Config, dict[str, str]]:
    """The configuration, and for each field where its value comes from."""
    args = parse_args(argv)
    import toy
    if args.get("opponent"):  # of a run, the checkpoint that is its newest now
        args["opponent"] = str(newest_step(args["opponent"]))
    rows = [("no GPU", NO_GPU)] * (not torch.cuda.is_available() and "plan" not in args)
    rows += [("toy world", TOY_WORLD)] * toy.is_toy_model(args.get("model", "toy"))
    judge = args.get("judge", "toy").partition(":")[0]
    out = Path(args.get("out", f"runs/{judge}-{args.get('play', 'self')}-{args.get('seed', 0)}"))
    names = {f.name for f in fields(Config)} - {"out", "resume", "plan"}
    resumes = args.get("resume") and checkpoint.newest_complete(out)  # else there is nothing to go on from
    saved = {name: value for name, value in run_config(str(out)).items() if resumes and name in names}
    if resumes and not saved:
        stop(f"--resume: {out}/config.json cannot be read as a run's settings; put back the file.")
    if "seeds" in args and "judge" not in args | saved:
        stop("--seeds: who judges the answers? Add --judge keywords, FORMAT:MODEL, or toy in its language.")
    changed = [name for name, value in args.items() if name in saved and value != saved[name]]
    for name in {"model", "opponent"} & set(changed):
        stop(f"--{name} {args[name]}: the run was begun with {saved[name]}; begin another run for that.")
    values = {f.name: f.default for f in fields(Config)}
    sources = {f.name: f.metadata["source"] for f in fields(Config)}
    for source, settings in [*rows, ("the run so far", saved), ("command line", args)]:  # later ones win
        values |= settings
        sources |= dict.fromkeys(settings, source)
    sources |= {name: f"command line; was {saved[name]}" for name in changed}
    return Config(**values | {"out": str(out)}), sources

def check_config(cfg: Config, world_size: int) -> None:
    """Refuse what cannot run, before any work and before anything is written."""
    for f in fields(Config):
        if f.type in (int, float):
            check_number(f.name, getattr(cfg, f.name), *LIMITS.get(f.name, LIMITS[f.type]))
    if cfg.plan:
        return
    import toy
    group = cfg.attacks_per_seed * cfg.answers_per_attack
    if cfg.games % (4 * group) or cfg.games % (world_size * cfg.answers_per_attack):
        stop(f"--games {cfg.games}: must be a multiple of {4 * group}, 4 types of seeds x {group} games, and "
             f"of {world_size * cfg.answers_per_attack}, so that ranks share no attack.")
    if cfg.credit == "group" and group == 1:
        stop("--credit group compares turns with one prompt: add --attacks-per-seed or --answers-per-attack.")
    if cfg.attacks and cfg.play != "defender":
        stop("--attacks FILE trains a defender on recorded attacks; add --play defender.")
    if cfg.opponent and (cfg.play == "self" or cfg.attacks):
        stop("--opponent MODEL plays one role: add --play attacker or --play defender, leave out --attacks.")
    check_judge(cfg.judge)
    if not cfg.resume and not toy.is_toy_model(cfg.model) and (cfg.judge == "toy" or not cfg.seeds):
        stop(f"--model {cfg.model} needs seeds, and a judge that reads them: add --seeds harmful=FILE "
             "benign=FILE, and --judge keywords or FORMAT:MODEL.")
    checkpoint.check_folder(Path(cfg.out), cfg.resume)

# ---------------------------------------------------------------- the loss
def policy_loss(logprob_BT: Tensor, old_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, n_tokens: int,
                clip: float) -> Tensor:
    """
    The clipped surrogate (Schulman et al., arXiv 1707.06347, equation 7), summed over tokens and divided by
    `n_tokens`, a token count of the whole update: a token weighs the same in any micro-batch, on any rank.
    """
    ratio_BT = (logprob_BT - old_BT).exp()  # new over old probability of each token
    clipped_BT = ratio_BT.clamp(1 - clip, 1 + clip)
    # the minimum has no gradient where the ratio has left the clip and a further move would gain
    gain_BT = torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    return -(gain_BT * mask_BT).sum() / n_tokens

def balance_roles(advantage: list[np.ndarray], experiences: list[Experience]) -> list[np.ndarray]:
    """Advantages with which both roles weigh the same in the loss, however long the other one talks."""
    n_tokens = Counter()
    for e in experiences:
        n_tokens[e.turn.role] += len(e.turn.ids)
    return [advantage_T * n_tokens.total() / n_tokens[e.turn.role]
            for advantage_T, e in zip(advantage, experiences, strict=True)]

def step_size(cfg: Config, n: int) -> float:
    """Learning rate of update n: warm-up over 3 % of the run, then a cosine from the peak to 10 % of it."""
    total = cfg.steps * cfg.updates
    warm_up = max(1, round(0.03 * total))
    progress = max(0, n - warm_up) / max(1, total - warm_up)
    cosine = (1 + math.cos(math.pi * progress)) / 2  # from 1 to 0
    return cfg.lr * min(1.0, (n + 1) / warm_up) * (0.1 + 0.9 * cosine)

# ---------------------------------------------------------------- distributed: what ranks are and share
@dataclass(frozen=True)
class Ranks:
    """This process among all: rank of world, and the device and the precision that it computes in."""
    rank: int
    world: int
    device: torch.device
    compute: torch.dtype = torch.float32

def setup(cfg: Config) -> Ranks:
    """One process without torchrun, any number with it; PyTorch picks nccl on GPUs, gloo on CPUs."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(timeout=timedelta(minutes=30))
    elif cfg.precision == "bf16":
        # a group of one: FSDP computes in bf16 over fp32 master weights, on one process too
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    compute = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    return Ranks(int(os.environ.get("RANK", 0)), world, device, compute)

def shard(model: Transformer, ranks: Ranks) -> Transformer:
    """Split every layer's parameters among the processes (FSDP2); one in fp32 keeps them as they are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy(param_dtype=ranks.compute, reduce_dtype=torch.float32)
    for part in (*model.layers, model) if dist.is_initialized() else ():
        fully_shard(part, mp_policy=policy)
    return model

def open_sharded(name: str, dtype: torch.dtype, ranks: Ranks) -> Transformer:
    """A checkpoint's model, split among the processes. Rank 0 alone reads the weights, one copy of them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    if ranks.world == 1 and dtype == ranks.compute:
        return load(name, dtype).to(ranks.device)
    model = shard(open_empty(name, dtype), ranks).to_empty(device=ranks.device)
    weights: dict[str, Tensor] = {}
    on_main(ranks, lambda: weights.update(read_weights(name, model)))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    return model

@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold all parameters in full on every rank, so that ranks may decode different numbers of tokens."""
    parts = [m for m in model.modules() if hasattr(m, "unshard")]  # none on one process in fp32
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)  # FSDP2's default: all but the root
        part.reshard()

def gather_list(mine: list, ranks: Ranks) -> list:
    """Every rank's list, one after the other, on every rank."""
    if ranks.world == 1:
        return list(mine)
    lists: list[list] = [[] for _ in range(ranks.world)]
    dist.all_gather_object(lists, mine)
    return [item for part in lists for item in part]

def stop_all(ranks: Ranks, sentence: str) -> None:
    """Rank 0 prints the sentence; all ranks exit with status 2."""
    if ranks.rank == 0:
        stop(sentence)
    raise SystemExit(2)

def on_main(ranks: Ranks, work: Callable[[], None]) -> None:
    """Rank 0 reads or writes the disk while the others wait. If it cannot, all ranks stop."""
    failures = []
    if ranks.rank == 0:
        try:
            work()
        except (OSError, SafetensorError, SystemExit) as error:
            failures.append(error)
    for failure in gather_list(failures, ranks):  # the others learn of it here
        if isinstance(failure, SystemExit):  # rank 0 has said why
            raise failure
        stop_all(ranks, f"A file cannot be read or written ({failure}). Complete checkpoints are intact: "
                        "mend that and go on with --resume.")

def log0(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        tqdm.write(text)

def micro_batches(lengths: list[int], ranks: Ranks, budget: int) -> list[list[int]]:
    """
    This rank's micro-batches of row numbers: of similar lengths, one row or at most `budget` padded tokens.
    A pass is a collective: every rank makes as many. The smallest budget that needs no more evens them out.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def pack_rows(limit: int) -> list[list[int]]:
        batches = []
        for row in order:
            if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > limit:
                batches.append([])
            batches[-1].append(row)
        return batches

    n = -(-len(pack_rows(budget)) // ranks.world) * ranks.world
    batches = pack_rows(bisect_left(range(budget), True, key=lambda limit: len(pack_rows(limit)) <= n))
    batches += [[]] * (n - len(batches))
    places = (ranks.rank, ranks.world - 1 - ranks.rank)  # first in one pass, and last in the next
    return [batches[i * ranks.world + places[i % 2]] for i in range(n // ranks.world)]

# ---------------------------------------------------------------- the update
def packed_batches(rows: list[tuple], cfg: Config, ranks: Ranks) -> Iterator[tuple[list[int], tuple]]:
    """Numbers and tensors (ids_BT, mask_BT, value_BT ..) of rows (prompt ids, reply ids, token values ..)."""
    for numbers in micro_batches([len(row[0]) + len(row[1]) for row in rows], ranks, cfg.micro_tokens):
        batch = [rows[i] for i in numbers]
        if not batch:  # FSDP needs a forward pass on every rank: a row with an empty mask adds 0
            batch = [([0, 0], [], *[[]] * (len(rows[0]) - 2))]
        prompts, replies, *values = zip(*batch, strict=True)
        yield numbers, pack(prompts, replies, values, ranks.device)

@torch.no_grad()
def rescore(model: Transformer, experiences: list[Experience], cfg: Config, ranks: Ranks) -> list[np.ndarray]:
    """logprob_T of every reply under a model; the ranks share the work, and each gets the whole result."""
    rows = [(e.turn.prompt_ids, e.turn.ids) for e in experiences]
    scored = []
    for numbers, (ids_BT, mask_BT) in packed_batches(rows, cfg, ranks):
        logprob_BT, _ = score(model, ids_BT, mask_BT, cfg.temperature)
        for b, i in enumerate(numbers):
            scored.append((i, logprob_BT[b][mask_BT[b]].double().cpu().numpy()))
    by_row = dict(gather_list(scored, ranks))  # they came rank by rank, longest first
    return [by_row[i] for i in range(len(experiences))]

def update(policy: Transformer, optimizer: torch.optim.Optimizer, experiences: list[Experience],
           old: list[np.ndarray], advantage: list[np.ndarray], pairs: list[tuple], cfg: Config,
           ranks: Ranks) -> list[dict[str, float]]:
    """One optimizer update, skipped if a loss or the gradient is not finite. Returns sums for the log."""
    n_tokens = sum(len(e.turn.ids) for e in experiences)
    rows, sums = [], []
    for e, old_T, advantage_T in zip(experiences, old, advantage, strict=True):
        rows.append((e.turn.prompt_ids, e.turn.ids, advantage_T, old_T, e.turn.logprobs))
    for _, (ids_BT, mask_BT, advantage_BT, old_BT, drawn_BT) in packed_batches(rows, cfg, ranks):
        logprob_BT, entropy_BT = score(policy, ids_BT, mask_BT, cfg.temperature)
        if cfg.updates == 1:  # the old policy is the policy itself: the ratio is exactly 1
            old_BT = logprob_BT.detach()
        mismatch_BT = (old_BT - drawn_BT) * mask_BT  # trainer against sampler
        weight_BT = importance_weight(mismatch_BT)
        loss = policy_loss(logprob_BT, old_BT, weight_BT * advantage_BT, mask_BT, n_tokens, cfg.clip)
        (loss * ranks.world).backward()  # FSDP averages over ranks, and we want the sum
        ratio_BT = (logprob_BT.detach() - old_BT).exp() * mask_BT
        sums.append({"loss": loss.item(), "ratio_max": ratio_BT.max().item(),
                     "entropy": entropy_BT.sum().item(), "mismatch": mismatch_BT.abs().sum().item(),
                     "corrected": (weight_BT != 1).sum().item()})
    sums += supervised_backward(policy, pairs, cfg, ranks)
    norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)  # before clipping
    norm = getattr(norm, "full_tensor", norm.clone)().item()  # of shards; of nothing, if no turn had tokens
    sums.append({"grad_norm": norm / ranks.world})  # every rank has the same, and the log sums over ranks
    sums = gather_list(sums, ranks)
    if all(math.isfinite(value) for part in sums for value in part.values()):
        optimizer.step()
    else:
        sums.append({"skipped": 1.0})  # on every rank, because all have the same sums
    optimizer.zero_grad()
    return sums

def supervised_backward(policy: Transformer, pairs: list[tuple[list[int], list[int]]], cfg: Config,
                        ranks: Ranks) -> list[dict[str, float]]:
    """Backward of the supervised term: cross-entropy of the responses, in nats per token."""
    sums, n_tokens = [], sum(len(response) for _, response in pairs)
    for _, (ids_BT, mask_BT) in packed_batches(pairs, cfg, ranks):
        logprob_BT, _ = score(policy, ids_BT, mask_BT)
        loss = -(logprob_BT * mask_BT).sum() / n_tokens
        (loss * cfg.sft_coef * ranks.world).backward()
        sums.append({"loss_sft": loss.item()})
    return sums

def draw_pairs(pairs: list[tuple[list[int], list[int]]], cfg: Config, n: int) -> list[tuple]:
    """The supervised pairs of update n. Three for four games makes the official run's 16 an update."""
    order = stream("pairs", cfg.seed, n).permutation(len(pairs))
    return [pairs[i] for i in order[:max(1, cfg.games * 3 // (4 * cfg.updates))]]

# ---------------------------------------------------------------- a step in numbers, and its memory
def update_metrics(sums: list[dict[str, float]], n_tokens: int, updates: int) -> dict[str, float]:
    """Means over the step's updates, or over its tokens; the largest ratio; how many updates were skipped."""
    over = dict.fromkeys(("mismatch", "corrected", "entropy"), max(1, n_tokens)) | {"skipped": 1}
    total = Counter(dict.fromkeys(("loss", *over), 0.0))
    for part in sums:
        total.update(part)  # adds
    metrics = {key: value / over.get(key, updates) for key, value in total.items()}
    return metrics | {"ratio_max": max(part.get("ratio_max", 0.0) for part in sums)}

def step_line(step: int, steps: int, metrics: dict, warning: str = "") -> str:
    """One line of the log, at most 120 columns without the warning."""
    shown = [f"step {step:4d}/{steps}"]
    for label, key in {"attack won": "asr", "raw": "asr_raw", "over-refusal": "over_refusal",
                       "forfeit": "forfeit", "new": "new_attacks"}.items():
        shown += [label + ("   --" if metrics[key] is None else f" {metrics[key]:4.0%}")]
    shown += [f"depth {metrics['depth'] or 0:.1f} | kl {metrics['kl'] or 0:.2f} | {metrics['seconds']:.1f}s"]
    return " | ".join(shown + [warning] * bool(warning))

def show_plan(cfg: Config, n_gpus: int) -> str:
    """What each of `n_gpus` GPUs holds: always, and in play and update, of which the larger counts."""
    from transformers import AutoConfig
    models = []
    for name in filter(None, (cfg.model, cfg.judge.partition(":")[2], cfg.opponent)):
        with refuse_damage(Path(name)), torch.device("meta"):  # the config is all that is read
            models.append(Transformer(AutoConfig.from_pretrained(newest_step(name)), name))
    sizes = [2 * sum(p.numel() for p in model.parameters()) for model in models]  # bytes in bf16
    c = models[0].config
    embeddings = 2 * c.vocab * c.dim * (1 if c.tied else 2)
    layer = (sizes[0] - embeddings) / c.layers
    # bytes that a token leaves in a layer for the backward pass; recomputed: inputs, and one layer at a time
    left = 8 * c.dim + 6 * c.ffn_dim + 6 * c.head_dim * (c.heads + c.kv_heads)
    kept = 2 * c.dim * c.layers + left if cfg.recompute else left * c.layers
    # a context holds instructions, an attack and an answer; with less memory, fewer games play at a time
    slots = -(-cfg.games // n_gpus) * (512 + 2 * cfg.max_new_tokens)
    # where several GPUs share a model, its embeddings stay in full between two passes
    always = {"weights and Adam moments, fp32": 6 * sizes[0] / n_gpus,
              "reference, judge, opponent": sum(sizes) / n_gpus + embeddings * (n_gpus > 1)}
    sizes += sizes[:1] * (cfg.play == "attacker" and not cfg.opponent)  # the reference defends
    play = {"play: policy, judge, opponent in full": sum(sizes) if n_gpus > 1 else sizes[0],
            "play: keys and values": 4 * slots * c.layers * c.kv_heads * c.head_dim}
    update = {"update: gradients, fp32": 2 * sizes[0] / n_gpus,
              "update: activations": cfg.micro_tokens * (kept + 2 * c.dim),
              "update: logits": head_bytes(cfg.micro_tokens, c.dim, c.vocab),
              "update: layers and embeddings in full": 2 * layer + embeddings + 3 * max(layer, embeddings)}
    peak = sum(always.values()) + max(sum(play.values()), sum(update.values()))
    # CUDA itself takes up to 3 GB
    fits = [f"fits {gb} GB" for gb in (24, 40, 48, 80, 96, 141, 180) if peak / 2 ** 30 + 3 < gb]
    plan = always | play | update | {"peak: " + (fits or ["fits no GPU"])[0]: peak}
    rows = [f"| {name} | {size / 2 ** 30:.1f} |" for name, size in plan.items()]
    text = (f"Disk: {7 * sizes[0] / 2 ** 30:.1f} GiB a checkpoint, {cfg.keep + 1} of them in a save. Host: "
            f"{2 * sizes[0] / 2 ** 30:.1f} GiB on rank 0 at the start and in a save. torchrun ends a run 30 "
            "s after a signal; if a step and a save take longer, start it with --shutdown-timeout 600.")
    return "\n".join([f"| {n_gpus} GPUs, bf16 | GiB on each |", "| --- | --- |", *rows, "", text])

# ---------------------------------------------------------------- inputs
def read_seeds(cfg: Config) -> tuple[list[list[Seed]], list[str]]:
    """The pools of seeds, and a line on every file. Without an attacker, no seed is revised."""
    import toy
    seed_files = read_prompts(cfg.seeds)
    attack_files = read_prompts([cfg.attacks] if cfg.attacks else [], attacks=True)
    labelled = [row for _, rows, _ in seed_files for row in rows] or toy.seeds()
    attacks = [row for _, rows, _ in attack_files for row in rows]
    if len({label for _, label in labelled}) < 2:
        stop(f"--seeds: only one kind of seed is in {', '.join(cfg.seeds)}; give harmful and benign ones.")
    pools = seed_pools(labelled, attacks, revise=cfg.play != "defender" or bool(cfg.opponent))
    return pools, [summary for _, _, summary in seed_files + attack_files]

def read_sft(cfg: Config, chat: ChatFormat, context: int) -> list[tuple[list[int], list[int]]]:
    """The supervised pairs as token ids; with thoughts on, a response is a whole reply, thought included."""
    pairs = []
    for where, row in read_rows(cfg.sft) if cfg.sft else ():
        response = text_of(row, ["response"], where)
        reply = parse_reply(response, cfg.cot)
        if not reply.well_formed or not cfg.cot and reply.answer != response.strip():
            stop(f"{where}: a response is thought </think> <answer> text </answer>, or text with --no-cot.")
        pair = chat.defender_prompt(text_of(row, ["prompt"], where)), chat.reply_ids(response)
        if sum(map(len, pair)) > context:  # it would be scored at positions that the model never saw
            stop(f"{where}: the pair has more tokens than the model's context, {context}; shorten it.")
        pairs.append(pair)
    if cfg.sft and not pairs:
        stop(f"{cfg.sft}: holds no pairs; give a file with at least one.")
    return pairs

def check_lengths(cfg: Config, pools: list[list[Seed]], chat: ChatFormat, context: int) -> None:
    """Refuse replies that a context of so many tokens cannot hold. A defender's prompt holds an attack."""
    seeds = [seed for pool in pools for seed in pool]
    seeds.sort(key=lambda seed: -len(seed.text.encode()))  # in bytes: nearly the order in tokens
    revised = [seed for seed in seeds if seed.revise][:8]
    left = [context - len(chat.defender_prompt(seed.text)) for seed in seeds[:8]]
    if revised:  # a defender's context holds an attack and an answer, each as long as a reply may be
        left.append((context - len(chat.defender_prompt(""))) // 2)
        left += [context - len(chat.attacker_prompt(seed)) for seed in revised]
    if cfg.max_new_tokens > min(left):
        stop(f"--max-new-tokens {cfg.max_new_tokens}: prompts leave less of the {context} tokens; choose at "
             f"most {min(left)}, or drop long seeds such as {seeds[0].text[:40]!r}.")

# ---------------------------------------------------------------- the run folder
def prepare(cfg: Config, chat: ChatFormat, summaries: list[str], newest: Path | None) -> None:
    """Write config.json, then the model of step 0, or, on resuming, the logs up to the newest checkpoint."""
    import toy
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    files = run_config(cfg.out).get("files", summaries)  # as when the run began
    settings = asdict(cfg) | {"prompts": asdict(chat.prompts), "files": files}
    checkpoint.replace_text(out / "config.json", json.dumps(settings, indent=1))
    if newest:
        checkpoint.rewind_logs(out, checkpoint.step_number(newest))  # later steps run again
        return
    tmp_dir = out / "partial_000000"
    shutil.rmtree(tmp_dir, ignore_errors=True)  # left by a run that was stopped here
    if cfg.model == "toy":
        model = toy.train_sft(chat, cfg.sft_steps, cfg.seed, label="SFT")
        save(tmp_dir, model.state_dict(), model, chat.tokenizer)
    else:
        checkpoint.link_model(find_checkpoint(cfg.model), tmp_dir)
    checkpoint.commit(tmp_dir, out / "step_000000")

def save_checkpoint(out: Path, step: int, policy: Transformer, optimizer: torch.optim.Optimizer,
                    chat: ChatFormat, keep: int, ranks: Ranks) -> None:
    """The weights, then each rank's part of the optimizer's state; committed when all is written."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    started = time.time()
    tmp_dir = out / f"partial_{step:06d}"
    # gathered one after the other, on rank 0's CPU alone; the optimizer's state has them in fp32
    weights = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    weights = {key: weights.pop(key).to(ranks.compute) for key in list(weights)}
    on_main(ranks, partial(save, tmp_dir, weights, policy, chat.tokenizer))
    problem = checkpoint.save_optimizer(tmp_dir, policy, optimizer)

    def finish() -> None:
        if problem:
            raise OSError(problem)
        checkpoint.commit(tmp_dir, out / f"step_{step:06d}")
        checkpoint.prune(out, keep, step)
    on_main(ranks, finish)
    log0(ranks, f"saved step_{step:06d} in {time.time() - started:.1f} s")

# ---------------------------------------------------------------- the run
MAX_SKIPPED = 3       # updates in a row that may be skipped before the run stops
MAX_DEAD_GAMES = 512  # games from the start of a run in which nothing happened, before it stops

def make_player(model: Transformer, role: str, chat: ChatFormat, cfg: Config, step: int,
                ranks: Ranks) -> Player:
    """A model in a role: a function from prompts to replies. Chance depends on (seed, step, game, turn)."""
    def answer(prompts: list[list[int]], numbers: list[int]) -> list[Sample]:
        uniform_NT = uniforms(cfg.seed, step, numbers, int(role == DEFENDER), cfg.max_new_tokens)
        stops, label = stop_ids(model, chat.tokenizer), role * (ranks.rank == 0)
        return sample(model, prompts, uniform_NT, stops, cfg.temperature, chat.prefixes(), label)
    return answer

def describe(cfg: Config, sources: dict[str, str], summaries: list[str], first: int, ranks: Ranks) -> str:
    """The configuration, with the origin of every value; the files, and what is not as it was or seems."""
    lines = [f"  {f.name:15s} {str(getattr(cfg, f.name)):28s} {sources[f.name]}" for f in fields(Config)]
    lines.append(f"  {cfg.games} games a step = {ranks.world} x {cfg.games // ranks.world} ({ranks.device})")
    before = run_config(cfg.out).get("files", summaries)
    lines += [f"  {line}{'' if line in before else ' - NOT as when the run began'}" for line in summaries]
    if first >= cfg.steps:
        lines.append(f"  {cfg.out} is finished, {first} steps of {cfg.steps}: to go on, raise --steps")
    return "\n".join(lines)

def main(argv: list[str] | None = None) -> None:
    """Refuse bad input before the run folder is touched; then repeat the numbered phases of a step."""
    cfg, sources = parse_config(argv)
    check_config(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    if cfg.plan:
        print(show_plan(cfg, cfg.plan))
        return
    import toy
    pools, summaries = read_seeds(cfg)
    ranks = setup(cfg)
    out = Path(cfg.out)
    newest = gather_list([checkpoint.newest_complete(out) if cfg.resume else None], ranks)[0]
    first = checkpoint.step_number(newest) if newest else 0
    origin = str(newest or cfg.model)
    chat = toy.open_chat(origin, cfg.cot)
    policy = open_sharded(origin, torch.float32, ranks) if origin != "toy" else None  # it may be damaged
    context = policy.hf_config.max_position_embeddings if policy else 256  # that of toy.random_init
    check_lengths(cfg, pools, chat, context)
    opponent = open_sharded(cfg.opponent, ranks.compute, ranks) if cfg.opponent else None
    judge = open_judge(cfg.judge, partial(open_sharded, dtype=ranks.compute, ranks=ranks), gathered)
    pairs = read_sft(cfg, chat, context)
    log0(ranks, describe(cfg, sources, summaries, first, ranks))
    if ranks.device.type == "cuda" and chat.prompts != toy.PROMPTS:
        log0(ranks, show_plan(cfg, ranks.world))

    # 0. the start: the SFT model or a checkpoint; a frozen copy of it is the reference
    on_main(ranks, partial(prepare, cfg, chat, summaries, newest))
    policy = policy or open_sharded(str(out / "step_000000"), torch.float32, ranks)
    reference = open_sharded(str(out / "step_000000"), ranks.compute, ranks)
    policy.recompute = cfg.recompute
    frozen = opponent or reference
    attacker_model = frozen if cfg.play == "defender" and cfg.opponent else policy
    defender_model = frozen if cfg.play == "attacker" else policy
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    problem = checkpoint.load_optimizer(newest, policy, optimizer) if first else ""
    if problem:
        stop_all(ranks, f"{newest}: its optimizer state cannot be read ({problem}); remove the folder.")
    logged = read_rows(f"{out}/games.jsonl") if first and not ranks.rank else []
    past = gather_list(checkpoint.past_attacks([row for _, row in logged], cfg.replay_won), ranks)
    skipped = 0                       # updates in a row
    dead = -math.inf if first else 0  # games in which nothing happened, as long as nothing has

    caught, signals = checkpoint.catch_signals(), []
    for step in range(first, cfg.steps):
        started = time.time()
        # 1. seeds: the same on every rank; each plays its slice. Attacker-only play has no use for raw seeds
        group = cfg.attacks_per_seed * cfg.answers_per_attack
        seeds = seeds_for_step(pools, cfg.games, cfg.seed, step, group)
        seeds = replay(seeds, past, cfg.replay, cfg.seed, step, group)
        mine = np.array_split(np.arange(cfg.games), ranks.world)[ranks.rank].tolist()
        mine = [n for n in mine if cfg.play != "attacker" or seeds[n].revise]

        # 2. play: attack, answer, verdict
        with gathered(attacker_model), gathered(defender_model):  # in self-play twice the same: harmless
            attacker = make_player(attacker_model, ATTACKER, chat, cfg, step, ranks)
            defender = make_player(defender_model, DEFENDER, chat, cfg, step, ranks)
            games = play([seeds[n] for n in mine], mine, chat, attacker, defender, judge,
                         cfg.answers_per_attack)
        games = gather_list(games, ranks)
        played = time.time()

        # 3. credit: payoffs, distance to the reference, returns, advantages over the turns of all ranks
        experiences = experiences_of(games, REWARDS[cfg.reward], PLAYS[cfg.play], cfg.cot)
        reference_logprob = rescore(reference, experiences, cfg, ranks)
        advantage, credit_metrics = credit(experiences, reference_logprob, cfg.kl, CREDITS[cfg.credit])
        if cfg.balance:
            advantage = balance_roles(advantage, experiences)

        # 4. update: one optimizer step over all turns, or several over shuffled shares of them
        sums, order = [], np.arange(len(experiences))
        old = [e.turn.logprobs for e in experiences]  # not read by a single update
        if cfg.updates > 1:
            old = rescore(policy, experiences, cfg, ranks)
            order = stream("shares", cfg.seed, step).permutation(len(experiences))
        for n, part in enumerate(np.array_split(order, cfg.updates), step * cfg.updates):
            optimizer.param_groups[0]["lr"] = step_size(cfg, n)
            batch = [[values[i] for i in part] for values in (experiences, old, advantage)]
            sums += update(policy, optimizer, *batch, draw_pairs(pairs, cfg, n), cfg, ranks)
            skipped = skipped + 1 if "skipped" in sums[-1] else 0

        # 5. log
        n_sampled = sum(len(turn.ids) for game in games for turn in (game.attacker, game.defender) if turn)
        n_tokens, now = sum(len(e.turn.ids) for e in experiences), time.time()
        metrics = {"step": step + 1, **game_metrics(games, experiences, REWARDS[cfg.reward]),
                   **toy.climb_metrics(games, past), **credit_metrics,
                   "lr": optimizer.param_groups[0]["lr"], **update_metrics(sums, n_tokens, cfg.updates),
                   "seconds": now - started,
                   "sample_tokens_per_s": n_sampled / (played - started),
                   "train_tokens_per_s": n_tokens / (now - played)}
        warning = nothing_happened(games)
        log0(ranks, step_line(step + 1, cfg.steps, metrics, warning))
        records = [checkpoint.game_record(game, step + 1) for game in games]
        on_main(ranks, partial(checkpoint.append_logs, out, metrics, records))
        past += checkpoint.past_attacks(records, cfg.replay_won)
        if (step + 1) % 25 == 0 or step + 1 == cfg.steps:
            shown = [game for game in games if game.attacker][:2] or games[:2]
            log0(ranks, "\n" + "\n\n".join(show_game(g, REWARDS[cfg.reward]) for g in shown) + "\n")
        if skipped >= MAX_SKIPPED:
            stop_all(ranks, f"step {step + 1}: {skipped} updates in a row had a loss or gradient that is not "
                            f"finite. Read the last games in {out}/games.jsonl; lower --lr and --resume.")
        dead = dead + len(games) if warning else -math.inf
        if dead >= MAX_DEAD_GAMES:
            stop_all(ranks, f"step {step + 1}: {warning} in the first {dead} games. Read {out}/games.jsonl, "
                            "then change --model or --judge, or try --no-cot.")

        # 6. save
        signals = gather_list(caught, ranks)  # any rank's will do
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or signals:
            save_checkpoint(out, step + 1, policy, optimizer, chat, cfg.keep, ranks)
        if signals:
            log0(ranks, f"{signals[0]}: stopped after step {step + 1} of {cfg.steps}; go on with --resume.")
            break

    checkpoint.on_stop_signals(signal.SIG_DFL)
    if dist.is_initialized():
        dist.destroy_process_group()
    if ranks.rank == 0 and cfg.exam and not signals:  # in the embedded world the exam, and the curves
        subprocess.run([sys.executable, Path(__file__).parent / "eval.py", "exam", out], check=True)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a step to finish, Ctrl-C ends at once
    main()
