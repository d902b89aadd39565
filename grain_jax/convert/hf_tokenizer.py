"""CLIP's tokenizer in the files of transformers' fast tokenizer."""

import json
from typing import Any

from grain_jax.input_pipeline import clip_tokenizer


def files(context_length: int) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json, as nested dicts; texts are padded with the end token, as in its CLIP.

    Raises:
      text_cleaning.TokenizerError: CLIP's vocabulary is not found.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    start, end = clip_tokenizer.SPECIAL
    merges = clip_tokenizer.read_merges(None)
    characters = clip_tokenizer.byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(m) for m in merges)]
    library = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate([*tokens, start, end])},
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    word = Regex(clip_tokenizer.WORD)
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(word, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
    library.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[
            (start, clip_tokenizer.START_OF_TEXT),
            (end, clip_tokenizer.END_OF_TEXT),
        ],
    )
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    # Normalised: the reference reads these names as special tokens in upper and lower case.
    library.add_special_tokens([AddedToken(t, special=True, normalized=True) for t in (start, end)])
    return {
        "tokenizer.json": json.loads(library.to_str()),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": start,
            "eos_token": end,
            "pad_token": end,
            "model_max_length": context_length,
            "model_input_names": ["input_ids"],
            "clean_up_tokenization_spaces": False,
        },
    }
