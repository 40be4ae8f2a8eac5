"""Makes what configs/tiny.yaml names: two tiny random models with different tokenizers, and some text.

python tests/tiny.py FOLDER
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ORGANS = ("heart", "kidney", "liver", "lung", "eye", "ear", "skin", "nerve")
FINDINGS = ("cyst", "stone", "defect", "lesion", "swelling", "thinning 12345", "fibrosé", "🙂 sign")


def make(folder: Path, records: int = 48) -> None:
    """FOLDER/teacher (Gemma 3, SentencePiece-like), FOLDER/student (Llama, byte-level), FOLDER/train.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(questions(records))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [text for row in rows for text in (row["question"], row["answer"])] + ["Question: Answer: \n"]
    save_llama(folder / "student", byte_level(texts), layers=4)
    save_gemma(folder / "teacher", sentencepiece(texts))


def questions(count: int):
    random.seed(0)
    for i in range(count):
        organ, finding = ORGANS[i % len(ORGANS)], FINDINGS[i // len(ORGANS) % len(FINDINGS)]
        options = [f"A {finding} of the {other}, seen in {n} of {7 * n}." for n, other in enumerate(random.sample(ORGANS, 3), i + 1)]
        answer = f"A {finding} of the {organ}, seen in {i} of 100."
        yield {"id": f"r{i}", "question": f"What is {organ} {finding} no {i}?", "answer": answer, "specialty": organ, "options": [answer, *options], "answer_idx": 0}


def byte_level(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>", "<|user|>"], initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece(texts: list[str]) -> PreTrainedTokenizerFast:
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁|[0-9]"), "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    ascii_only = [text.encode("ascii", "ignore").decode() for text in texts]
    tokenizer.train_from_iterator(ascii_only, trainers.BpeTrainer(vocab_size=700, special_tokens=[*specials, *fallback], show_progress=False))
    data = json.loads(tokenizer.to_str())
    # byte tokens are ordinary tokens of the model, not added ones
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, layers: int = 2, seed: int = 1) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_gemma(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """With more rows in its head than tokens, as real Gemmas have."""
    torch.manual_seed(2)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer) + 24,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
