"""
How text is drawn, fast, and with what probability.

    prompts -> pad left, batch -> prefill the cache -> [ logits_BV -> log_policy -> draw one token per row -> one step ] until all rows stop

The log-probability of a token is recorded under exactly the distribution that it was drawn from. Chance enters as an argument: one
uniform number per token, a function of (seed, step, game, turn). Whoever samples a game, in whatever batch, draws the same text.

    python sample.py runs/toy-self-0 "how do i kill the weed"
"""
from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from os.path import commonprefix
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kernels.logprob import log_policy
from model import Cache, Transformer, last_logits, load, open_tokenizer, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARED = 16               # tokens that all prompts must have in common for a separate pass over them to pay
CACHE_SLOTS = 65_536      # rows x slots of one batch: 3 GB for a 135M model in fp32, 8 GB for an 8B model in bf16
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands where the text goes while the template is rendered


# ---------------------------------------------------------------- text to tokens

def clean(text: str) -> str:
    """Text that can be encoded: half of a surrogate pair, which JSON can spell, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


@lru_cache(maxsize=8)
def markup(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every added token but the unknown one, with its id: spellings that are not read as text."""
    return {word: i for word, i in tokenizer.get_added_vocab().items() if i != tokenizer.unk_token_id}


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text that somebody else wrote: what spells markup is cut after its first character, and stays plain text."""
    marks, text = markup(tokenizer), clean(text)
    spelled = re.compile("|".join(f"(?={re.escape(word)})" for word in marks) or "$^")
    cuts = [0, *(match.start() + 1 for match in spelled.finditer(text)), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(cuts) if begin < end]
    ids = [tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids for piece in pieces]
    special = set(marks.values())
    return [i for piece in ids for i in piece if i not in special]


@lru_cache(maxsize=64)
def parts_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> list[list[int]]:
    """What stands before, between and after the texts of a template: our own words and the template's, where markup is markup."""
    return [tokenizer(part, add_special_tokens=False).input_ids for part in template.split(MARK)]


def fill(tokenizer: PreTrainedTokenizerBase, template: str, texts: Sequence[str]) -> list[int]:
    """
    Token ids of a template with a text in the place of each MARK. It is tokenised as a whole, as models are trained to see it. Where that
    yields other markup than the template has by itself, a text has spelled some: then every part is tokenised alone, texts as plain text.
    """
    parts, apart = template.split(MARK), parts_ids(tokenizer, template)
    whole = tokenizer(parts[0] + "".join(clean(t) + p for t, p in zip(texts, parts[1:], strict=True)), add_special_tokens=False).input_ids
    marks = set(markup(tokenizer).values())
    if [i for i in whole if i in marks] == [i for part in apart for i in part if i in marks]:
        return whole
    return apart[0] + [i for text, part in zip(texts, apart[1:]) for i in plain_ids(tokenizer, text) + part]


@lru_cache(maxsize=64)
def chat_template(tokenizer: PreTrainedTokenizerBase, instruction: str, prefill: str) -> str:
    """One user turn in the tokenizer's own template, a MARK for {text}, and the opening of the assistant's turn."""
    message = {"role": "user", "content": instruction.replace("{text}", MARK)}
    rendered = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return rendered if prefill and rendered.rstrip().endswith(prefill) else rendered + prefill   # some templates open the thought


def chat_ids(tokenizer: PreTrainedTokenizerBase, instruction: str, text: str, prefill: str = "") -> list[int]:
    """A prompt's token ids. `instruction` is ours and contains {text}; `text` is somebody's and never becomes markup."""
    return fill(tokenizer, chat_template(tokenizer, instruction, prefill), [text])


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


def draw(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """token_B by inverting the cumulative distribution. In fp64: over 150,000 words fp32 sums would lose the rare ones."""
    cdf_BV = logp_BV.double().exp_().cumsum(-1)
    token_B1 = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)
    return token_B1.squeeze(1).clamp(max=logp_BV.shape[1] - 1)


def prefill(model: Transformer, prompts: list[list[int]], steps: int) -> tuple[Cache, Tensor]:
    """
    A cache with room for all prompts and `steps` more tokens, and the ids_BT that are still to be run. What all prompts begin with, such
    as an instruction, is run once and has been copied to every row.
    """
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    shared = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    shared = shared if shared >= SHARED and len(prompts) > 1 else 0
    longest = max(map(len, prompts))
    pad_B = torch.tensor([longest - len(p) for p in prompts], device=device)
    ids_BT = torch.tensor([[0] * (longest - len(p)) + p[shared:] for p in prompts], device=device)
    cache = Cache(model.shape, len(prompts), longest + steps, pad_B, dtype, shared)
    if shared:
        common = Cache(model.shape, 1, shared, pad_B.new_zeros(1), dtype)
        model(torch.tensor([prompts[0][:shared]], device=device), lambda hidden_BTD, weight_VD: None, cache=common)
        cache.begin_with(common)
    return cache, ids_BT


def decode(model: Transformer, prompts: list[list[int]], uniform_BT: Tensor, stops: list[int], temperature: float,
           done: Done) -> list[Sample]:
    """One batch, start to end. Rows that have stopped leave the batch once they are half of it."""
    steps = uniform_BT.shape[1]
    cache, ids_BT = prefill(model, prompts, steps)
    device = ids_BT.device
    token_BT = torch.zeros(len(prompts), steps, dtype=torch.long, device=device)
    logprob_BT = torch.zeros(len(prompts), steps, device=device)
    uniform_BT, stop_S = uniform_BT.to(device), torch.tensor(stops, device=device)
    length_B = torch.full((len(prompts),), steps, device=device)
    live_B = torch.arange(len(prompts), device=device)            # the rows still in the batch
    for t in range(steps):
        logp_BV = log_policy(model(ids_BT, last_logits, cache=cache), temperature or 1.0)
        next_B = draw(logp_BV, uniform_BT[live_B, t]) if temperature else logp_BV.argmax(-1)
        token_BT[live_B, t] = next_B
        logprob_BT[live_B, t] = logp_BV.gather(1, next_B[:, None]).squeeze(1)
        ends_B = torch.isin(next_B, stop_S)
        if done:
            ends_B |= torch.tensor([done(ids) for ids in token_BT[live_B, :t + 1].tolist()], device=device)
        length_B[live_B] = torch.where(ends_B & (length_B[live_B] == steps), t + 1, length_B[live_B])
        going_B = length_B[live_B] > t + 1
        n_going = int(going_B.sum())
        if n_going == 0:
            break
        if n_going <= len(live_B) // 2:
            live_B, next_B = live_B[going_B], next_B[going_B]
            cache.keep(going_B)
        ids_BT = next_B[:, None]
    tokens, logprobs, lengths = token_BT.tolist(), logprob_BT.tolist(), length_B.tolist()
    return [Sample(i[:n], p[:n], i[n - 1] in stops) for i, p, n in zip(tokens, logprobs, lengths)]


@torch.no_grad()
def sample(model: Transformer, prompts: list[list[int]], uniform_NT: Tensor, stops: list[int], temperature: float = 1.0,
           label: str = "", done: Done = None) -> list[Sample]:
    """
    A reply to each prompt, in order, of at most uniform_NT.shape[1] tokens. Temperature 0 takes the likeliest token and records its
    log-probability at temperature 1. Longest prompts go first, so that each batch pads little and the first one shows the memory it needs.
    A reply ends with a stop token, or as soon as `done` says so of its tokens. With a `label`, a progress bar appears after two seconds.
    """
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    replies: list[Sample | None] = [None] * len(prompts)
    with tqdm(total=len(order), desc=label, unit="reply", leave=False, delay=2, disable=not label) as bar:
        while order:
            rows = max(1, CACHE_SLOTS // (len(prompts[order[0]]) + uniform_NT.shape[1]))
            batch, order = order[:rows], order[rows:]
            for n, reply in zip(batch, decode(model, [prompts[n] for n in batch], uniform_NT[batch], stops, temperature, done)):
                replies[n] = reply
            bar.update(len(batch))
    return replies


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
