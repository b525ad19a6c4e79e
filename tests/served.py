"""A small OpenAI-compatible server for tests: a judge in transformers answers, with honest log-probabilities.

It speaks as vLLM does unless it is told to be less: no token ids, no log-probabilities of a prompt, short lists, no
continued messages. Failures can be put in front of its answers.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image

from listener_reward.chat import Chat
from listener_reward.media.images import to_picture
from listener_reward.models.transformers_vlm import TransformersVLM


@dataclass
class Served:
    """A server's model, and what it can and cannot do."""

    vlm: TransformersVLM
    name: str = "tiny"
    address: str = ""
    token_ids: bool = True
    """Whether answers hold token ids, and lists name tokens by their ids."""
    by_id: bool = True
    """Whether `logprob_token_ids` is known."""
    prompt_logprobs: bool = True
    logprobs: bool = True
    continues: bool = True
    longest_list: int = 20
    """More `top_logprobs` are a bad request."""
    refuses: tuple[str, ...] = ()
    """Fields that are a bad request."""
    models: list[dict[str, Any]] = field(default_factory=list)
    before: Callable[[dict[str, Any]], Any] | None = None
    """Called with each request's body: what it returns is sent in place of an answer, unless it is None."""
    requests: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        unknown = [name for name in self.refuses if name in body]
        if unknown:
            return 400, {"error": {"message": f"Unsupported parameter: {unknown[0]!r}"}}
        if body.get("top_logprobs", 0) > self.longest_list:
            return 400, {"error": {"message": f"top_logprobs is greater than max allowed: {self.longest_list}"}}
        if body["model"] not in [self.name, *(model["id"] for model in self.models)]:
            return 404, {"error": {"message": f"The model {body['model']!r} does not exist."}}
        turns = body["messages"]
        content = turns[-1]["content"] if turns[-1]["role"] == "assistant" else None
        chat = _chat([turn for turn in turns if turn["role"] != "assistant"])
        if content is None:
            return 200, self._generated(chat, body)
        return 200, self._continued(chat, content, body)

    def _generated(self, chat: Chat, body: dict[str, Any]) -> Any:
        (text,) = self.vlm.generate(
            [chat], seeds=[body.get("seed") or 0], max_new_tokens=body["max_tokens"], temperature=body["temperature"]
        )
        ids = self.vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return self._wrapped(choice | ({"token_ids": ids} if self.token_ids else {}), [])

    @torch.inference_mode()
    def _continued(self, chat: Chat, content: str, body: dict[str, Any]) -> Any:
        tokenizer = self.vlm.tokenizer
        text = self.vlm.turns.texts([chat])[0] + content
        if not self.continues:
            text = text + "<|im_end|>\n" + "<|im_start|>assistant\n"
        pictures = [picture.image for picture in chat.images]
        inputs = self.vlm.processor(images=pictures, text=[text], return_tensors="pt")
        log_probs = self.vlm.model(**inputs).logits[0].float().log_softmax(-1)
        ids = inputs["input_ids"][0].tolist()

        def listed(token: int, values: torch.Tensor) -> dict[str, Any]:
            named = body.get("return_tokens_as_token_ids") and self.token_ids
            name = f"token_id:{token}" if named else tokenizer.decode([token])
            return {"token": name, "logprob": float(values[token])}

        last = log_probs[-1]
        best = int(last.argmax())
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": tokenizer.decode([best])}}
        if self.token_ids:
            choice["token_ids"] = [best]
        if body.get("logprobs") and self.logprobs:
            top = last.topk(min(body.get("top_logprobs", 0), len(last))).indices.tolist()
            wanted = body.get("logprob_token_ids", []) if self.by_id else []
            tokens = [listed(token, last) for token in wanted or top]
            choice["logprobs"] = {"content": [listed(best, last) | {"top_logprobs": tokens}]}
        answer = self._wrapped(choice, ids)
        if body.get("prompt_logprobs") is not None and self.prompt_logprobs:
            rows = zip(ids[1:], log_probs[:-1], strict=True)
            answer["prompt_logprobs"] = [None, *({str(token): {"logprob": float(row[token])}} for token, row in rows)]
        return answer

    def _wrapped(self, choice: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        usage = {"usage": {"prompt_tokens": len(ids)}} | ({"prompt_token_ids": ids} if self.token_ids and ids else {})
        return {"object": "chat.completion", "choices": [{"index": 0} | choice]} | usage


def _chat(turns: list[dict[str, Any]]) -> Chat:
    pictures = []
    messages = []
    for turn in turns:
        blocks = []
        for block in turn["content"]:
            if block["type"] == "image_url":
                head, _, data = block["image_url"]["url"].partition(",")
                assert head == "data:image/png;base64"
                pictures.append(to_picture(Image.open(io.BytesIO(base64.b64decode(data)))))
                block = {"type": "image"}
            blocks.append(block)
        messages.append(turn | {"content": blocks})
    return Chat(messages, tuple(pictures))


@contextmanager
def serving(served: Served) -> Iterator[Served]:
    """`served` behind its `address`, for as long as the block lasts."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            models = served.models or [{"id": served.name, "object": "model", "parent": None}]
            self._send(200, {"object": "list", "data": models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                served.requests.append(body)
                instead = None if served.before is None else served.before(body)
                status, said, *headers = instead or served.answer(body)
            if isinstance(said, float):
                time.sleep(said)
                return
            self._send(status, said, *headers)

        def _send(self, status: int, said: Any, headers: dict[str, str] | None = None) -> None:
            payload = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    served.address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
