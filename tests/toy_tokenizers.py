"""Small tokenizers built in memory: no network, a few milliseconds each.

(Not called ``tokenizers``: the tests directory is on sys.path and would hide the library.)
"""

from __future__ import annotations

import re
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

SENTENCES = (
    "Answer the following question. How many apples does Anna have now?",
    "She has 12 apples and buys 30 more, so the answer is 42.",
    "def add(a, b):\n    return a + b\n",
    "user: hello there\nassistant: The answer is: C",
    "Jürgen zählt 7 Äpfel; naïve café “quoted” text… 你好世界 🙂",
)

# One template per habit that matters: where the system turn goes, what is trimmed, how turns end.
TEMPLATES = {
    # No generation prompt of its own, content trimmed, BOS written for every question.
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set offset = 1 %}"
        "{% set sys = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% else %}{% set offset = 0 %}{% set sys = '' %}{% endif %}"
        "{% for m in messages[offset:] %}"
        "{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (sys if loop.first else '') + m['content'].strip() + ' [/INST]'"
        " }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim"
        " + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # Generation prompt with a trailing newline, newline behind the end of turn.
    "chatml": (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Not prefix-stable: the system turn moves into the last question.
    "mistral": (
        "{% set ns = namespace(sys='') %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set ns.sys = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}"
        "{% endif %}"
        "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + (ns.sys if m == users[-1] else '') + m['content'] + '[/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    # Refuses system turns and roles out of order, calls the assistant "model", trims.
    "gemma": (
        "{{ bos_token }}"
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # Ends the whole text with one more token that no earlier turn has.
    "phi3": (
        "{% for m in messages %}"
        "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    # Removes reasoning from all but the last answer, writes an empty one into it if it has none.
    "thinking": (
        "{% for m in messages %}{% set content = m['content'] %}"
        "{% if m['role'] == 'assistant' %}"
        "{% set think = '' %}"
        "{% if '</think>' in content %}"
        "{% set think = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% if loop.last %}"
        "{{ '<|im_start|>assistant\\n<think>\\n' + think + '\\n</think>\\n\\n' + content }}"
        "{% else %}{{ '<|im_start|>assistant\\n' + content }}{% endif %}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + content }}{% endif %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Its generation prompt opens a reasoning block that answers in the data never have.
    "open_think": (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    ),
    # No special token anywhere: turns end in a newline.
    "plain": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}

MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
)  # fmt: skip


@cache
def _byte_level(bos: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    if bos:
        # trim_offsets leaves blanks out of the spans, as GPT-2 and Llama 3 do.
        core.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
                ),
            ]
        )
    else:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    return core


@cache
def _metaspace() -> Tokenizer:
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first", split=False
    )
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(content=" ", left=1),
    ])  # fmt: skip
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    core.train_from_iterator(SENTENCES[:4], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return core


def byte_level(template: str | None = None, *, bos: bool = True, eos: bool = True):
    """GPT-2 and Llama 3 style; ``template`` names an entry of TEMPLATES."""
    return _wrap(_byte_level(bos), template, bos, eos, pad_token="<pad>")


def metaspace(template: str | None = None):
    """Llama 2 and Mistral style: SentencePiece blanks, byte fallback, BOS."""
    return _wrap(_metaspace(), template, True, True, unk_token="<unk>")


def _wrap(core: Tokenizer, template: str | None, bos: bool, eos: bool, **special: str):
    named = {"bos_token": "<s>"} if bos else {}
    named |= {"eos_token": "</s>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core.to_str()), **named, **special
    )
    if template is not None:
        source = TEMPLATES[template]
        used = [m for m in MARKERS if m in source or "'<|' + m['role']" in source]
        tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in used])
        tokenizer.chat_template = source
    return tokenizer


class WordTokenizer(PreTrainedTokenizer):
    """A slow tokenizer, without offsets: words, blanks and punctuation of a fixed vocabulary."""

    def __init__(self, **kwargs):
        self._split = re.compile(r"\s+|\w+|[^\w\s]")
        pieces = {p for s in SENTENCES for p in self._split.findall(s)}
        pieces |= {"User", "Assistant", "System", ":", "\n", " "}
        self._ids = {p: i for i, p in enumerate(["<unk>", "<s>", "</s>", *sorted(pieces)])}
        self._pieces = {i: p for p, i in self._ids.items()}
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return len(self._ids)

    def get_vocab(self):
        return dict(self._ids)

    def _tokenize(self, text, **kwargs):
        return self._split.findall(text)

    def _convert_token_to_id(self, token):
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return self._pieces.get(index, "<unk>")

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)
