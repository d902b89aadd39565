"""A chat model on this machine, by `transformers`: LLaVA-NeXT 1.6 and others that take one image and a text."""

from collections.abc import Sequence

import PIL.Image
from etils import epy

from grain_jax.data.annotate import chat, checkpoint
from grain_jax.data.annotate.arguments import Annotate

with epy.lazy_imports():
    import torch

MODEL = "llava-hf/llava-v1.6-mistral-7b-hf"


class LocalChat:
    """A model that is loaded; answers are the most probable ones (no sampling), so that a second run repeats them.

    Raises:
      CheckpointError: the model cannot be loaded, or has no template for a chat.
    """

    def __init__(self, given: Annotate):
        name = given.chat or MODEL
        self._model, self._processor, self._device = checkpoint.load(
            name, "AutoModelForImageTextToText", half=True
        )
        if not getattr(self._processor, "chat_template", None):
            raise checkpoint.CheckpointError(
                f"{name}: its processor has no chat template, expected a model made for chats"
            )
        # Answers start where the prompt ends, so prompts of a batch must end at the same place.
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self._batches = checkpoint.Batches(given.batch_size)

    def answer(
        self, images: Sequence[PIL.Image.Image], prompts: Sequence[str]
    ) -> list[chat.Answer | chat.Failure]:
        """One answer for each image (of any size and mode) with its prompt; failures: "out of memory", "model error"."""
        return self._batches.run(self._generate, list(zip(images, prompts, strict=True)))

    def _generate(self, batch: Sequence[tuple[PIL.Image.Image, str]]) -> list[chat.Answer]:
        inputs = self._processor(
            images=[image.convert("RGB") for image, _ in batch],
            text=[self._conversation(prompt) for _, prompt in batch],
            padding=True,
            return_tensors="pt",
        ).to(self._device, self._model.dtype)
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=chat.MAX_TOKENS,
                pad_token_id=self._processor.tokenizer.pad_token_id,
            )
        prompt_tokens = inputs["attention_mask"].sum(dim=1).tolist()
        answers = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        found = []
        for tokens, count in zip(answers, prompt_tokens):  # behind the end is padding
            length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
            text = self._processor.tokenizer.decode(tokens[:length], skip_special_tokens=True)
            found.append(chat.Answer(text, count, length, cut_off=length == len(tokens)))
        return found

    def _conversation(self, prompt: str) -> str:
        # A prompt can quote an answer; in it, the mark of an image's place would count as an image.
        mark = getattr(self._processor, "image_token", None)
        text = prompt.replace(mark, "") if mark else prompt
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
