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
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import (STOPPING, catch_signals, checkpoints, commit, sync_to_disk, is_complete, newest_complete, prune, reason, replace_text,
                        rewind_logs, state_by_name)
from data import ATTACK_COLUMNS, read_prompts, read_rows
from judge import Exchange, Judge, JudgeModel, Verdict, check_judge, open_judge
from kernels.linear import keep_memory
from kernels.logprob import head_bytes
from model import ModelConfig, Transformer, load, open_tokenizer, save, score, read_config, stop, stop_ids
from sample import CACHE_SLOTS, Sample, plain_ids, sample, uniforms
from selfplay import (ATTACKER, DEFENDER, ENGLISH, REWARDS, Game, Experience, Player, Seed, ChatFormat, is_legal, game_metrics, mean, seeds_for_step, pack, parse_reply, payoffs,
                      play, experiences_of, game_record, returns, show_game, whiten)

if TYPE_CHECKING:   # --help should not wait: at run time transformers, the toy, FSDP and its checkpoints are imported where they are used
    from transformers import PreTrainedConfig


# ---------------------------------------------------------------- a folder that is complete or not there at all


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
    opponent: str = opt("", "ours", "a checkpoint that experiences the role that does not learn, frozen; none: as --play says")
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
    micro_tokens: int = opt(16384, "ours", "most tokens, padding included, in one pass of one rank", cpu=1024)
    sft_steps: int = opt(600, "ours", "supervised updates of the toy model before it experiences")
    seed: int = opt(0, "ours", "of everything random")
    save_every: int = opt(100, "paper", "steps between checkpoints; the last step is always saved")
    keep: int = opt(5, "ours", "newest checkpoints that stay, besides step_000000; older ones are deleted")
    exam: bool = opt(True, "ours", "end with the held-out exam of the embedded world, before and after, and with the curves")
    out: str = opt("", "ours", "run folder [runs/JUDGE-PLAY-SEED]")
    resume: bool = opt(False, "ours", "continue the run in --out, with its settings, from its newest complete checkpoint")
    precision: str = opt("bf16", "paper", "of all arithmetic over fp32 master weights", toy="fp32", cpu="fp32", choices=("bf16", "fp32"))
    recompute: bool = opt(True, "ours", "make activations again in the backward pass: less memory, more arithmetic", toy=False, cpu=False)
    plan: int = opt(0, "ours", "do not train: print what each of this many GPUs would have to hold and to send")


class Parser(ArgumentParser):
    def error(self, message: str) -> None:
        stop(f"train.py: {message}; python train.py --help lists the flags.")


def recorded(out: Path) -> dict[str, object]:
    """The settings that the run in this folder was last started with."""
    try:
        settings = json.loads((out / "config.json").read_text())
        known = {f.name: f.type for f in fields(Config) if f.name in settings and f.name not in ("out", "resume", "plan")}
        if all(isinstance(settings[name], {float: (int, float), list[str]: list}.get(kind, kind)) for name, kind in known.items()):
            return {name: settings[name] for name in known}
    except (OSError, ValueError, TypeError):
        pass
    stop(f"--resume: {out / 'config.json'} cannot be read as a run's settings; put back the file, or begin another run.")


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
    if values["resume"] and newest_complete(Path(values["out"])):
        before = recorded(Path(values["out"]))
        for name in before.keys() - given.keys():
            values[name], sources[name] = before[name], "the run so far"
        sources |= {name: f"command line; was {before[name]}" for name in before.keys() & given.keys() if before[name] != given[name]}
        for name in ("model", "opponent"):
            if values[name] != before.get(name, values[name]):
                stop(f"--{name} {values[name]}: the run was begun with {before[name]}, and cannot change that; begin another with --out.")
    return Config(**values), sources


MAY_BE_0 = ("kl", "sft_coef", "seed", "max_unreadable", "plan")


def check_numbers(cfg: Config) -> None:
    """Counts, sizes and rates are finite and not negative."""
    for f in fields(Config):
        value = getattr(cfg, f.name)
        if f.type in (int, float) and not (0 < value < 2 ** 31 or value == 0 and f.name in MAY_BE_0):
            stop(f"--{f.name.replace('_', '-')} {value}: must be a number greater than 0{', or 0' * (f.name in MAY_BE_0)}.")


def check_config(cfg: Config, world: int) -> None:
    """Refuse what cannot run, before any work and before anything is written."""
    if cfg.games % 4:
        stop(f"--games {cfg.games}: must be a positive multiple of 4, one for each type of seed.")
    if cfg.games % world:
        stop(f"--games {cfg.games} cannot be divided among {world} ranks; choose a multiple of {world} and of 4.")
    if cfg.attacks and cfg.play != "defender":
        stop("--attacks FILE trains a defender on recorded attacks; add --play defender.")
    if cfg.opponent and (cfg.play == "self" or cfg.attacks):
        stop("--opponent MODEL experiences the role that does not learn, live; add --play attacker or --play defender, and leave out --attacks.")
    if cfg.judge != "toy":
        check_judge(cfg.judge)
    if cfg.judge != "toy" and not cfg.seeds:
        stop(f"--judge {cfg.judge} needs seeds: add --seeds harmful.jsonl benign.jsonl.")
    if cfg.judge != "toy" and cfg.model == "toy":
        stop(f"--judge {cfg.judge} needs a model that speaks English: add --model FOLDER.")
    out = Path(cfg.out)
    if cfg.resume and not newest_complete(out):
        stop(f"--resume: {out} holds no complete checkpoint; start it without --resume.")
    begun = out.is_dir() and {p.name for p in out.iterdir()} <= {"config.json", "config.json.new", "partial_000000"}   # and died at once
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
    The four pools that `seeds_for_step` draws from in equal shares, harmful and benign, each once for the attacker and once raw; and a line on every
    file that was read. A mode of play is a choice of seeds: without an attacker no seed is marked for revision, and recorded attacks take
    the place of those that would have been.
    """
    import toy
    files = [read_prompts(path) for path in cfg.seeds]
    labelled = [row for file in files for row in file.rows] or toy.seeds()
    attacks = [read_prompts(path, ATTACK_COLUMNS) for path in [cfg.attacks] if path]
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


def setup(cfg: Config) -> Ranks:
    """One process without torchrun, any number with it; nccl on GPUs, gloo on CPUs."""
    keep_memory()
    cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    elif cfg.precision == "bf16":   # a group of one: computing in another precision is FSDP's work here too
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(int(os.environ.get("RANK", 0)), world, device, torch.bfloat16 if cfg.precision == "bf16" else torch.float32)


def shard(model: Transformer, ranks: Ranks) -> Transformer:
    """Move to the device and split every layer's parameters among the processes (FSDP2); they stay in the precision they come in."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
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
    parts = [m for m in model.modules() if hasattr(m, "unshard")]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)   # FSDP2's own default: all but the root
        part.reshard()


def judge_on_demand(judge: Judge, ranks: Ranks) -> Judge:
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


def stop_all(ranks: Ranks, sentence: str) -> NoReturn:
    """What every rank knows, one says; all end with status 2."""
    if ranks.main:
        stop(sentence)
    raise SystemExit(2)


def on_main(ranks: Ranks, write: Callable[[], None]) -> None:
    """Let one rank write to the disk while the others wait; if the disk will not have it, all stop."""
    failed = ""
    if ranks.main:
        try:
            write()
        except (OSError, SafetensorError) as error:
            failed = str(error)
    if failed := gather_list([failed], ranks)[0]:
        stop_all(ranks, f"The run folder cannot be written ({failed}). Complete checkpoints are intact: mend that and go on with --resume.")


def log0(ranks: Ranks, text: str = "") -> None:
    if ranks.main:
        tqdm.write(text)


def full_norm(parameters: list[nn.Parameter]) -> float:
    """Clip the gradient to norm 1 over all ranks and return its norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


# ---------------------------------------------------------------- memory

def n_parameters(config: "PreTrainedConfig") -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def layer_bytes(shape: ModelConfig) -> int:
    """What a token leaves in one layer for its backward pass, in bf16."""
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    return 8 * shape.width + 6 * (queries + keys) + 6 * shape.inner


def activation_bytes(shape: ModelConfig, recompute: bool) -> int:
    """What a token leaves in all layers; where they are recomputed, their inputs and one layer at a time."""
    kept = 2 * shape.width * shape.layers + layer_bytes(shape) if recompute else layer_bytes(shape) * shape.layers
    return kept + 2 * shape.width   # the input of the last norm


def cache_bytes(shape: ModelConfig) -> int:
    """
    Keys and values of one full batch of the sampler, in bf16, and of prompts that have been run and wait for a seat: for each of two
    instructions a group of them, and another that is made when the first ends.
    """
    return 2 * 2 * CACHE_SLOTS * shape.layers * shape.kv_heads * shape.head_width


BYTES = {"adamw": ({"policy, fp32 master weights": 4, "Adam moments, fp32": 8}, 4),   # for every weight: what stays, and its gradient
         "split": ({"policy, bf16": 2, "low halves of the master weights": 2, "Adam moments, bf16": 4}, 2)}


def memory_plan(cfg: Config, policy: "PreTrainedConfig", judge: "PreTrainedConfig | None", world: int,
                device: str = "cuda") -> dict[str, dict[str, float]]:
    """
    Bytes that one of `world` GPUs holds: always, and besides while games are played and judged, while a backward pass is at its deepest,
    and when its last gradients are split among the ranks. What the CUDA context and the allocator's gaps take, 1 to 3 GB, comes on top.
    """
    shape, P = read_config(policy, cfg.model), n_parameters(policy)
    J = n_parameters(judge) if judge else 0
    embeddings = shape.vocab * shape.width * (1 if shape.tied else 2)
    layer, (kept, gradient) = (P - embeddings) / shape.layers, BYTES["adamw"]
    gradients = {f"gradients, {'fp32' if gradient == 4 else 'bf16'}": gradient * P / world}
    always = {name: size * P / world for name, size in kept.items()}
    always |= {"reference, bf16": 2 * P / world, "its embeddings, gathered": 2 * embeddings,
               "judge, bf16, split": 2 * J / world if world > 1 else 0, "opponent, bf16": 2 * P / world if cfg.opponent else 0}
    caches = [cache_bytes(shape)] + ([cache_bytes(read_config(judge, cfg.judge))] if judge else [])
    play = {"policy gathered, bf16": 2 * P, "frozen opponent gathered, bf16": 2 * P if cfg.play == "attacker" or cfg.opponent else 0,
            "judge gathered, bf16": 2 * J, "cache of keys and values": max(caches)}
    backward = gradients | {"activations": cfg.micro_tokens * activation_bytes(shape, cfg.recompute),
                            "the output matrix, piece by piece": head_bytes(cfg.micro_tokens, shape.width, shape.vocab, 2, device),
                            "two layers and the embeddings gathered, bf16": 2 * (2 * layer + embeddings),
                            "a layer's gradients, bf16 and fp32": 6 * layer}
    end = gradients | {"embeddings gathered, bf16, and their gradients, bf16 and fp32": 8 * embeddings,
                       "their part of the sum, fp32 and as it is kept": (4 if gradient == 4 else 6) * embeddings / world}
    return {"always": always, "play": play, "backward pass": backward, "its end": end}


def peak_bytes(cfg: Config, policy: "PreTrainedConfig", judge: "PreTrainedConfig | None", world: int, device: str = "cuda") -> float:
    always, *phases = (sum(parts.values()) for parts in memory_plan(cfg, policy, judge, world, device).values())
    return always + max(phases)


def show_plan(cfg: Config) -> str:
    """The plan as Markdown, whether it fits, what would help, and what goes over the network. Of the models only the configs are read."""
    from transformers import AutoConfig
    if cfg.model == "toy":
        stop("--plan needs --model: the toy model fits everywhere.")
    judge_model = cfg.judge.partition(":")[2]
    try:
        policy, judge = (AutoConfig.from_pretrained(name) if name else None for name in (cfg.model, judge_model))
    except (OSError, ValueError) as error:
        stop(f"--plan: no config to be read ({str(error).splitlines()[0]}); give folders or hub names for --model and --judge.")
    gib = 2 ** 30
    rows = [f"| {phase} | {name} | {size / gib:.1f} |" for phase, part in memory_plan(cfg, policy, judge, cfg.plan).items()
            for name, size in part.items() if size]
    others = {"--recompute": {"recompute": True}, "--micro-tokens 4096": {"micro_tokens": 4096}}
    peaks = {"peak": peak_bytes(cfg, policy, judge, cfg.plan), f"peak on {2 * cfg.plan} GPUs": peak_bytes(cfg, policy, judge, 2 * cfg.plan)}
    for flag, change in others.items():
        peaks[f"peak with {flag}"] = peak_bytes(dataclasses.replace(cfg, **change), policy, judge, cfg.plan)
    for name, peak in peaks.items():
        least = next((size for size in (24, 40, 48, 80, 96, 141, 180) if peak / gib + 3 < size), None)
        rows.append(f"| {name} | {f'fits GPUs of {least} GB' if least else 'fits no GPU'} | {peak / gib:.1f} |")
    return "\n".join([f"| {cfg.plan} GPUs | part | GiB on each |", "| --- | --- | --- |", *rows])


# ---------------------------------------------------------------- the update

MOST_SKIPPED = 3                                             # updates in a row that may be skipped before the run stops


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


def pack_experiences(experiences: list[Experience], rows: list[int], per_token: list[list], device: torch.device) -> tuple[Tensor, ...]:
    """Pack these rows; an empty micro-batch becomes a row of two tokens that no mask selects: the pass happens but weighs nothing."""
    if not rows:
        ids_BT = torch.zeros(1, 2, dtype=torch.long, device=device)
        return ids_BT, torch.zeros_like(ids_BT, dtype=torch.bool), *(torch.zeros(1, 2, device=device) for _ in per_token)
    turns = [experiences[i].turn for i in rows]
    return pack([t.prompt_ids for t in turns], [t.ids for t in turns], [[values[i] for i in rows] for values in per_token], device)


@torch.no_grad()
def rescore(model: Transformer, experiences: list[Experience], cfg: Config, ranks: Ranks) -> list[np.ndarray]:
    """logprob_T of every play's reply under a model; the ranks share the work and all get the whole result."""
    scored: list[tuple[int, np.ndarray]] = []
    lengths = [len(p.turn.prompt_ids) + len(p.turn.ids) for p in experiences]
    for rows in micro_batches(lengths, ranks, cfg.micro_tokens):
        ids_BT, mask_BT = pack_experiences(experiences, rows, [], ranks.device)
        logprob_BT, _ = score(model, ids_BT, mask_BT, cfg.temperature)
        scored += [(i, logprob_BT[b][mask_BT[b]].double().cpu().numpy()) for b, i in enumerate(rows)]
    by_row = dict(gather_list(scored, ranks))
    return [by_row[i] for i in range(len(experiences))]


def update(policy: Transformer, optimizer: torch.optim.Optimizer, experiences: list[Experience], old: list[np.ndarray], advantage: list[np.ndarray],
           demos: list[tuple], cfg: Config, ranks: Ranks) -> list[dict]:
    """
    One optimiser update on these experiences, and on the supervised pairs `demos` if there are any; none if a loss or the gradient is not finite.
    Returns, on every rank, sums per micro-batch and role for the log. With one update a step the old policy is the policy itself:
    old = logprob, detached, and the ratio is exactly 1.
    """
    lengths, sums = [len(p.turn.prompt_ids) + len(p.turn.ids) for p in experiences], []
    n_tokens = sum(len(p.turn.ids) for p in experiences)
    role = [np.full(len(p.turn.ids), p.turn.role == ATTACKER, dtype=np.float32) for p in experiences]
    sampled = [np.array(p.turn.logprobs) for p in experiences]
    for rows in tqdm(micro_batches(lengths, ranks, cfg.micro_tokens), desc="update", leave=False, delay=3, disable=not ranks.main):
        ids_BT, mask_BT, *values = pack_experiences(experiences, rows, [advantage, old, role, sampled], ranks.device)
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
    sums = gather_list(sums, ranks)
    if all(math.isfinite(value) for part in sums for value in part.values()):   # all ranks see the same, and decide alike
        optimizer.step()
    else:
        sums.append({"skipped": 1.0})
    optimizer.zero_grad()
    return sums


def supervised(policy: Transformer, demos: list[tuple[list[int], list[int]]], cfg: Config, ranks: Ranks) -> list[float]:
    """Backward of the supervised term: cross-entropy in nats per token of the responses; the ranks share the pairs."""
    losses, n_tokens = [], sum(len(reply) for _, reply in demos)
    for rows in micro_batches([len(p) + len(r) for p, r in demos], ranks, cfg.micro_tokens):
        if rows:
            ids_BT, mask_BT = pack([demos[i][0] for i in rows], [demos[i][1] for i in rows], device=ranks.device)
        else:
            ids_BT, mask_BT = pack_experiences([], [], [], ranks.device)
        logprob_BT, _ = score(policy, ids_BT, mask_BT)
        loss = -(logprob_BT * mask_BT).sum() / n_tokens
        (loss * cfg.sft_coef * ranks.world).backward()
        losses.append(loss.item())
    return losses


def sft_batch(demos: list[tuple[str, str]], chat: ChatFormat, cfg: Config, n: int) -> list[tuple[list[int], list[int]]]:
    """
    The n-th update's supervised pairs as token ids: three for every four games of the step, shared out among its updates, which makes the
    16 an update and 19,000 in all of the official run.
    """
    if not demos:
        return []
    pairs = min(len(demos), max(1, cfg.games * 3 // (4 * cfg.updates)))
    chosen = np.random.default_rng((cfg.seed, n, 1)).choice(len(demos), size=pairs, replace=False)
    end = [chat.tokenizer.eos_token_id]
    return [(chat.defender_prompt(demos[i][0]), plain_ids(chat.tokenizer, demos[i][1]) + end) for i in chosen]


def schedule(cfg: Config) -> Callable[[int], float]:
    """Step size over its peak at the n-th update: warm-up over 3 % of the run, then a cosine down to 10 %."""
    total = cfg.steps * cfg.updates
    warm = max(1, round(0.03 * total))
    return lambda n: min(1.0, (n + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, max(0, n - warm) / max(1, total - warm)))))


# ---------------------------------------------------------------- measuring a step


def credit_metrics(experiences: list[Experience], advantage: list[np.ndarray], reference: list[np.ndarray]) -> dict[str, float | None]:
    """How the rewards became credit: distance to the reference (k1, nats per token), and how often the two signs disagree."""
    log_ratio = [np.array(p.turn.logprobs) - r for p, r in zip(experiences, reference)]
    flips = [np.sign(a.mean()) * np.sign(p.payoff + p.shaping) < 0 for p, a in zip(experiences, advantage)]
    return {"kl": mean(list(np.concatenate(log_ratio))) if experiences else None, "sign_flip": mean([bool(f) for f in flips])}


def update_metrics(sums: list[dict], n_tokens: int, updates: int) -> dict[str, float]:
    """A step's updates, averaged over the step and not over its last micro-batch."""
    total = lambda key: sum(s.get(key, 0.0) for s in sums)
    metrics = {key: total(key) / updates for key in ("loss_attacker", "loss_defender", "grad_norm")} | {"skipped": total("skipped")}
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


def save_weights(tmp_dir: Path, policy: Transformer, chat: ChatFormat, ranks: Ranks) -> None:
    """A Hugging Face folder, by the main rank, which gathers one parameter after the other on its CPU; the others keep none."""
    weights = {}
    for name, parameter in policy.named_parameters():
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        if ranks.main:
            weights[name] = full.detach().cpu()
    on_main(ranks, lambda: (shutil.rmtree(tmp_dir, ignore_errors=True), save(tmp_dir, weights, policy, chat.tokenizer)))


def save_checkpoint(out: Path, step: int, policy: Transformer, optimizer: torch.optim.Optimizer, chat: ChatFormat, keep: int,
                    ranks: Ranks) -> None:
    """The weights, and in the same folder each rank's part of the optimizer's state as safetensors; published when all is written."""
    import torch.distributed.checkpoint as dcp
    tmp_dir, failed = out / f"partial_{step:06d}", ""
    save_weights(tmp_dir, policy, chat, ranks)
    try:
        dcp.save(state_by_name(policy, optimizer), no_dist=not dist.is_initialized(),
                 storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_dir / "optimizer"), save_distributed=True))
    except dcp.CheckpointException as error:
        failed = reason(error)

    def finish() -> None:
        if failed:
            raise OSError(failed)
        commit(tmp_dir, out / f"step_{step:06d}")
        prune(out, keep)
    on_main(ranks, finish)


def load_optimizer(folder: Path, policy: Transformer, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Restore the optimizer's state in place, on any number of ranks."""
    import torch.distributed.checkpoint as dcp
    try:
        dcp.load(state_by_name(policy, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(folder / "optimizer")),
                 no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        stop_all(ranks, f"{folder}: its optimizer state cannot be read ({reason(error)}); remove the folder to go on from the one before.")


def write_sft_start(cfg: Config, chat: ChatFormat, out: Path, folder: Path) -> None:
    """
    Write the toy model's starting point into `folder`. It depends on few settings, so a sibling run that has the same one lends it;
    `sft.json` inside says what it is.
    """
    import toy
    source = "".join((Path(__file__).parent / name).read_text() for name in ("toy.py", "model.py"))
    key = {"seed": cfg.seed, "steps": cfg.sft_steps, "cot": cfg.cot, "source": hashlib.sha256(source.encode()).hexdigest()[:16]}
    for other in sorted(out.parent.glob("*/step_000000/sft.json")):
        if is_complete(other.parent) and json.loads(other.read_text()) == key:
            tqdm.write(f"warm start: the same as in {other.parent.parent}, copied")
            shutil.copytree(other.parent, folder)
            return
    begun = time.time()
    model = toy.train_sft(chat, cfg.sft_steps, cfg.seed, label="warm start")
    tqdm.write(f"warm start: {cfg.sft_steps} supervised updates in {time.time() - begun:.0f} s")
    save(folder, model.state_dict(), model, chat.tokenizer)
    (folder / "sft.json").write_text(json.dumps(key))


def write_start(cfg: Config, given: Transformer | None, chat: ChatFormat, out: Path) -> None:
    """The run folder with what the run begins with: its configuration, and the model of step 0."""
    tmp_dir = out / "partial_000000"
    shutil.rmtree(tmp_dir, ignore_errors=True)   # tmp_dir of one, if the run was stopped here before
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1))
    if given is None:
        write_sft_start(cfg, chat, out, tmp_dir)
    else:
        save(tmp_dir, given.state_dict(), given, chat.tokenizer)
    commit(tmp_dir, out / "step_000000")


def write_logs(out: Path, metrics: dict, games: list[Game], step: int) -> None:
    """A line of metrics.jsonl and a line of games.jsonl per game."""
    finite = {key: value if value is None or math.isfinite(value) else None for key, value in metrics.items()}   # JSON has no NaN
    for name, lines in (("metrics.jsonl", [finite]), ("games.jsonl", [game_record(game, step) for game in games])):
        with open(out / name, "a") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        sync_to_disk(out / name)


def keep_batch(out: Path, step: int, n: int, experiences: list[Experience], old: list[np.ndarray], advantage: list[np.ndarray]) -> None:
    """What an update was to learn from that was skipped: a line per turn."""
    with open(out / f"skipped_{step:06d}_{n}.jsonl", "w") as file:
        for p, old_T, advantage_T in zip(experiences, old, advantage):
            credit = {"payoff": p.payoff, "shaping": p.shaping, "old": old_T.tolist(), "advantage": advantage_T.tolist()}
            file.write(json.dumps({"game": p.game, **dataclasses.asdict(p.turn), **credit}) + "\n")


# ---------------------------------------------------------------- the run


def player(model: Transformer, role: str, stops: list[int], cfg: Config, step: int, ranks: Ranks) -> Player:
    """A model in a role, as a function from prompts to replies. Chance is that of (seed, step, game, turn)."""
    def answer(prompts: list[list[int]], numbers: list[int]) -> list[Sample]:
        uniform_NT = uniforms(cfg.seed, step, numbers, (ATTACKER, DEFENDER).index(role), cfg.max_new_tokens)
        return sample(model, prompts, uniform_NT, stops, cfg.temperature, label=role if ranks.main else "")
    return answer


def open_setting(cfg: Config, origin: str, ranks: Ranks) -> tuple[ChatFormat, Judge]:
    """The language of the model that the run goes on from, and the judge of the game."""
    import toy
    tokenizer = toy.make_tokenizer() if origin == "toy" else open_tokenizer(origin)
    if cfg.judge == "toy":
        return ChatFormat(tokenizer, toy.PROMPTS, cfg.cot), toy.judge
    return ChatFormat(tokenizer, ENGLISH, cfg.cot), open_judge(cfg.judge, ranks.compute)


def check_lengths(cfg: Config, pools: list[list[Seed]], chat: ChatFormat, model: Transformer | None) -> None:
    """Refuse replies that the context cannot hold behind their prompts; the defender's may hold a whole reply of the attacker."""
    if model is None:
        return
    context, room = model.hf_config.max_position_embeddings, {}
    seeds = sorted((seed for pool in pools for seed in pool), key=lambda seed: -len(seed.text.encode("utf-8", "replace")))
    for seed in [*seeds[:8], *[s for s in seeds if s.revise][:8]]:   # the longest in bytes are nearly the longest in tokens
        room[seed.text] = context - len(chat.attacker_prompt(seed) if seed.revise else chat.defender_prompt(seed.text))
    longest, most = min(room.items(), key=lambda item: item[1])
    if any(seed.revise for seed in seeds):
        most = min(most, (context - len(chat.defender_prompt(""))) // 2)
    if cfg.max_new_tokens > most:
        stop(f"--max-new-tokens {cfg.max_new_tokens}: prompt and reply do not fit into the {context} tokens of {cfg.model}; "
             + (f"choose at most {most}." if most > 0 else f"leave out the seed that begins {longest[:40]!r}."))


def check_verdicts(cfg: Config, games: list[Game], step: int, ranks: Ranks) -> None:
    """A judge that cannot be read is no judge."""
    judged = [g for g in games if g.defender.reply.answer]
    unreadable = sum(not g.verdict.readable for g in judged)
    if unreadable > cfg.max_unreadable * len(judged):
        stop_all(ranks, f"step {step}: {unreadable} of {len(judged)} verdicts of {cfg.judge} cannot be read, more than --max-unreadable "
                        f"{cfg.max_unreadable} allows; give a judge of that format. The newest checkpoint is in {cfg.out}.")


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


def main(argv: list[str] | None = None) -> None:
    """Everything that can be refused is refused before the run folder is touched; then the numbered phases of a step, over and over."""
    cfg, sources = parse_config(argv)
    check_numbers(cfg)
    if cfg.plan:
        print(show_plan(cfg))
        return
    check_config(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    (pools, read), demos = seed_pools(cfg), read_sft(cfg.sft, cfg.cot) if cfg.sft else []
    ranks, out = setup(cfg), Path(cfg.out)
    newest = newest_complete(out) if cfg.resume else None
    first, origin = int(newest.name.removeprefix("step_")) if newest else 0, str(newest or cfg.model)
    chat, judge = open_setting(cfg, origin, ranks)
    given = load(origin) if origin != "toy" else None   # opened before anything is written: it may be damaged
    opponent = load(cfg.opponent, ranks.compute) if cfg.opponent else None
    check_lengths(cfg, pools, chat, given)
    log0(ranks, "\n".join([describe(cfg, sources, ranks), *(f"  {line}" for line in read)]))

    # 0. the start: a model of its own, or a checkpoint; frozen, it is the reference
    if newest:
        for folder in (folder for folder in checkpoints(out) if folder > newest):
            log0(ranks, f"  {folder} is not complete: passed over, and made again when its step comes")
        on_main(ranks, lambda: rewind_logs(cfg, newest, out))
    else:
        on_main(ranks, lambda: write_start(cfg, given, chat, out))
    policy = shard(given or load(str(out / "step_000000")), ranks)   # first: a CPU holds one model at a time
    reference = shard(load(str(out / "step_000000"), ranks.compute), ranks).requires_grad_(False)
    policy.recompute = cfg.recompute
    frozen = shard(opponent, ranks).requires_grad_(False) if opponent else reference
    attacking = frozen if cfg.play == "defender" and cfg.opponent else policy
    defending = frozen if cfg.play == "attacker" else policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if first:
        load_optimizer(newest, policy, optimizer, ranks)
    judge = judge_on_demand(judge, ranks)
    stops, rate, rewards, skipped = stop_ids(policy, chat.tokenizer), schedule(cfg), REWARDS[cfg.reward], 0

    signals_seen, asked = catch_signals(), []
    for step in range(first, cfg.steps):
        begun = time.time()
        # 1. seeds: the same on every rank; each experiences its slice. Attacker-only play has no use for raw seeds
        share = cfg.games // ranks.world
        seeds = seeds_for_step(pools, cfg.games, cfg.seed, step)
        mine = [n for n in range(ranks.rank * share, (ranks.rank + 1) * share) if cfg.play != "attacker" or seeds[n].revise]

        # 2. play: attack, answer, verdict
        with gathered(attacking), gathered(defending):
            attacker, defender = player(attacking, ATTACKER, stops, cfg, step, ranks), player(defending, DEFENDER, stops, cfg, step, ranks)
            games = play([seeds[n] for n in mine], mine, chat, attacker, defender, judge)
        games = gather_list(games, ranks)
        check_verdicts(cfg, games, step + 1, ranks)
        played = time.time()

        # 3. credit: payoffs, distance to the reference, returns, whitened per role over all ranks
        experiences = experiences_of(games, rewards, PLAYS[cfg.play], cfg.cot)
        reference_logprob = rescore(reference, experiences, cfg, ranks)
        old = rescore(policy, experiences, cfg, ranks) if cfg.updates > 1 else [np.array(p.turn.logprobs) for p in experiences]
        gains = [returns(p.payoff + p.shaping, np.array(p.turn.logprobs), r, cfg.kl) for p, r in zip(experiences, reference_logprob)]
        advantage = whiten(gains, [p.turn.role for p in experiences])

        # 4. update: one optimiser step over all turns, or several over shuffled shares of them
        order, sums = np.random.default_rng((cfg.seed, step)).permutation(len(experiences)) if cfg.updates > 1 else np.arange(len(experiences)), []
        for n, part in enumerate(np.array_split(order, cfg.updates), step * cfg.updates):
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * rate(n)
            batch = [[values[i] for i in part] for values in (experiences, old, advantage)]
            sums += update(policy, optimizer, *batch, sft_batch(demos, chat, cfg, n), cfg, ranks)
            skipped = skipped + 1 if "skipped" in sums[-1] else 0
            if skipped:
                on_main(ranks, lambda: keep_batch(out, step + 1, n, *batch))
        if skipped >= MOST_SKIPPED:
            stop_all(ranks, f"step {step + 1}: {skipped} updates in a row had a loss or a gradient that is not finite, and were skipped. "
                            f"What they were to learn from is in {out}/skipped_*.jsonl; lower --lr and --resume from a checkpoint.")

        # 5. log
        n_sampled = sum(len(t.ids) for g in games for t in (g.attacker, g.defender) if t)
        n_tokens = sum(len(p.turn.ids) for p in experiences)
        now = time.time()
        metrics = {"step": step + 1, **game_metrics(games, experiences, rewards, bool(cfg.attacks)), **credit_metrics(experiences, advantage, reference_logprob),
                   **update_metrics(sums, n_tokens, cfg.updates), "lr": optimizer.param_groups[0]["lr"],
                   "sample_tokens_per_s": n_sampled / (played - begun), "train_tokens_per_s": n_tokens / (now - played),
                   "seconds": now - begun}
        log0(ranks, step_line(step + 1, cfg.steps, metrics))
        on_main(ranks, lambda: write_logs(out, metrics, games, step + 1))
        if (step + 1) % 25 == 0 or step + 1 == cfg.steps:
            shown = [g for g in games if g.attacker][:2] or games[:2]
            log0(ranks, "\n" + "\n\n".join(show_game(g, rewards) for g in shown) + "\n")

        # 6. save
        asked = gather_list(signals_seen[:1], ranks)   # one rank may hear of it before the others do
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or asked:
            save_checkpoint(out, step + 1, policy, optimizer, chat, cfg.keep, ranks)
        if asked:
            log0(ranks, f"{asked[0]}: stopped after step {step + 1} of {cfg.steps}; all is saved, and --resume goes on from there.")
            break

    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    if dist.is_initialized():
        dist.destroy_process_group()
    if ranks.main and not asked:
        show_results(cfg, out)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # until there is a step to finish, Ctrl-C ends the process at once
    main()
