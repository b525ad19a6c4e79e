"""Files are read a piece at a time, streams decode nothing early, and an unreachable Hub is told at once."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import config
from PIL import Image

from listener_reward.datasets import load_pairs, rows
from listener_reward.datasets.rows import read_file
from listener_reward.errors import InputError


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def as_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path: Path):
    """Writes so many pairs of two good pictures, those of the given numbers with a missing one."""
    for level in (10, 200):
        (tmp_path / f"{level}.png").write_bytes(png(level))

    def write(n: int, missing: tuple[int, ...] = ()) -> str:
        row = {"prompt": "a cat", "image_first": "10.png", "image_second": "200.png", "label": 1}
        rows = [row | ({"image_second": f"gone {i}.png"} if i in missing else {}) for i in range(n)]
        return as_lines(tmp_path / "pairs.jsonl", rows)

    return write


# ---------------------------------------------------------------- files, a piece at a time


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_is_the_same_whatever_the_chunks(tmp_path, monkeypatch, indent):
    entries = [{"text": '\\"]},[{ \n\u2028', "n": i, "deep": [[{"a": None}], i / 7, -1e300, True]} for i in range(40)]
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(entries, indent=indent) + "\n ", encoding="utf-8")
    for chunk in (1, 2, 3, 7, 64, 1000, 2**20):
        monkeypatch.setattr(rows, "_CHUNK", chunk)
        assert list(read_file(path)) == entries


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1}', "ends within entry 1"),
        ('[{"a": 1},', "ends within entry 1"),
        ('[{"a": 1},]', "entry 1"),
        ('[{"a": 1} {"a": 2}]', "no comma after entry 0"),
        ('[{"a": 1}, {"a": }]', "entry 1: Expecting value"),
        ('[{"a": 1}] x', "something follows the list of 1"),
        ("[,]", "entry 0"),
        ("[", "ends within entry 0"),
        ('[{"a": "' + "x" * 500, "entry 0"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 100])
def test_a_broken_json_list_names_the_entry(tmp_path, monkeypatch, text, says, chunk):
    monkeypatch.setattr(rows, "_CHUNK", chunk)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=f"a.json does not parse .*{says}"):
        list(read_file(tmp_path / "a.json"))


def test_an_entry_without_end_is_not_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_CHUNK", 100)
    monkeypatch.setattr(rows, "_LONGEST_ENTRY", 1000)
    (tmp_path / "a.json").write_text('[{"a": "' + "x" * 100_000 + '"}]')
    with pytest.raises(InputError, match="entry 0: Unterminated string"):
        list(read_file(tmp_path / "a.json"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_large_file_takes_little_memory(tmp_path, suffix):
    noise = random.Random(0)
    entries = [{"prompt": noise.randbytes(500).hex(), "n": i} for i in range(20_000)]
    path = tmp_path / f"large{suffix}"
    data = datasets.Dataset.from_list(entries)
    if suffix == ".json":
        path.write_text(json.dumps(entries))
    else:
        {".jsonl": data.to_json, ".csv": data.to_csv, ".parquet": data.to_parquet}[suffix](str(path))
    del entries, data
    assert path.stat().st_size > 10_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_file(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- streams


def test_a_stream_has_the_pairs_of_the_data_set(pairs):
    path = pairs(300)
    whole, stream = load_pairs(path), load_pairs(path, stream=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert stream.features == whole.features
    assert list(stream) == list(whole)
    assert list(stream) == list(whole), "and again: each pass reads the file anew"
    assert [row["id"] for row in load_pairs(path, stream=True, limit=3)] == ["0", "1", "2"]
    assert list(load_pairs(path, stream=True, seed=1)) == list(load_pairs(path, seed=1))


def test_a_stream_of_the_tiny_world():
    assert list(load_pairs("tiny:id", limit=3, stream=True)) == list(load_pairs("tiny:id", limit=3))


def test_a_stream_decodes_no_pair_before_it_is_wanted(pairs, monkeypatch):
    decoded = []
    monkeypatch.setattr("listener_reward.datasets.load.to_pil", lambda image, field: decoded.append(field))
    stream = iter(load_pairs(pairs(500), stream=True))
    assert decoded == []
    for _ in range(5):
        next(stream)
    assert 10 <= len(decoded) <= 20


def test_a_stream_holds_a_batch_of_embedded_images(tmp_path):
    noise = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(noise.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(buffer, "PNG")  # about 28 kB
    image = {"bytes": buffer.getvalue(), "path": None}
    row = {"prompt": "a", "image_first": image, "image_second": image, "label": 1}
    datasets.Dataset.from_list([row] * 1000).to_parquet(str(tmp_path / "a.parquet"), batch_size=50)
    size = 2 * 1000 * len(buffer.getvalue())
    assert size > 50_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in load_pairs(str(tmp_path / "a.parquet"), stream=True, check_images=False)) == 1000
        assert tracemalloc.get_traced_memory()[1] < size / 3
    finally:
        tracemalloc.stop()


def test_a_stream_leaves_out_broken_pairs_and_says_so_at_its_end(pairs):
    stream = load_pairs(pairs(150, missing=(3, 100)), stream=True)
    with pytest.warns(UserWarning, match=r"2 of 150 pairs .* image of pair 3 is .*; an image of pair 100 .*left out"):
        assert len(list(stream)) == 148


@pytest.mark.parametrize("missing", [tuple(range(50)), tuple(range(450, 500))])
def test_a_stream_with_too_many_broken_pairs_is_refused(pairs, missing):
    assert len(list(load_pairs(pairs(500), stream=True))) == 500
    stream = load_pairs(pairs(500, missing), stream=True, max_broken=0.05)
    with pytest.raises(InputError, match=r"pairs have an unreadable image: .* More than 5% cannot be right"):
        list(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_the_share_of_broken_pairs_is_the_callers_choice(pairs, stream):
    path = pairs(10, missing=(1, 2, 3))
    with pytest.raises(InputError, match=r"3 of 10 .* More than 20%"):
        list(load_pairs(path, stream=stream))
    with pytest.warns(UserWarning, match="3 of 10"):
        assert len(list(load_pairs(path, stream=stream, max_broken=0.3))) == 7
    for share in (-0.1, 1.1):
        with pytest.raises(InputError, match=f"max_broken is {share}"):
            load_pairs(path, max_broken=share)


def test_a_stream_of_nothing_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match="holds no pairs"):
        load_pairs(as_lines(tmp_path / "a.jsonl", []), stream=True)


def test_a_sample_holds_no_more_than_it_keeps_and_is_fair(pairs):
    path = pairs(200)
    counts = np.zeros(200)
    for seed in range(60):
        for name in load_pairs(path, limit=20, seed=seed)["id"]:
            counts[int(name)] += 1
    assert counts.sum() == 60 * 20 and counts.max() <= 18  # mean 6, standard deviation 2.3


# ---------------------------------------------------------------- the Hub


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    before = config.HF_HUB_OFFLINE
    for stream in (False, True):
        with pytest.raises(InputError, match="org/name: the Hugging Face Hub cannot be reached"):
            load_pairs("org/name", stream=stream)
    assert before == config.HF_HUB_OFFLINE, "later calls may find it again"


def test_hub_names_splits_and_configurations(monkeypatch):
    asked = []
    data = datasets.Dataset.from_list([{"prompt": "a cat"}])

    def load_dataset(path: str, **options):
        asked.append((path, options))
        return data.to_iterable_dataset() if options.get("streaming") else data

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for spec, stream in (
        ("org/name:conf/test", False),
        ("pickapic:org/name", True),
        ("genai-bench:org/name", False),
        ("rapidata:org/name:train_0001#coherence", False),
    ):
        with pytest.raises(InputError, match=r"org/name:\S+, row 0: "):
            load_pairs(spec, stream=stream)
    assert asked == [
        ("org/name", {"name": "conf", "split": "test"}),
        ("org/name", {"split": "validation_unique", "streaming": True}),
        ("org/name", {"name": "image_generation", "split": "test_v1"}),
        ("org/name", {"split": "train_0001"}),
    ]


def test_a_published_hub_set_is_recognised_and_streamed(monkeypatch):
    row = {"caption": "a cat", "jpg_0": png(10), "jpg_1": png(200), "label_0": 1.0, "label_1": 0.0, "has_label": True}
    data = datasets.Dataset.from_list([row] * 100).to_iterable_dataset()
    monkeypatch.setattr("datasets.load_dataset", lambda path, **options: data)
    found = list(load_pairs("org/name:test", stream=True, limit=70))
    assert len(found) == 70 and {one["dataset"] for one in found} == {"pickapic"}
    assert {one["p_first"] for one in found if one["swapped"]} == {0.0}
