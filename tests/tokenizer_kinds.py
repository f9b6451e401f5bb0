"""Tokenizers of the kinds that backbones use, quickly trained on a few lines, and chat templates for them."""

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["KINDS", "TEMPLATES", "make_tokenizer"]

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
HEADER_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURN_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
SENTENCEPIECE_TOKENS = ("<unk>", "<s>", "</s>")

EACH = "{% for m in messages %}"
TEMPLATES = {
    "chatml": EACH
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # As in Llama 2: no generation prompt, both sides trimmed, a space before and after an answer.
    "inst": "{{ bos_token }}"
    + EACH
    + "{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    + "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    # As in Zephyr: roles are written as text, not as control tokens.
    "roles": EACH
    + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # As in Gemma: no system turn, and a turn does not end with the end-of-sequence token.
    "turns": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    + "{% endif %}"
    + EACH
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    + "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    # As in Llama 3.1: the date is written, and content is trimmed.
    "dated": "{% if date_string is not defined %}"
    + "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    + "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    + "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '<|eot_id|>' }}"
    + EACH
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # As in multimodal models: content is a list of parts.
    "parts": EACH
    + "{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    + "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "deaf": "{{ '<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n' }}",
}


@cache
def _lines() -> tuple[str, ...]:
    words = re.findall(r"\w+", "call number code key the of Anna Bo at line phone office answer to and road North")
    words += list("0123456789")
    drawn = random.Random(5)
    lines = [" ".join(drawn.choices(words, k=12)) + f" {drawn.randrange(10**9)}" for _ in range(400)]
    return (*lines, *["Åsa Öberg x² ﬁne ½ \uff21\uff22\uff23\uff11\uff12\uff13", "日本語の電話番号は", "مرحبا بك"] * 10)


def _byte_level(
    specials: Sequence[str], normalizer: object = None, digits: bool = False, prefix_space: bool = False
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=not digits)
    split = pre_tokenizers.Split(Regex(r"\d{1,3}| ?[^\s\d]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if digits else level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    return tokenizer


def _appending() -> Tokenizer:
    tokenizer = _byte_level(SENTENCEPIECE_TOKENS)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=list(SENTENCEPIECE_TOKENS), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """Like sentencepiece's BPE: spaces are letters, each text gets a leading one, unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*SENTENCEPIECE_TOKENS, *bytes_], show_progress=False, max_token_length=8
    )
    words = [word for line in _lines() for word in line.split()]
    tokenizer.train_from_iterator([*words, *_lines()], trainer)
    # The trainer marks the byte tokens as special, which they are not.
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] not in bytes_]
    return Tokenizer.from_str(json.dumps(saved))


def _llama() -> Tokenizer:
    """Like Llama's first tokenizer: each text gets a leading space and a beginning-of-sequence token."""
    tokenizer = _byte_fallback()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    begin = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    return tokenizer


def _marks() -> Tokenizer:
    """Like home-made fine-tunes: the marks of turns are added tokens, but not special ones."""
    tokenizer = _byte_level(SENTENCEPIECE_TOKENS)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(_lines(), trainer)
    return tokenizer


KINDS: dict[str, tuple[Callable[[], Tokenizer], str | None, dict[str, str]]] = {
    "plain": (lambda: _byte_level(SENTENCEPIECE_TOKENS), None, {"bos_token": "<s>", "eos_token": "</s>"}),
    "appending": (_appending, None, {"bos_token": "<s>", "eos_token": "</s>"}),
    "prefix_space": (
        lambda: _byte_level(SENTENCEPIECE_TOKENS, prefix_space=True),
        None,
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "chatml": (lambda: _byte_level(CHATML_TOKENS), "chatml", {"eos_token": "<|im_end|>"}),
    "nfc": (lambda: _byte_level(CHATML_TOKENS, normalizers.NFC()), "chatml", {"eos_token": "<|im_end|>"}),
    "parts": (lambda: _byte_level(CHATML_TOKENS), "parts", {"eos_token": "<|im_end|>"}),
    "unigram": (_unigram, "roles", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "inst": (_byte_fallback, "inst", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "roles": (_byte_fallback, "roles", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "byte_fallback": (_byte_fallback, None, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "llama": (_llama, None, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "marks": (_marks, "chatml", {"eos_token": "</s>"}),
    "turns": (lambda: _byte_level(TURN_TOKENS), "turns", {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "dated": (
        lambda: _byte_level(HEADER_TOKENS, digits=True),
        "dated",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "word_piece": (_word_piece, None, {"unk_token": "[UNK]", "eos_token": "[SEP]"}),
}
"""By name: how the tokenizer is made, its chat template, and the roles of its special tokens."""


@cache
def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of `KINDS`; it is cached, so callers must not change it."""
    make, template, roles = KINDS[kind]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), clean_up_tokenization_spaces=False, **roles)
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    return tokenizer
