"""Tiny checkpoints of the annotation models: real classes and processors, random weights."""

import pathlib

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 characters in byte-level vocabularies
# Threads of a model this small only wait for each other, and for the other processes of a machine.
torch.set_num_threads(1)


def owlv2(folder: pathlib.Path, *, size: int = 96) -> str:
    """An OWLv2 with 36 boxes per image; its processor pads to a square and resizes to `size` pixels."""
    torch.manual_seed(0)
    tokenizer = _clip_tokenizer()
    layers = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.Owlv2Config(
        text_config={
            **layers,
            "num_hidden_layers": 1,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**layers, "num_hidden_layers": 1, "image_size": size, "patch_size": size // 6},
        projection_dim=32,
    )
    processor = transformers.Owlv2Processor(
        transformers.Owlv2ImageProcessor(size={"height": size, "width": size}), tokenizer
    )
    model = transformers.Owlv2ForObjectDetection(config)
    # Random weights make lines of boxes, and scores that all but agree: nearer to the start of a training.
    model.box_head.dense2.weight.data *= 0.001
    model.class_head.logit_shift.weight.data *= 0.1
    model.class_head.logit_scale.weight.data.zero_()
    model.class_head.logit_scale.bias.data.fill_(5)
    for part in (model, processor):
        part.save_pretrained(folder)
    return str(folder)


def llava_next(folder: pathlib.Path) -> str:
    """A LLaVA-NeXT that looks at 28 x 28 pixels a tile; its answers are noise of image and prompt."""
    torch.manual_seed(0)
    tokenizer = _byte_tokenizer()
    layers = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(
            **layers, num_attention_heads=2, image_size=28, patch_size=14
        ),
        text_config=transformers.MistralConfig(
            **layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        image_seq_length=4,
    )
    model = transformers.LlavaNextForConditionalGeneration(config)
    for parameter in model.parameters():  # the usual ones repeat one token whatever they are given
        parameter.data *= 8
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}[INST] {% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %} [/INST]{% endfor %}"
        ),
    )
    for part in (model, processor):
        part.save_pretrained(folder)
    return str(folder)


def _byte_tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *BYTES])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def _clip_tokenizer():
    # As the real one: "!" is id 0 and pads, and the end has the highest id, by which the tower finds it.
    letters = ["!", *(letter for letter in BYTES if letter != "!")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], pad_token="!", model_max_length=16
    )
