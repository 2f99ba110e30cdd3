"""Small tokenizers of the kinds that models have, trained within a second, each with a chat template of its kind."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

WORDS = "my cat is called Mia and the unbelievable gardener is called Theodora def fibroblast fibers fib assistant user"
CORPUS = [
    f"{WORDS} 1234 = 1", "tell me something\n\nYes.\n\n\nno", "\n".join(WORDS.split()), "  two spaces   three é ü 日本"
] * 20  # fmt: skip

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def special(text: str, **flags: bool) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, **flags)


def _train(backend: Backend, tokens: list[AddedToken], **options: object) -> Backend:
    kind = trainers.UnigramTrainer if isinstance(backend.model, models.Unigram) else trainers.BpeTrainer
    backend.train_from_iterator(CORPUS, kind(vocab_size=600, show_progress=False, special_tokens=tokens, **options))
    return backend


def byte_level() -> tuple[Backend, str, str]:
    """GPT-2's and SmolLM2's kind: bytes, digits apart, nothing normalised."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokens = [special("<|endoftext|>"), special("<|im_start|>"), special("<|im_end|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(backend, tokens, initial_alphabet=alphabet), CHATML, "<|im_end|>"


def _sentencepiece(tokens: list[AddedToken]) -> Backend:
    """BPE over whole sentences: a space before every piece of text, bytes for what is unknown."""
    plain = Backend(models.BPE(unk_token="<unk>"))
    plain.normalizer = normalizers.Replace(" ", "\u2581")
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("\n|(?=\u2581)"), "isolated")  # or training would merge sentences
    _train(plain, [special("<unk>")])
    vocab, merges = plain.get_vocab(), _merges(plain)
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(tokens)
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return backend


def _merges(backend: Backend) -> list[tuple[str, str]]:
    import json

    return [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]


def llama_2() -> tuple[Backend, str, str]:
    """Llama-2's kind: texts begin with <s>, a space goes before each piece of text, unknown characters become bytes."""
    return _sentencepiece([special("<s>"), special("</s>")]), LLAMA_2, "</s>"


def phi_3() -> tuple[Backend, str, str]:
    """Phi-3's kind: tokens that take in the spaces and line ends behind them."""
    names = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    return _sentencepiece([special("<s>"), *(special(name, rstrip=True) for name in names)]), PHI_3, "<|end|>"


def llama_3() -> tuple[Backend, str, str]:
    """Newer Llamas' kind: bytes, a begin token, a template that trims; and a token that takes in the spaces before it."""
    backend, _, _ = byte_level()
    backend.add_special_tokens([special("<|begin|>"), special("<|mask|>", lstrip=True), special("<|im_end|>x")])
    bos = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", bos)]
    )
    template = CHATML.replace("m.content", "m.content | trim").replace("<|im_end|>", "<|endoftext|>")
    return backend, "<|begin|>" + template, "<|endoftext|>"


def unigram() -> tuple[Backend, str, str]:
    """T5's and Gemma's kind: pieces by probability, a space before the first only, texts normalised; words as tokens."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokens = [special("<unk>"), special("<|im_start|>"), special("<|im_end|>")]
    _train(backend, tokens, unk_token="<unk>")
    backend.add_tokens([AddedToken("\n" * n, normalized=False) for n in range(1, 4)])
    backend.add_tokens([AddedToken("Mia", single_word=True, normalized=True), AddedToken("cat", normalized=True)])
    return backend, CHATML, "<|im_end|>"


KINDS = {kind.__name__: kind for kind in (byte_level, llama_2, phi_3, llama_3, unigram)}


def save_tokenizer(kind: str, folder: Path) -> Path:
    """A tokenizer.json with what belongs to it, in `folder`."""
    backend, template, eos = KINDS[kind]()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
