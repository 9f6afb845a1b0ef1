"""
Train one model against itself: it attacks, it defends, a judge scores, REINFORCE updates it.

    seeds -> attack -> answer -> verdict -> payoff per turn -> return per token -> whitened per role -> loss -> one AdamW step

    python train.py                                   # the embedded world, minutes on a laptop: attack success falls
    torchrun --nproc_per_node=8 train.py --model Qwen/Qwen2.5-7B-Instruct --judge keywords --seeds harmful.jsonl benign.jsonl

Algorithm: Self-RedTeam (Liu et al., arXiv 2506.07468) with REINFORCE++ as its official run executes it. Left out on purpose: a critic,
an adaptive KL, and a second pass for old log-probabilities where one update per step makes the ratio 1 by construction.
"""
import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig

import toy
from judge import ATTACK_COLUMNS, Exchange, Judge, JudgeModel, Verdict, check_judge, open_judge, read_labelled, read_rows
from kernels.logprob import PIECE
from model import Shape, Transformer, find, load, open_tokenizer, save, score, shape_of, stop, stop_ids
from sample import CACHE_SLOTS, Sample, plain_ids, sample, uniforms
from selfplay import (ATTACKER, DEFENDER, ENGLISH, REWARDS, Game, Play, Player, Seed, Setting, is_legal, mix, pack, parse_reply, payoffs,
                      play, plays_of, record, returns, transcript, whiten)

# ---------------------------------------------------------------- configuration

def opt(default: object, source: str, help: str, toy: object = None, cpu: object = None, choices: tuple | None = None) -> dataclasses.Field:
    """A knob: its default and where that comes from, and what takes its place in the toy world or where there is no GPU."""
    return field(default=default, metadata={"source": source, "help": help, "toy world": toy, "no GPU": cpu, "choices": choices})


PLAYS = {"self": (ATTACKER, DEFENDER), "attacker": (ATTACKER,), "defender": (DEFENDER,)}   # the roles that learn


@dataclass(frozen=True)
class Config:
    """Every knob of a run. Counts are global: ranks divide them."""
    model: str = opt("toy", "ours", "checkpoint folder, run folder or hub name; toy: born and warm-started here")
    judge: str = opt("toy", "ours", "toy, keywords, or FORMAT:MODEL with a format in judge.py, such as wildguard:allenai/wildguard")
    seeds: list[str] = opt((), "ours", "files of seeds: JSONL, CSV or JSON, labelled by a column, by harmful=FILE or by name")
    play: str = opt("self", "paper", "attacker: the defender is the frozen start; defender: nobody rewrites", choices=PLAYS)
    opponent: str = opt("", "ours", "a checkpoint that plays the role that does not learn, frozen; none: as --play says")
    attacks: str = opt("", "ours", "a file of recorded attacks, such as a games.jsonl, asked in place of fresh ones; needs --play defender")
    reward: str = opt("zero_sum", "ours", "payoff table in selfplay.py", choices=tuple(REWARDS))
    cot: bool = opt(True, "paper", "think in private before writing")
    sft: str = opt("", "paper", "a JSONL file of prompt/response pairs for the supervised term")
    sft_coef: float = opt(1.0, "paper", "weight of the supervised term")
    steps: int = opt(200, "paper", "rounds of play and update", toy=120)
    games: int = opt(128, "paper", "games a step, over all ranks; a multiple of 4", toy=128, cpu=32)
    updates: int = opt(1, "ours", "optimiser updates a step; the official run makes 6")
    lr: float = opt(5e-7, "paper", "AdamW step size at its peak", toy=2e-4)
    kl: float = opt(0.01, "paper", "what a nat of log-ratio to the reference costs")
    clip: float = opt(0.2, "paper", "PPO clip of the ratio")
    temperature: float = opt(1.0, "paper", "of sampling and of scoring")
    max_new_tokens: int = opt(2048, "paper", "longest reply in tokens", toy=48, cpu=64)
    max_unreadable: float = opt(0.2, "ours", "stop when more than this share of a step's verdicts cannot be read")
    micro_tokens: int = opt(16384, "ours", "most tokens, padding included, in one pass of one rank", toy=16384, cpu=2048)
    warm_steps: int = opt(600, "ours", "supervised updates of the toy model before it plays")
    seed: int = opt(0, "ours", "of everything random")
    save_every: int = opt(100, "paper", "steps between checkpoints; the last step is always saved")
    exam: bool = opt(True, "ours", "end with the held-out exam of the embedded world, before and after, and with the curves")
    out: str = opt("", "ours", "run folder [runs/JUDGE-PLAY-SEED]")
    resume: bool = opt(False, "ours", "continue the run in --out from its newest complete checkpoint")
    precision: str = opt("bf16", "paper", "of all arithmetic over fp32 master weights", toy="fp32", cpu="fp32", choices=("bf16", "fp32"))
    recompute: bool = opt(True, "ours", "make activations again in the backward pass: less memory, more arithmetic", toy=False, cpu=False)
    plan: int = opt(0, "ours", "do not train: print what each of this many GPUs would have to hold")


class Parser(ArgumentParser):
    def error(self, message: str) -> None:
        stop(f"train.py: {message}; python train.py --help lists the flags.")


def parse_config(argv: list[str] | None = None) -> tuple[Config, dict[str, str]]:
    """The configuration, and for each field where its value came from."""
    cli = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        kind = {"action": BooleanOptionalAction} if f.type is bool else {"nargs": "+"} if f.type == list[str] else {"type": f.type}
        elsewhere = [f"{where}: {f.metadata[where]}" for where in ("toy world", "no GPU") if f.metadata[where] is not None]
        shown = f"{f.metadata['help']} [{'; '.join([str(f.default), *elsewhere])}]"
        cli.add_argument("--" + f.name.replace("_", "-"), default=None, choices=f.metadata["choices"], help=shown, **kind)
    given = {name: value for name, value in vars(cli.parse_args(argv)).items() if value is not None}
    here = ["toy world"] * (given.get("judge", "toy") == "toy") + ["no GPU"] * (not torch.cuda.is_available() and "plan" not in given)
    values, sources = {}, {}
    for f in fields(Config):
        special = next((where for where in here if f.metadata[where] is not None), None)
        values[f.name] = given.get(f.name, f.metadata[special] if special else f.default)
        sources[f.name] = "command line" if f.name in given else special or f.metadata["source"]
    values["out"] = values["out"] or f"runs/{values['judge'].split(':')[0]}-{values['play']}-{values['seed']}"
    return Config(**values), sources


def check_config(cfg: Config, world: int) -> None:
    """Refuse what cannot run, before any work and before anything is written."""
    if cfg.games <= 0 or cfg.games % 4:
        stop(f"--games {cfg.games}: must be a positive multiple of 4, one for each type of seed.")
    if cfg.games % world:
        stop(f"--games {cfg.games} cannot be divided among {world} ranks; choose a multiple of {world} and of 4.")
    for name in ("steps", "updates", "max_new_tokens", "micro_tokens", "warm_steps", "save_every", "temperature", "lr"):
        if not getattr(cfg, name) > 0:
            stop(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be greater than 0.")
    if cfg.attacks and cfg.play != "defender":
        stop("--attacks FILE trains a defender on recorded attacks; add --play defender.")
    if cfg.opponent and (cfg.play == "self" or cfg.attacks):
        stop("--opponent MODEL plays the role that does not learn, live; add --play attacker or --play defender, and leave out --attacks.")
    if cfg.judge != "toy":
        check_judge(cfg.judge)
    if cfg.judge != "toy" and not cfg.seeds:
        stop(f"--judge {cfg.judge} needs seeds: add --seeds harmful.jsonl benign.jsonl.")
    if cfg.judge != "toy" and cfg.model == "toy":
        stop(f"--judge {cfg.judge} needs a model that speaks English: add --model FOLDER.")
    out = Path(cfg.out)
    if cfg.resume and not (out / "latest").is_file():
        stop(f"--resume: {out} holds no complete checkpoint; start it without --resume.")
    begun = out.is_dir() and {p.name for p in out.iterdir()} <= {"config.json", "step_000000"}   # stopped before it had a start
    if not cfg.resume and out.exists() and not begun:
        stop(f"{out} exists and will not be overwritten; choose another folder with --out, or continue it with --resume.")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        stop(f"--out {out}: {parent} cannot be written; choose another folder.")


# ---------------------------------------------------------------- files of seeds

def read_sft(path: str, cot: bool) -> list[tuple[str, str]]:
    """(prompt, response) of every line; with thoughts on, a response is a whole reply, thought included."""
    pairs = []
    for number, row in read_rows(path):
        if not isinstance(row, dict) or not {"prompt", "response"} <= row.keys():
            stop(f"{path}, line {number}: needs the columns prompt and response.")
        if not parse_reply(row["response"], cot).well_formed:
            stop(f"{path}, line {number}: the response is not 'thought </think> <answer> text </answer>'; mend it, or train with --no-cot.")
        pairs.append((row["prompt"], row["response"]))
    if not pairs:
        stop(f"{path}: holds no pairs; give a file with at least one.")
    return pairs


def seed_pools(cfg: Config) -> tuple[list[list[Seed]], list[str]]:
    """
    The four pools that `mix` draws from in equal shares, harmful and benign, each once for the attacker and once raw; and a line on every
    file that was read. A mode of play is a choice of seeds: without an attacker no seed is marked for revision, and recorded attacks take
    the place of those that would have been.
    """
    files = [read_labelled(path) for path in cfg.seeds]
    labelled = [row for file in files for row in file.rows] or toy.seeds()
    attacks = [read_labelled(path, ATTACK_COLUMNS) for path in [cfg.attacks] if path]
    recorded = [row for file in attacks for row in file.rows]
    pools = []
    for harmful in (True, False):
        texts = [text for text, label in labelled if label == harmful]
        asked = [text for text, label in recorded if label == harmful] or texts
        if not texts:
            stop(f"--seeds: no {'harmful' if harmful else 'benign'} seed among {', '.join(cfg.seeds)}; the game needs both kinds.")
        pools.append([Seed(text, harmful, revise=cfg.play != "defender" or bool(cfg.opponent)) for text in asked])
        pools.append([Seed(text, harmful, revise=False) for text in texts])
    return pools, [file.summary for file in files + attacks]


# ---------------------------------------------------------------- distributed: the only place where ranks exist

@dataclass(frozen=True)
class Ranks:
    """This process's place among all: rank of world, and the device and the precision it computes in."""
    rank: int
    world: int
    device: torch.device
    compute: torch.dtype = torch.float32

    @property
    def main(self) -> bool:
        return self.rank == 0


warnings.filterwarnings("ignore", message="torch.distributed is disabled")   # one process saves by itself, and means to


def setup(precision: str) -> Ranks:
    """One process without torchrun, any number with it; nccl on GPUs, gloo on CPUs."""
    cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    elif precision == "bf16":   # a group of one: computing in bf16 over fp32 master weights is FSDP's work here too
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(int(os.environ.get("RANK", 0)), world, device, torch.bfloat16 if precision == "bf16" else torch.float32)


def shard(model: Transformer, ranks: Ranks) -> Transformer:
    """Move to the device and split every layer's parameters among the processes (FSDP2); they stay in the precision they come in."""
    model = model.to(ranks.device)
    if dist.is_initialized():
        policy = MixedPrecisionPolicy(param_dtype=ranks.compute, reduce_dtype=torch.float32)
        for block in model.layers:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold all parameters in full on every rank, so that ranks may decode different numbers of tokens. A no-op on one process."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)   # FSDP2's own default: all but the root
        part.reshard()


def seated(judge: Judge, ranks: Ranks) -> Judge:
    """A judge model's weights take up a GPU only while it judges: before and after they are split among the ranks, or on the CPU."""
    if not isinstance(judge, JudgeModel):
        return judge
    if ranks.world > 1:
        shard(judge.model, ranks)

    def judged(exchanges: list[Exchange]) -> list[Verdict]:
        if ranks.world > 1:
            with gathered(judge.model):
                return judge(exchanges)
        judge.model.to(ranks.device)
        verdicts = judge(exchanges)
        judge.model.to("cpu")
        return verdicts
    return judged


def gather_list(mine: list, ranks: Ranks) -> list:
    """Every rank's list, one after the other, on every rank."""
    if ranks.world == 1:
        return mine
    lists: list[list] = [[] for _ in range(ranks.world)]
    dist.all_gather_object(lists, mine)
    return [item for part in lists for item in part]


def on_main(ranks: Ranks, act: Callable[[], None]) -> None:
    """Let one rank do it while the others wait."""
    if ranks.main:
        act()
    if ranks.world > 1:
        dist.barrier()


def log0(ranks: Ranks, text: str = "") -> None:
    if ranks.main:
        tqdm.write(text)


def full_norm(parameters: list[nn.Parameter]) -> float:
    """Clip the gradient to norm 1 over all ranks and return its norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


# ---------------------------------------------------------------- memory

def n_parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def layer_bytes(shape: Shape) -> int:
    """What a token leaves in one layer for its backward pass, in bf16."""
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    return 16 * shape.width + 4 * (queries + keys) + 8 * shape.inner + 8 * (queries + keys) * shape.qk_norm


def activation_bytes(shape: Shape, recompute: bool) -> int:
    """What a token leaves in all layers; where they are recomputed, their inputs and one layer at a time."""
    kept = 2 * shape.width * shape.layers + layer_bytes(shape) if recompute else layer_bytes(shape) * shape.layers
    return kept + 6 * shape.width   # the last norm


def cache_bytes(shape: Shape) -> int:
    """Keys and values of one full batch of the sampler, in bf16."""
    return 2 * 2 * CACHE_SLOTS * shape.layers * shape.kv_heads * shape.head_width


def memory_plan(cfg: Config, policy: PreTrainedConfig, judge: PreTrainedConfig | None, world: int) -> dict[str, dict[str, float]]:
    """
    Bytes that one of `world` GPUs holds: always, while games are played and judged, and during an update. The peak is the first with the
    larger of the others. What the CUDA context and the allocator's gaps take, 1 to 3 GB, comes on top.
    """
    shape, P = shape_of(policy, cfg.model), n_parameters(policy)
    J = n_parameters(judge) if judge else 0
    always = {"policy, fp32 master weights": 4 * P / world, "Adam moments, fp32": 8 * P / world, "reference, bf16": 2 * P / world,
              "judge, bf16, split": 2 * J / world if world > 1 else 0, "opponent, bf16": 2 * P / world if cfg.opponent else 0}
    caches = [cache_bytes(shape)] + ([cache_bytes(shape_of(judge, cfg.judge))] if judge else [])
    play = {"policy gathered, bf16": 2 * P, "frozen opponent gathered, bf16": 2 * P if cfg.play == "attacker" or cfg.opponent else 0,
            "judge gathered, bf16": 2 * J, "cache of keys and values": max(caches)}
    embeddings = shape.vocab * shape.width * (1 if shape.tied else 2)
    update = {"gradients, fp32": 4 * P / world,
              "activations": cfg.micro_tokens * activation_bytes(shape, cfg.recompute),
              "logit gradients of a slice, bf16, and products, fp32": 2 * PIECE["cuda"] + 8 * cfg.micro_tokens * shape.width,
              "two layers and the embeddings gathered, bf16": 2 * (2 * (P - embeddings) / shape.layers + embeddings)}
    return {"always": always, "play": play, "update": update}


def show_plan(cfg: Config) -> str:
    """The plan as Markdown, and whether it fits. Of the models only the configs are read."""
    if cfg.model == "toy":
        stop("--plan needs --model: the toy model fits everywhere.")
    judge_model = cfg.judge.partition(":")[2]
    try:
        policy, judge = (AutoConfig.from_pretrained(name) if name else None for name in (cfg.model, judge_model))
    except (OSError, ValueError) as error:
        stop(f"--plan: no config to be read ({str(error).splitlines()[0]}); give folders or hub names for --model and --judge.")
    parts = memory_plan(cfg, policy, judge, cfg.plan)
    rows = [f"| {phase} | {name} | {size / 2 ** 30:.1f} |" for phase, part in parts.items() for name, size in part.items() if size]
    peak = sum(parts["always"].values()) + max(sum(parts["play"].values()), sum(parts["update"].values()))
    least = next((size for size in (24, 40, 48, 80, 96, 141, 180) if peak / 2 ** 30 + 3 < size), None)
    verdict = f"fits GPUs of {least} GB" if least else "fits no GPU: take more of them, a smaller --micro-tokens, or a smaller model"
    head, foot = [f"| {cfg.plan} GPUs | part | GiB on each |", "| --- | --- | --- |"], [f"| peak | | {peak / 2 ** 30:.1f} |", "", verdict]
    return "\n".join([*head, *rows, *foot])


# ---------------------------------------------------------------- the update

def policy_loss(logprob_BT: Tensor, old_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, n_tokens: int, clip: float) -> Tensor:
    """
    The clipped surrogate (Schulman et al., arXiv 1707.06347, equation 7), summed over tokens and divided by `n_tokens`, the token count of
    the whole update: a token weighs the same in whatever micro-batch and on whatever rank it lands.
    """
    ratio_BT = (logprob_BT - old_BT).exp()
    gain_BT = torch.minimum(ratio_BT * advantage_BT, ratio_BT.clamp(1 - clip, 1 + clip) * advantage_BT)
    return -(gain_BT * mask_BT).sum() / n_tokens


def micro_batches(lengths: list[int], ranks: Ranks, budget: int) -> list[list[int]]:
    """
    This rank's micro-batches, as indices into the update's rows: rows of similar length together, at most `budget` tokens with padding.
    Every rank gets equally many, the last ones possibly empty, because each pass is a collective.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    batches += [[]] * (-len(batches) % ranks.world)
    return batches[ranks.rank::ranks.world]


def pack_plays(plays: list[Play], rows: list[int], per_token: list[list], device: torch.device) -> tuple[Tensor, ...]:
    """Pack these rows; an empty micro-batch becomes a row of two tokens that no mask selects: the pass happens but weighs nothing."""
    if not rows:
        ids_BT = torch.zeros(1, 2, dtype=torch.long, device=device)
        return ids_BT, torch.zeros_like(ids_BT, dtype=torch.bool), *(torch.zeros(1, 2, device=device) for _ in per_token)
    turns = [plays[i].turn for i in rows]
    return pack([t.prompt_ids for t in turns], [t.ids for t in turns], [[values[i] for i in rows] for values in per_token], device)


@torch.no_grad()
def rescore(model: Transformer, plays: list[Play], cfg: Config, ranks: Ranks) -> list[np.ndarray]:
    """logprob_T of every play's reply under a model; the ranks share the work and all get the whole result."""
    scored: list[tuple[int, np.ndarray]] = []
    lengths = [len(p.turn.prompt_ids) + len(p.turn.ids) for p in plays]
    for rows in micro_batches(lengths, ranks, cfg.micro_tokens):
        ids_BT, mask_BT = pack_plays(plays, rows, [], ranks.device)
        logprob_BT, _ = score(model, ids_BT, mask_BT, cfg.temperature)
        scored += [(i, logprob_BT[b][mask_BT[b]].double().cpu().numpy()) for b, i in enumerate(rows)]
    by_row = dict(gather_list(scored, ranks))
    return [by_row[i] for i in range(len(plays))]


def update(policy: Transformer, optimizer: torch.optim.Optimizer, plays: list[Play], old: list[np.ndarray], advantage: list[np.ndarray],
           demos: list[tuple], cfg: Config, ranks: Ranks) -> list[dict]:
    """
    One optimiser update on these plays, and on the supervised pairs `demos` if there are any. Returns, on every rank, sums per micro-batch
    and role for the log. With one update a step the old policy is the policy itself: old = logprob, detached, and the ratio is exactly 1.
    """
    lengths, sums = [len(p.turn.prompt_ids) + len(p.turn.ids) for p in plays], []
    n_tokens = sum(len(p.turn.ids) for p in plays)
    role = [np.full(len(p.turn.ids), p.turn.role == ATTACKER, dtype=np.float32) for p in plays]
    sampled = [np.array(p.turn.logprobs) for p in plays]
    for rows in tqdm(micro_batches(lengths, ranks, cfg.micro_tokens), desc="update", leave=False, delay=3, disable=not ranks.main):
        ids_BT, mask_BT, *values = pack_plays(plays, rows, [advantage, old, role, sampled], ranks.device)
        advantage_BT, old_BT, attacker_BT, sampled_BT = values
        logprob_BT, entropy_BT = score(policy, ids_BT, mask_BT, cfg.temperature)
        old_BT = old_BT if cfg.updates > 1 else logprob_BT.detach()
        losses = {name: policy_loss(logprob_BT, old_BT, advantage_BT, mask_BT & (attacker_BT == flag), n_tokens, cfg.clip)
                  for name, flag in ((ATTACKER, 1), (DEFENDER, 0))}
        (sum(losses.values()) * ranks.world).backward()   # FSDP averages over ranks; we want the sum
        with torch.no_grad():
            ratio_BT = (logprob_BT - old_BT).exp() * mask_BT
            sums.append({"loss_attacker": losses[ATTACKER].item(), "loss_defender": losses[DEFENDER].item(),
                         "ratio_max": ratio_BT.max().item(), "entropy": entropy_BT.sum().item(),
                         "mismatch": (logprob_BT - sampled_BT)[mask_BT].abs().sum().item()})
    sums += [{"loss_sft": loss} for loss in supervised(policy, demos, cfg, ranks)]
    sums.append({"grad_norm": full_norm(list(policy.parameters())) / ranks.world})   # the same on every rank, and the log sums over ranks
    optimizer.step()
    optimizer.zero_grad()
    return gather_list(sums, ranks)


def supervised(policy: Transformer, demos: list[tuple[list[int], list[int]]], cfg: Config, ranks: Ranks) -> list[float]:
    """Backward of the supervised term: cross-entropy in nats per token of the responses; the ranks share the pairs."""
    losses, n_tokens = [], sum(len(reply) for _, reply in demos)
    for rows in micro_batches([len(p) + len(r) for p, r in demos], ranks, cfg.micro_tokens):
        if rows:
            ids_BT, mask_BT = pack([demos[i][0] for i in rows], [demos[i][1] for i in rows], device=ranks.device)
        else:
            ids_BT, mask_BT = pack_plays([], [], [], ranks.device)
        logprob_BT, _ = score(policy, ids_BT, mask_BT)
        loss = -(logprob_BT * mask_BT).sum() / n_tokens
        (loss * cfg.sft_coef * ranks.world).backward()
        losses.append(loss.item())
    return losses


def sft_batch(demos: list[tuple[str, str]], setting: Setting, cfg: Config, n: int) -> list[tuple[list[int], list[int]]]:
    """The n-th update's supervised pairs as token ids, one for every eight games: 16 at the official run's size."""
    if not demos:
        return []
    chosen = np.random.default_rng((cfg.seed, n, 1)).choice(len(demos), size=min(len(demos), max(1, cfg.games // 8)), replace=False)
    end = [setting.tokenizer.eos_token_id]
    return [(setting.defender_prompt(demos[i][0]), plain_ids(setting.tokenizer, demos[i][1]) + end) for i in chosen]


def schedule(cfg: Config) -> Callable[[int], float]:
    """Step size over its peak at the n-th update: warm-up over 3 % of the run, then a cosine down to 10 %."""
    total = cfg.steps * cfg.updates
    warm = max(1, round(0.03 * total))
    return lambda n: min(1.0, (n + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, max(0, n - warm) / max(1, total - warm)))))


# ---------------------------------------------------------------- measuring a step

def mean(values: list) -> float | None:
    """The mean of what is there; None, not 0, where nothing is."""
    return float(np.mean(values)) if values else None


def game_metrics(games: list[Game], plays: list[Play], cfg: Config) -> dict[str, float | None]:
    """What happened in a step's games. A rate is None where no game could have shown it."""
    read = [g for g in games if g.verdict.readable]
    attacked, rewards = [g for g in read if g.attacked or (cfg.attacks and not g.seed.revise)], REWARDS[cfg.reward]
    answered = lambda games: [not g.verdict.refusal for g in games if g.verdict.refusal is not None]
    legal = [payoffs(g, rewards) for g in read if is_legal(g)]
    sums = [p[ATTACKER] + p[DEFENDER] for p in legal if None not in p.values()]
    tries = [g for g in games if g.attacker]
    under_fire = attacked or read
    return {"asr": mean([bool(g.verdict.response_harmful) for g in under_fire if g.seed.harmful]),
            "asr_not_refused": mean(answered([g for g in under_fire if g.seed.harmful])),
            "over_refusal": mean([not a for a in answered([g for g in under_fire if not g.seed.harmful])]),
            "benign_answered": mean(answered([g for g in read if not g.seed.harmful])),
            "drift": mean([g.verdict.prompt_harmful != g.seed.harmful for g in read if g.attacked]),
            "forfeit": mean([not is_legal(g) for g in tries if g.verdict.readable]),
            "format_attacker": mean([g.attacker.reply.well_formed for g in tries]),
            "format_defender": mean([g.defender.reply.well_formed for g in games]),
            "reward_attacker": mean([p.payoff for p in plays if p.turn.role == ATTACKER]),
            "reward_defender": mean([p.payoff for p in plays if p.turn.role == DEFENDER]),
            "zero_sum_gap": float(sum(sums)), "unreadable": mean([not g.verdict.readable for g in games])}


def credit_metrics(plays: list[Play], advantage: list[np.ndarray], reference: list[np.ndarray]) -> dict[str, float | None]:
    """How the rewards became credit: distance to the reference (k1, nats per token), and how often the two signs disagree."""
    log_ratio = [np.array(p.turn.logprobs) - r for p, r in zip(plays, reference)]
    flips = [np.sign(a.mean()) * np.sign(p.payoff + p.shaping) < 0 for p, a in zip(plays, advantage)]
    return {"kl": mean(list(np.concatenate(log_ratio))) if plays else None, "sign_flip": mean([bool(f) for f in flips])}


def update_metrics(sums: list[dict], n_tokens: int, updates: int) -> dict[str, float]:
    """A step's updates, averaged over the step and not over its last micro-batch."""
    total = lambda key: sum(s.get(key, 0.0) for s in sums)
    metrics = {key: total(key) / updates for key in ("loss_attacker", "loss_defender", "grad_norm")}
    metrics |= {key: total(key) / max(1, n_tokens) for key in ("mismatch", "entropy")}
    metrics["ratio_max"] = max((s.get("ratio_max", 0.0) for s in sums), default=0.0)
    return metrics | ({"loss_sft": total("loss_sft") / updates} if any("loss_sft" in s for s in sums) else {})


def step_line(step: int, steps: int, m: dict) -> str:
    """One line of the log, at most 120 columns."""
    rate = lambda key: f"{m[key]:4.0%}" if m[key] is not None else "  --"
    return (f"step {step:4d}/{steps} | attack won {rate('asr')} | over-refusal {rate('over_refusal')} | "
            f"benign answered {rate('benign_answered')} | forfeit {rate('forfeit')} | kl {m['kl'] or 0:.3f} | {m['seconds']:.1f}s")


def table_before_after(lines: list[dict]) -> str:
    """Own metrics, averaged over the first and the last tenth of the steps."""
    tenth, rows = max(1, len(lines) // 10), []
    for key in ("asr", "over_refusal", "benign_answered", "forfeit", "kl", "entropy"):
        ends = [mean([line[key] for line in part if line.get(key) is not None]) for part in (lines[:tenth], lines[-tenth:])]
        rows.append(f"  {key:16s} " + "   ".join(f"{e:7.3f}" if e is not None else "     --" for e in ends))
    head = f"  against its own attacker, means over {tenth} step{'s' * (tenth > 1)}\n  {'':16s}   first      last\n"
    return head + "\n".join(rows)


# ---------------------------------------------------------------- checkpoints

def save_checkpoint(out: Path, step: int, policy: Transformer, optimizer: torch.optim.Optimizer, setting: Setting, ranks: Ranks) -> None:
    """A Hugging Face folder and the optimizer's shards under a temporary name; renamed when complete, and only then named in `latest`."""
    final, partial = out / f"step_{step:06d}", out / f"partial_{step:06d}"
    weights = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    on_main(ranks, lambda: (shutil.rmtree(partial, ignore_errors=True), save(partial, weights, policy, setting.tokenizer)))
    alone = not dist.is_initialized()
    dcp.save({"optimizer": get_optimizer_state_dict(policy, optimizer)}, checkpoint_id=partial / "optimizer", no_dist=alone)

    def publish() -> None:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        (out / "latest.new").write_text(final.name)
        (out / "latest.new").replace(out / "latest")
    on_main(ranks, publish)


def load_optimizer(folder: Path, policy: Transformer, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Restore the optimizer's state in place, on any number of ranks."""
    state = {"optimizer": get_optimizer_state_dict(policy, optimizer)}
    dcp.load(state, checkpoint_id=folder / "optimizer", no_dist=not dist.is_initialized())
    set_optimizer_state_dict(policy, optimizer, state["optimizer"])


def warm_started(cfg: Config, setting: Setting, out: Path) -> None:
    """
    Write the toy model's starting point, out/step_000000. It depends on few settings, so a sibling run that has the same one lends it;
    `warm_start.json` inside says what it is.
    """
    source = "".join((Path(__file__).parent / name).read_text() for name in ("toy.py", "model.py"))
    key = {"seed": cfg.seed, "steps": cfg.warm_steps, "cot": cfg.cot, "source": hashlib.sha256(source.encode()).hexdigest()[:16]}
    folder = out / "step_000000"
    shutil.rmtree(folder, ignore_errors=True)   # half of one, if the run was stopped here before
    for other in sorted(out.parent.glob("*/step_000000/warm_start.json")):
        if json.loads(other.read_text()) == key:
            tqdm.write(f"warm start: the same as in {other.parent.parent}, copied")
            shutil.copytree(other.parent, folder)
            return
    begun = time.time()
    model = toy.warm_start(setting, cfg.warm_steps, cfg.seed, label="warm start")
    tqdm.write(f"warm start: {cfg.warm_steps} supervised updates in {time.time() - begun:.0f} s")
    save(folder, model.state_dict(), model, setting.tokenizer)
    (folder / "warm_start.json").write_text(json.dumps(key))


def write_start(cfg: Config, given: Transformer | None, setting: Setting, out: Path) -> None:
    """The run folder with what the run begins with: its configuration, and the model of step 0."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    if given is None:
        warm_started(cfg, setting, out)
    else:
        save(out / "step_000000", given.state_dict(), given, setting.tokenizer)
    (out / "latest").write_text("step_000000")


def write_logs(out: Path, metrics: dict, games: list[Game], step: int) -> None:
    """A line of metrics.jsonl and a line of games.jsonl per game."""
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    with open(out / "games.jsonl", "a") as file:
        file.writelines(json.dumps(record(game, step), ensure_ascii=False) + "\n" for game in games)


def truncate_logs(out: Path, step: int) -> None:
    """Drop what was logged after the checkpoint: those steps will be made again."""
    for name in ("metrics.jsonl", "games.jsonl"):
        lines = [line for line in (out / name).read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
        (out / (name + ".new")).write_text("".join(lines))
        (out / (name + ".new")).replace(out / name)


# ---------------------------------------------------------------- the run

def player(model: Transformer, role: str, stops: list[int], cfg: Config, step: int, ranks: Ranks) -> Player:
    """A model in a role, as a function from prompts to replies. Chance is that of (seed, step, game, turn)."""
    def answer(prompts: list[list[int]], numbers: list[int]) -> list[Sample]:
        uniform_NT = uniforms(cfg.seed, step, numbers, (ATTACKER, DEFENDER).index(role), cfg.max_new_tokens)
        return sample(model, prompts, uniform_NT, stops, cfg.temperature, label=role if ranks.main else "")
    return answer


def open_setting(cfg: Config, ranks: Ranks) -> tuple[Setting, Judge]:
    """The language and the judge of the game."""
    if cfg.judge == "toy":
        return Setting(toy.make_tokenizer() if cfg.model == "toy" else open_tokenizer(cfg.model), toy.PROMPTS, cfg.cot), toy.judge
    return Setting(open_tokenizer(cfg.model), ENGLISH, cfg.cot), open_judge(cfg.judge, ranks.compute)


def check_lengths(cfg: Config, pools: list[list[Seed]], setting: Setting, model: Transformer | None) -> None:
    """Refuse seeds and replies that the model's context cannot hold."""
    if model is None:
        return
    context, longest = model.config.max_position_embeddings, max((seed for pool in pools for seed in pool), key=lambda seed: len(seed.text))
    asked = max(len(setting.attacker_prompt(longest)), len(setting.defender_prompt("")) + cfg.max_new_tokens * (cfg.play != "defender"))
    if asked + cfg.max_new_tokens > context:
        stop(f"--max-new-tokens {cfg.max_new_tokens}: a prompt of up to {asked} tokens and its reply do not fit into the {context} tokens "
             f"of {cfg.model}; choose at most {(context - asked) // 2}, or leave out the seed that begins {longest.text[:40]!r}.")


def check_verdicts(cfg: Config, games: list[Game], step: int, ranks: Ranks) -> None:
    """A judge that cannot be read is no judge."""
    judged = [g for g in games if g.defender.reply.answer]
    unreadable = sum(not g.verdict.readable for g in judged)
    if unreadable > cfg.max_unreadable * len(judged):
        log0(ranks, f"step {step}: {unreadable} of {len(judged)} verdicts of {cfg.judge} cannot be read, more than --max-unreadable "
                    f"{cfg.max_unreadable} allows; give a judge of that format. The newest checkpoint is in {cfg.out}.")
        raise SystemExit(2)


def describe(cfg: Config, sources: dict[str, str], ranks: Ranks) -> str:
    """The configuration, with the origin of every value."""
    lines = [f"  {f.name:15s} {str(getattr(cfg, f.name)):28s} {sources[f.name]}" for f in fields(Config)]
    shares = f"{ranks.world} process{'es' * (ranks.world > 1)} on {ranks.device.type} x {cfg.games // ranks.world}"
    return "\n".join([*lines, f"  {cfg.games} games a step = {shares}"])


def show_results(cfg: Config, out: Path) -> None:
    """The end of a run: its own numbers, then what a reader would type next: the held-out exam before and after, and the curves."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    print(f"\n{table_before_after(lines)}\n", flush=True)
    here = Path(__file__).parent
    if not cfg.exam:
        return
    if cfg.judge == "toy":
        subprocess.run([sys.executable, here / "eval.py", "bench", out / "step_000000", out], check=True)
    subprocess.run([sys.executable, here / "eval.py", "plot", out], check=True)


def main() -> None:
    cfg, sources = parse_config()
    if cfg.plan:
        print(show_plan(cfg))
        return
    world = int(os.environ.get("WORLD_SIZE", 1))
    check_config(cfg, world)
    (pools, read), demos = seed_pools(cfg), read_sft(cfg.sft, cfg.cot) if cfg.sft else []
    ranks, out = setup(cfg.precision), Path(cfg.out)
    setting, judge = open_setting(cfg, ranks)
    given = load(cfg.model) if cfg.model != "toy" else None   # opened before anything is written: it may be damaged
    opponent = load(cfg.opponent, ranks.compute) if cfg.opponent else None
    check_lengths(cfg, pools, setting, given)
    log0(ranks, "\n".join([describe(cfg, sources, ranks), *(f"  {line}" for line in read)]))

    # 0. the start: a model of its own, or a checkpoint; frozen, it is the reference
    if not cfg.resume:
        on_main(ranks, lambda: write_start(cfg, given, setting, out))
    given, newest = None, find(str(out))
    reference = shard(load(str(out / "step_000000"), ranks.compute), ranks).requires_grad_(False)
    policy = shard(load(str(newest)), ranks)
    policy.recompute = cfg.recompute
    frozen = shard(opponent, ranks).requires_grad_(False) if opponent else reference
    attacking = frozen if cfg.play == "defender" and cfg.opponent else policy
    defending = frozen if cfg.play == "attacker" else policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    first = int(newest.name.removeprefix("step_"))
    if first:
        load_optimizer(newest, policy, optimizer, ranks)
        on_main(ranks, lambda: truncate_logs(out, first))
    judge = seated(judge, ranks)
    stops, rate, rewards = stop_ids(policy, setting.tokenizer), schedule(cfg), REWARDS[cfg.reward]

    for step in range(first, cfg.steps):
        begun = time.time()
        # 1. seeds: the same on every rank; each plays its slice. Attacker-only play has no use for raw seeds
        share = cfg.games // ranks.world
        seeds = mix(pools, cfg.games, cfg.seed, step)
        mine = [n for n in range(ranks.rank * share, (ranks.rank + 1) * share) if cfg.play != "attacker" or seeds[n].revise]

        # 2. play: attack, answer, verdict
        with gathered(attacking), gathered(defending):
            attacker, defender = player(attacking, ATTACKER, stops, cfg, step, ranks), player(defending, DEFENDER, stops, cfg, step, ranks)
            games = play([seeds[n] for n in mine], mine, setting, attacker, defender, judge)
        games = gather_list(games, ranks)
        check_verdicts(cfg, games, step + 1, ranks)
        played = time.time()

        # 3. credit: payoffs, distance to the reference, returns, whitened per role over all ranks
        plays = plays_of(games, rewards, PLAYS[cfg.play], cfg.cot)
        reference_logprob = rescore(reference, plays, cfg, ranks)
        old = rescore(policy, plays, cfg, ranks) if cfg.updates > 1 else [np.array(p.turn.logprobs) for p in plays]
        gains = [returns(p.payoff + p.shaping, np.array(p.turn.logprobs), r, cfg.kl) for p, r in zip(plays, reference_logprob)]
        advantage = whiten(gains, [p.turn.role for p in plays])

        # 4. update: one optimiser step over all turns, or several over shuffled shares of them
        order, sums = np.random.default_rng((cfg.seed, step)).permutation(len(plays)) if cfg.updates > 1 else np.arange(len(plays)), []
        for n, part in enumerate(np.array_split(order, cfg.updates)):
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * rate(step * cfg.updates + n)
            sums += update(policy, optimizer, *([values[i] for i in part] for values in (plays, old, advantage)),
                           sft_batch(demos, setting, cfg, step * cfg.updates + n), cfg, ranks)

        # 5. log
        n_sampled = sum(len(t.ids) for g in games for t in (g.attacker, g.defender) if t)
        n_tokens = sum(len(p.turn.ids) for p in plays)
        now = time.time()
        metrics = {"step": step + 1, **game_metrics(games, plays, cfg), **credit_metrics(plays, advantage, reference_logprob),
                   **update_metrics(sums, n_tokens, cfg.updates), "lr": optimizer.param_groups[0]["lr"],
                   "sample_tokens_per_s": n_sampled / (played - begun), "train_tokens_per_s": n_tokens / (now - played),
                   "seconds": now - begun}
        log0(ranks, step_line(step + 1, cfg.steps, metrics))
        on_main(ranks, lambda: write_logs(out, metrics, games, step + 1))
        if (step + 1) % 25 == 0 or step + 1 == cfg.steps:
            shown = [g for g in games if g.attacker][:2] or games[:2]
            log0(ranks, "\n" + "\n\n".join(transcript(g, rewards) for g in shown) + "\n")

        # 6. save
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save_checkpoint(out, step + 1, policy, optimizer, setting, ranks)

    on_main(ranks, lambda: show_results(cfg, out))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
