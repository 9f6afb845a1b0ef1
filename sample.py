"""
How text is drawn, fast, and with what probability.

    prompts -> fill_template empty rows of the cache -> [ logits_BV -> log_policy -> draw one token per row -> one step ] until all have stopped

The log-probability of a token is recorded under exactly the distribution that it was drawn from. Chance enters as an argument: one
uniform number per token, a function of (seed, step, game, turn). Whoever samples a game, in whatever batch, draws the same text.

    python sample.py runs/toy-self-0 "how do i kill the weed"
"""
from __future__ import annotations

import re
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from operator import itemgetter
from os.path import commonprefix
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from kernels.logprob import log_policy
from model import Cache, Transformer, last_logits, load, open_tokenizer, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORTH = 256               # tokens of prompts that a pass over what several of them begin with must save
CACHE_SLOTS = 65_536      # rows x slots of one batch: 3 GB for a 135M model in fp32, 8 GB for an 8B model in bf16; without the spare ones
SPARE = {"cpu": 64, "cuda": 0}             # more slots for a row: a CPU leaves out what nobody needs, for to move the rest takes time
PREFILL = {"cpu": 1024, "cuda": 8192}      # tokens of prompts in one pass: the fewer, the less padding
AHEAD = 4096              # rows x slots of prompts that have been run together and wait for a seat
WORDS = 128               # words in a block of the vocabulary, see draw
COMPANY = 16              # rows for each thread of a CPU that a batch keeps: with fewer, products add in another order than a trainer's
EMPTY = {"cpu": 1 / 32, "cuda": 1 / 8}     # prompts that wait take their seats once so many of a batch's are empty
FULL = {"cpu": 0.75, "cuda": 0.5}          # a batch shrinks when no more of its seats are taken; a GPU has to game_record its step anew
BURST = 8                 # steps that a GPU takes before anybody looks which replies have ended
PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands where the text goes while the template is rendered


# ---------------------------------------------------------------- text to tokens

def clean_text(text: str) -> str:
    """Text that can be encoded: tmp_dir of a surrogate pair, which JSON can spell, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


@lru_cache(maxsize=8)
def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every added token but the unknown one, with its id: spellings that are not read as text."""
    return {word: i for word, i in tokenizer.get_added_vocab().items() if i != tokenizer.unk_token_id}


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text that somebody else wrote: what spells added_tokens is cut after its first character, and stays plain text."""
    marks, text = added_tokens(tokenizer), clean_text(text)
    spelled = re.compile("|".join(f"(?={re.escape(word)})" for word in marks) or "$^")
    cuts = [0, *(match.start() + 1 for match in spelled.finditer(text)), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(cuts) if begin < end]
    ids = [tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids for piece in pieces]
    special = set(marks.values())
    return [i for piece in ids for i in piece if i not in special]


@lru_cache(maxsize=64)
def template_part_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> list[list[int]]:
    """What stands before, between and after the texts of a template: our own words and the template's, where added_tokens is added_tokens."""
    return [tokenizer(part, add_special_tokens=False).input_ids for part in template.split(PLACEHOLDER)]


def fill_template(tokenizer: PreTrainedTokenizerBase, template: str, texts: Sequence[str]) -> list[int]:
    """
    Token ids of a template with a text in the place of each PLACEHOLDER. It is tokenised as a whole, as models are trained to see it. Where that
    yields other added_tokens than the template has by itself, a text has spelled some: then every part is tokenised alone, texts as plain text.
    """
    parts, unfuse = template.split(PLACEHOLDER), template_part_ids(tokenizer, template)
    whole = tokenizer(parts[0] + "".join(clean_text(t) + p for t, p in zip(texts, parts[1:], strict=True)), add_special_tokens=False).input_ids
    marks = set(added_tokens(tokenizer).values())
    if [i for i in whole if i in marks] == [i for part in unfuse for i in part if i in marks]:
        return whole
    return unfuse[0] + [i for text, part in zip(texts, unfuse[1:]) for i in plain_ids(tokenizer, text) + part]


@lru_cache(maxsize=64)
def chat_template(tokenizer: PreTrainedTokenizerBase, instruction: str, prefill: str) -> str:
    """One user turn in the tokenizer's own template, a PLACEHOLDER for {text}, and the opening of the assistant's turn."""
    message = {"role": "user", "content": instruction.replace("{text}", PLACEHOLDER)}
    rendered = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return rendered if prefill and rendered.rstrip().endswith(prefill) else rendered + prefill   # some templates open the thought


def chat_ids(tokenizer: PreTrainedTokenizerBase, instruction: str, text: str, prefill: str = "") -> list[int]:
    """A prompt's token ids. `instruction` is ours and contains {text}; `text` is somebody's and never becomes added_tokens."""
    return fill_template(tokenizer, chat_template(tokenizer, instruction, prefill), [text])


# ---------------------------------------------------------------- tokens to tokens

Done = Callable[[list[int]], bool] | None   # whether a reply that begins with these tokens may end here


@dataclass(frozen=True)
class Sample:
    """One reply: its tokens, the stop token included, and the log-probability (nats) of each at the temperature it was drawn at."""
    ids: list[int]
    logprobs: list[float]
    stopped: bool


def uniforms(seed: int, step: int, games: Sequence[int], turn: int, length: int) -> Tensor:
    """uniform_NT in [0, 1), fp64, a row per game: a function of (seed, step, game, turn) and of nothing else."""
    rows = [np.random.default_rng((seed, step, game, turn)).random(length) for game in games]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, length, dtype=torch.float64)


def invert(cdf_BW: Tensor, point_B1: Tensor) -> Tensor:
    """
    The first entry whose cumulative mass (fp64) exceeds `point`, [B, 1]. An entry without mass is never the one: a point that rounding has
    pushed to the end of all mass counts as lying just before it.
    """
    last_B1 = torch.nextafter(cdf_BW[:, -1:], torch.zeros_like(point_B1))
    return torch.searchsorted(cdf_BW, torch.minimum(point_B1, last_B1), right=True)


def draw(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """
    token_B by inverting the cumulative distribution. Cumulative sums are fp64, because over 150,000 words fp32 ones would lose the rare;
    of a large vocabulary first the block of words, then the word in it, because only few of the sums are needed.
    """
    p_BV, uniform_B1 = logp_BV.exp(), uniform_B[:, None]
    if p_BV.shape[1] <= 2 * WORDS:
        cdf_BV = p_BV.cumsum(-1, dtype=torch.float64)
        return invert(cdf_BV, uniform_B1 * cdf_BV[:, -1:]).squeeze(1)
    p_BCW = F.pad(p_BV, (0, -p_BV.shape[1] % WORDS)).unflatten(1, (-1, WORDS))
    cdf_BC = p_BCW.sum(-1, dtype=torch.float64).cumsum(-1)
    point_B1 = uniform_B1 * cdf_BC[:, -1:]
    block_B1 = invert(cdf_BC, point_B1)
    before_B1 = F.pad(cdf_BC, (1, 0)).gather(1, block_B1)
    inside_BW = p_BCW.gather(1, block_B1[..., None].expand(-1, -1, WORDS)).squeeze(1)
    return (block_B1 * WORDS + invert(inside_BW.cumsum(-1, dtype=torch.float64), point_B1 - before_B1)).squeeze(1)


def instructions(prompts: list[tuple[int, ...]], known: int = 0) -> dict[tuple[int, ...], tuple[int, ...]]:
    """What each of these different prompts has in common with others and is worth a pass of its own, beyond `known` tokens that are."""
    alike, branches = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1), {}
    if (len(prompts) - 1) * (alike - known) >= WORTH:
        known = alike
    for prompt in prompts:
        branches.setdefault(prompt[:alike + 1], []).append(prompt)
    hopeful = [some for some in branches.values() if len(branches) > 1 and (len(some) - 1) * (max(map(len, some)) - known) >= WORTH]
    found = {prompt: prompt[:known] for prompt in prompts}
    for some in hopeful:
        found |= instructions(some, known)
    return found


def begin(model: Transformer, prefix: tuple[int, ...]) -> Cache:
    """A cache of one row with these tokens."""
    weight_VD = model.embed_tokens.weight
    cache = Cache(model.config, 1, len(prefix), torch.zeros(1, dtype=torch.long, device=weight_VD.device), weight_VD.dtype)
    if prefix:
        model(torch.tensor([prefix], device=weight_VD.device), None, cache=cache)
    return cache


def prefill(model: Transformer, prefix: Cache, prompts: list[tuple[int, ...]]) -> Cache:
    """A cache of these prompts, longest first, that begin with `prefix`: all but the last token of each, which the next step runs."""
    device, shared, longest = prefix.pad_B.device, prefix.length, len(prompts[0]) - 1
    pad_B = torch.tensor([longest + 1 - len(p) for p in prompts], device=device)
    cache = Cache(model.config, len(prompts), longest, pad_B, model.embed_tokens.weight.dtype, shared)
    cache.begin_with(prefix)
    if longest > shared:
        model(torch.tensor([(0,) * (longest + 1 - len(p)) + p[shared:-1] for p in prompts], device=device), None, cache=cache)
    return cache


class Seats:
    """
    The rows of a cache and who sits in them. Row b has drawn t_B[b] tokens for prompt number_B[b], and runs token next_B[b] now; the
    number of an empty seat is that of no prompt. Prompts are judge_on_demand in their order, longest first, so that those who stay are at least as
    long as a newcomer. `judge_on_demand` prompts have had a seat so far. What has been drawn is in token_NT and logprob_NT, length_N[n] of it; their
    last row takes what empty seats draw.
    """

    def __init__(self, model: Transformer, prompts: list[list[int]], rows: int, uniform_NT: Tensor, stops: list[int], temperature: float):
        (N, steps), device, dtype = uniform_NT.shape, model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
        self.model, self.prompts, self.judge_on_demand, self.N, self.temperature = model, [tuple(p) for p in prompts], 0, N, temperature
        self.copies = Counter(self.prompts)
        self.prefix, self.begun, self.found, self.waiting = instructions(list(self.copies)), {}, {}, {}
        for prompt in self.copies:
            self.waiting.setdefault(self.prefix[prompt], []).append(prompt)
        self.number_B = torch.full((rows,), N, device=device)
        self.t_B, self.next_B = torch.zeros_like(self.number_B), torch.zeros_like(self.number_B)
        self.spare = SPARE[device.type]
        self.cache = Cache(model.config, rows, len(prompts[0]) + steps + self.spare, torch.zeros_like(self.t_B), dtype)
        self.token_NT = torch.zeros(N + 1, steps, dtype=torch.long, device=device)
        self.logprob_NT, self.length_N = torch.zeros(N + 1, steps, device=device), torch.zeros(N + 1, dtype=torch.long, device=device)
        self.uniform_NT, self.stop_S = F.pad(uniform_NT, (0, 0, 0, 1)).to(device), torch.tensor(stops, dtype=torch.long, device=device)
        self.widened = lru_cache(maxsize=1)(lambda weight_VD: weight_VD if weight_VD.is_cuda else weight_VD.float())   # once, not each step
        self.recorded, self.least = None, 0 if device.type == "cuda" else COMPANY * torch.get_num_threads()

    def working(self) -> int:
        """Seats that are taken. To ask is to wait for a GPU."""
        return int((self.number_B < self.N).sum())

    def unneeded(self) -> int:
        """Slots in front that no prompt at work needs any more."""
        pad_N = self.cache.pad_B[self.number_B < self.N]
        return int(pad_N.min()) if len(pad_N) else self.cache.length

    def make_room(self) -> None:
        """Slots that nobody needs become free behind, as soon as they are more than the spare ones."""
        if (by := self.unneeded()) > self.spare:
            self.cache.slide(by)

    def fill(self) -> None:
        """Empty seats go to the prompts that wait."""
        empty_N = (self.number_B == self.N).nonzero().squeeze(1)[:self.N - self.judge_on_demand]
        new = range(self.judge_on_demand, self.judge_on_demand + len(empty_N))
        self.judge_on_demand = new.stop
        self.make_room()
        self.cache.length_1.clamp_(min=len(self.prompts[new[0]]) - 1)
        families = {}                                            # by prefix, who goes where
        for n, b in zip(new, empty_N.tolist()):
            families.setdefault(self.prefix[self.prompts[n]], []).append((b, self.prompts[n]))
        for family in families.values():
            found = ((b, *self.find(prompt)) for b, prompt in family)
            for cache, some in groupby(found, key=itemgetter(1)):
                self.cache.place(*torch.tensor([(b, i) for b, _, i in some], device=empty_N.device).T, cache)
        self.number_B[empty_N] = torch.arange(new.start, new.stop, device=empty_N.device)
        self.next_B[empty_N] = torch.tensor([self.prompts[n][-1] for n in new], device=empty_N.device)
        self.cache.front = self.unneeded()

    def find(self, prompt: tuple[int, ...]) -> tuple[Cache, int]:
        """
        Where a prompt's keys and values are, a cache and its row. It is run with those that come after it and have the same prefix: a pass
        over many costs less than many passes. One that occurs several times is run once, and so is a prefix; the last to ask takes it away.
        """
        if prompt not in self.found:
            prefix, device = self.prefix[prompt], self.t_B.device.type
            if prefix not in self.begun:
                self.begun[prefix] = begin(self.model, prefix)
            at_once = max(1, min(PREFILL[device] // (len(prompt) - len(prefix)), AHEAD // len(prompt)))
            group, self.waiting[prefix] = self.waiting[prefix][:at_once], self.waiting[prefix][at_once:]
            cache = prefill(self.model, self.begun[prefix], group)
            self.found |= {other: (cache, i) for i, other in enumerate(group)}
        self.copies[prompt] -= 1
        return self.found[prompt] if self.copies[prompt] else self.found.pop(prompt)

    def shrink(self) -> None:
        """Empty seats leave, but for those that keep a small batch company."""
        stays_B = self.number_B < self.N
        stays_B |= (~stays_B).cumsum(0) <= self.least - int(stays_B.sum())
        self.number_B, self.t_B, self.next_B = self.number_B[stays_B], self.t_B[stays_B], self.next_B[stays_B]
        self.cache.keep(stays_B)
        self.cache.front, self.recorded = self.unneeded(), None

    def step(self) -> None:
        """Everybody draws a token, and some leave with it. All of it happens on the device, at addresses that stay, and nobody waits."""
        head = lambda hidden_BTD, weight_VD: last_logits(hidden_BTD, self.widened(weight_VD))
        logp_BV = log_policy(self.model(self.next_B[:, None], head, cache=self.cache), self.temperature or 1.0)
        place = self.number_B, self.t_B
        next_B = draw(logp_BV, self.uniform_NT[place]) if self.temperature else logp_BV.argmax(-1)
        self.token_NT[place], self.logprob_NT[place] = next_B, logp_BV.gather(1, next_B[:, None]).squeeze(1)
        self.t_B += 1
        self.length_N[self.number_B] = self.t_B
        self.number_B.masked_fill_((next_B[:, None] == self.stop_S).any(1) | (self.t_B == self.uniform_NT.shape[1]), self.N)
        self.t_B *= self.number_B < self.N
        self.next_B.copy_(next_B)

    def game_record(self) -> torch.cuda.CUDAGraph | None:
        """The step as something that can be replayed, on a GPU: to launch its few hundred kernels takes longer than they do."""
        if not self.t_B.is_cuda:
            return None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):   # nothing is computed; other threads may use the GPU
            self.step()
        return graph

    def advance(self) -> None:
        """One step; from a game_record, several, before anybody looks at what came out: whoever has left draws into the last row."""
        if self.recorded is None:
            self.step()
            self.recorded = self.game_record()
        else:
            for _ in range(min(BURST, self.cache.slots - self.cache.length)):
                self.recorded.replay()

    def decide(self, was: list[tuple[int, int]], done: Callable[[list[int]], bool]) -> None:
        """Replies end where `done` says so of the tokens since the seats were as in `was`, (number, t) for each."""
        drawn, length = self.token_NT.tolist(), self.length_N.tolist()
        for b, (n, t) in enumerate(was):
            end = next((end for end in range(t + 1, length[n] + 1) if n < self.N and done(drawn[n][:end])), None)
            if end:
                self.length_N[n], self.number_B[b], self.t_B[b] = end, self.N, 0


def decode(model: Transformer, prompts: list[list[int]], uniform_NT: Tensor, stops: list[int], temperature: float, done: Done,
           rows: int, bar: tqdm) -> list[Sample]:
    """
    All prompts, longest first, through so many rows. As soon as a thirty-second of them have stopped, on a GPU an eighth, prompts that wait
    take their places; once none wait, those that have stopped leave when they are a quarter of the batch, on a GPU tmp_dir of it.
    """
    seats, working, device = Seats(model, prompts, rows, uniform_NT, stops, temperature), 0, model.embed_tokens.weight.device.type
    empty, full = max(1, int(rows * EMPTY[device])), FULL[device]
    while working or seats.judge_on_demand < seats.N:
        if seats.judge_on_demand < seats.N and working <= rows - empty:
            seats.fill()
        elif seats.judge_on_demand == seats.N and max(working, seats.least) <= full * len(seats.number_B):
            seats.shrink()
        if seats.cache.length == seats.cache.slots:
            seats.make_room()
        was = list(zip(seats.number_B.tolist(), seats.t_B.tolist())) if done else []
        seats.advance()
        if done:
            seats.decide(was, done)
        working = seats.working()
        bar.update(seats.judge_on_demand - working - bar.n)
    replies = zip(seats.token_NT.tolist(), seats.logprob_NT.tolist(), seats.length_N[:seats.N].tolist())
    return [Sample(i[:n], p[:n], i[n - 1] in stops) for i, p, n in replies]


@torch.inference_mode()
def sample(model: Transformer, prompts: list[list[int]], uniform_NT: Tensor, stops: list[int], temperature: float = 1.0,
           label: str = "", done: Done = None) -> list[Sample]:
    """
    A reply to each prompt, in order, of at most uniform_NT.shape[1] tokens. Temperature 0 takes the likeliest token and records its
    log-probability at temperature 1. A reply ends with a stop token, or as soon as `done` says so of its tokens. With a `label`, a progress
    bar appears after two seconds.
    """
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), prompts[n]))   # equal ones side by side
    rows = min(len(prompts), max(1, CACHE_SLOTS // (len(prompts[order[0]]) + uniform_NT.shape[1])))
    with tqdm(total=len(order), desc=label, unit="reply", leave=False, delay=2, disable=not label) as bar:
        replies = decode(model, [prompts[n] for n in order], uniform_NT[order], stops, temperature, done, rows, bar)
    return [reply for _, reply in sorted(zip(order, replies), key=lambda pair: pair[0])]


def main() -> None:
    cli = ArgumentParser(description="Ask a model one question.")
    cli.add_argument("model", help="a checkpoint folder, a run folder or a hub name")
    cli.add_argument("question")
    cli.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token [%(default)s]")
    cli.add_argument("--max-new-tokens", type=int, default=128, help="[%(default)s]")
    cli.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    args = cli.parse_args()
    model, tokenizer = load(args.model), open_tokenizer(args.model)
    prompt = chat_ids(tokenizer, "{text}", args.question)
    reply = sample(model, [prompt], uniforms(args.seed, 0, [0], 0, args.max_new_tokens), stop_ids(model, tokenizer), args.temperature)[0]
    print(tokenizer.decode(reply.ids, skip_special_tokens=True).strip())
    ending = "stopped" if reply.stopped else "cut at --max-new-tokens"
    print(f"[{len(reply.ids)} tokens, log-probability {sum(reply.logprobs):.2f}, {ending}]")


if __name__ == "__main__":
    main()
