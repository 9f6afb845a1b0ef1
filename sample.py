"""
How text is drawn, fast, and with what probability.

    prompts -> prefill -> rows of a DecodeBatch -> [ logits_BV -> log_policy -> one token per row ] -> replies

The sampler records a token's log-probability under the distribution it was drawn from. Chance is an argument:
one uniform number per token, a function of (seed, step, game, turn): neither the batch nor the process that
samples it changes a text, but for rounding. Speed comes from continuous batching and from shared prefixes.

    python sample.py runs/toy-self-0 "how do i kill the weed"
"""
from __future__ import annotations

from kernels import CommandLine, check_number, stop  # before torch, which reads the OpenMP setting in there
import re
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import groupby, pairwise
from os.path import commonprefix
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kernels.logprob import log_policy
from model import Cache, Transformer, find_checkpoint, last_logits, load, refuse_damage, run_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the text while a chat template is rendered
TODAY = date(2024, 7, 26)  # for templates that ask: a resumed run must draw the same prompts
DATES = "".join(f"|replace('%{c}', '{TODAY.strftime('%' + c)}')" for c in ("-d", "-m", *"YmdBbAayejHIMSp"))
STRFTIME = "{%- macro strftime_now(format) -%}{{ format" + DATES + " }}{%- endmacro %}"  # for all templates
THOUGHT = re.compile(r"<think(?:ing)?>|<thought>|\[think\]|<\|begin_of_thought\|>", re.I)
THOUGHT_END = re.compile(r"</think(?:ing)?>|</thought>|\[/think\]|<\|end_of_thought\|>", re.I)
BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that look like spaces

# ---------------------------------------------------------------- text to tokens
def clean_text(text: str) -> str:
    """Text that can be encoded: half of a surrogate pair, which JSON can spell, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()

def visible(text: str) -> str:
    """A text without outer spaces; empty if it has no letter, number, sign or symbol that can be seen."""
    seen = any(unicodedata.category(c)[0] in "LNPS" and c not in BLANK for c in text)
    return text.strip() if seen else ""

def after_thought(text: str) -> str | None:
    """What a text says once its thoughts have ended; None while one is open."""
    said = THOUGHT_END.split(text)[-1]
    return None if THOUGHT.search(said) else visible(said)

def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], think: bool, reply: bool) -> str:
    """A conversation in the tokenizer's chat template, up to the reply that follows, if one is to follow."""
    template = STRFTIME + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, enable_thinking=think, add_generation_prompt=reply,
        date_string=TODAY.strftime("%d %b %Y"))

def open_tokenizer(name: str, chat: bool = True) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. With `chat`, it must have a chat template that shows a user's message."""
    from transformers import AutoConfig, AutoTokenizer
    message = {"role": "user", "content": "How are you?"}
    folder = find_checkpoint(name)
    with refuse_damage(folder):  # some templates refuse a conversation without a system's turn
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rendered = [render(tokenizer, [message], think, reply=True) for think in (False, True) if chat]
        top = max((i for text in rendered for i in tokenizer(text).input_ids), default=0)
        if any(text.count(message["content"]) != 1 for text in rendered):
            stop(f"{name}: its chat template does not show a user's message once; choose a chat model.")
        if top >= AutoConfig.from_pretrained(folder).vocab_size:
            stop(f"{name}: the model does not embed all tokens of its chat template; choose another.")
    return tokenizer

def stop_ids(model: Transformer, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a reply, by the generation config and by the tokenizer."""
    listed = model.generation.eos_token_id  # None, one id, or several
    ids = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id} - {None}
    if not ids:
        warnings.warn("No token ends a reply, by generation_config.json and by the tokenizer.", stacklevel=2)
    return sorted(ids)

@lru_cache(maxsize=8)
def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Spelling and id of every added token but the unknown one: a text that spells one must stay text."""
    return {word: i for word, i in tokenizer.get_added_vocab().items() if i != tokenizer.unk_token_id}

def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text that somebody else wrote. Markup in it is undone: cut after its first character."""
    text = clean_text(text)
    markup = added_tokens(tokenizer)
    # (?=...) finds spellings that overlap, too; "(?!)" matches nowhere
    spelling = re.compile("|".join(f"(?={re.escape(word)})" for word in markup) or "(?!)")
    cuts = [0, *(match.start() + 1 for match in spelling.finditer(text)), len(text)]
    ids = []
    for start, end in pairwise(cuts):
        if start < end:
            ids += tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=True).input_ids
    special = set(markup.values())  # a spelling of one character cannot be cut
    return [i for i in ids if i not in special]

def tagged_ids(tokenizer: PreTrainedTokenizerBase, text: str, tags: Sequence[str]) -> list[int]:
    """Tokens of a reply to learn from: plain text, but tags that are added tokens are those tokens."""
    ids = []
    own = {tag: i for tag, i in added_tokens(tokenizer).items() if tag in tags}
    for part in re.split(f"({'|'.join(map(re.escape, own))})", text) if own else [text]:
        ids += [own[part]] if part in own else plain_ids(tokenizer, part)
    return ids + [i for i in [tokenizer.eos_token_id] if i is not None]

def fill_template(tokenizer: PreTrainedTokenizerBase, template: str, texts: Sequence[str]) -> list[int]:
    """
    Token ids of a template with a text for each PLACEHOLDER, tokenised at once, as in training. If that
    yields more markup than the template has, a text has spelled some: then every part is tokenised alone.
    """
    parts = template.split(PLACEHOLDER)
    filled = parts[0] + "".join(clean_text(text) + part for text, part in zip(texts, parts[1:], strict=True))
    whole_ids = tokenizer(filled, add_special_tokens=False).input_ids
    part_ids = tokenizer(parts, add_special_tokens=False).input_ids  # here, markup is markup
    special = set(added_tokens(tokenizer).values())
    template_markup = [i for ids in part_ids for i in ids if i in special]
    if [i for i in whole_ids if i in special] == template_markup:
        return whole_ids
    ids = list(part_ids[0])
    for text, following in zip(texts, part_ids[1:], strict=True):
        ids += plain_ids(tokenizer, text) + following
    return ids

@lru_cache(maxsize=64)
def template_prefix(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """The tokens with which the fillings of a template begin: a shared prefix for `sample`."""
    probes = ("a", "0", " ", "\n", "?")  # the first characters may merge with the template's last token
    fillings = ([probe] * template.count(PLACEHOLDER) for probe in probes)
    return commonprefix([fill_template(tokenizer, template, texts) for texts in fillings])

@lru_cache(maxsize=64)
def chat_template(tokenizer: PreTrainedTokenizerBase, instruction: str, opening: str) -> str:
    """One user turn in the tokenizer's template, a PLACEHOLDER for {text}, and the assistant's opening."""
    message = {"role": "user", "content": instruction.replace("{text}", PLACEHOLDER)}
    rendered = render(tokenizer, [message], think=bool(opening), reply=True)
    begun = after_thought(rendered.rpartition(PLACEHOLDER)[2]) is None  # some templates open it themselves
    return rendered if begun else rendered + opening

# ---------------------------------------------------------------- drawing a token
def stream(name: str, *numbers: int) -> np.random.Generator:
    """Random numbers of their own for each use: a name, and always the same count of numbers."""
    return np.random.default_rng((*name.encode(), *numbers))

def uniforms(seed: int, step: int, games: Sequence[int], turn: int, length: int) -> Tensor:
    """uniform_NT in [0, 1), fp64, a row per game: a function of (seed, step, game, turn) alone."""
    rows = [stream("draw", seed, step, game, turn).random(length) for game in games]
    return torch.from_numpy(np.array(rows).reshape(len(rows), length))

def draw(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """token_B: the first token whose cumulative probability exceeds the row's uniform number."""
    # sums in fp64: over 150,000 tokens, fp32 would lose the rare ones
    cdf_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
    # u <= 1 - 2^-53, so the point stays below the total, and a last token of probability 0 is never drawn
    point_B1 = uniform_B[:, None] * cdf_BV[:, -1:]
    token_B = torch.searchsorted(cdf_BV, point_B1, right=True).squeeze(1)
    return token_B.clamp_(max=cdf_BV.shape[1] - 1)  # of NaN logits any token, with NaN as its log-probability

# ---------------------------------------------------------------- prompts to cached keys and values
CACHE_SLOTS = 65_536   # rows x slots of a batch on a CPU: 3 GB for a model of 135M parameters in fp32
CACHE_SHARE = 0.7      # of a GPU's free memory, for a batch; prefill takes of the rest
PREFILL_SLOTS = {"cpu": 1_024, "cuda": 16_384}  # rows x slots of one prefill pass
MIN_PREFIX = 32        # tokens; a shorter shared prefix saves less than its own pass costs

def batches_within(rows: Iterable[int], lengths: Sequence[int] | dict[int, int],
                   max_tokens: int) -> list[list[int]]:
    """Rows, longest first, in batches of one row or at most so many tokens, padding included."""
    batches = []
    for row in rows:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches

class PrefillPass(NamedTuple):
    """Prompts that run together, longest first, by their number; all begin with the tokens of `prefix`."""
    prefix: tuple[int, ...]
    numbers: list[int]

def plan_prefill(prompts: list[tuple[int, ...]], prefixes: Sequence[list[int]],
                 max_slots: int) -> deque[PrefillPass]:
    """Passes over all prompts. A pass has one prefix and similar lengths; equal prompts are neighbours."""
    usable = sorted((tuple(p) for p in prefixes if len(p) >= MIN_PREFIX), key=len, reverse=True)
    prefix_N = [next((p for p in usable if prompt[:-1][:len(p)] == p), ()) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda n: (prefix_N[n], -len(prompts[n]), prompts[n]))
    lengths = list(map(len, prompts))
    return deque(PrefillPass(prefix, batch) for prefix, numbers in groupby(order, key=prefix_N.__getitem__)
                 for batch in batches_within(numbers, lengths, max_slots))

def prefill(model: Transformer, texts: list[tuple[int, ...]], prefix: Cache | None) -> Cache:
    """A cache of these token lists, longest first; all begin with the tokens of `prefix`, a single row."""
    weight_VD = model.embed_tokens.weight
    longest = len(texts[0])
    n_prefix = prefix.slots if prefix else 0
    cache = Cache(model.config, len(texts), longest, weight_VD.dtype, weight_VD.device)
    if prefix:
        cache.copy_rows(slice(None), prefix, slice(None))  # one row into all
        cache.length_B.fill_(n_prefix)
    if longest > n_prefix:
        # padded on the right: nothing looks there, and `length_B` of the decode batch says where a row ends
        suffixes = [text[n_prefix:] + (0,) * (longest - len(text)) for text in texts]
        model(torch.tensor(suffixes, device=weight_VD.device), None, cache)
    return cache

class PromptQueue:
    """Prompts that wait for a row. They run pass by pass; in one, equal prompts and the prefix run once."""

    def __init__(self, model: Transformer, prompts: list[list[int]], prefixes: Sequence[list[int]]):
        self.model = model
        self.prompts = [tuple(prompt) for prompt in prompts]
        max_slots = PREFILL_SLOTS[model.embed_tokens.weight.device.type]
        self.passes = plan_prefill(self.prompts, prefixes, max_slots)
        self.prefix: tuple[int, ...] = ()             # of the newest pass
        self.prefix_cache: Cache | None = None
        self.cache: Cache | None = None
        self.ready = deque()  # (prompt number, row of self.cache)

    def run_next_pass(self) -> None:
        """Prefill the next pass: all but the last token of each prompt, which the first decode step runs."""
        current = self.passes.popleft()
        if current.prefix != self.prefix:
            self.prefix = current.prefix
            self.prefix_cache = prefill(self.model, [self.prefix], None) if self.prefix else None
        row_of = {}
        for n in current.numbers:
            row_of.setdefault(self.prompts[n][:-1], len(row_of))
        self.cache = prefill(self.model, list(row_of), self.prefix_cache)
        self.ready.extend((n, row_of[self.prompts[n][:-1]]) for n in current.numbers)

    def take(self, count: int) -> list[tuple[int, int]]:
        """Up to `count` prompts of one pass: (prompt number, row of self.cache). Empty when none is left."""
        if not self.ready and self.passes:
            self.run_next_pass()
        return [self.ready.popleft() for _ in range(min(count, len(self.ready)))]

# ---------------------------------------------------------------- decoding
MIN_ROWS = 16         # on a CPU: with fewer, matmuls round differently, and sampler and trainer disagree
COMPACT_BELOW = 0.75  # a CPU batch drops its free rows when no more than this share of its rows is active

def rows_for(model: Transformer, n: int, slots: int) -> int:
    """Rows of a batch for n prompts: on a CPU by a constant, on a GPU as many as its free memory holds."""
    weight_VD = model.embed_tokens.weight
    if not weight_VD.is_cuda:
        return max(MIN_ROWS, min(n, CACHE_SLOTS // slots))
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # what PyTorch holds, unused
    c = model.config
    keys_and_values = 2 * c.layers * c.kv_heads * c.head_dim * slots * weight_VD.itemsize
    drawing = 24 * c.vocab  # logits and probabilities in fp32, sums in fp64, copies
    return max(1, min(n, int(CACHE_SHARE * free / (keys_and_values + drawing))))

def join_gather_streams(model: Transformer) -> None:
    """FSDP2's hooks fork two streams off the current one: join them, or a capture cannot end."""
    if hasattr(model, "_get_fsdp_state"):
        context = model._get_fsdp_state()._comm_ctx
        torch.cuda.current_stream().wait_stream(context.all_gather_copy_in_stream)
        torch.cuda.current_stream().wait_stream(context.all_gather_stream)

class DecodeBatch:
    """Rows of a cache, each drawing a token per step. prompt_B[b]: what row b answers; None: it is free."""

    def __init__(self, model: Transformer, rows: int, slots: int, uniform_NT: Tensor, temperature: float):
        weight_VD = model.embed_tokens.weight
        device = weight_VD.device
        self.model = model
        self.temperature = temperature
        self.cache = Cache(model.config, rows, slots, weight_VD.dtype, device)
        self.prompt_B: list[int | None] = [None] * rows
        self.max_new_tokens = uniform_NT.shape[1]
        self.uniform_M = uniform_NT.flatten().to(device)  # M = N * T
        self.next_B = torch.zeros(rows, dtype=torch.long, device=device)  # the token to run next; stays here
        self.uniform_index_B = torch.zeros_like(self.next_B)              # where its uniform number is
        self.logprob_B = torch.zeros(rows, device=device)                 # of the token drawn last
        self.graph: torch.cuda.CUDAGraph | None = None

    def n_active(self) -> int:
        return len(self.prompt_B) - self.prompt_B.count(None)

    def admit(self, queue: PromptQueue) -> None:
        """Give free rows to waiting prompts: copy their keys and values, and set their state."""
        free = [b for b, n in enumerate(self.prompt_B) if n is None]
        while free and (started := queue.take(len(free))):
            rows = free[:len(started)]
            free = free[len(started):]
            self.cache.copy_rows(rows, queue.cache, [source for _, source in started])
            state = []
            for b, (n, _) in zip(rows, started, strict=True):
                prompt = queue.prompts[n]
                self.prompt_B[b] = n
                state.append((len(prompt) - 1, prompt[-1], n * self.max_new_tokens))
            length_R, next_R, index_R = torch.tensor(state, device=self.next_B.device).T  # R = len(rows)
            self.cache.length_B[rows] = length_R
            self.next_B[rows] = next_R
            self.uniform_index_B[rows] = index_R

    def retire(self, row: int) -> None:
        """Free a row whose reply has ended. It draws on from slot 0: no step reads far for its sake."""
        self.prompt_B[row] = None
        self.cache.length_B[row] = 0

    def compact(self) -> None:
        """On a CPU, where free rows cost as much as active ones, drop them once they are many."""
        rows = max(MIN_ROWS, self.n_active())
        if self.next_B.is_cuda or rows > COMPACT_BELOW * len(self.prompt_B):
            return  # a GPU would have to record its step anew
        kept = sorted(range(len(self.prompt_B)), key=lambda b: self.prompt_B[b] is None)[:rows]
        self.prompt_B = [self.prompt_B[b] for b in kept]
        self.next_B = self.next_B[kept]
        self.uniform_index_B = self.uniform_index_B[kept]
        self.logprob_B = self.logprob_B[kept]
        self.cache.keep_rows(kept)

    def draw_step(self) -> None:
        """One decode step. No host sync and static addresses: it can be captured as a CUDA graph."""
        logits_BV = self.model(self.next_B[:, None], last_logits, self.cache)
        logp_BV = log_policy(logits_BV, self.temperature or 1.0)
        uniform_B = self.uniform_M[self.uniform_index_B]
        token_B = draw(logp_BV, uniform_B) if self.temperature else logp_BV.argmax(-1)
        self.next_B.copy_(token_B)
        self.logprob_B.copy_(logp_BV.gather(1, token_B[:, None]).squeeze(1))
        self.uniform_index_B.add_(1).clamp_(max=len(self.uniform_M) - 1)  # free rows draw on: in bounds
        self.cache.length_B.clamp_(max=self.cache.slots - 1)

    def step(self) -> list[tuple[int, int, int, float]]:
        """Draw a token for each row; return (row, prompt number, token, log-probability) of active ones."""
        if self.graph:
            self.graph.replay()
        else:
            self.draw_step()
            if self.next_B.is_cuda:  # launching a step's kernels one by one takes longer than they run
                self.graph = torch.cuda.CUDAGraph()
                # capturing computes nothing; thread_local: other threads may use the GPU meanwhile
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.draw_step()
                    join_gather_streams(self.model)
        tokens = self.next_B.tolist()
        logprobs = self.logprob_B.tolist()
        return [(b, n, tokens[b], logprobs[b]) for b, n in enumerate(self.prompt_B) if n is not None]

# ---------------------------------------------------------------- prompts to replies
Done = Callable[[list[int]], bool] | None  # whether a reply that begins with these tokens may end here

@dataclass
class Sample:
    """A reply: its tokens, the stop token too, and their log-probabilities (nats, at the temperature)."""
    ids: list[int]
    logprobs: list[float]

@torch.inference_mode()
def sample(model: Transformer, prompts: list[list[int]], uniform_NT: Tensor, stops: list[int],
           temperature: float = 1.0, prefixes: Sequence[list[int]] = (), label: str = "", done: Done = None,
           max_rows: int = 0) -> list[Sample]:
    """
    A reply to each prompt, in order, of at most T = uniform_NT.shape[1] tokens; it ends with a stop token, or
    when `done` says so. Temperature 0 takes the likeliest token and records its log-probability at 1. Many
    prompts begin with one of the `prefixes`: that saves time. With a `label` there is a progress bar.
    """
    if not prompts:
        return []
    slots = max(len(prompt) for prompt in prompts) + uniform_NT.shape[1]
    rows = min(len(prompts), max_rows) or rows_for(model, len(prompts), slots)
    batch = DecodeBatch(model, rows, slots, uniform_NT, temperature)
    queue = PromptQueue(model, prompts, prefixes)
    replies = [Sample([], []) for _ in prompts]
    stop_set = set(stops)
    bar = tqdm(total=len(prompts), desc=label, unit="reply", leave=False, delay=2, disable=not label)
    batch.admit(queue)
    while batch.n_active():
        for row, n, token, logprob in batch.step():
            reply = replies[n]
            reply.ids.append(token)
            reply.logprobs.append(logprob)
            is_last = token in stop_set or len(reply.ids) == batch.max_new_tokens
            if is_last or (done and done(reply.ids)):
                batch.retire(row)
                bar.update()
        batch.admit(queue)
        batch.compact()
    bar.close()
    return replies

# ---------------------------------------------------------------- the command line
def main() -> None:
    cli = CommandLine(description="Ask a model one question, as the defender of its run was asked.")
    cli.add_argument("model", help="a checkpoint folder, a run folder or a hub name")
    cli.add_argument("question")
    cli.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token [%(default)s]")
    args = cli.parse_args()
    check_number("temperature", args.temperature, 0, 100)
    model = load(args.model)
    model.use("defender")
    tokenizer = open_tokenizer(args.model)
    run = run_config(args.model)  # the prompts of its game; other models get the bare question
    prompts = run.get("prompts", {"defend": "{text}", "layout": ""})
    opening = "<think>" if run.get("cot") else ""
    instruction = prompts["defend"] + prompts["layout"] * bool(opening)
    prompt = fill_template(tokenizer, chat_template(tokenizer, instruction, opening), [args.question])
    uniform_NT = torch.rand(1, 256, dtype=torch.float64)  # at most so many tokens
    reply = sample(model, [prompt], uniform_NT, stop_ids(model, tokenizer), args.temperature)[0]
    print(f"{opening} {tokenizer.decode(reply.ids, skip_special_tokens=True)}".strip())

if __name__ == "__main__":
    main()
