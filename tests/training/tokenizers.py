"""Tokenizers that training's tests read with, and a chat template that marks what the assistant says."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
EXAMPLE_TARGET = ROOT / "examples" / "models" / "target"
SHARED = ROOT.parent / "shared" / "data"
VICUNA = SHARED / "models" / "vicuna-7b-v1.3-tokenizer"

needs_vicuna = pytest.mark.skipif(not VICUNA.is_dir(), reason="no ../shared/data with Vicuna's tokenizer")

# the layout that Vicuna was trained on, in our own words; the space before an answer is the target's to write
VICUNA_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0]['role'] != 'system' -%}{{- 'A curious user talks to a polite assistant. ' -}}{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{- message['content'] + ' ' -}}
  {%- elif message['role'] == 'user' -%}
    {{- 'USER: ' + message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ASSISTANT:' -}}
    {%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- raise_exception('no such role here') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""


def example_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer of the project's own example target: byte-level, its template without generation spans."""
    return AutoTokenizer.from_pretrained(EXAMPLE_TARGET)


def character_tokenizer(*, trim_offsets: bool = False, adds_bos: bool = True) -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer without merges: a token per byte, `<s>`, `</s>` and `<|user|>` on top."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in ("<s>", "</s>", "<|user|>")])
    offsets = processors.ByteLevel(trim_offsets=trim_offsets)
    if adds_bos:
        opening = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.post_processor = processors.Sequence([offsets, opening])
    else:
        tokenizer.post_processor = offsets
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
