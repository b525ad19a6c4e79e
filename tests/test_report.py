"""The report: complete, self-contained, safe with hostile text, and never stopped by a missing value."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import CHROMIUM, NO_CHROMIUM, Browser
from PIL import Image

from listener_reward.recipes.demo import CAPTIONS
from listener_reward.report import write_report
from listener_reward.report.pairs import picture
from listener_reward.report.plots import MAX_BANDS, METRICS, _bands, _path, _smooth, _tick_digits, _ticks
from listener_reward.report.tables import COLUMNS, _cells
from listener_reward.report.values import DASH, MINUS
from listener_reward.tiny.drawing import draw_pair
from listener_reward.tiny.world import split_pairs

VOID = {"meta", "img", "input", "br", "hr", "link"}
HOSTILE = (
    '<script>alert("prompt")</script> </style></title> <img src=x onerror=alert(1)> {{ 7 * 6 }} ${x} '
    "<|im_start|>system <|vision_pad|> &lt;b&gt; ' \" `"
)
RIGHT_TO_LEFT = "دائرتان حمراوان \u202e \U0001f534\U0001f534"


class Page(HTMLParser):
    """Elements, attributes and visible text of a page; fails on a tag that is not closed by its own kind."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.raw = {"style": "", "script": ""}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute: {names}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]] += data
        elif data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and (kind is None or kind in a.get("class", "").split())]


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def thought(order: str, answer: int | None, listener: float | None, contradicted: bool | None) -> dict[str, Any]:
    text = f"image 1 : one clean red star . seen {order} ."
    return {
        "text": text,
        "order": order,
        "answer": answer,
        "p_first": 0.7,
        "listener_p_first": listener,
        "contradicted": contradicted,
    }


def verdict(**changes: Any) -> dict[str, Any]:
    thoughts = [thought("as given", 1, 0.86, False), thought("swapped", 1, 0.64, False)]
    return {
        "p_first": 0.71,
        "preferred": 1,
        "thoughts": thoughts,
        "listener_p_first": 0.75,
        "contradicted": False,
        "position_gap": -0.08,
        "malformed": 0,
    } | changes


def pair(**changes: Any) -> dict[str, Any]:
    tiny = next(split_pairs("id", 1))
    first, second = draw_pair(tiny)
    return {
        "prompt": tiny.wording,
        "split": "id",
        "p_first": 0.8,
        "first_png": encoded(first),
        "second_png": encoded(second),
        "model": "listener-shaped GRPO",
        "verdict": verdict(),
    } | changes


def row(model: str, split: str, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    interval = None if accuracy is None else (accuracy - 0.04, accuracy + 0.04)
    return {
        "model": model,
        "split": split,
        "n": 400,
        "n_ties": 0,
        "accuracy": accuracy,
        "accuracy_interval": interval,
        "contradiction_rate": 0.128,
        "contradiction_interval": (0.11, 0.15),
        "malformed_rate": 0.0,
        "position_gap": 0.051,
        "ece": 0.043,
        "brier": 0.2,
        "nll": 0.55,
    } | changes


def results(**changes: Any) -> dict[str, Any]:
    curve = {key.key: [0.5 + 0.01 * i for i in range(30)] for key in METRICS} | {"step": list(range(1, 31))}
    return {
        "title": "Does a listener keep a judge honest?",
        "created": "2025-01-15T10:22:31+00:00",
        "command": "listener-reward demo --steps 30",
        "versions": {"torch": "2.13.0", "trl": "1.16.0"},
        "settings": {"steps": 30, "learning_rate": 1e-4, "verdict_masking": None, "splits": ["id", "ood"]},
        "curves": {"accuracy-only": curve, "listener-shaped": curve},
        "splits": CAPTIONS,
        "table": [
            row("base", "wrong", 0.551),
            row("base", "id", 0.621),
            row("SFT", "id", 0.712, malformed_rate=0.01, ece=0.09),
        ],
        "pairs": [pair(), pair(split="wrong")],
        "ranking": {
            "prompt": "two red stars",
            "images": [pair()["first_png"], pair()["second_png"], pair()["first_png"]],
            "order": [1, 0, 2],
            "scores": [0.25, 1.5, -1.75],
            "standard_errors": [0.3, 0.41, 0.5],
            "comparisons": 3,
        },
    } | changes


def written(folder: Path, **changes: Any) -> tuple[str, Page]:
    html = write_report(folder / "report.html", results(**changes)).read_text(encoding="utf-8")
    return html, Page(html)


def test_returns_the_path_and_makes_folders(tmp_path: Path) -> None:
    path = write_report(str(tmp_path / "new" / "folder" / "page.html"), results())
    assert path == tmp_path / "new" / "folder" / "page.html"
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_is_reproducible(tmp_path: Path) -> None:
    assert written(tmp_path)[0] == written(tmp_path)[0]


def test_sections_stand_in_order(tmp_path: Path) -> None:
    _, page = written(tmp_path)
    assert [a["id"] for a in page.all("section")] == ["results", "curves", "ranking", "pairs", "settings"]
    assert len(page.all("h1")) == 1
    for text in ("Does a listener keep a judge honest?", "½ accuracy", "½ listener", "listener-reward demo --steps 30"):
        assert text in page.text
    for text in ("2.13.0", "verdict_masking", '["id", "ood"]', "0.0001", "2025-01-15"):
        assert text in page.text


def test_asks_nothing_of_the_network(tmp_path: Path) -> None:
    html, page = written(tmp_path)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", html.replace(page.raw["script"], ""))
    assert not page.all("link") and not page.all("iframe") and not page.all("a")
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
            if name in attributes:
                assert tag == "img" and attributes[name].startswith("data:image/png;base64,")
    assert "//" not in page.raw["script"]


def test_policy_allows_the_pages_own_script_and_no_other(tmp_path: Path) -> None:
    _, page = written(tmp_path, title=HOSTILE, pairs=[pair(prompt=HOSTILE)])
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.raw["script"].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert len(page.all("script")) == 1


def everywhere(text: str) -> dict[str, Any]:
    """Results with `text` in every place that takes text."""
    said = [thought(text, 1, 0.2, True) | {"text": text}] * 3
    curve = {"step": [1, 2], "reward": [0.1, 0.2]}
    return {
        "title": text,
        "created": text,
        "command": text,
        "versions": {text: text},
        "settings": {text: text, "nested": {"key": [text]}},
        "curves": {text: curve},
        "splits": {text: {"title": text, "meaning": text}},
        "table": [row(text, text, 0.5), row(text + "2", text, 0.6)],
        "pairs": [
            pair(prompt=text, split=text, model=text, verdict=verdict(thoughts=said)),
            pair(first_png=text, second_png=text, p_first=text, verdict=text),
            pair(source_pngs=[text], criterion=text),
            pair(source_pngs=[text, pair()["first_png"]], criterion=text + "2"),
        ],
        "ranking": {
            "prompt": text,
            "images": [text, pair()["first_png"]],
            "order": [0, 1],
            "scores": [text, 1],
            "standard_errors": [1, text],
            "sources": [text, pair()["second_png"]],
        },
    }


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    # The same page with a harmless word has the same elements and attributes: nothing hostile became markup.
    html, page = written(tmp_path, **everywhere(HOSTILE))
    _, harmless = written(tmp_path, **everywhere("word"))
    assert [(tag, sorted(a)) for tag, a in page.elements] == [(tag, sorted(a)) for tag, a in harmless.elements]
    assert page.raw == harmless.raw
    assert page.text.count("<script>alert(") >= 10, "the text must be shown, not dropped"
    assert "{{ 7 * 6 }}" in page.text and "<|vision_pad|>" in page.text and "&lt;b&gt;" in page.text
    assert html.count("<script>") == 1 and html.count("</style>") == 1
    assert any(HOSTILE in a["alt"] for a in page.all("img"))


def test_a_source_stands_beside_the_two_pictures(tmp_path: Path) -> None:
    first, second = pair()["first_png"], pair()["second_png"]
    html, page = written(tmp_path, pairs=[pair(source_pngs=[second])])
    (row_of_three,) = [a for a in page.all("div") if a.get("class") == "two and-source"]
    assert row_of_three and not [a for a in page.all("div") if a.get("class") == "sources"]
    shown = [(a["alt"], a["src"]) for a in page.all("img")][-3:]
    assert [alt.partition(" for")[0] for alt, _ in shown] == ["source image", "picture 1", "picture 2"]
    assert [source for _, source in shown] == [f"data:image/png;base64,{one}" for one in (second, first, second)]
    assert "<figcaption>source</figcaption>" in html and "a dashed frame has a source image" in page.text
    assert "dashed frame" not in written(tmp_path, pairs=[pair()])[1].text


def test_several_sources_stand_above_the_two_pictures(tmp_path: Path) -> None:
    html, page = written(tmp_path, pairs=[pair(source_pngs=[pair()["first_png"], "no picture"], criterion="quality")])
    assert [a.get("class") for a in page.all("div") if a.get("class") in ("two", "two and-source", "sources")] == [
        "sources",
        "two",
    ]
    assert "<figcaption>source 1</figcaption>" in html and "<figcaption>source 2</figcaption>" in html
    assert html.count('<span class="no-picture">') == 1 and "by <bdi>quality</bdi>" in html


def test_pairs_can_be_chosen_by_their_criterion(tmp_path: Path) -> None:
    html, _ = written(tmp_path, pairs=[pair(criterion="quality"), pair(criterion="alignment"), pair()])
    assert '<select name="criterion">' in html
    assert [place for place in re.findall(r'data-criterion="(\d)"', html)] == ["0", "1", "2"]
    assert '<select name="criterion">' not in written(tmp_path, pairs=[pair(), pair()])[0]


def test_a_ranking_of_edits_shows_what_was_edited(tmp_path: Path) -> None:
    edits = results()["ranking"] | {"sources": [pair()["second_png"]]}
    html, page = written(tmp_path, ranking=edits, pairs=[])
    assert next(a["alt"] for a in page.all("img")) == "source image" and "<figcaption>source</figcaption>" in html


def test_right_to_left_text_and_emoji_are_kept_and_isolated(tmp_path: Path) -> None:
    html, _ = written(tmp_path, pairs=[pair(prompt=RIGHT_TO_LEFT, model=RIGHT_TO_LEFT)])
    assert RIGHT_TO_LEFT in html
    assert f'<p class="quoted" dir="auto">{RIGHT_TO_LEFT}</p>' in html
    assert f"<bdi>{RIGHT_TO_LEFT}</bdi>" in html


def test_characters_that_a_page_cannot_hold_are_replaced(tmp_path: Path) -> None:
    html, _ = written(tmp_path, pairs=[pair(prompt="a\x00b\ud800c\x1bd\x85e\tf\ng")])
    assert "a\ufffdb\ufffdc\ufffdd\ufffde\tf\ng" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)


@pytest.mark.parametrize("gap", [None, float("nan"), float("inf"), "text", [], {}, b"x", True, 10**400, object()])
def test_any_value_may_be_missing(tmp_path: Path, gap: Any) -> None:
    # All that lies at one depth of the results goes missing at once, for every depth.
    def holes(value: Any, depth: int) -> Any:
        if depth == 0:
            return gap
        if isinstance(value, dict):
            return {key: holes(item, depth - 1) for key, item in value.items()}
        return [holes(item, depth - 1) for item in value] if isinstance(value, (list, tuple)) else gap

    for depth in range(1, 7):
        path = write_report(tmp_path / "report.html", holes(results(), depth))
        page = Page(path.read_text(encoding="utf-8"))
        assert len(page.all("section")) == 5
        if gap is None:
            assert not re.search(r"\b(None|nan|inf)\b", page.text)


def test_an_empty_result_says_so(tmp_path: Path) -> None:
    empty: dict[str, Any] = dict.fromkeys(("table", "curves", "ranking", "pairs"))
    page = Page(write_report(tmp_path / "report.html", empty).read_text(encoding="utf-8"))
    assert [a["id"] for a in page.all("section")] == ["results", "curves", "ranking", "pairs", "settings"]
    assert page.text.count("not recorded") == len(METRICS)
    for text in ("No results were recorded.", "No ranking was recorded.", "No pairs were recorded."):
        assert text in page.text
    assert "None" not in page.text and not page.all("input")


def test_table_shows_values_intervals_and_splits_in_order(tmp_path: Path) -> None:
    html, page = written(tmp_path)
    assert page.text.index("In distribution") < page.text.index("Wrong-way")
    assert "falls below 50 %" in page.text and "400 pairs" in page.text
    assert f"<strong>71.2</strong><small>67.2{DASH}75.2</small>" in html
    assert f"<td>62.1<small>58.1{DASH}66.1</small></td>" in html
    assert "Out of distribution" not in page.text, "a split without rows must not be claimed"
    # Alone in its split: nothing to be better than.
    assert "<td>55.1<small>" in html


def test_only_the_results_say_what_a_split_is(tmp_path: Path) -> None:
    table = [row("base", "id", 0.6), row("base", "mine", 0.7), row("base", "other", 0.8)]
    splits = {"other": {"title": "The others", "meaning": "Pairs of others."}, "mine": {"title": None}, "gone": {}}
    _, page = written(tmp_path, table=table, splits=splits, pairs=[pair(split="other"), pair(split="id")])
    titles = [page.text.index(title) for title in ("The others", "Pairs of others.", "mine", "id 400 pairs")]
    assert titles == sorted(titles), "those with a caption first, in its order"
    assert "In distribution" not in page.text and "gone" not in page.text
    assert page.texts.count("The others") >= 3, "the table, the further numbers and the card of a pair"


def test_best_is_by_what_is_printed() -> None:
    accuracy = next(column for column in COLUMNS if column.key == "accuracy")
    ece = next(column for column in COLUMNS if column.key == "ece")

    def best(column: Any, *values: Any) -> list[bool]:
        return [cell["best"] for cell in _cells(column, [{column.key: value} for value in values])]

    assert best(accuracy, 0.61, 0.72, None) == [False, True, False]
    assert best(accuracy, 0.72004, 0.61, 0.72001) == [True, False, True]
    assert best(accuracy, 0.7, 0.7) == [False, False]
    assert best(ece, 0.04, 0.05, float("nan")) == [True, False, False]


def test_curves_have_both_arms_axes_and_hover_titles(tmp_path: Path) -> None:
    _, page = written(tmp_path)
    assert len(page.all("path", "smooth")) == len(page.all("path", "raw")) == 2 * len(METRICS)
    assert {"arm-1", "arm-2"} <= {name for a in page.all("path") for name in a["class"].split()}
    assert page.text.count("training step") == len(METRICS)
    assert page.texts.count("accuracy-only") == 1 and page.texts.count("listener-shaped") == 1
    assert len(page.all("g", "band")) == 30 * len(METRICS)
    # Smoothed by sigma 1 at the end of a ramp to 79 %: weights 1, .607, .135, .011 put it 0.52 points lower.
    assert "step 30 accuracy-only: 78.5 %" in page.text
    for a in page.all("path"):
        numbers = [float(number) for number in re.findall(r"[ML]([\d.]+) ", a["d"])]
        assert len(numbers) == 30 and all(36 <= x <= 312 for x in numbers)


def test_curve_lists_may_differ_in_length_and_order(tmp_path: Path) -> None:
    curve = {"step": [30, 10], "reward": [0.3, 0.1, 0.2], "accuracy": [None, None, None]}
    _, page = written(tmp_path, curves={"arm": curve})
    assert len(page.all("path", "raw")) == 1
    assert page.text.count("not recorded") == len(METRICS) - 1


def test_smoothing_keeps_gaps_and_constants() -> None:
    assert _smooth([0.4] * 3 + [None] + [0.4] * 3) == pytest.approx([0.4] * 3 + [None] + [0.4] * 3)
    # Three points, sigma 1: weights 1, e^-0.5, e^-2 of the distances 0, 1, 2; the middle has 1/(1 + 2 * 0.60653).
    assert _smooth([0.0, 1.0, 0.0])[1] == pytest.approx(1 / (1 + 2 * 0.60653), abs=1e-5)
    assert _smooth([]) == []


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.53, 0.91), (-3, 4.2), (0.5, 0.5), (0, 0), (7, 7), (1e-9, 2e-9), (1, 1 + 1e-16), (0, 9e11)],
)
def test_ticks_enclose_and_are_few(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 7 and ticks == sorted(set(ticks))


def test_ticks_are_round_numbers() -> None:
    assert _ticks(0.53, 0.91) == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert _ticks(0, 0) == [0, 0.25, 0.5, 0.75, 1]
    assert _tick_digits([0.0, 0.25], percent=False) == 2
    assert _tick_digits([0.0, 0.25], percent=True) == 0


def test_path_breaks_at_gaps() -> None:
    assert _path([(0, 1.0), (1, 2.0), (2, None), (3, 4.5)]) == "M0 1h0L1 2M3 4.5h0"
    assert _path([(0, None)]) == ""


def test_hover_bands_cover_the_plot_without_overlap() -> None:
    bands = _bands(list(range(1000)), lambda step: 36 + 276 * step / 999)
    assert len(bands) == MAX_BANDS and bands[0][0] == 0 and bands[-1][0] == 999
    assert bands[0][1] == 36 and bands[-1][2] == 312
    assert all(b[2] == pytest.approx(c[1], abs=0.1) for b, c in itertools.pairwise(bands))
    assert _bands([5], lambda _: 174) == [(5, 36, 312)]


def test_ranking_is_best_first_with_errors(tmp_path: Path) -> None:
    _, page = written(tmp_path)
    at = [page.text.index(text) for text in ("+1.50 ± 0.41", "+0.25 ± 0.30", f"{MINUS}1.75 ± 0.50")]
    assert at == sorted(at)
    assert "Comparisons made: 3." in page.text


def test_ranking_ignores_an_order_that_names_no_picture(tmp_path: Path) -> None:
    ranking = results()["ranking"] | {"order": [7, 2, -1, None], "scores": [0.5]}
    _, page = written(tmp_path, ranking=ranking, pairs=[])
    assert len(page.all("img")) == 1


def test_pictures_keep_their_pixels_and_only_pictures_pass() -> None:
    small = picture(encoded(Image.new("RGB", (96, 64), "red")))
    assert small is not None and small["pixelated"] and (small["width"], small["height"]) == (96, 64)
    photo = picture(encoded(Image.new("RGB", (512, 300)), "JPEG"))
    assert photo is not None and not photo["pixelated"] and photo["source"].startswith("data:image/jpeg;base64,")
    svg = base64.b64encode(b"<svg onload='alert(1)'/>").decode()
    for bad in (None, 3, "", "not base64 !", svg, encoded(Image.new("RGB", (2, 2)), "BMP"), "data:text/html,x"):
        assert picture(bad) is None


def card(folder: Path, **changes: Any) -> Page:
    return written(folder, pairs=[pair(**changes)])[1]


def test_a_card_shows_votes_judge_listener_and_thoughts(tmp_path: Path) -> None:
    page = card(tmp_path)
    assert "people 80 % 20 % judge 71 % 29 % listener 75 % 25 %" in page.text
    assert {"width: 80.0%", "width: 71.0%", "width: 75.0%", "width: 86.0%"} <= {a["style"] for a in page.all("i")}
    assert "seen as given" in page.text and "seen swapped" in page.text
    assert "In swapped order (its image 1 is picture 2): prefers picture 1" in page.text
    assert f"Position gap {MINUS}0.08" in page.text
    assert page.all("span", "right") and not page.all("span", "badge") and not page.all("article", "contradicted")


def test_contradictions_are_marked(tmp_path: Path) -> None:
    page = card(tmp_path, verdict=verdict(contradicted=True, listener_p_first=0.3))
    assert page.all("article", "contradicted") and len(page.all("span", "badge")) == 1
    said = [thought("as given", 1, 0.2, True), thought("swapped", 2, 0.1, False)]
    page = card(tmp_path, verdict=verdict(thoughts=said))
    assert "contradiction in 1 thought" in page.text and len(page.all("div", "contradicted")) == 1
    # The listener's bar is its share for the thought's own answer: 0.2 for picture 1, 1 - 0.1 for picture 2.
    assert {"width: 20.0%", "width: 90.0%"} <= {a["style"] for a in page.all("i")}


@pytest.mark.parametrize(
    ("p_first", "preferred", "mark"),
    [
        (0.8, 1, "✓ right"),
        (0.8, 2, "✗ wrong"),
        (0.2, 2, "✓ right"),
        (0.8, None, "✗ wrong: undecided"),
        (0.5, 1, "people tied"),
    ],
)
def test_right_and_wrong(tmp_path: Path, p_first: float, preferred: int | None, mark: str) -> None:
    assert mark in card(tmp_path, p_first=p_first, verdict=verdict(preferred=preferred)).text


def test_malformed_thoughts_and_many_thoughts(tmp_path: Path) -> None:
    said = [thought("as given", None, None, None), thought("swapped", 1, 0.9, False)]
    said += [thought("as given", 1, 0.9, False), thought("swapped", 1, 0.1, True)]
    page = card(tmp_path, verdict=verdict(thoughts=said))
    assert "no readable answer" in page.text
    assert "2 more thoughts, 1 contradicted" in page.text


def test_the_page_is_whole_without_its_script(tmp_path: Path) -> None:
    _, page = written(tmp_path)
    assert len(page.all("article")) == 2 and not any("hidden" in a for a in page.all("article"))
    # The filter would do nothing without the script, which is what shows it.
    assert "hidden" in page.all("form")[0]


# ---------------------------------------------------------------------------------------------------------------------
# The page of an evaluation
# ---------------------------------------------------------------------------------------------------------------------


def share(accuracy: float, n: int = 40) -> dict[str, Any]:
    return {"n": n, "accuracy": accuracy, "interval": [accuracy - 0.05, accuracy + 0.05]}


def diagnostics(**changes: Any) -> dict[str, Any]:
    bins = [{"low": 0.5, "high": 0.55, "confidence": 0.52, "agreement": 0.5} | share(0.5, 100)]
    bins += [{"low": 0.95, "high": 1.0, "confidence": 0.97, "agreement": 0.75} | share(0.8, 300)]
    return {
        "unit": "probability",
        "bins": bins,
        "coverage": {"share": [0.1, 0.5, 1.0], "accuracy": [0.95, 0.9, 0.7]},
        "kept": [{"wanted": w, "share": s} | share(a) for w, s, a in ((0.1, 0.31, 0.95), (0.5, 0.5, 0.9), (1, 1, 0.7))],
        "position": {
            "n": 400,
            "mean": 0.05,
            "mean_size": 0.11,
            "counts": [0] * 10 + [300, 100] + [0] * 9,
            "turned": 0.17,
            "interval": [0.12, 0.21],
            "to_first": 0.12,
            "to_second": 0.05,
        },
        "contradictions": {
            "thoughts": 800,
            "rate": 0.06,
            "interval": [0.04, 0.08],
            "right": 0.03,
            "wrong": 0.2,
            "by_pair": {"none": share(0.9, 370), "some": share(0.6, 20), "all": share(0.2, 10)},
        },
    } | changes


NOTHING = {"unit": "score"} | dict.fromkeys(("bins", "coverage", "kept", "position", "contradictions"))


def protocol(value: float, **changes: Any) -> dict[str, Any]:
    return {"value": value, "interval": [value - 0.04, value + 0.04], "always_first": 0.59} | changes


def judged(**changes: Any) -> dict[str, Any]:
    paired = {"difference": -0.11, "interval": [-0.27, 0.02], "p_value": 0.0002}
    rows = [
        row("ours", "some data", 0.9, always_first=0.59, diagnostics=diagnostics(), against="ours", paired=None)
        | {"protocols": {"imagereward": protocol(0.9), "tau-b": protocol(-0.02)}},
        row("theirs", "some data", 0.79, always_first=0.59, diagnostics=NOTHING, against="ours", paired=paired)
        | {"protocols": {"imagereward": protocol(0.79), "tau-b": protocol(0.7)}}
        | dict.fromkeys(("contradiction_rate", "contradiction_interval", "malformed_rate", "position_gap", "ece")),
    ]
    wrong = verdict(p_first=0.03, preferred=2, contradicted=True, listener_p_first=0.9)
    scored = {"p_first": None, "preferred": 2, "thoughts": [], "margin": -3.25}
    return {
        "title": "ours and theirs",
        "summary": "400 labelled pairs.",
        "notes": ["Not measured: a third, which broke"],
        "table": rows,
        "pairs": [
            pair(model="ours", split="some data", verdict=wrong, id="row 17"),
            pair(model="ours", split="some data", prompt="two green stars"),
            pair(model="theirs", split="other data", verdict=scored, first_png=None),
        ],
        "pairs_title": "The worst mistakes",
        "pairs_note": "The worst first.",
    } | changes


def evaluated(folder: Path, **changes: Any) -> tuple[str, Page]:
    html = write_report(folder / "page.html", judged(**changes)).read_text(encoding="utf-8")
    return html, Page(html)


def test_an_evaluation_has_its_own_parts_and_not_those_of_a_training(tmp_path: Path) -> None:
    _, page = evaluated(tmp_path)
    names = "results protocols confidence order contradictions pairs settings".split()
    assert [a["id"] for a in page.all("section")] == names
    assert "400 labelled pairs." in page.text and "a third, which broke" in page.text
    assert "½ accuracy" not in page.text and "Learning curves" not in page.text
    assert "The worst mistakes" in page.text and "The worst first." in page.text


def test_the_baseline_stands_beside_every_accuracy(tmp_path: Path) -> None:
    html, page = evaluated(tmp_path)
    assert '<tr class="baseline"><th scope="row">always the first</th><td>59.0</td>' in html
    assert '<tr class="baseline"><th scope="row">always the first</th><td>0.590</td><td>0.590</td>' in html
    assert len(page.all("tr", "baseline")) == 2


def test_protocols_and_paired_tests(tmp_path: Path) -> None:
    html, page = evaluated(tmp_path)
    assert f"<td>0.900<small>0.860{DASH}0.940</small></td>" in html
    assert f"<td>{MINUS}0.020<small>{MINUS}0.060 to 0.020</small></td>" in html
    assert f"<td>{MINUS}0.110<small>{MINUS}0.270 to +0.020</small></td><td>&lt; 0.001</td>" in html
    assert "difference to ours" in page.text


def test_a_protocol_that_only_repeats_the_accuracy_is_left_out(tmp_path: Path) -> None:
    alone = row("ours", "some data", 0.9) | {"protocols": {"imagereward": protocol(0.9)}, "paired": None}
    assert "protocols" not in [a["id"] for a in evaluated(tmp_path, table=[alone])[1].all("section")]
    other = alone | {"protocols": {"hpsv2": protocol(0.88)}}
    assert "protocols" in [a["id"] for a in evaluated(tmp_path, table=[other])[1].all("section")]


def of_criterion(accuracy: float, n: int = 40) -> dict[str, Any]:
    return {"n": n, "accuracy": accuracy, "accuracy_interval": [accuracy - 0.05, accuracy + 0.05], "ece": 0.02}


def test_a_split_with_criteria_has_a_column_for_each(tmp_path: Path) -> None:
    asked = {"alignment": of_criterion(0.8), "quality": of_criterion(0.7, n=60)}
    table = [row("ours", "some data", 0.75) | {"by_criterion": asked}, row("theirs", "some data", 0.6)]
    html, page = evaluated(tmp_path, table=[*table, row("ours", "other data", 0.9) | {"by_criterion": {}}])
    assert "criteria" in [a["id"] for a in page.all("section")] and html.count('aria-label="Criteria"') == 1
    assert "<bdi>alignment</bdi></th>" in html.replace("<small>40 pairs</small>", "")
    assert f"<td>80.0<small>75.0{DASH}85.0</small></td><td>0.020</td>" in html
    assert f"<td>70.0<small>65.0{DASH}75.0</small></td><td>0.020</td>" in html
    assert "criteria" not in [a["id"] for a in evaluated(tmp_path)[1].all("section")]


def test_reliability_and_coverage_are_drawn_to_scale(tmp_path: Path) -> None:
    _, page = evaluated(tmp_path)
    # x: 36 + 196 * 2 (c - 0.5); y: 176 - 164 * agreement; r: 2 + 9 sqrt(n / 400).
    dots = [(float(a["cx"]), float(a["cy"]), float(a["r"])) for a in page.all("circle", "bin")]
    assert dots == [(43.8, 94.0, 6.5), (220.2, 53.0, 9.8)]
    assert "300 pairs: 97 % sure, 75 % of the people agree" in page.text
    # Accuracy runs from 40 to 100 %: 0.7 is half-way down.
    (line,) = (a["d"] for a in page.all("path", "smooth"))
    assert line == "M55.6 25.7h0L134 39.3L232 94"
    assert f"95.0 90.0{DASH}100.0 of 31 %" in page.text, "a fraction that could not be met is told"


def test_order_and_contradictions_in_numbers(tmp_path: Path) -> None:
    _, page = evaluated(tmp_path)
    assert f"turns 17.0 % (12.0{DASH}21.0) of 400 answers: 12.0 % to the picture shown first, 5.0 %" in page.text
    bars = [(float(a["y"]), float(a["height"])) for a in page.all("rect", "count")]
    assert bars[10] == (12.0, 164.0) and bars[11] == (121.3, 54.7) and bars[0] == (176.0, 0.0)
    assert f"6.0 4.0{DASH}8.0 3.0 20.0 90.0 85.0{DASH}95.0 370 pairs" in page.text


def test_what_a_judge_does_not_have_is_said_and_never_zero(tmp_path: Path) -> None:
    _, page = evaluated(tmp_path)
    for text in (
        "No reliability plot where there are no probabilities: theirs .",
        "As sure of every pair, or silent about it: theirs .",
        "Not known, for want of probabilities in both orders: theirs .",
        "No listener read a thought of theirs .",
        "score of picture 1 minus picture 2: \N{MINUS SIGN}3.250",
        "no picture",
    ):
        assert text in page.text, text
    same = diagnostics(position=diagnostics()["position"] | {"mean": 0.0, "mean_size": 0.0})
    table = [row("steady", "some data", 0.9, diagnostics=same)]
    assert "The same in both orders on every pair: steady ." in evaluated(tmp_path, table=table)[1].text


def test_judges_keep_their_colour_in_every_drawing(tmp_path: Path) -> None:
    table = [row(f"judge {i}", "some data", 0.9, diagnostics=diagnostics()) for i in range(6)]
    _, page = evaluated(tmp_path, table=table)
    lines = [a["class"] for a in page.all("path", "smooth")]
    assert lines == [f"smooth arm-{i}" for i in (1, 2, 3, 4)] + ["smooth arm-1 dashed", "smooth arm-2 dashed"]


def test_filters_name_what_there_is_to_choose(tmp_path: Path) -> None:
    _, page = evaluated(tmp_path)
    assert [a["name"] for a in page.all("select")] == ["mark", "contradicted", "model", "split"]
    cards = page.all("article")
    assert [card["data-model"] for card in cards] == ["0", "0", "1"]
    assert [card["data-contradicted"] for card in cards] == ["0", "1", "2"]
    assert "no listener" in page.text
    _, page = evaluated(tmp_path, pairs=[pair()])
    assert not page.all("select") and page.all("input")


def test_hostile_text_in_an_evaluation_stays_text(tmp_path: Path) -> None:
    def everywhere(text: str) -> dict[str, Any]:
        one = row(text, text, 0.5, against=text, paired={"difference": text, "p_value": text}) | {
            "protocols": {text: protocol(0.4), text + "2": {"value": text}},
            "diagnostics": diagnostics(unit=text),
            "by_criterion": {text: {"n": text, "accuracy": text}, text + "2": of_criterion(0.4)},
        }
        pairs = [pair(model=text, split=text, id=text), pair(model=text + "2", split=text + "2")]
        told = {"summary": text, "notes": [text], "pairs_title": text, "pairs_note": text}
        return {"table": [one], "pairs": pairs, **told}

    html, page = evaluated(tmp_path, **everywhere(HOSTILE))
    _, harmless = evaluated(tmp_path, **everywhere("word"))
    assert [(tag, sorted(a)) for tag, a in page.elements] == [(tag, sorted(a)) for tag, a in harmless.elements]
    assert page.raw == harmless.raw and html.count("<script>") == 1


@pytest.mark.parametrize("gap", [None, float("nan"), "text", [], {}, True, 10**400, object()])
def test_any_value_of_an_evaluation_may_be_missing(tmp_path: Path, gap: Any) -> None:
    def holes(value: Any, depth: int) -> Any:
        if depth == 0:
            return gap
        if isinstance(value, dict):
            return {key: holes(item, depth - 1) for key, item in value.items()}
        return [holes(item, depth - 1) for item in value] if isinstance(value, (list, tuple)) else gap

    for depth in range(1, 8):
        path = write_report(tmp_path / "report.html", holes(judged(), depth))
        page = Page(path.read_text(encoding="utf-8"))
        assert {"results", "pairs", "settings"} <= {a["id"] for a in page.all("section")}
        if gap is None:
            assert not re.search(r"\b(None|nan|inf)\b", page.text)


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------------

SHOWN = "[...document.querySelectorAll('.card')].filter(card => card.offsetParent).length"


def test_a_browser_is_looked_for_in_playwright_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser, "_PLACES", ())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "cache"))
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert browser.find_chromium() is None
    program = tmp_path / "cache/chromium-1200/chrome-linux/chrome"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert browser.find_chromium() == str(program)
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "gone"))
    assert browser.find_chromium() is None, "what is named and not there is not replaced by another"


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")
def test_in_a_real_browser(tmp_path: Path) -> None:
    long = "two very " + "long" * 200 + " words"
    pages = [write_report(tmp_path / "demo.html", results(title=long))]
    pages.append(write_report(tmp_path / "eval.html", judged(title=long, notes=[long])))
    named = [row(long + end, long, 0.9, diagnostics=diagnostics()) for end in ("", "2")]
    crowded = [pair(model=long, split=long, id=long, prompt=long), pair(model=long + "2")]
    pages.insert(0, write_report(tmp_path / "long.html", judged(table=named, pairs=crowded, summary=long)))
    colors = {}
    with Browser(tmp_path / "profile") as tab:
        for page in pages:
            for width in (1280, 390):
                for scheme in ("light", "dark"):
                    tab.open(page, width=width, scheme=scheme)
                    assert tab.complaints == []
                    assert tab.requests == [page.as_uri()], "the page asks for something"
                    across = tab.run("[document.documentElement.scrollWidth, innerWidth]")
                    assert across[0] <= width == across[1], "the page scrolls sideways"
                    colors[scheme] = tab.run("getComputedStyle(document.body).backgroundColor")
                    assert tab.run("[...document.images].every(image => image.complete && image.naturalWidth)")
            assert colors["light"] != colors["dark"]

        def search(text: str) -> int:
            tab.run(f"box = document.querySelector('#filter'); box.value = {text!r}; box.dispatchEvent({event})")
            return tab.run(SHOWN)

        def choose(name: str, option: int) -> int:
            choice = f"choice = document.querySelector('select[name={name}]')"
            tab.run(f"{choice}; choice.selectedIndex = {option}; choice.dispatchEvent({event})")
            return tab.run(SHOWN)

        event = "new Event('input', {bubbles: true})"
        assert tab.run(SHOWN) == 3 and tab.run("!document.querySelector('#filters').hidden")
        assert (search("GREEN  stars"), search("no such word"), search("row 17"), search("")) == (1, 0, 1, 3)
        assert (choose("mark", 1), choose("model", 2), search("green"), search("")) == (2, 1, 0, 1)
        assert tab.run("document.querySelector('#count').textContent") == "1 of 3"
        assert (choose("mark", 0), choose("model", 0), choose("contradicted", 1)) == (1, 3, 1)
        assert tab.complaints == []
