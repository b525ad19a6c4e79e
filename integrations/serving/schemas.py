"""The requests and answers of the server as types: what `/v1` is read by, and what the OpenAPI page shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from listener_reward.errors import missing

if fault := missing("serve", "a server"):
    raise fault

from pydantic import BaseModel, ConfigDict, Field

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
"""A PNG of one red pixel, for the examples."""

Base64 = Annotated[
    str,
    Field(description="base64 of a PNG, JPEG or WebP file, or of a video file.", json_schema_extra={"format": "byte"}),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Question(_Body):
    """What is asked of images."""

    prompt: Annotated[str, Field(description="The text that all images were made from; for edits the instruction.")]
    sources: Annotated[
        list[Base64],
        Field(description="What the prompt speaks of: an edit's original, reference subjects, a first frame."),
    ] = []
    criterion: Annotated[
        str | None, Field(description="The name of a question of the judge's; null is the general one.")
    ] = None


class CompareRequest(_Question):
    """Two images of one prompt."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "two red circles", "first": PIXEL, "second": PIXEL}]}
    )

    first: Base64
    second: Base64
    think: Annotated[bool | None, Field(description="Whether to think first; null is the judge's own setting.")] = None


class RankRequest(_Question):
    """Images of one prompt."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "two red circles", "images": [PIXEL, PIXEL], "budget": None}]}
    )

    images: Annotated[list[Base64], Field(min_length=1)]
    budget: Annotated[
        int | None, Field(ge=1, le=10**6, description="Comparisons to make; null compares every pair.")
    ] = None


class ThoughtReply(BaseModel):
    """One sampled thought, about the request's images in their own order."""

    text: str
    order: Literal["as given", "swapped"]
    answer: Literal[1, 2] | None
    p_first: float | None
    listener_p_first: float | None
    contradicted: bool | None


class VerdictReply(BaseModel):
    """The judge's verdict; see `Verdict`."""

    p_first: Annotated[float | None, Field(description="Probability that people prefer the first image, in [0, 1].")]
    preferred: Annotated[Literal[1, 2] | None, Field(description="null is a tie.")]
    thoughts: list[ThoughtReply]
    listener_p_first: float | None
    contradicted: bool | None
    position_gap: Annotated[float | None, Field(description="null if only one order was asked.")]
    malformed: int
    by_order: list[float | None]
    label_mass: float | None


class RankingReply(BaseModel):
    """The images ordered and scored; see `Ranking`."""

    order: Annotated[list[int], Field(description="Positions of the images, best first.")]
    scores: Annotated[list[float], Field(description="Log-odds, in the order of the request.")]
    standard_errors: list[float]
    comparisons: int


class ComputeRequest(BaseModel):
    """Prompts with one image or one video each, as Flow-Factory and `RemoteReward` send them."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": ["two red circles", "two red circles"], "image": [PIXEL, PIXEL]}]}
    )

    prompt: list[str]
    image: list[Base64] | None = None
    video: Annotated[
        list[list[Base64]] | None, Field(description="Frames of each video; one of image and video is given.")
    ] = None
    condition_images: Annotated[
        list[list[Base64 | int] | None] | None,
        Field(description="The source images of each prompt: themselves, or their numbers in pictures."),
    ] = None
    condition_videos: Annotated[
        list[list[list[Base64]] | None] | None,
        Field(description="Source videos of each prompt, as frames; each becomes a storyboard, after the images."),
    ] = None
    pictures: Annotated[
        list[Base64] | None, Field(description="Pictures that condition_images names by their numbers, from 0.")
    ] = None
    criterion: Annotated[
        list[str | None] | None, Field(description="For each prompt a question of the judge's, or null.")
    ] = None


class ComputeReply(BaseModel):
    """One number for each prompt; null where the judge broke."""

    rewards: list[float | None] | None
    info: dict[str, list[float | None]] | None = None
    sources: Annotated[
        list[int] | None, Field(description="How many source images each prompt was judged with, where any has some.")
    ] = None
    criterion: Annotated[
        list[str | None] | None, Field(description="The criteria that were asked by, where there are any.")
    ] = None
    error: str | None = None
    kind: Annotated[Literal["input", "judge"] | None, Field(description="Whose fault a missing score is.")] = None


class ScoreRequest(BaseModel):
    """UniRL's request; see `listener_reward.integrations.unirl`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "protocol_version": "1",
                    "requests": [
                        {
                            "history": [{"text": "two red circles", "image_b64": PIXEL}],
                            "required_rewards": ["listener"],
                            "group_id": "0",
                        }
                    ],
                }
            ]
        }
    )

    protocol_version: Literal["1"] = "1"
    requests: list[dict[str, Any]]


class ScoreReply(BaseModel):
    """UniRL's answer: one entry for each item in each list."""

    protocol_version: Literal["1"]
    results: list[dict[str, dict[str, float]]]
    errors: list[dict[str, str]]
    identities: list[dict[str, Any]]


class HealthReply(BaseModel):
    """That the server answers, and by what. Without the token, `status` alone."""

    status: Literal["ok"]
    rewards: dict[str, list[str]] | None = None
    scorer_version: str | None = None
    scheme: Literal["auto", "group", "reference", "anchors"] | None = None


class ReadyReply(BaseModel):
    """Whether a request would be taken now."""

    ready: bool
    under_way: int


class Refusal(BaseModel):
    """Why there is no answer."""

    detail: str
