"""verl-omni: `compute_score`, which the host calls by keyword for one sample at a time.

    listener-reward serve                           # the host pins transformers<=5.14 and has no GPU for its rewards

Eight overrides. The last four switch the host to the manager that reads `reward_functions`; without them it scores by
its own rule for the data's `data_source`, for some of them without a word:

    +reward.reward_functions.listener.path=pkg://listener_reward.integrations.verl_omni
    +reward.reward_functions.listener.name=compute_score
    +reward.reward_functions.listener.required=true
    +reward.reward_functions.listener.judge=http://127.0.0.1:8300
    reward.custom_reward_function.path=pkg://verl_omni.reward_loop.reward_manager.multi
    reward.custom_reward_function.name=_multi_reward_placeholder
    reward.reward_manager.name=MultiVisualRewardManager
    reward.reward_manager.module.path=pkg://verl_omni.reward_loop.reward_manager

`required=true` matters: without it the host turns an exception into a score of 0. Every other key of the entry arrives
here as a keyword; an unknown one is an `InputError`. Give `judge` a URL: the host's reward workers are several
processes without a GPU, and each would load a judge of its own on the CPU.

One sample is no group, so the scheme is `reference`. Samples of a prompt arrive in any order, so which of them becomes
its reference differs from run to run: where that matters, `listener-reward serve --reference`.

With `group_size` the call waits, without blocking the host's event loop, until that many samples of the prompt are
there, and they are compared with one another. That needs all of a group in one process (`reward.num_workers=1`). Or
give `scheme: group`, and one `listener-reward serve --group-size N` sees the samples of all processes. Both need
validation to draw as many images a prompt, too: the host calls the same function there and does not say so.

Of an edit the host hands over no source image, but `extra_info` as the data has it. Put `"sources"` there, a path, the
bytes of a file, or a list; or, for the data that its own prepare_data.py of qwen_image_edit writes, which name a file
in `extra_info["image"]`, give the folder:

    +reward.reward_functions.listener.source_folder=my_image_edit_data/images

Data that name an image are an `InputError` without one of the two.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from listener_reward.errors import InputError
from listener_reward.media.storyboards import as_picture
from listener_reward.pairs import check_prompts, prompt_with
from listener_reward.reward import PAPER_CHECKPOINT

from .contract import Reward, as_reward, check_edits, logged, score_in_thread
from .serving.collector import GroupCollector


async def compute_score(
    *,
    solution_image: Any,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    data_source: str = "",
    judge: Any = PAPER_CHECKPOINT,
    scheme: str | None = None,
    group_size: int = 0,
    timeout: float = 600.0,
    source_folder: str = "",
    edits: bool = False,
    reward_router_address: Any = None,
    reward_model_tokenizer: Any = None,
    model_name: Any = None,
    **options: Any,
) -> dict[str, float]:
    """The score of one image, or of one video as a storyboard.

    Args:
        solution_image: uint8 `(C, H, W)`, or `(T, C, H, W)` for a video.
        ground_truth, extra_info: the prompt is `extra_info["prompt"]`, or its `"raw_prompt"`, or `ground_truth`: text,
            or a chat as the host's Parquet files give it (list or array of turns), whose last user turn is meant.
        data_source: where it is of text to be drawn ("flow_grpo/ocr"), `ground_truth` may be that text alone.
        judge: a judge's name, the URL of a server, or a callable; see `contract.as_reward`.
        scheme: what the sample is compared with; left out, "group" with `group_size` and else "reference".
        group_size: samples of one prompt that wait for one another; 0 compares with a reference image.
        timeout: seconds that a sample waits for its group, or for the server.
        source_folder: where the file `extra_info["image"]` is, the source of an edit without `extra_info["sources"]`.
        edits: whether a sample has to have a source.
        reward_router_address, reward_model_tokenizer, model_name: of a reward model that the host serves; not used.
        options: of `ListenerReward`, such as `reference`, the path of a JSON file; or of `RemoteReward`, for a URL.

    Returns:
        `score`, and beside it what `contract.logged` takes of the reward's info, as the host logs their means.
        Plain floats, the same keys for every sample.

    Raises:
        InputError, JudgeError: the host stops, given `required=true`.
    """
    text = _prompt(ground_truth, extra_info or {}, data_source)
    prompt = prompt_with(text, _sources(extra_info or {}, source_folder))
    if edits:
        check_edits([prompt])
    picture = as_picture(solution_image, field="solution_image")
    if isinstance(judge, str) and "://" in judge:
        options["timeout"] = timeout
    chosen = scheme or ("group" if group_size else "reference")
    reward = _reward(judge, chosen, group_size, timeout, tuple(sorted(options.items())))
    if isinstance(reward, GroupCollector):
        value, info = await asyncio.wrap_future(reward.submit(picture, prompt))
    else:
        scores, arrays = await score_in_thread(reward, [picture], [prompt])
        value, info = float(scores[0]), {name: float(array[0]) for name, array in arrays.items()}
    return {"score": value} | logged(info)


@lru_cache
def _reward(judge: Any, scheme: Any, group_size: int, timeout: float, options: tuple[tuple[str, Any], ...]) -> Reward:
    """One reward for each configuration, as the host knows only functions."""
    try:
        reward = as_reward(judge, dict(options), scheme=scheme)
    except InputError as error:  # which names the keys of the reward, and not those that are read here
        raise InputError(
            f"{error}; beside those this entry may have judge, scheme, group_size, timeout, source_folder and edits"
        ) from error
    return GroupCollector(reward, group_size, timeout=timeout) if group_size else reward


def _sources(extra_info: Mapping[str, Any], folder: str) -> Any:
    given, image = extra_info.get("sources"), extra_info.get("image")
    if isinstance(given, np.ndarray) and given.dtype == object:  # what Parquet's lists become
        given = given.tolist()
    if given is not None or not isinstance(image, str):
        return given
    if not folder:
        raise InputError(
            f"extra_info names a source image, {image[:80]!r}, which the host does not hand over; give source_folder, "
            "or add 'sources' to the extra_info of the data"
        )
    return os.path.join(folder, image)


def _prompt(ground_truth: Any, extra_info: Mapping[str, Any], data_source: str) -> str:
    named = any(_text(extra_info.get(key)) is not None for key in ("prompt", "raw_prompt"))
    if not named and "ocr" in str(data_source).lower() and not _quotes(ground_truth):
        raise InputError(
            f"ground_truth of {data_source!r} is {ground_truth!r:.80}, the text to be drawn and not the prompt; add "
            "'raw_prompt' with the prompt to extra_info, as the host's sd3_ocr.py does"
        )
    for given in (extra_info.get("prompt"), extra_info.get("raw_prompt"), ground_truth):
        given = _text(given)
        if given is not None:
            check_prompts([given], 1)
            return given
    raise InputError(
        "there is no prompt: extra_info has neither 'prompt' nor 'raw_prompt', and ground_truth is None; add one of "
        "them to the data"
    )


def _quotes(text: Any) -> bool:
    """Whether the text to be drawn stands in quotation marks, so that there is a prompt around it."""
    return isinstance(text, str) and text.count('"') >= 2


def _text(given: Any) -> Any:
    """A chat's last user turn, and of several parts its text; anything else as it is."""
    if isinstance(given, np.ndarray):  # what Parquet's lists become
        given = given.tolist()
    if not isinstance(given, (list, tuple)):
        return given
    turns = [turn for turn in given if isinstance(turn, Mapping)]
    content = next((turn.get("content") for turn in reversed(turns) if turn.get("role") == "user"), None)
    if isinstance(content, np.ndarray):
        content = content.tolist()
    if not isinstance(content, (list, tuple)):
        return content
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "\n".join(part for part in parts if isinstance(part, str) and part.strip())
