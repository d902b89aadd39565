"""Models of `transformers` on this machine: loading, batches, and chat models such as LLaVA-NeXT 1.6."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import PIL.Image
from absl import logging
from etils import epath, epy

from grain_jax.core import errors
from grain_jax.data.annotate import chat
from grain_jax.data.annotate.arguments import Annotate

with epy.lazy_imports():  # slow to start, and not needed with an endpoint
    import torch
    import transformers

CHAT_MODEL = "llava-hf/llava-v1.6-mistral-7b-hf"

Item = TypeVar("Item")
Result = TypeVar("Result")


def load(name: str, auto_class: str, *, half: bool) -> tuple[Any, Any, str]:
    """Loads a model for inference, on the accelerator if there is one, else on the CPU.

    `name` is a folder (local or remote) as `save_pretrained` writes it, or a name on the Hub. `auto_class` of
    `transformers` chooses the model's class. `half` is bfloat16 on an accelerator; the CPU has float32.
    Raises UserError: there is no such model, or the class does not know it.
    """
    # A torch that was built for CUDA names it even on machines that have none: ask first.
    accelerated = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator().type if accelerated else "cpu"
    dtype = torch.bfloat16 if half and accelerated else torch.float32
    transformers.utils.logging.disable_progress_bar()
    folder = contextlib.nullcontext(name)
    if "://" in name:  # transformers opens local folders
        from grain_jax.convert import output

        folder = output.on_disk(epath.Path(name))
    try:
        with folder as path:
            processor = transformers.AutoProcessor.from_pretrained(path)
            model = getattr(transformers, auto_class).from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise errors.UserError(
            f"{name}: cannot be loaded by transformers' {auto_class}: {chat.one_line(error)}"
        ) from error
    return model.to(device).eval(), processor, device


def in_batches(
    model: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item], size: int
) -> list[Result | chat.Failure]:
    """One result per item; if the model fails on a batch, it gets the halves, down to single items.

    An item has a failure if the model raises even for it alone. Raises UserError, which concerns every item.
    """
    results: list[Result | chat.Failure] = []
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        try:
            results += model(batch)
            continue
        except errors.UserError:
            raise
        except Exception as error:  # one image must not end a job of millions, whatever it does
            # The error holds the frames, and they the tensors: keep only its text beyond this block.
            memory = errors.is_out_of_memory(error) or type(error).__name__ == "OutOfMemoryError"
            detail = chat.one_line(f"{type(error).__name__}: {error}")
        if memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            results.append(chat.Failure("out of memory" if memory else "model error", detail))
        else:
            logging.warning("a batch of %d images failed; now its halves: %s", len(batch), detail)
            results += in_batches(model, batch, -(-len(batch) // 2))
    return results


class LocalChat:
    """A chat model that takes an image and a text; it does not sample, so a second run answers the same."""

    def __init__(self, args: Annotate):
        name = args.chat or CHAT_MODEL
        self._model, self._processor, self._device = load(name, "AutoModelForImageTextToText", half=True)
        if not getattr(self._processor, "chat_template", None):
            raise errors.UserError(f"{name}: its processor has no chat template, expected a chat model")
        # Answers start where the prompt ends, so the prompts of a batch must end at the same place.
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self._batch_size = args.batch_size

    def answer(
        self, images: Sequence[PIL.Image.Image], prompts: Sequence[str]
    ) -> list[chat.Answer | chat.Failure]:
        """An answer per image (any size, mode) and its prompt; failures: "out of memory", "model error"."""
        pairs = list(zip(images, prompts, strict=True))
        return in_batches(self._generate, pairs, self._batch_size)

    def _generate(self, batch: Sequence[tuple[PIL.Image.Image, str]]) -> list[chat.Answer]:
        tokenizer = self._processor.tokenizer
        inputs = self._processor(
            images=[image.convert("RGB") for image, _ in batch],
            text=[self._asked(prompt) for _, prompt in batch],
            padding=True,
            return_tensors="pt",
        ).to(self._device, self._model.dtype)
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs, do_sample=False, max_new_tokens=chat.MAX_TOKENS, pad_token_id=tokenizer.pad_token_id
            )
        tokens = tokens[:, inputs["input_ids"].shape[1] :].cpu().numpy()
        is_end = np.isin(tokens, self._model.generation_config.eos_token_id)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [chat.Answer(text, cut_off=not end) for text, end in zip(texts, is_end.any(axis=1))]

    def _asked(self, prompt: str) -> str:
        # A prompt can quote an answer; the mark of an image in it would count as an image.
        text = prompt.replace(getattr(self._processor, "image_token", None) or "\0", "")
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return self._processor.apply_chat_template([turn], add_generation_prompt=True)
