"""Conversations: what is learned from, token by token, and how batches are made of them."""

import json
from itertools import combinations

import pytest
import torch
from conftest import WORDS
from torch.utils.data import BatchSampler

from lightning_rdrop.cli import RDropCLI
from lightning_rdrop.data import ChatDataModule
from lightning_rdrop.data.length_groups import LengthGroups
from lightning_rdrop.modules import CausalLM

transformers = pytest.importorskip("transformers")

SPECIAL = ["<|im_start|>", "<|im_end|>"]
ROLES = ["system", "user", "assistant"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}\n{% endfor %}"
)
REASONING = (  # what an assistant thought is left out once it is answered
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] if loop.last else message['content'].split('p')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"
PLAIN = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
PLAIN += "{% if add_generation_prompt %}assistant {% endif %}"


def messages(*turns):
    return [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]


THREE = messages("system: a b", "user: c", "assistant: d e", "user: f g", "assistant: h")


@pytest.fixture
def chat(tmp_path):
    """A data module for rows, with a tokenizer of words and a template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    def make(rows, template=CHATML, **settings):
        words = [*WORDS, *ROLES, *SPECIAL]
        core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>",
            additional_special_tokens=["<|im_start|>"],
        )  # fmt: skip
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return ChatDataModule(str(tmp_path / "tokenizer"), str(tmp_path / "train.jsonl"), **settings)

    return make


def spelled(data, example):
    """The tokens of an example, those that are learned from in brackets."""
    words = data.tokenizer.convert_ids_to_tokens([*example.ids])
    assert all(label in (-100, token) for token, label in zip(example.ids, example.labels, strict=True))
    return [f"[{word}]" if label != -100 else word for word, label in zip(words, example.labels, strict=True)]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_what_the_assistant_says(chat, template):
    data = chat([{"messages": THREE}], template)
    (example,) = data.examples("train")
    start, end = SPECIAL
    assert spelled(data, example) == [
        start, "system", "a", "b", end,
        start, "user", "c", end,
        start, "assistant", "[d]", "[e]", f"[{end}]",
        start, "user", "f", "g", end,
        start, "assistant", "[h]", f"[{end}]",
    ]  # fmt: skip


def test_a_prompt_and_its_completion(chat):
    data = chat([{"prompt": "a b", "completion": "c"}])
    (example,) = data.examples("train")
    start, end = SPECIAL
    assert spelled(data, example) == [start, "user", "a", "b", end, start, "assistant", "[c]", f"[{end}]"]


def test_without_marks_of_a_turn(chat):
    data = chat([{"messages": messages("user: a", "assistant: b c", "user: d", "assistant: e")}], PLAIN)
    expected = "user a assistant [b] [c] user d assistant [e]"
    assert spelled(data, data.examples("train")[0]) == expected.split()


def test_a_text_that_looks_like_an_answer_is_none(chat):
    """It is the place that counts, not the words."""
    data = chat([{"messages": messages("user: assistant d", "assistant: d")}])
    assert spelled(data, data.examples("train")[0]).count("[d]") == 1


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": THREE}, REFUSING, r"line 2: the chat template rejects .*roles must alternate"),
        ({"messages": messages("user: a", "assistant: p b", "user: c")}, REASONING, r"line 2: .*generation %\}"),
        ({"messages": messages("user: a")}, CHATML, r"line 2: no message has the role 'assistant'"),
        ({"messages": [{"role": "user"}]}, CHATML, r"line 2: a message must be .*got \{'role': 'user'\}"),
        ({"text": "a"}, CHATML, r"line 2: no column 'messages', only 'text'"),
        ({"prompt": "a", "completion": ""}, CHATML, r"line 2: .*completion"),
    ],
)
def test_wrong_rows(chat, row, template, message):
    fine = {"messages": messages("user: a", "assistant: b")}
    data = chat([fine, row], template)
    if template == REFUSING:
        message = message.replace("line 2", "line 1")
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_a_tokenizer_without_a_template(chat):
    with pytest.raises(ValueError, match="has no chat template"):
        chat([{"messages": THREE}], None).setup("fit")


def test_conversations_are_cut_on_the_right_and_left_out_if_nothing_remains(chat):
    rows = [{"messages": THREE}, {"messages": messages("user: " + "a " * 20, "assistant: b")}]
    data = chat(rows, max_length=12)
    with pytest.warns(UserWarning, match=r"1 of 2 conversations.*max_length=12 tokens: .*train.jsonl, line 2\."):
        (example,) = data.examples("train")
    assert spelled(data, example)[-2:] == ["assistant", "[d]"]
    assert len(example.ids) == 12
    with pytest.raises(ValueError, match="Increase max_length"):
        chat(rows, max_length=5).setup("fit")


def test_a_batch(chat):
    data = chat([{"messages": THREE}, {"prompt": "a", "completion": "b"}])
    batch = data.collate(data.examples("train"))
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(batch, (2, 23))
    assert batch["attention_mask"].sum(1).tolist() == [23, 8]
    assert (batch["input_ids"][1, 8:] == 0).all()
    assert (batch["labels"][1] != -100).nonzero().flatten().tolist() == [6, 7]


def test_only_the_assistants_tokens_are_in_the_loss(chat, gpt2):
    """The model's logits elsewhere are of no account."""
    data = chat([{"messages": messages("user: c", "assistant: d e")}])
    batch = data.collate(data.examples("train"))
    module = CausalLM(gpt2)
    inputs, target = module.rdrop_unpack(batch)
    ids = batch["input_ids"][0].tolist()
    assert target[0].tolist() == [-100] * 5 + ids[6:]  # the mark of the answer predicts its first token
    inputs["input_ids"] = inputs["input_ids"].clamp(max=len(WORDS) - 1)
    logits = torch.randn(2, 1, len(ids) - 1, len(WORDS) + 5, requires_grad=True)
    terms = module.rdrop_loss(logits, target)
    terms.loss.backward()
    assert terms.rows == 3
    assert (logits.grad[:, 0].abs().sum(-1) > 0).tolist() == [[False] * 5 + [True] * 3] * 2


def test_a_test_after_fit_needs_its_table_before(chat, gpt2):
    data = chat([{"messages": THREE}])
    with pytest.raises(ValueError, match="There is no test table"):
        RDropCLI(
            args=[
                "fit", "--model=CausalLM", f"--model.pretrained={gpt2}", "--data=ChatDataModule",
                f"--data.tokenizer={data.name}", f"--data.train={data.tables['train']}", "--test_after_fit=true",
                "--trainer.logger=false",
            ]
        )  # fmt: skip


def test_conversations_from_elsewhere_are_not_checked_before_training():
    class Own(ChatDataModule):
        test_dataloader = ChatDataModule.val_dataloader

    Own("none").check_test()
    with pytest.raises(ValueError, match="There is no test table"):
        ChatDataModule("none").check_test()


def test_length_groups():
    lengths = torch.randint(1, 500, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = LengthGroups(lengths, 8, seed=3)
    first = [*groups]
    assert sorted(first) == list(range(1003))
    groups.set_epoch(1)
    assert [*groups] != first
    groups.set_epoch(0)
    assert [*groups] == first
    batches = [*BatchSampler(first, 8, drop_last=False)]
    assert [len(batch) for batch in batches] == [8] * 125 + [3]
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)  # at random it is 1.8
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest != sorted(longest, reverse=True)


def test_length_groups_of_a_small_table_change_with_each_pass():
    def batches(groups):
        return {frozenset(batch) for batch in BatchSampler(groups, 4, drop_last=False)}

    groups = LengthGroups([*range(64)], 4)
    passes = [batches(groups), batches(groups)]  # a loader that restarts within an epoch
    groups.set_epoch(1)
    passes += [batches(groups), batches(groups)]
    assert all(len(one & other) <= 2 for one, other in combinations(passes, 2))  # of 16
    groups.set_epoch(0)
    first = batches(groups)
    groups.set_epoch(0)  # as Lightning does again after the first pass
    assert [first, batches(groups)] == passes[:2]
    assert sum(max(batch) - min(batch) for batch in first) < 16 * 20  # at random it is 16 * 39


def test_length_groups_of_two_ranks_stay_in_step():
    ranks = [LengthGroups([*range(64)], 2, 2, rank) for rank in (0, 1)]
    for _ in range(2):
        assert sorted(index for rank in ranks for index in rank) == list(range(64))


@pytest.mark.parametrize("examples", [1, 3, 8, 11])
def test_length_groups_of_few_on_two_ranks(examples):
    ranks = [[*LengthGroups([1] * examples, 4, 2, rank)] for rank in (0, 1)]
    assert {len(indices) for indices in ranks} == {len(LengthGroups([1] * examples, 4, 2))} == {-(-examples // 2)}
    assert sorted({*ranks[0], *ranks[1]}) == list(range(examples))
