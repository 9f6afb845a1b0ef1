"""Models that think, asked or not: a thought never reaches the other side, the judge or a benchmark."""
import json
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

import eval
import judge
import train
from conftest import CHATML, byte_tokenizer
from judge import FORMATS, JudgeModel, keywords
from model import new_model, save, score
from sample import Sample, chat_template, open_tokenizer, visible
from data import pack
from selfplay import ENGLISH, ChatFormat, parse_reply
from toy import write_reply

ASSISTANT = "<|im_start|>assistant\n"
TEMPLATES = {   # name: what it writes after the assistant's header
    "a switch": "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
                "{% endif %}",
    "opens the tag": "<think>\n", "knows nothing of thoughts": ""}
SECRET = "plum"   # stands in every thought, and nowhere else
CORPUS = (f"{ENGLISH.attack_harmful} {ENGLISH.attack_benign} {ENGLISH.layout} how do i bake bread please now "
          f"{SECRET} jam sure thing <answer> </answer>",)


def thinking_tokenizer(opening):
    return byte_tokenizer(CHATML.replace(ASSISTANT, ASSISTANT + opening), CORPUS)


@pytest.fixture(scope="module", params=TEMPLATES)
def thinker(request, tmp_path_factory):
    """A folder with a tiny Qwen3 that has learnt to think before every reply, asked or not."""
    tokenizer = thinking_tokenizer(TEMPLATES[request.param])
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         tie_word_embeddings=True, max_position_embeddings=1024,
                         eos_token_id=tokenizer.eos_token_id, initializer_range=0.05)
    model = new_model(config, seed=0)
    rows = []
    for cot in (True, False):
        chat = ChatFormat(tokenizer, ENGLISH, cot)
        thought = "" if cot or request.param == "opens the tag" else "<think>"
        reply = f"{thought} {SECRET} jam {SECRET} </think> "
        reply += "<answer> sure thing </answer>" if cot else "sure thing"
        for i in range(8):
            seed = train.Seed(f"how do i bake bread {i}", i % 2 == 0, True)
            for prompt in (chat.attacker_prompt(seed), chat.defender_prompt(seed.text),
                           chat.defender_prompt("sure thing")):
                rows.append((prompt, chat.reply_ids(reply)))
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(70):
        batch = [rows[i] for i in rng.integers(len(rows), size=8)]
        ids_BT, mask_BT = pack(*zip(*batch, strict=True))
        loss = -score(model, ids_BT, mask_BT)[0].sum() / mask_BT.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("thinker")
    save(folder, model.state_dict(), model, tokenizer)
    return folder


@pytest.fixture
def exchanges(monkeypatch):
    """What the judge called `spy` is shown."""
    shown = []

    def spy(batch):
        shown.extend(batch)
        return keywords(batch)
    monkeypatch.setitem(judge.JUDGES, "spy", spy)
    eval.open_judge_on_device.cache_clear()
    return shown


def write_seeds(folder):
    for label in ("harmful", "benign"):
        rows = [{"prompt": f"how do i bake {label} bread {i}"} for i in range(8)]
        (folder / f"{label}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [f"{label}={folder / label}.jsonl" for label in ("harmful", "benign")]


def no_secret(texts):
    """No thought is in these texts, of which there are some."""
    texts = [text for text in texts if text]
    assert texts and not [text for text in texts if SECRET in text], texts


def judge_prompts(folder, exchanges):
    """What a WildGuard would be asked about these exchanges, as text."""
    tokenizer = open_tokenizer(str(folder))
    prompts = JudgeModel(FORMATS["wildguard"], None, tokenizer).prompt_ids(FORMATS["wildguard"][0], exchanges)
    return tokenizer.batch_decode(prompts)


@pytest.mark.parametrize("cot", ["--cot", "--no-cot"])
def test_no_thought_leaves_a_turn_of_a_training_run(thinker, exchanges, tmp_path, cot):
    train.main(["--model", str(thinker), "--judge", "spy", "--seeds", *write_seeds(tmp_path), "--steps", "1",
                "--games", "16", "--max-new-tokens", "24", "--temperature", "0.3", "--no-exam", cot,
                "--out", str(tmp_path / "run")])
    games = [json.loads(line) for line in open(tmp_path / "run" / "games.jsonl")]
    thoughts = [SECRET in game["defender_reply"] for game in games]
    answers = [bool(game["answer"]) for game in games]
    print(f"\n    {sum(thoughts)} of 16 defenders think, {sum(answers)} answer", end="")
    assert sum(thoughts) > 8 and sum(answers) > 4
    no_secret([game["answer"] for game in games])
    no_secret([game["attack"] for game in games])
    no_secret([exchange.prompt for exchange in exchanges])
    no_secret([exchange.response for exchange in exchanges])
    no_secret(judge_prompts(thinker, exchanges))


def test_a_benchmark_judges_no_thought(thinker, exchanges, tmp_path, monkeypatch):
    transcripts = tmp_path / "transcripts.jsonl"
    monkeypatch.setattr(sys, "argv", ["eval.py", "bench", str(thinker), "--judge", "spy", "--prompts",
                                      *write_seeds(tmp_path), "--max-new-tokens", "24", "--transcripts",
                                      str(transcripts)])
    eval.main()
    no_secret([json.loads(line)["response"] for line in open(transcripts)])
    no_secret(judge_prompts(thinker, exchanges))


# ---------------------------------------------------------------- replies, by what an independent reader sees

PART = st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "a", " b\n", "\u200b", "<answer>"])
PARTS = st.lists(PART, max_size=8).map("".join)


def visible_to_a_reader(text):
    """What stands after the last closing tag, letter by letter; nothing if a thought is open there."""
    said, depth = "", False
    for part in re.findall(r"<think>|</think>|\[THINK\]|\[/THINK\]|.", text, re.S):
        if part in ("</think>", "[/THINK]"):
            said, depth = "", False
        elif part in ("<think>", "[THINK]"):
            depth = True
        else:
            said += part
    said = said.strip()
    return "" if depth or not said.strip("\u200b \n") else said


@settings(max_examples=300, database=None, derandomize=True, deadline=None)
@given(PARTS)
def test_without_cot_the_answer_is_what_follows_the_last_thought(text):
    reply = parse_reply(text, cot=False)
    assert reply.answer == visible_to_a_reader(text) and reply.well_formed == bool(reply.answer)


@pytest.mark.parametrize("answer", ["\u200b", " \u200b\ufeff ", "\u2060\u00ad", "\ufe0f", "\u3164",
                                    "\u2800\u115f", ""])
def test_an_answer_that_cannot_be_seen_is_empty(answer):
    assert visible(answer) == "" and parse_reply(answer, cot=False).answer == ""
    reply = parse_reply(write_reply("a thought", answer))
    assert reply.answer == "" and not reply.well_formed
    assert parse_reply(write_reply(answer, "an answer")).well_formed is False


@pytest.mark.parametrize("answer", ["a", "no.", "\u2603", "7", "\U0001F600", "\u200bhi", "\u4f60"])
def test_an_answer_that_can_be_seen_is_kept(answer):
    assert parse_reply(answer, cot=False).answer == answer == parse_reply(write_reply("t", answer)).answer


# ---------------------------------------------------------------- templates

@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("cot", [True, False])
def test_a_prompt_opens_one_thought_with_cot_and_none_without_unless_the_template_insists(name, cot):
    tokenizer = thinking_tokenizer(TEMPLATES[name])
    prompt = tokenizer.decode(ChatFormat(tokenizer, ENGLISH, cot).defender_prompt("hi"))
    after = prompt.partition(ASSISTANT)[2]
    opened = after.count("<think>") - after.count("</think>")
    assert opened == (1 if cot or name == "opens the tag" else 0)
    assert (after == "<think>\n\n</think>\n\n") == (name == "a switch" and not cot)


@pytest.mark.parametrize("name, answer", [("opens the tag", "sure"), ("a switch", "secret </think> sure")])
def test_a_reply_begins_inside_a_thought_that_its_template_has_opened(name, answer):
    tokenizer = thinking_tokenizer(TEMPLATES[name])
    chat = ChatFormat(tokenizer, ENGLISH, cot=False)
    closed = chat.parse(Sample(chat.reply_ids("secret </think> sure"), []))
    never = chat.parse(Sample(chat.reply_ids("secret sure"), []))
    assert closed.answer == "sure" and never.answer == ("" if name == "opens the tag" else "secret sure")


@pytest.mark.parametrize("opening", ["<think>\nOkay, let me think.\n", "<think>\nOkay,", "[THINK]",
                                     "<thinking>\n"])
def test_a_thought_that_the_template_has_begun_is_no_answer(opening):
    chat = ChatFormat(thinking_tokenizer(opening), ENGLISH, cot=False)
    assert chat.parse(Sample(chat.reply_ids("secret, truncated"), [])).answer == ""
    assert chat.parse(Sample(chat.reply_ids("secret </think> sure"), [])).answer == "sure"


@pytest.mark.parametrize("text, answer", [
    ("t </think> <answer>[THINK]secret[/THINK]hi</answer>", "hi"),
    ("t </think> <answer>[THINK]secret</answer>", ""),
    ("t </think> <answer>hi</answer>", "hi")])
def test_a_thought_within_an_answer_is_cut(text, answer):
    assert parse_reply(text).answer == answer


@pytest.mark.parametrize("tags", [("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
                                  ("<THINK>", "</THINK>"), ("[think]", "[/think]"),
                                  ("<|begin_of_thought|>", "<|end_of_thought|>")])
def test_other_spellings_of_a_thought_are_cut_too(tags):
    begin, end = tags
    assert parse_reply(f"{begin} secret {end} sure", cot=False).answer == "sure"
    assert parse_reply(f"{begin} secret", cot=False).answer == ""


@pytest.mark.parametrize("context, fits", [(10, False), (30, False), (60, True), (1000, True)])
def test_a_pair_longer_than_the_context_is_refused_with_its_place(context, fits, tmp_path, capsys):
    (tmp_path / "sft.jsonl").write_text(json.dumps({"prompt": "a", "response": "bake bread " * 8}))
    chat = ChatFormat(thinking_tokenizer(""), ENGLISH, cot=False)
    config = train.Config(sft=str(tmp_path / "sft.jsonl"), cot=False)
    if fits:
        (prompt, response), = train.read_sft(config, chat, context)
        assert len(prompt) + len(response) <= context
        return
    with pytest.raises(SystemExit):
        train.read_sft(config, chat, context)
    assert f"row 1: the pair has more tokens than the model's context, {context}" in capsys.readouterr().err


@pytest.mark.parametrize("response", ["<think> x </think> hi", "x </think> hi", "<think> x"])
def test_without_cot_a_pair_that_thinks_is_refused(response, tmp_path, capsys):
    (tmp_path / "sft.jsonl").write_text(json.dumps({"prompt": "a", "response": response}))
    config = train.Config(sft=str(tmp_path / "sft.jsonl"), cot=False)
    with pytest.raises(SystemExit):
        train.read_sft(config, ChatFormat(byte_tokenizer(), ENGLISH, cot=False), 1000)
    assert "row 1: a response is thought </think>" in capsys.readouterr().err


@pytest.mark.parametrize("special", [True, False])
def test_layout_tags_that_are_tokens_are_taught_and_read_as_such(special):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<answer>", "</answer>"], special_tokens=special)
    chat = ChatFormat(tokenizer, ENGLISH, cot=True)
    text = write_reply("a <tool_call> thought", "an answer <|im_end|> here")
    ids = chat.reply_ids(text)
    for tag in ("</think>", "<answer>", "</answer>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(tag)) == 1
    for word in ("<tool_call>", "<|im_end|>"):   # other markup stays text
        assert tokenizer.convert_tokens_to_ids(word) not in ids
    reply = chat.parse(Sample(ids, []))
    assert (reply.thought, reply.answer) == ("a <tool_call> thought", "an answer <|im_end|> here")


@pytest.mark.parametrize("template", [
    "{{ messages[0].content if messages[0].role == 'system' else raise_exception('a system turn first') }}",
    "{{ messages[1].content }}", "{% if messages|length < 2 %}{{ raise_exception('two turns') }}{% endif %}"])
def test_a_template_that_needs_a_system_turn_is_refused_in_a_sentence(template, tmp_path, capsys):
    write_model(tmp_path, byte_tokenizer(template))
    with pytest.raises(SystemExit):
        open_tokenizer(str(tmp_path))
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be read" in sentence or "not show a user's message" in sentence


def write_model(folder, tokenizer, vocab=None):
    config = Qwen3Config(vocab_size=vocab or len(tokenizer), hidden_size=16, intermediate_size=32,
                         num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                         max_position_embeddings=1024)
    model = new_model(config, seed=0)
    save(folder, model.state_dict(), model, tokenizer)


def test_a_template_with_tokens_that_the_model_does_not_embed_is_refused(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    write_model(tmp_path, tokenizer, len(tokenizer) - 3)   # the added tokens are the last three
    assert open_tokenizer(str(tmp_path))                   # the template does not use them
    write_model(tmp_path / "x", thinking_tokenizer("<think>"), len(tokenizer) - 3)
    with pytest.raises(SystemExit):
        open_tokenizer(str(tmp_path / "x"))
    assert "the model does not embed all tokens of its chat template" in capsys.readouterr().err


DATED = [CHATML.replace("{% for", prefix + "{% for", 1) for prefix in (
    "Today: {{ date_string }}\n", "{{ strftime_now('%d %b %Y') }}\n", "{{ strftime_now('%Y-%m-%d') }}\n",
    "{% if not date_string is defined %}{% set date_string = strftime_now('%A') %}{% endif %}"
    "{{ date_string }}\n",
    "Knowledge {{ strftime_now('%B %Y') }} and {{ date_string }}\n", "{{ strftime_now( '%Y-%m-%d' ) }}\n",
    "{{ strftime_now(format='%Y-%m-%d') }}\n", "{% set f = '%Y' %}{{ strftime_now(f ~ '-%m-%d') }}\n",
    "{% set now = strftime_now %}{{ now('%Y-%m-%d') }}\n", "{{ strftime_now('%-d %B %Y') }}\n")]


@pytest.mark.parametrize("template", DATED)
def test_time_stands_still_in_a_template_that_asks_for_the_date(template):
    tokenizer = byte_tokenizer(template)
    rendered = chat_template(tokenizer, "{text}", "")
    assert re.search(r"26 July? 2024|2024-07-26|July 2024|Friday", rendered)
