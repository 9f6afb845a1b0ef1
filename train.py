r"""
Train one model against itself: it attacks, it defends, a judge scores, REINFORCE updates it from both sides.

    seeds -> attack -> answer -> verdict -> payoff per turn -> return per token -> advantage -> loss -> AdamW

    python train.py                           # the embedded world, minutes on a CPU: attack success falls
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-7B-Instruct \
        --judge wildguard:allenai/wildguard --seeds harmful=harmful.jsonl benign=benign.jsonl

Self-RedTeam (Liu et al., arXiv 2506.07468), without a critic or an adaptive KL; with `--credit reinforce++
--reward paper --updates 6` as its official run executes it. `main`, at the end, is all in numbered phases.
"""
from kernels import CommandLine, check_number, stop  # before torch, which reads the OpenMP setting in there
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from argparse import SUPPRESS, BooleanOptionalAction, RawDescriptionHelpFormatter
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, asdict, dataclass, field, fields
from datetime import timedelta
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
from data import pack, read_rows, text_of
from judge import check_judge, open_judge
from kernels.logprob import importance_weight
from model import (ADAPTER_FILES, Transformer, find_checkpoint, load, newest_step, open_empty, read_adapter,
                   read_weights, refuse_damage, run_config, save, score)
from sample import Sample, batches_within, sample, stop_ids, stream, uniforms
from selfplay import (ATTACKER, CREDITS, DEFENDER, REWARDS, ChatFormat, Experience, Player, Seed,
                      balance_roles, credit, experiences_of, game_metrics, nothing_happened, parse_reply,
                      play, replay, seeds_for_step, show_game)

# Functions import toy, transformers and FSDP when they run: it takes seconds, and --help should not wait.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves without it
# ---------------------------------------------------------------- configuration
ROLES = ATTACKER, DEFENDER
PLAYS = {"self": ROLES, "attacker": ROLES[:1], "defender": ROLES[1:]}  # who learns

def opt(source: str, default: object, help: str, choices: Iterable | None = None) -> Field:
    return field(default=default, metadata={"source": source, "help": help, "choices": choices})

paper, ours = partial(opt, "paper"), partial(opt, "ours")  # the sources of defaults

@dataclass(frozen=True)
class Config:
    """Every flag: its default, where that comes from, what it means. Ranks divide --games among them."""
    model: str = ours("toy", "folder of a checkpoint or run, or hub name; toy: made here by SFT")
    judge: str = ours("toy", "toy, a name in judge.JUDGES, or FORMAT:MODEL (judge.FORMATS)")
    seeds: list[str] = ours((), "files of seeds; a column labels them, or harmful=FILE benign=FILE")
    play: str = paper("self", "attacker: against the frozen start; defender: raw seeds", PLAYS)
    opponent: str = ours("", "who plays a role that does not learn: a checkpoint; in self-play, one role in "
                             "turn: past (any of this run's so far) or a file of eval.py crossplay")
    opponent_share: float = ours(0.5, "share of the steps of self-play that have an --opponent")
    attacks: str = ours("", "recorded attacks, such as a games.jsonl, for --play defender")
    reward: str = ours("zero_sum", "payoff table in selfplay.py", REWARDS)
    credit: str = ours("centred", "what becomes of returns; the official run: reinforce++", CREDITS)
    balance: bool = ours(False, "let both roles weigh the same in the loss, however long they talk")
    replay: float = ours(0.0, "share of raw games that ask an attack of this run's past, or of --attacks")
    replay_won: bool = ours(False, "with --replay: only attacks that won, as often as they did")
    cot: bool = paper(True, "think in private before writing")
    sft: str = paper("", "a JSONL file of prompt/response pairs for a supervised term")
    sft_coef: float = paper(1.0, "weight of the supervised term")
    steps: int = paper(200, "rounds of play and update")
    games: int = paper(128, "games a step, over all ranks; a multiple of 4 x attacks x answers")
    attacks_per_seed: int = paper(1, "attacks on each seed; in --credit group, 1 teaches no attacker")
    answers_per_attack: int = paper(1, "answers to an attack; in --credit group, 1 teaches none")
    updates: int = ours(1, "optimizer updates a step; the official run makes 6")
    lr: float = paper(5e-7, "AdamW step size at its peak; of adapters see --adapter-rank")
    adapter_rank: int = ours(0, "LoRA: train adapters of this rank, not the weights; --lr is then by "
                             "default ten times as large (thinkingmachines.ai/blog/lora)")
    adapters: str = ours("shared", "one adapter for both roles, or one for each", ("shared", "roles"))
    kl: float = paper(0.01, "what a nat of log-ratio to the reference costs")
    clip: float = paper(0.2, "PPO clip of the ratio")
    temperature: float = paper(1.0, "of sampling and of scoring")
    max_new_tokens: int = paper(2048, "longest reply in tokens")
    micro_tokens: int = ours(16384, "most tokens, padding included, in one pass of one rank")
    sft_steps: int = ours(600, "supervised updates of the toy model before it plays")
    seed: int = ours(0, "of everything random")
    save_every: int = paper(100, "steps between checkpoints; the last step is always saved")
    keep: int = ours(5, "newest checkpoints that stay, besides step_000000; with --opponent past, all")
    exam: bool = ours(True, "end with the held-out exam of the embedded world, and with the curves")
    log: str = ours("json", "json: metrics.jsonl alone; or in this, too", ("json", "tensorboard", "wandb"))
    out: str = ours("", "run folder [runs/JUDGE-PLAY-SEED]")
    resume: bool = ours(False, "continue the run in --out, with its settings")
    precision: str = paper("bf16", "of arithmetic; master weights are fp32", ("bf16", "fp32"))
    recompute: bool = ours(True, "compute activations again in the backward pass: less memory")
    plan: int = ours(0, "do not train: print what each of this many GPUs would have to hold")

# Other defaults; the toy world's win over those without a GPU
NO_GPU = {"games": 32, "max_new_tokens": 64, "micro_tokens": 1024, "precision": "fp32", "recompute": False}
TOY_WORLD = NO_GPU | {"steps": 250, "games": 128, "lr": 5e-4, "kl": 0.05, "replay": 0.5, "balance": True}
LIMITS = {"adapter_rank": (0, 1024), "temperature": (0.01, 100), "replay": (0, 1), "opponent_share": (0, 1)}

def parse_args(argv: list[str] | None) -> dict[str, object]:
    """The flags that the user gave, by the name of their field."""
    defaults = f"Defaults without a GPU: {NO_GPU}\n\nDefaults of the toy world: {TOY_WORLD}"
    cli = CommandLine(description=__doc__, epilog=defaults, formatter_class=RawDescriptionHelpFormatter,
                      argument_default=SUPPRESS, allow_abbrev=False)
    special = {bool: {"action": BooleanOptionalAction}, list[str]: {"nargs": "+"}}
    for f in fields(Config):
        kind = special.get(f.type, {"type": f.type, "choices": f.metadata["choices"]})
        cli.add_argument("--" + f.name.replace("_", "-"), **kind,
                         help=f"{f.metadata['help']} [{f.default}, {f.metadata['source']}]")
    return vars(cli.parse_args(argv))

def parse_config(argv: list[str] | None = None) -> Config:
    """Flags win over the settings of the run that is resumed, and those over the defaults."""
    args = parse_args(argv)
    import toy
    if args.get("opponent"):  # of a run, the checkpoint that is its newest now
        args["opponent"] = str(newest_step(args["opponent"]))
    defaults = asdict(Config())
    if not torch.cuda.is_available() and "plan" not in args:
        defaults |= NO_GPU
    if toy.is_toy_model(args.get("model", "toy")):
        defaults |= TOY_WORLD
    if args.get("adapter_rank"):
        defaults["lr"] *= 10
    name = f"{args.get('judge', 'toy').partition(':')[0]}-{args.get('play', 'self')}-{args.get('seed', 0)}"
    out = Path(args.get("out", f"runs/{name}"))
    resumes = args.get("resume") and checkpoint.newest_complete(out)  # else there is nothing to go on from
    saved = {name: value for name, value in run_config(str(out)).items()
             if resumes and name in defaults.keys() - {"out", "resume", "plan"}}
    if resumes and not saved:
        stop(f"--resume: {out}/config.json cannot be read as a run's settings; put back the file.")
    if "seeds" in args and "judge" not in args | saved:
        stop("--seeds: who judges the answers? Add --judge keywords, FORMAT:MODEL, or toy in its language.")
    for name in ({"model", "play", "opponent", "save_every", "adapter_rank", "adapters"}
                 & args.keys() & saved.keys()):
        if args[name] != saved[name]:
            stop(f"--{name.replace('_', '-')} {args[name]}: the run was begun with {saved[name]}; begin "
                 "another run for that.")
    return Config(**defaults | saved | args | {"out": str(out)})

def check_config(cfg: Config, world_size: int) -> None:
    """Refuse what cannot run, before any work and before anything is written."""
    for f in fields(Config):
        if f.type in (int, float):  # a count may be 0 where that is its default
            least = min(f.default, 1) if f.type is int else 0
            check_number(f.name, getattr(cfg, f.name), *LIMITS.get(f.name, (least, 2 ** 31 - 1)))
    check_judge(cfg.judge)
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
    if cfg.adapters == "roles" and not cfg.adapter_rank:
        stop("--adapters roles: of which size? Add --adapter-rank, such as 16.")
    if os.path.isdir(cfg.model) and any(newest_step(cfg.model).glob(ADAPTER_FILES)):
        stop(f"--model {cfg.model} holds adapters; give the folder that python model.py --merge makes of it.")
    mixes = cfg.opponent == "past" or cfg.opponent.endswith(".json")
    if cfg.opponent and (mixes != (cfg.play == "self") or cfg.attacks):
        stop("--opponent MODEL plays one role: add --play attacker or --play defender, leave out --attacks. "
             "--opponent past, and FILE.json of eval.py crossplay, are for --play self.")
    if not find_spec(cfg.log):
        stop(f"--log {cfg.log}: is not installed; run pip install {cfg.log}, or choose --log json.")
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
    elif cfg.precision == "bf16":  # a group of one: FSDP computes in bf16 over fp32 master weights
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    compute = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    return Ranks(int(os.environ.get("RANK", 0)), world, device, compute)

def shard(model: Transformer, ranks: Ranks) -> Transformer:
    """Split every layer's parameters among the processes (FSDP2), but no adapters; one in fp32 keeps all."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy(param_dtype=ranks.compute, reduce_dtype=torch.float32)
    adapters = {parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    for part in (*model.layers, model) if dist.is_initialized() else ():
        fully_shard(part, mp_policy=policy, ignored_params=adapters)
    return model

def open_sharded(name: str, dtype: torch.dtype, ranks: Ranks) -> Transformer:
    """A checkpoint's model, split among the processes. Rank 0 alone reads the weights, one copy of them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    if ranks.world == 1 and dtype == ranks.compute:
        return load(name, dtype).to(ranks.device)
    gc.collect()  # a sharded model refers to itself: a former opponent is freed only here
    model = shard(open_empty(name, dtype), ranks).to_empty(device=ranks.device)
    weights = {}
    on_main(ranks, lambda: weights.update(read_weights(name, model)))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    return model

open_other = lru_cache(maxsize=1)(open_sharded)  # an opponent that stays is read once

def add_adapters(model: Transformer, cfg: Config) -> Transformer:
    """With --adapter-rank, freeze the model and add what learns instead, in full on every rank."""
    if cfg.adapter_rank:
        if cfg.opponent:
            model.add_adapter("past", cfg.adapter_rank)  # an earlier self's, frozen like the base
        model.requires_grad_(False)
        roles = PLAYS[cfg.play]
        for name in roles if cfg.adapters == "roles" else ["-".join(roles)]:
            model.add_adapter(name, cfg.adapter_rank, cfg.seed)
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
    lists = [None] * ranks.world
    dist.all_gather_object(lists, mine)
    return sum(lists, [])

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

def micro_batches(lengths: dict[int, int], ranks: Ranks, budget: int) -> list[list[int]]:
    """
    This rank's micro-batches of row numbers: of similar lengths, one row or at most `budget` padded tokens.
    A pass is a collective: every rank makes as many. The smallest budget that needs no more evens them out.
    """
    order = sorted(lengths, key=lambda i: (-lengths[i], i))
    pack_rows = partial(batches_within, order, lengths)
    n = -(-len(pack_rows(budget)) // ranks.world) * ranks.world
    batches = pack_rows(bisect_left(range(budget), True, key=lambda limit: len(pack_rows(limit)) <= n))
    batches += [[]] * (n - len(batches))
    places = (ranks.rank, ranks.world - 1 - ranks.rank)  # first in one pass, and last in the next
    return [batches[i * ranks.world + places[i % 2]] for i in range(n // ranks.world)]

# ---------------------------------------------------------------- the update
def packed_batches(model: Transformer, rows: list[tuple], cfg: Config,
                   ranks: Ranks) -> Iterator[tuple[list[int], tuple]]:
    """Batches of rows (role, prompt ids, reply ids, token values ..): their numbers, and the tensors."""
    adapter_lengths = defaultdict(dict)  # {adapter: {row: its length}}
    for i, (role, prompt, reply, *_) in enumerate(rows):
        adapter_lengths[model.adapters.get(role)][i] = len(prompt + reply)
    for lengths in adapter_lengths.values():
        model.use(rows[min(lengths)][0])  # until the next adapter's batches
        for numbers in micro_batches(lengths, ranks, cfg.micro_tokens):
            # FSDP needs a forward pass on every rank: a row with an empty mask adds 0
            batch = [rows[i][1:] for i in numbers] or [([0, 0], *[[]] * (len(rows[0]) - 2))]
            prompts, replies, *values = zip(*batch, strict=True)
            yield numbers, pack(prompts, replies, values, ranks.device)

@torch.no_grad()
def rescore(model: Transformer, experiences: list[Experience], cfg: Config, ranks: Ranks,
            as_base: bool = False) -> list[np.ndarray]:
    """logprob_T of every reply under a model; the ranks share the work, and each gets the whole result."""
    rows = [("" if as_base else e.turn.role, e.turn.prompt_ids, e.turn.ids) for e in experiences]
    scored = []
    for numbers, (ids_BT, mask_BT) in packed_batches(model, rows, cfg, ranks):
        logprob_BT, _ = score(model, ids_BT, mask_BT, cfg.temperature)
        for b, i in enumerate(numbers):
            scored.append((i, logprob_BT[b][mask_BT[b]].double().cpu().numpy()))
    return [logprob_T for _, logprob_T in sorted(gather_list(scored, ranks))]  # they came longest first

def update(policy: Transformer, optimizer: torch.optim.Optimizer, experiences: list[Experience],
           old: list[np.ndarray], advantage: list[np.ndarray], pairs: list[tuple], cfg: Config,
           ranks: Ranks) -> list[dict[str, float]]:
    """One optimizer update, skipped if a loss or the gradient is not finite. Returns sums for the log."""
    n_tokens = sum(len(e.turn.ids) for e in experiences)
    rows = [(e.turn.role, e.turn.prompt_ids, e.turn.ids, advantage_T, old_T, e.turn.logprobs)
            for e, old_T, advantage_T in zip(experiences, old, advantage, strict=True)]
    sums = []
    for _, (ids_BT, mask_BT, advantage_BT, old_BT, drawn_BT) in packed_batches(policy, rows, cfg, ranks):
        logprob_BT, entropy_BT = score(policy, ids_BT, mask_BT, cfg.temperature)
        if cfg.updates == 1:  # the old policy is the policy itself: the ratio is exactly 1
            old_BT = logprob_BT.detach()
        mismatch_BT = (old_BT - drawn_BT) * mask_BT  # trainer against sampler
        weight_BT = importance_weight(mismatch_BT)
        loss = policy_loss(logprob_BT, old_BT, weight_BT * advantage_BT, mask_BT, n_tokens, cfg.clip)
        (loss * ranks.world).backward()  # FSDP averages over ranks, and we want the sum
        ratio_BT = (logprob_BT.detach() - old_BT).exp() * mask_BT
        sums.append({"loss": loss.item(), "ratio_max": ratio_BT.max().item(),
                     "entropy": entropy_BT.sum().item() / n_tokens,
                     "mismatch": mismatch_BT.abs().sum().item() / n_tokens,
                     "corrected": (weight_BT != 1).sum().item() / n_tokens})
    sums += supervised_backward(policy, pairs, cfg, ranks)
    for p in policy.parameters() if policy.adapters and ranks.world > 1 else ():
        if p.grad is not None:  # adapters are whole on every rank: average them, as FSDP does its shards
            dist.all_reduce(p.grad.div_(ranks.world))
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
    rows = [(PLAYS[cfg.play][-1], *pair) for pair in pairs]  # the defender's, if it learns
    for _, (ids_BT, mask_BT) in packed_batches(policy, rows, cfg, ranks):
        logprob_BT, _ = score(policy, ids_BT, mask_BT)
        loss = -(logprob_BT * mask_BT).sum() / n_tokens
        (loss * cfg.sft_coef * ranks.world).backward()
        sums.append({"loss_sft": loss.item()})
    return sums

def draw_pairs(pairs: list[tuple[list[int], list[int]]], cfg: Config, n: int) -> list[tuple]:
    """The supervised pairs of update n. Three for four games makes the official run's 16 an update."""
    order = stream("pairs", cfg.seed, n).permutation(len(pairs))
    return [pairs[i] for i in order[:max(1, cfg.games * 3 // (4 * cfg.updates))]]

# ---------------------------------------------------------------- a step in numbers
def update_metrics(sums: list[dict[str, float]], updates: int) -> dict[str, float]:
    """Means over the step's updates, and the largest ratio."""
    total = Counter(dict.fromkeys(("loss", "mismatch", "corrected", "entropy", "skipped"), 0.0))
    for part in sums:
        total.update(part)  # adds
    metrics = {key: value / updates for key, value in total.items()}
    return metrics | {"ratio_max": max(part.get("ratio_max", 0.0) for part in sums)}

def step_line(step: int, steps: int, metrics: dict, warning: str = "") -> str:
    """One line of the log, at most 120 columns without the warning."""
    shown = [f"step {step:4d}/{steps}"]
    for label, key in (("attack won", "asr"), ("raw", "asr_raw"), ("over-refusal", "over_refusal"),
                       ("forfeit", "forfeit"), ("new", "new_attacks")):
        shown.append(f"{label} {'--' if metrics[key] is None else format(metrics[key], '.0%'):>4}")
    shown += [f"depth {metrics['depth'] or 0:.1f}", f"kl {metrics['kl'] or 0:.2f}",
              f"{metrics['seconds']:.1f}s"]
    return " | ".join(shown + [warning] * bool(warning))

# ---------------------------------------------------------------- inputs
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

def read_mixtures(cfg: Config) -> dict[str, tuple[list[Path], list[float]]]:
    """For each role the checkpoints of a file of eval.py crossplay, and their weights at its equilibrium."""
    if not cfg.opponent.endswith(".json"):
        return {}
    with refuse_damage(Path(cfg.opponent)):
        results = json.loads(Path(cfg.opponent).read_text("utf-8"))
        folders = [find_checkpoint(name) for name in results["cells"]]
        weights = results["equilibrium"]
        for role in ROLES:
            np.random.choice(len(folders), p=weights[role])  # an error if no step could draw
        return {role: (folders, weights[role]) for role in ROLES}

def frozen_players(cfg: Config, mixtures: dict[str, tuple], step: int) -> dict[str, Path]:
    """Who does not learn in this step. In self-play, opponents take one role in turn (arXiv 1711.00832)."""
    random, role = stream("opponent", cfg.seed, step), ROLES[step % 2]
    own = [Path(cfg.out, f"step_{n:06d}") for n in range(0, step + 1, cfg.save_every)]
    if cfg.play == "attacker":
        return {DEFENDER: Path(cfg.opponent or own[0])}
    if cfg.play == "defender":
        return {ATTACKER: Path(cfg.opponent)} if cfg.opponent else {}
    if not cfg.opponent or random.random() >= cfg.opponent_share:
        return {}
    folders, weights = mixtures.get(role, (own, None))
    return {role: folders[random.choice(len(folders), p=weights)]}

def check_lengths(cfg: Config, pools: list[list[Seed]], chat: ChatFormat, context: int) -> None:
    """Refuse replies that a context of so many tokens cannot hold. A defender's prompt holds an attack."""
    seeds = sorted(sum(pools, []), key=lambda seed: -len(seed.text.encode()))  # nearly by tokens
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
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(policy, options=options)
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

def open_live_log(cfg: Config, first: int) -> Callable:
    """A function that shows a line of metrics.jsonl and its step, once, though a run resumes from `first`."""
    if cfg.log == "wandb":
        import wandb  # it ignores a step that it has. Not sent: what is printed, which holds attacks
        return wandb.init(project="self-redteam", resume="allow", dir=cfg.out, config=asdict(cfg),
                          id=f"{Path(cfg.out).name}-{os.stat(f'{cfg.out}/step_000000').st_mtime_ns}",
                          settings={"console": "off"}).log
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(f"{cfg.out}/tensorboard", purge_step=first + 1)  # later steps are forgotten
    def show(line: dict, step: int) -> None:
        for key, value in line.items():
            if value is not None:
                writer.add_scalar(key, value, step)
        writer.flush()
    return show

# ---------------------------------------------------------------- the run
MAX_SKIPPED = 3       # updates in a row that may be skipped before the run stops
MAX_DEAD_GAMES = 512  # games from the start of a run in which nothing happened, before it stops

def open_player(role: str, folder: Path | None, policy: Transformer, reference: Transformer, cfg: Config,
                ranks: Ranks) -> tuple[Transformer, str]:
    """Who plays a role, the policy or a frozen checkpoint: a model, and whose adapter it uses."""
    if not folder:
        return policy, role
    if folder == Path(cfg.out, "step_000000"):
        return reference, ""
    if cfg.adapter_rank and folder.parent == Path(cfg.out):
        return policy, read_adapter(folder / policy.adapters[role], policy, "past")
    return open_other(str(folder), ranks.compute, ranks), role

def make_player(model: Transformer, use_as: str, role: str, chat: ChatFormat, cfg: Config, step: int,
                ranks: Ranks) -> Player:
    """A model in a role: a function from prompts to replies. Chance depends on (seed, step, game, turn)."""
    def answer(prompts: list[list[int]], numbers: list[int]) -> list[Sample]:
        model.use(use_as)
        uniform_NT = uniforms(cfg.seed, step, numbers, int(role == DEFENDER), cfg.max_new_tokens)
        stops, label = stop_ids(model, chat.tokenizer), role * (ranks.rank == 0)
        return sample(model, prompts, uniform_NT, stops, cfg.temperature, chat.prefixes(), label)
    return answer

def run_eval(*words: str) -> None:
    """A command of eval.py, which rests on this file and so is not imported here."""
    status = subprocess.run([sys.executable, Path(__file__).with_name("eval.py"), *words]).returncode
    if status:
        raise SystemExit(status)

def describe(cfg: Config, summaries: list[str], first: int, ranks: Ranks) -> str:
    """The configuration and the files, and what was otherwise at the latest start."""
    before = run_config(cfg.out)
    lines = [f"  {name:18s} {value}"
             f"{f', was {before[name]}' if before.get(name, value) != value and name != 'resume' else ''}"
             for name, value in asdict(cfg).items()]
    lines.append(f"  {cfg.games} games a step = {ranks.world} x {cfg.games // ranks.world} ({ranks.device})"
                 f"{'; finished: to go on, raise --steps' if first >= cfg.steps else ''}")
    lines += [f"  {line}{'' if line in before.get('files', summaries) else ' - NOT as when the run began'}"
              for line in summaries]
    return "\n".join(lines)

def main(argv: list[str] | None = None) -> None:
    """Refuse bad input before the run folder is touched; then repeat the numbered phases of a step."""
    cfg = parse_config(argv)
    check_config(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    settings = json.dumps(asdict(cfg))
    if cfg.plan:
        return run_eval("plan", settings)
    import toy
    pools, summaries = toy.read_seeds(cfg.seeds, cfg.attacks, cfg.play, cfg.opponent)
    ranks = setup(cfg)
    out = Path(cfg.out)
    newest = gather_list([cfg.resume and checkpoint.newest_complete(out)], ranks)[0]
    first = checkpoint.step_number(newest) if newest else 0
    origin = str(newest or cfg.model)
    chat = toy.open_chat(origin, cfg.cot, cfg.opponent)
    dtype = ranks.compute if cfg.adapter_rank else torch.float32  # of the policy's own weights
    policy = open_sharded(origin, dtype, ranks) if origin != "toy" else None  # it may be damaged
    context = policy.hf_config.max_position_embeddings if policy else 256  # that of toy.random_init
    check_lengths(cfg, pools, chat, context)
    mixtures = read_mixtures(cfg)
    if cfg.opponent and cfg.play != "self":
        open_other(cfg.opponent, ranks.compute, ranks)
    judge = open_judge(cfg.judge, partial(open_sharded, dtype=ranks.compute, ranks=ranks), gathered)
    pairs = read_sft(cfg, chat, context)
    log0(ranks, describe(cfg, summaries, first, ranks))
    if ranks.device.type == "cuda" and chat.prompts != toy.PROMPTS and not newest:
        on_main(ranks, partial(run_eval, "plan", settings))

    # 0. the start: SFT or a checkpoint. The reference is a frozen copy, or the policy with its adapters off
    on_main(ranks, partial(prepare, cfg, chat, summaries, newest))
    start = str(out / "step_000000")
    policy = add_adapters(policy or open_sharded(start, dtype, ranks), cfg)
    reference = policy if cfg.adapter_rank else open_sharded(start, ranks.compute, ranks)
    policy.recompute = cfg.recompute
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if first and (problem := checkpoint.load_optimizer(newest, policy, optimizer)):
        stop_all(ranks, f"{newest}: its optimizer state cannot be read ({problem}); remove the folder.")
    logged = read_rows(f"{out}/games.jsonl") if first else []
    past_attacks = [seed for pool in pools for seed in pool if seed.recorded]
    past_attacks += checkpoint.past_attacks([row for _, row in logged], cfg.replay_won)
    show = open_live_log(cfg, first) if cfg.log != "json" and ranks.rank == 0 else None
    skipped, dead = 0, not first  # updates in a row; whether nothing has happened in any game

    caught, signals, rewards = checkpoint.catch_signals(), [], REWARDS[cfg.reward]
    for step in range(first, cfg.steps):
        started, done = time.time(), step + 1
        # 1. seeds: the same on every rank; each plays its slice. Raw ones teach nobody but the defender
        group = cfg.attacks_per_seed * cfg.answers_per_attack
        seeds = seeds_for_step(pools, cfg.games, cfg.seed, step, group)
        seeds = replay(seeds, past_attacks, cfg.replay, cfg.seed, step, group)
        frozen = frozen_players(cfg, mixtures, step)
        learn = [role for role in PLAYS[cfg.play] if role not in frozen]
        share = np.array_split(range(cfg.games), ranks.world)[ranks.rank]
        mine = [n for n in share.tolist() if DEFENDER in learn or seeds[n].revise]

        # 2. play: attack, answer, verdict
        players = {role: open_player(role, frozen.get(role), policy, reference, cfg, ranks) for role in ROLES}
        with gathered(players[ATTACKER][0]), gathered(players[DEFENDER][0]):  # twice the same: harmless
            attacker, defender = (make_player(*players[role], role, chat, cfg, step, ranks) for role in ROLES)
            games = play([seeds[n] for n in mine], mine, chat, attacker, defender, judge,
                         cfg.answers_per_attack)
        games = gather_list(games, ranks)
        played = time.time()

        # 3. credit: payoffs, distance to the reference, returns, advantages over the turns of all ranks
        experiences = experiences_of(games, rewards, learn, cfg.cot)
        reference_logprob = rescore(reference, experiences, cfg, ranks, as_base=True)
        advantage, credit_metrics = credit(experiences, reference_logprob, cfg.kl, CREDITS[cfg.credit])
        if cfg.balance:
            advantage = balance_roles(advantage, experiences)

        # 4. update: one optimizer step over all turns, or several over shuffled shares of them
        sums, order = [], range(len(experiences))
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
        n_learnt, now = sum(len(e.turn.ids) for e in experiences), time.time()
        metrics = {"step": done, "frozen": len(frozen), **game_metrics(games, experiences, rewards),
                   **toy.climb_metrics(games, past_attacks), **credit_metrics,
                   "lr": optimizer.param_groups[0]["lr"], **update_metrics(sums, cfg.updates),
                   "seconds": now - started, "sample_tokens_per_s": n_sampled / (played - started),
                   "train_tokens_per_s": n_learnt / (now - played)}
        warning = nothing_happened(games)
        log0(ranks, step_line(done, cfg.steps, metrics, warning))
        records = [checkpoint.game_record(game, done) for game in games]
        on_main(ranks, partial(checkpoint.append_logs, out, metrics, records, show))
        past_attacks += checkpoint.past_attacks(records, cfg.replay_won)
        if step % 25 == 0:
            log0(ranks, "\n" + "\n\n".join(show_game(g, rewards) for g in games[:2]) + "\n")
        if skipped >= MAX_SKIPPED:
            stop_all(ranks, f"step {done}: {skipped} updates in a row had a loss or gradient that is not "
                            f"finite. Read the last games in {out}/games.jsonl; lower --lr and --resume.")
        dead = dead and warning
        if dead and done * len(games) >= MAX_DEAD_GAMES:
            stop_all(ranks, f"step {done}: {warning} since the start. Read {out}/games.jsonl, "
                            "then change --model or --judge, or try --no-cot.")

        # 6. save
        signals = gather_list(caught, ranks)  # any rank's will do
        if done % cfg.save_every == 0 or done == cfg.steps or signals:
            keep = done if cfg.opponent == "past" else cfg.keep  # all of them may be asked to play
            save_checkpoint(out, done, policy, optimizer, chat, keep, ranks)
        if signals:
            log0(ranks, f"{signals[0]}: stopped after step {done} of {cfg.steps}; go on with --resume.")
            break

    checkpoint.on_stop_signals(signal.SIG_DFL)
    if dist.is_initialized():
        dist.destroy_process_group()
    if ranks.rank == 0 and cfg.exam and not signals:  # in the embedded world the exam, and the curves
        run_eval("exam", str(out))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a step to finish, Ctrl-C ends at once
    main()
