"""CLIP's tokenizer in the files of transformers' fast tokenizer."""

import json
from typing import Any

from grain_jax.input_pipeline import clip_tokenizer


def files(context_length: int) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json, as nested dicts; texts are padded with the end token, as in its CLIP."""
    from tokenizers import AddedToken, Regex, decoders, normalizers, processors

    start, end = clip_tokenizer.SPECIAL
    library = clip_tokenizer.byte_pairs()
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
        special_tokens=[(start, clip_tokenizer.START_OF_TEXT), (end, clip_tokenizer.END_OF_TEXT)],
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
