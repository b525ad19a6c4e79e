"""`RemoteReward`: a reward that lives in another process or on another machine, behind `listener-reward serve`.

Reward models need versions of transformers that trainers often cannot have. This side needs numpy and Pillow only.
Pictures travel as PNG in JSON: nothing that is received can run.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any
from urllib import error, request

import numpy as np

from listener_reward.errors import InputError, JudgeError
from listener_reward.media.images import to_pil_batch


class RemoteReward:
    """`reward(images, prompts, metadata) -> (scores, info)`, asked of a server. Threads may share it; it pickles."""

    __name__ = "listener_reward"

    def __init__(self, url: str, *, timeout: float = 600.0):
        """
        Args:
            url: where the server listens, such as "http://127.0.0.1:8300".
            timeout: seconds to wait for an answer. A server that collects groups answers when the group is full.
        """
        if not url.startswith(("http://", "https://")):
            raise InputError(f"url is {url!r}; it begins with http:// or https://")
        self.url = url.rstrip("/")
        self.timeout = timeout

    def __call__(
        self, images: Any, prompts: Sequence[str], metadata: Any = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Contract as in `ListenerReward`; NaN for an image on which the judge broke.

        Raises:
            InputError: unusable images or prompts, found here or there.
            JudgeError: the judge broke, or no server answered.
        """
        pictures = [_png(picture) for picture in to_pil_batch(images)]
        answer = self._post({"prompt": [str(prompt) for prompt in prompts], "image": pictures})
        if answer.get("error") and answer.get("rewards") is None:
            raise (InputError if answer.get("kind") == "input" else JudgeError)(f"{self.url}: {answer['error']}")
        try:
            scores = np.array(answer["rewards"], dtype=np.float32)
            info = {name: np.array(values, dtype=np.float32) for name, values in answer.get("info", {}).items()}
        except (KeyError, TypeError, ValueError) as wrong:
            raise JudgeError(f"{self.url} gave an answer of another form; is it a `listener-reward serve`?") from wrong
        return scores, info

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        asked = request.Request(f"{self.url}/compute", data, {"Content-Type": "application/json"})
        try:
            with request.urlopen(asked, timeout=self.timeout) as reply:
                answer = json.load(reply)
        except error.HTTPError as refused:
            raise JudgeError(
                f"{self.url} refused: {refused.code} {refused.read(500).decode('utf-8', 'replace')}"
            ) from refused
        except (OSError, ValueError) as failed:
            raise JudgeError(
                f"{self.url} did not answer ({failed}); is `listener-reward serve` running there?"
            ) from failed
        if not isinstance(answer, dict):
            raise JudgeError(f"{self.url} gave an answer of another form; is it a `listener-reward serve`?")
        return answer


def _png(picture: Any) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")
