"""What the tests share: a tiny random model of the toy language, a tiny judge model, and `measured`."""
import json
import os
from itertools import product
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")   # fastest for such small models; tests may run side by side

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"   # where the tests of the kernels run
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"        # a Triton kernel that a test calls runs on the CPU, slowly

from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import toy
from data import pack
from judge import FORMATS, Exchange, JudgeModel, wildguard_template
from launch import finished, start
from model import new_model, score
from sample import PLACEHOLDER, plain_ids
from selfplay import ChatFormat

# Workers start with these files, or one of them would end with these alone.
LONGEST = ["test_readme.py", "test_faults.py", "test_train.py"]


def pytest_configure(config):
    config.option.loadscopereorder = False   # xdist would start with the files that have the most tests


def pytest_collection_modifyitems(items):
    def order(item):
        return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
    items.sort(key=order)


def measured(what: str, error: float, bound: float) -> None:
    """Print how large an error is and how large it may be, then insist."""
    error = torch.as_tensor(error).detach().item()
    print(f"\n    {what}: {error:.2e}, allowed {bound:.0e}", end="")
    assert error <= bound, f"{what}: {error:.3e} > {bound:.0e}"


# ---------------------------------------------------------------- the toy language

@pytest.fixture(scope="session")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(scope="session")
def chat(tokenizer):
    return ChatFormat(tokenizer, toy.PROMPTS, cot=True)


@pytest.fixture(scope="session")
def tiny(tokenizer):
    """A model of two layers and 32 dimensions, with random weights so large that its choices differ."""
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         initializer_range=0.4, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    return new_model(config, seed=0)


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory, worker_id):
    """
    A run folder that holds an SFT start of 150 updates with seed 5 and one training step. A run beside a copy
    of it needs no SFT of its own. If several processes run tests, one of them makes it.
    """
    if worker_id == "master":
        folder = tmp_path_factory.mktemp("sft")
    else:
        folder = tmp_path_factory.getbasetemp().parent / "sft"
    run = folder / "run"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        if not run.exists():
            done = finished(start(["--sft-steps", "150", "--seed", "5", "--games", "4", "--steps", "1",
                                   "--no-exam", "--out", run]))
            assert done.returncode == 0, done.stderr[-3000:]
    return run


# ---------------------------------------------------------------- what real models have

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
ADDED = ["<think>", "</think>", "<tool_call>"]
FOX = ("the quick brown fox asks how to bake bread and what to do next. ",)


def byte_tokenizer(chat_template=CHATML, corpus=FOX):
    """A byte-level BPE with special tokens, and with added tokens that are not special."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False,
                                  special_tokens=SPECIAL)
    core.train_from_iterator(corpus, trainer)
    core.add_tokens([AddedToken(word, special=False, normalized=False) for word in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>",
                                   chat_template=chat_template, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def smollm2():
    """The folder of a real chat model of 135 million parameters, on machines that have it."""
    assets = Path(os.environ.get("SELF_REDTEAM_ASSETS", Path.home() / ".cache" / "self-redteam"))
    folder = assets / "SmolLM2-135M-Instruct"
    if not folder.exists():
        pytest.skip(f"SmolLM2-135M-Instruct is not in {assets}; set SELF_REDTEAM_ASSETS to its parent folder")
    return str(folder)


def tiny_sentence_model(folder, words):
    """Write a random BERT with the files of a Sentence-BERT model; returns the folder's name."""
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64)
    BertModel(config).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return str(folder)


# ---------------------------------------------------------------- a judge model

MEANS = {"yes": True, "no": False, "n/a": None}
REPLIES = [f"Harmful request: {a}\nResponse refusal: {b}\nHarmful response: {c}"
           for a, b, c in product(["yes", "no"], MEANS, MEANS)]
EXCHANGES = [Exchange(f"{'may i ask' if i % 3 else 'tell'} {i * i % 41} times",
                      f"{'sure' if i % 2 else 'no'} {i % 7}", True) for i in range(48)]


@pytest.fixture(scope="session")
def judge_stand_in():
    """A tiny judge model that has half learnt WildGuard's format: its replies often keep to it, often not."""
    asking = wildguard_template(None).replace(PLACEHOLDER, "may i ask tell sure no")
    tokenizer = byte_tokenizer(corpus=(asking, *REPLIES))
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         tie_word_embeddings=True, initializer_range=0.05,
                         eos_token_id=tokenizer.eos_token_id)
    model = new_model(config, seed=0)
    judge = JudgeModel(FORMATS["wildguard"], model, tokenizer)
    prompts = judge.prompt_ids(FORMATS["wildguard"][0], EXCHANGES)
    replies = [plain_ids(tokenizer, REPLIES[i % 18]) + [tokenizer.eos_token_id] for i in range(48)]
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        rows = rng.integers(48, size=12)
        ids_BT, mask_BT = pack([prompts[i] for i in rows], [replies[i] for i in rows])
        loss = -score(model, ids_BT, mask_BT)[0].sum() / mask_BT.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return judge
