"""
How text is drawn, fast, and with what probability.

    prompts -> pad left, batch -> prefill the cache -> [ logits_BV -> log_policy -> draw one token per row -> one step ] until all rows stop

The log-probability of a token is recorded under exactly the distribution that it was drawn from. Chance enters as an argument: one
uniform number per token, a function of (seed, step, game, turn). Whoever samples a game, in whatever batch, draws the same text.

    python sample.py runs/toy-self-0 "how do i kill the weed"
"""
from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kernels.logprob import log_policy
from model import Cache, Transformer, last_logits, load, open_tokenizer, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_SLOTS = 65_536      # rows x slots of one batch: 3 GB for a 135M model in fp32, 8 GB for an 8B model in bf16
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands where the text goes while the template is rendered


# ---------------------------------------------------------------- text to tokens

def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text that somebody else wrote: what spells a special token stays plain text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


@lru_cache(maxsize=64)
def frame_ids(tokenizer: PreTrainedTokenizerBase, instruction: str, prefill: str) -> tuple[list[int], list[int]]:
    """What stands before and after the text in a prompt: our own words and the template's, where markup is markup."""
    message = {"role": "user", "content": instruction.replace("{text}", MARK)}
    before, after = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True).split(MARK)
    return tuple(tokenizer(part, add_special_tokens=False).input_ids for part in (before, after + prefill))


def chat_ids(tokenizer: PreTrainedTokenizerBase, instruction: str, text: str, prefill: str = "") -> list[int]:
    """
    One user turn in the tokenizer's own chat template and the opening of the assistant's. `instruction` is ours and contains {text};
    `text` is somebody's and never becomes markup: the template is rendered around a mark, and the text is tokenised by itself.
    """
    before, after = frame_ids(tokenizer, instruction, prefill)
    return before + plain_ids(tokenizer, text) + after


# ---------------------------------------------------------------- tokens to tokens

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


def decode(model: Transformer, prompts: list[list[int]], uniform_BT: Tensor, stops: list[int], temperature: float) -> list[Sample]:
    """One batch, start to end. Rows that have stopped leave the batch once they are half of it."""
    device, steps = model.embed_tokens.weight.device, uniform_BT.shape[1]
    longest = max(map(len, prompts))
    pad_B = torch.tensor([longest - len(p) for p in prompts], device=device)
    ids_BT = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    cache = Cache(model.shape, len(prompts), longest + steps, pad_B, model.embed_tokens.weight.dtype)
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
        length_B[live_B] = torch.where(torch.isin(next_B, stop_S) & (length_B[live_B] == steps), t + 1, length_B[live_B])
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
           label: str = "") -> list[Sample]:
    """
    A reply to each prompt, in order, of at most uniform_NT.shape[1] tokens. Temperature 0 takes the likeliest token and records its
    log-probability at temperature 1. Longest prompts go first, so that each batch pads little and the first one shows the memory it needs.
    With a `label`, a progress bar appears when sampling takes seconds.
    """
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    replies: list[Sample | None] = [None] * len(prompts)
    with tqdm(total=len(order), desc=label, unit="reply", leave=False, delay=2, disable=not label) as bar:
        while order:
            rows = max(1, CACHE_SLOTS // (len(prompts[order[0]]) + uniform_NT.shape[1]))
            batch, order = order[:rows], order[rows:]
            for n, reply in zip(batch, decode(model, [prompts[n] for n in batch], uniform_NT[batch], stops, temperature)):
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
