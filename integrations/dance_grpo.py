"""DanceGRPO, whose scripts score one image at a time inside the sampling loop.

    listener-reward serve --scheme auto             # the host pins transformers 4.46, so the judge is a server

In `main`, where the host makes its reward models (it hands `reward_model` and `processor` down to the loop, and in
train_grpo_flux.py neither exists unless one of its own rewards is switched on):

    from listener_reward.integrations.dance_grpo import ListenerScorer
    reward_model, processor = ListenerScorer("http://127.0.0.1:8300", device=device), None

In `sample_reference_model`, after the image is saved, and where `torch.cat(all_rewards, dim=0)` stood:

    reward_model.add(decoded_image[0], batch_caption[0])
    all_rewards = reward_model.collect()

The images of a group follow one another on one process, so the whole group can be compared: `add` keeps them and
`collect` judges them. In train_grpo_sd.py the image is `pil` and its caption `current_batch[j]`, and `rewards` is what
is collected.

With two lines less: the scripts that know HPSv3 (flux_lora, qwenimage, sd) call `reward_model.reward([path],
[caption])`, and the scripts of videos (hunyuan, skyreels_i2v) `inferencer.reward([path], [caption], use_norm=True)`.
`ListenerScorer` has that method, so it is enough to make `reward_model` or `inferencer` one, and to switch that reward
on (`--use_hpsv3`, `--use_videoalign`). Each image is then compared with the first one of its caption, which tells less.

train_grpo_qwenimage_edit.py has no source image, but the latents of one. Its preprocessing has the file: write it into
the items of the JSON (`item["source_image"] = data["source_image"][idx]`), have the data set return it beside the
caption, and hand it down to the loop as `caption` is. Then `reward_model.add(decoded_image[0], batch_caption[0],
sources=source)`. With `edits=True` an image without its source is an `InputError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from listener_reward.errors import InputError
from listener_reward.media.images import to_pil
from listener_reward.media.storyboards import as_picture
from listener_reward.pairs import PromptLike, check_prompts, prompt_with
from listener_reward.reward import PAPER_CHECKPOINT

from .contract import as_reward, check_edits, score

if TYPE_CHECKING:
    import torch


class ListenerScorer:
    """A reward model for DanceGRPO's loop. Not thread-safe between `add` and `collect`; neither is the loop."""

    def __init__(
        self,
        reward: Any = PAPER_CHECKPOINT,
        *,
        device: str | int | torch.device = "cpu",
        edits: bool = False,
        **options: Any,
    ):
        """
        Args:
            reward, options: as in `contract.as_reward`; the scheme is `auto`: groups, and else the reference.
            edits: whether each image has to come with a source.
            device: where the host wants its tensors: NCCL gathers none of the CPU's. A number is a GPU's.
        """
        import torch  # the host's

        self.device = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        wanted = None if self.device.type == "cpu" else self.device
        self._scorer = as_reward(reward, options, scheme="auto", device=wanted)
        self.edits = edits
        self._added: list[tuple[Any, PromptLike]] = []

    def add(self, image: Any, caption: str, *, sources: Any = ()) -> None:
        """Keeps one image until `collect`, with the source image of an edit, or several.

        Raises:
            InputError: at once, where an image or the caption is of no use, or with `edits` no source is there.
        """
        check_prompts([caption], 1)
        prompt = prompt_with(str(caption), sources)
        if self.edits:
            check_edits([prompt])
        self._added.append((to_pil(image), prompt))

    def collect(self, device: str | int | torch.device | None = None) -> torch.Tensor:
        """The scores of all images added since the last call, in their order: float32 `(B,)`, on `device` or its own.

        Raises:
            InputError: nothing was added.
            JudgeError: the judge broke. What was added is forgotten either way, so the next group starts afresh.
        """
        import torch

        added, self._added = self._added, []
        if not added:
            raise InputError("nothing was added; call add(image, caption) for each image of the group")
        images, prompts = zip(*added, strict=True)
        return torch.as_tensor(
            score(self._scorer, images, prompts)[0], device=self.device if device is None else device
        )

    def __call__(
        self, image: Any, caption: str, device: str | int | torch.device | None = None, *, sources: Any = None
    ) -> torch.Tensor:
        """The score of one image against the first one of its caption: float32 `(1,)`, 0 for that first one."""
        import torch

        scores, _ = score(self._scorer, [image], [caption], sources=[sources], edits=self.edits)
        return torch.as_tensor(scores, device=self.device if device is None else device)

    def reward(
        self, paths: list[str], prompts: list[str], use_norm: bool | None = None, *, sources: Any = None
    ) -> torch.Tensor | list[dict[str, float]]:
        """The calls that the host makes of `HPSv3RewardInferencer` and of `VideoVLMRewardInference`.

        Without `use_norm`, as of HPSv3: image files, and their scores as float32 `(B,)`.

        With `use_norm`, as of VideoAlign, whatever its value: video files, judged as storyboards. The judge has one
        verdict and not three, so `VQ`, `MQ`, `TA` and `Overall` are all of them its score: set the host's weights of
        all but one to 0. The host turns an exception of this call into -1 for the sample.

        `sources` are the source images of each file, which no script of the host hands over by itself.
        """
        import torch

        check_prompts(prompts, len(paths))
        pictures = [as_picture(path, field=f"paths[{i}]") for i, path in enumerate(paths)]
        scores, _ = score(self._scorer, pictures, prompts, sources=sources, edits=self.edits)
        if use_norm is None:
            return torch.as_tensor(scores, device=self.device)
        return [dict.fromkeys(("VQ", "MQ", "TA", "Overall"), value) for value in scores.tolist()]
