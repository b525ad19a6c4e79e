"""The plain path: every chat for itself, in padded batches, as transformers' own `generate` and forward pass run them.

It takes any vision-language model that transformers loads, and pays for a chat's images and prompt as often as the
chat is asked.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

from listener_reward.errors import missing

if fault := missing("judge", "a model in this process"):
    raise fault

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from listener_reward.chat import Chat, ChatFormat
from listener_reward.errors import InputError
from listener_reward.models.head import next_token_logprobs
from listener_reward.models.placement import input_device
from listener_reward.models.video_processing import metadata
from listener_reward.models.vlm import LEAST_LOGPROB
from listener_reward.prefix.attention import base_model

LOGITS_BYTES = 2**29
"""Most bytes that the logits of a pass may take in float32; a pass reads fewer rows where they are more."""


class PlainBatches:
    """Runs chats of one model, copies and all."""

    def __init__(self, model: Any, processor: Any):
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer

    def check_two_images(self) -> None:
        """Raises InputError for a checkpoint that cannot be asked about two images in one chat."""
        named = f"this {base_model(self.model).config.model_type!r} checkpoint"
        stills = Image.new("RGB", (64, 48), "white"), Image.new("RGB", (48, 64))
        chat = ChatFormat().chat("", *stills)
        blind = [{**turn, "content": [b for b in turn["content"] if b["type"] == "text"]} for turn in chat.messages]
        render = partial(self.processor.apply_chat_template, tokenize=False, add_generation_prompt=True)
        try:
            text, without = render(chat.messages), render(blind)
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the chat template of {named} cannot write a question: {error}") from error
        if text == without:
            raise InputError(
                f"the chat template of {named} leaves {{'type': 'image'}} blocks out, so that it would judge images "
                "which it does not see; add them to its chat_template.jinja"
            )
        try:
            self.encode([chat], [text])
        except (TypeError, ValueError, IndexError) as error:
            raise InputError(f"{named} cannot be shown two images in one chat: {error}") from error

    def encode(self, chats: Sequence[Chat], texts: Sequence[str]) -> dict[str, Any]:
        """The model's inputs for rendered chats, padded on the left, on the model's device."""
        media: dict[str, Any] = {}
        if any(chat.images for chat in chats):
            images = [[picture.image for picture in chat.images] for chat in chats]
            # By chats, because some processors count each chat's; none of them takes a chat without any in between.
            media["images"] = images if all(images) else [image for some in images for image in some]
        if clips := [clip for chat in chats for clip in chat.videos]:
            frames = [[frame.image for frame in clip.frames] for clip in clips]
            media |= {"videos": frames, "video_metadata": [*map(metadata, clips)]}
        if (first := self.tokenizer.bos_token) and all(text.startswith(first) for text in texts):
            media["add_special_tokens"] = False  # the template has written the first token, and one is enough
        inputs = self.processor(**media, text=list(texts), padding=True, return_tensors="pt")
        device, dtype = input_device(self.model), base_model(self.model).dtype
        # Some vision towers do not see to their input's dtype. Times of a clip's frames stay as they are.
        pixels = {name for name in inputs if name.startswith("pixel_values")}
        return {name: x.to(device, dtype if name in pixels else x.dtype) for name, x in inputs.items()}

    def sample(self, chats: Sequence[Chat], texts: Sequence[str], options: dict[str, Any]) -> Tensor:
        """Token ids (n, longest completion) of one completion for each chat, under `generate`'s options."""
        inputs = self.encode(chats, texts)
        filler = self.tokenizer.pad_token_id
        drawn = self.model.generate(**inputs, pad_token_id=filler, **options)[:, inputs["input_ids"].shape[1] :]
        # What ends a turn may be an ordinary token of the tokenizer, which would be read as the completion's last word.
        ends = base_model(self.model).generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends, device=drawn.device, dtype=drawn.dtype)
        return drawn.masked_fill(torch.isin(drawn, ends), filler)

    def read(
        self, chats: Sequence[Chat], texts: Sequence[str], slots: Sequence[list[int]], ids: Tensor, *, likelihood: bool
    ) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the tokens `ids` (n, A) after each chat and its `slots`, and the slots' own.

        Returns:
            (n, A) and (n,) float32 on the CPU, as `VLM.read`; the second are zeros unless `likelihood`.
        """
        keep = max(map(len, slots)) + 1 if likelihood else 1
        vocabulary = base_model(self.model).config.get_text_config().vocab_size
        rows = max(1, LOGITS_BYTES // (4 * keep * vocabulary))
        parts = [
            self._read(chats[some], texts[some], slots[some], ids[some], likelihood)
            for some in (slice(start, start + rows) for start in range(0, len(chats), rows))
        ]
        return torch.cat([log_probs for log_probs, _ in parts]), torch.cat([means for _, means in parts])

    def _read(
        self, chats: Sequence[Chat], texts: Sequence[str], slots: Sequence[list[int]], ids: Tensor, likelihood: bool
    ) -> tuple[Tensor, Tensor]:
        inputs = followed(self.encode(chats, texts), slots, self.tokenizer.pad_token_id)
        core = base_model(self.model)
        longest = max(map(len, slots)) if likelihood else 0
        few = {"logits_to_keep": longest + 1} if "logits_to_keep" in inspect.signature(core.forward).parameters else {}
        head = core.get_output_embeddings()
        with watched(head) as passes:
            logits = self.model(**inputs, **few, use_cache=False).logits[:, -longest - 1 :]
        last = logits[:, -1].float()
        if passes and torch.equal(passes[-1][1][:, -1].float(), last):
            found = next_token_logprobs(head, passes[-1][0][:, -1], ids)
        else:  # the model scales or caps what comes from its head
            found = last.log_softmax(-1).gather(-1, ids.to(last.device))
        if not longest:
            return found.cpu(), torch.zeros(len(chats))
        tokens = inputs["input_ids"][:, -longest:].to(logits.device)
        before = logits[:, :-1].float()
        chosen = before.gather(-1, tokens[..., None])[..., 0] - before.logsumexp(-1)
        from_end = torch.arange(longest, 0, -1, device=tokens.device)
        own = from_end <= torch.tensor([len(slot) for slot in slots], device=tokens.device)[:, None]
        return found.cpu(), ((chosen.clamp(min=LEAST_LOGPROB) * own).sum(1) / own.sum(1)).cpu()

    def placeholders(self) -> list[int]:
        """Tokens that stand for images and clips, or open and close them: they must not be sampled."""
        names = [f"{kind}_token_id" for kind in ("image", "video", "vision_start", "boi", "eoi", "image_break")]
        owners = base_model(self.model).config, self.processor
        found = [getattr(owner, name, None) for owner in owners for name in names]
        found += getattr(self.processor, "image_token_ids", None) or []
        return sorted({int(token) for token in found if token is not None})


def followed(inputs: dict[str, Any], written: Sequence[Sequence[int]], filler: int) -> dict[str, Any]:
    """`inputs`, a batch padded on the left, with the tokens `written` after each row, as if the model had drawn them.

    Text that is tokenised together with its prompt may merge with the prompt's last token.
    """
    ids, kept = inputs["input_ids"], inputs["attention_mask"].bool()
    width = max(int(mask.sum()) + len(own) for mask, own in zip(kept, written, strict=True))
    fillers = {"input_ids": filler}
    longer: dict[str, Any] = {}
    for name, values in inputs.items():
        if values.shape != ids.shape:
            continue
        rows: list[Tensor] = []
        for row, mask, own in zip(values, kept, written, strict=True):
            more = torch.tensor(own, dtype=values.dtype, device=values.device)
            if name != "input_ids":
                more = torch.full_like(more, 1 if name == "attention_mask" else 0)  # 0 is the type of a text's token
            whole = torch.cat([row[mask], more])
            rows.append(pad(whole, (width - len(whole), 0), value=fillers.get(name, 0)))
        longer[name] = torch.stack(rows)
    return inputs | longer


@contextlib.contextmanager
def watched(head: Any) -> Generator[list[tuple[Tensor, Tensor]]]:
    """Inside, every pass through `head` adds its input and its output to the list."""
    passes: list[tuple[Tensor, Tensor]] = []

    def note(_: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        passes.append((given[0], output))

    hook = head.register_forward_hook(note) if head is not None else None
    try:
        yield passes
    finally:
        if hook is not None:
            hook.remove()
