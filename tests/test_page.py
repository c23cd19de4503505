"""The HTML report: well-formed, complete, and safe with whatever names the data has."""

from html.parser import HTMLParser

import pytest

from pkt_fast import TransferConfig
from pkt_fast.page import write_html

VOID = {"meta", "line"}


class Checker(HTMLParser):
    """Collects text and tags; every element must be closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def report(**changes):
    return {
        "summary": {"pairs": "source 3 → target 1", "trained parameters": 23552},
        "config": TransferConfig(rank=4).as_dict(),
        "pairs": [{"target": 1, "source": [3], "weight": 0.0}],
        "attribution": [0.25, 0.5, 0.0, 1.0],
        "data": {
            "source": "<b>rows</b>.jsonl",
            "rows": 3000,
            "formats": {"text": 2999},
            "dropped": {"empty text": [7]},
        },
        "alignment": [
            {"target": 1, "source": [3], "cosine": 0.5, "chance": 0.1, "r2": None,
             "round_trip": None},
        ],
        "phases": {"load": {"seconds": 0.0}, "steer": {"seconds": 2.0, "tokens": 4000,
                                                     "tokens_per_second": 2000.0}},
        "delta": {},
        "ops": {"align_rows": "native"},
        "versions": {"python": "3"},
        "machine": {"cores": 2},
        **changes,
    }  # fmt: skip


def page(tmp_path, steps, **changes):
    history = [{"step": i, "layer_loss": 1 - i / 100, "output_loss": 0.5} for i in range(steps)]
    write_html(tmp_path / "report.html", report(**changes), history)
    return Checker((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("steps", "lines"), [(0, 0), (1, 0), (2, 2), (12, 2), (40, 4)])
def test_one_figure_a_loss_with_a_moving_mean_over_many_steps(tmp_path, steps, lines):
    found = page(tmp_path, steps)
    assert found.tags.count("svg") == (2 if steps > 1 else 0)
    assert found.tags.count("polyline") == lines


def test_values_are_written_for_a_person(tmp_path):
    text = " ".join(page(tmp_path, 3).text)
    for words in ("23,552", "<b>rows</b>.jsonl", "1: empty text", "2,999 text", "loss: 1.0000"):
        assert words in text
    assert "4,000" in text
    assert "{" not in text.partition("</style>")[2]


def test_only_changed_settings_are_shown_at_once(tmp_path):
    shown = "|".join(page(tmp_path, 3).text)
    assert shown.index("rank|4") < shown.index("All settings") < shown.index("epochs|5")
    assert "All are the defaults." in " ".join(
        page(tmp_path, 3, config=TransferConfig().as_dict()).text
    )


@pytest.mark.parametrize("missing", [{"attribution": None}, {"alignment": []}])
def test_sections_without_content_are_left_out(tmp_path, missing):
    title = next(iter(missing)).capitalize()
    assert title in page(tmp_path, 3).text
    assert title not in page(tmp_path, 3, **missing).text
