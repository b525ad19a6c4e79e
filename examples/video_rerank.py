"""Order videos of one prompt from best to worst.

    python examples/video_rerank.py "two red circles"                    # draws some clips of the tiny world first
    python examples/video_rerank.py "two red circles" a.mp4 b.webm c.gif

With a large judge take strategy "storyboard": one comparison a pair. The tiny judge reads single pictures only.
"""

import argparse
import random
from pathlib import Path

from listener_reward.integrations.video import rank_videos
from listener_reward.tiny.motion import draw_clip
from listener_reward.tiny.world import Scene

SCENES = (Scene("red", "circle", 1), Scene("blue", "star", 2), Scene("red", "circle", 2), Scene("red", "square", 3))


def draw_some(folder: Path) -> list[str]:
    """Clips as gifs, whose names say what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for scene in SCENES:
        frames = draw_clip(scene, random.Random(scene.words()))
        paths.append(str(folder / f"{scene.words().replace(' ', '-')}.gif"))
        frames[0].save(paths[-1], save_all=True, append_images=frames[1:], duration=125)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="two red circles")
    parser.add_argument("videos", nargs="*", help="mp4, webm, mov, mkv, gif; drawn if left out")
    parser.add_argument("--judge", default="tiny")
    parser.add_argument("--strategy", default="frames", choices=("storyboard", "frames", "clip"))
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--rate", type=float, help="frames to look at per second, the same moments in each video")
    parser.add_argument("--out", type=Path, default=Path("clips"), help="where clips are drawn")
    args = parser.parse_args()

    videos = args.videos or draw_some(args.out)
    ranking = rank_videos(args.judge, args.prompt, videos, strategy=args.strategy, frames=args.frames, rate=args.rate)
    for place, k in enumerate(ranking.order, start=1):
        print(f"{place}. {videos[k]}  {ranking.scores[k]:+.2f} ± {ranking.standard_errors[k]:.2f}")


if __name__ == "__main__":
    main()
