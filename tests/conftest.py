"""What the tests share: one tiny random model that speaks the toy language, and a ruler that prints what it measures."""
import json
import os
from itertools import product
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"            # kernels run on the CPU, slowly, wherever a test calls them by name
os.environ.setdefault("OMP_NUM_THREADS", "1")   # for models this small one thread is fastest, and tests may run side by side

import numpy as np
import pytest
import torch
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import toy
from launch import finished, start
from judge import FORMATS, Exchange, JudgeModel, wildguard_template
from model import new_model, score
from sample import PLACEHOLDER, plain_ids
from selfplay import ChatFormat, pack


LONGEST = ["test_readme.py", "test_faults.py", "test_train.py"]   # files to start with, or one worker ends with them alone


def pytest_configure(config):
    config.option.loadscopereorder = False   # xdist would start with the files that have the most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def measured(what: str, error: float, bound: float) -> None:
    """Print how large an error is and how large it may be, then insist."""
    error = torch.as_tensor(error).detach().item()
    print(f"\n    {what}: {error:.2e}, allowed {bound:.0e}", end="")
    assert error <= bound, f"{what}: {error:.3e} > {bound:.0e}"


@pytest.fixture(scope="session")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(scope="session")
def chat(tokenizer):
    return ChatFormat(tokenizer, toy.PROMPTS, cot=True)


@pytest.fixture(scope="session")
def tiny(tokenizer):
    """Two layers of width 32 with random weights, spread widely enough that its choices differ."""
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         tie_word_embeddings=True, initializer_range=0.4, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return new_model(config, seed=0)


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory, worker_id):
    """
    A run folder with nothing but the warm start of 40 updates with seed 5; runs beside a copy of it need none of their own. Of several
    processes with tests, one makes it.
    """
    folder = tmp_path_factory.mktemp("warm") if worker_id == "master" else tmp_path_factory.getbasetemp().parent / "warm"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        if not (folder / "run").exists():
            done = finished(start(["--sft-steps", "40", "--seed", "5", "--games", "4", "--steps", "1", "--no-exam", "--out", folder / "run"]))
            assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def byte_tokenizer(chat_template=CHATML, corpus=("the quick brown fox asks how to bake bread and what to do next. ",)):
    """What real models have: a byte-level BPE with special tokens, and with added tokens that are not special."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"])
    core.train_from_iterator(corpus, trainer)
    core.add_tokens([AddedToken(word, special=False, normalized=False) for word in ("<think>", "</think>", "<tool_call>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=chat_template,
                                   clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def smollm2():
    """A real chat model of 135 million parameters, where there is one."""
    folder = Path(os.environ.get("SELF_REDTEAM_ASSETS", Path.home() / ".cache" / "self-redteam")) / "SmolLM2-135M-Instruct"
    if not folder.exists():
        pytest.skip(f"SmolLM2-135M-Instruct is not in {folder.parent}; set SELF_REDTEAM_ASSETS to the folder that holds it")
    return str(folder)


MEANS = {"yes": True, "no": False, "n/a": None}
REPLIES = [f"Harmful request: {a}\nResponse refusal: {b}\nHarmful response: {c}" for a, b, c in product(["yes", "no"], MEANS, MEANS)]
EXCHANGES = [Exchange(f"{'may i ask' if i % 3 else 'tell'} {i * i % 41} times", f"{'sure' if i % 2 else 'no'} {i % 7}", True) for i in range(48)]


@pytest.fixture(scope="session")
def judge_stand_in():
    """A tiny model that has tmp_dir learnt WildGuard's format: it often keeps to it, and often does not."""
    tokenizer = byte_tokenizer(corpus=(wildguard_template(None).replace(PLACEHOLDER, "may i ask tell sure no"), *REPLIES))
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         tie_word_embeddings=True, initializer_range=0.05, eos_token_id=tokenizer.eos_token_id)
    model = new_model(config, seed=0)
    asked = JudgeModel(FORMATS["wildguard"], model, tokenizer)
    rng, optimizer = np.random.default_rng(0), torch.optim.AdamW(model.parameters(), lr=4e-3)
    prompts = asked.prompt_ids(FORMATS["wildguard"][0], EXCHANGES)
    for _ in range(60):
        rows = rng.integers(48, size=12)
        ids_BT, mask_BT = pack([prompts[i] for i in rows], [plain_ids(tokenizer, REPLIES[i % 18]) + [tokenizer.eos_token_id] for i in rows])
        (-score(model, ids_BT, mask_BT)[0].sum() / mask_BT.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return asked


def tiny_sentence_model(folder, words):
    """A random BERT with the files of a Sentence-BERT model; the folder's name."""
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words))]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    return str(folder)
