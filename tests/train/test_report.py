"""The page: its structure, that it says what the files say, and that nothing in them can act in it."""

import base64
import hashlib
import html.parser
import json

import pytest

from jax_sae import InputError
from tests.train.report_workdir import (
    CONFIG,
    EVALUATION,
    concept,
    concepts,
    context,
    jsonl,
    records,
    write_workdir,
)
from train import cli
from train.report import main, render

VOID = {"meta", "input", "br", "link", "img"}


class Page(html.parser.HTMLParser):
    """Elements, attributes and texts of a page whose tags must balance."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.texts, self._open = [], [], []
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag, f"unbalanced </{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.texts.append((tuple(self._open), data))

    def all(self, tag, **attributes):
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]

    def text(self, tag="body", **attributes):
        """What is written inside the matching elements, white space collapsed."""
        inside = [
            data
            for path, data in self.texts
            if any(name == tag and attributes.items() <= found.items() for name, found in path)
            and not any(name in ("script", "style") for name, _ in path)
        ]
        return " ".join("".join(inside).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(render(write_workdir(tmp_path_factory.mktemp("runs") / "demo")))


def test_the_headline_names_the_run_and_its_key_numbers(page):
    assert page.text("h1") == "demo"
    assert page.text("p", **{"class": "subject"}) == "SmolLM2, layer 9 · 64 concepts on 16 dimensions"
    names = [name.strip() for path, name in page.texts if path and path[-1][0] == "dt"]
    numbers = [text.strip() for path, text in page.texts if path and path[-1] == ("dd", {"class": "number"})]
    assert dict(zip(names, numbers, strict=True)) == {
        "FVU": "0.0761",
        "Pooled FVU": "0.106",
        "Active concepts": "18.2",
        "Dead concepts": "25\xa0%",
        "Cosine similarity": "0.961",
        "Loss recovered": "98.1\xa0%",
        "Cross-entropy": "3.480 → 3.616",
    }


def test_every_section_is_there_once_and_reachable(page):
    sections = [found["id"] for found in page.all("section")]
    assert sections == ["training", "active", "frequency", "loss", "metrics", "concepts", "configuration"]
    linked = {found["href"] for found in page.all("a") if found["href"].startswith("#")}
    identifiers = [found["id"] for _, found in page.elements if "id" in found]
    assert len(identifiers) == len(set(identifiers))
    assert linked == {f"#{name}" for name in identifiers}


def test_training_says_how_far_and_how_fast(page):
    text = page.text("section", id="training")
    assert "100 steps over 3,200 rows. 10.0 s of training at a median of 320 rows/s." in text
    assert "waiting for input was 1.0 %." in text
    titles = [text for path, text in page.texts if path and path[-1] == ("span", {"class": "title"})]
    assert [title.strip() for title in titles] == [
        "Loss",
        "FVU",
        "Active concepts",
        "Dead concepts",
        "Rows per second",
        "Time waiting for input",
    ]


def test_charts_are_described_in_words(page):
    labels = [found["aria-label"] for found in page.all("div", role="img")]
    assert labels[1] == "FVU: 0.500 at step 20, 0.100 at step 100; validation 0.125 at step 100"
    assert len(labels) == 8
    assert all(labels)


def test_the_distributions_say_what_the_histograms_hold(page):
    text = page.text("section", id="active")
    assert "median of the 1,000 held-out inputs uses 2 concepts" in text
    assert "from 1 to 3, a factor of 3.0; all of them use between 1 and 4." in text
    assert "Sparsemax has no k" in text
    text = page.text("section", id="frequency")
    assert "16 of 64 concepts (25 %) never fire on the 1,000 held-out inputs." in text
    assert "Half of the others fire on less than about 1.0 % of the inputs; 8 fire on a tenth of them" in text


def test_the_loss_table_has_the_four_losses(page):
    text = page.text("table", **{"class": "losses"})
    for number in ("3.480", "3.616", "+0.136", "9.198", "+5.718", "10.803", "+7.323"):
        assert number in text
    sentence = (
        "the next-token loss rises by 0.136 nats per token; 98.1 % of what zero ablation destroys is "
        "recovered, and 97.6 % of what mean ablation destroys."
    )
    assert sentence in page.text("section", id="loss")
    widths = [found["style"] for found in page.all("i") if "style" in found]
    assert widths == ["width:32.2%", "width:33.5%", "width:85.1%", "width:100.0%"]


def test_every_metric_is_listed_with_its_meaning_or_why_it_is_missing(tmp_path):
    evaluation = EVALUATION | {"ms_mean": 0.1234, "ms_max": 0.9, "ndn": 16, "cknna_left_out": "few rows"}
    page = Page(render(write_workdir(tmp_path, evaluation=evaluation)))
    text = page.text("section", id="metrics")
    for row in (
        "FVU variance left unexplained, per input over its features, mean over inputs0.0761lower",
        "NDN concepts that never fire on the held-out inputs16lower",
        "Loss recovered share of what zero ablation destroys98.1 %higher",
        "CKNNA left out: few rows\N{EN DASH}higher",
        "that a concept fires on, mean0.123higher",
        "With no image encoder at hand it is the source model's own",
    ):
        assert row in text
    assert "NMSE" not in text  # an older evaluation, which says nothing of it


def test_a_concept_shows_its_contexts_with_the_firing_tokens_marked(page):
    (card,) = page.all("article", id="concept-41")
    assert card["data-frequency"] == "0.0042"
    assert card["data-strength"] == "4.0"
    text = page.text("article", id="concept-41")
    assert text.startswith("#41 0.42 % of inputs · mean 1.50 · max 4.00 4.00 the peace of⏎ 1862-Lincoln")
    assert "2 more contexts" in text
    marks = [
        (found, data)
        for path, data in page.texts
        for tag, found in path[-1:]
        if tag == "mark" and ("article", card) in path
    ]
    assert marks[:2] == [
        ({"class": "peak", "style": "--s:1.0", "title": "4.00"}, "peace"),
        ({"style": "--s:0.25", "title": "1.00"}, "of"),
    ]
    assert len(marks) == 10


def test_inputs_that_use_few_and_many_are_shown_with_their_number(page):
    text = page.text("section", id="active")
    assert "Inputs that use few 1 Mr. 1862-Lincoln" in text
    assert "Inputs that use many 4 a war 1862-Lincoln" in text


def test_every_setting_is_listed(page):
    cells = [(path[-1][0], text) for path, text in page.texts if ("div", {"class": "settings"}) in path]
    names = [text for tag, text in cells if tag == "th"]
    values = [text for tag, text in cells if tag == "td"]
    assert dict(zip(names, values, strict=True)) == {
        "preset": "sparsemax",
        "data": "runs/demo/activations",
        "steps": "100",
        "batch_size": "32",
        "clip_norm": "none",
        "d_in": "16",
        "n_concepts": "64",
        "activation": "sparsemax",
        "k": "32",
        "model": "SmolLM2",
        "layer": "9",
        "text.name": "speeches",
    }


def test_the_page_needs_nothing_from_elsewhere(page):
    for _, found in page.elements:
        assert not {"src", "srcset", "action", "data"} & found.keys()
        assert found.get("href", "#").startswith("#")
    assert "http:" not in page.source and "https:" not in page.source
    assert "url(" not in page.source and "@import" not in page.source
    (policy,) = [found["content"] for found in page.all("meta") if "http-equiv" in found]
    (script,) = [data for path, data in page.texts if path and path[-1][0] == "script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


HOSTILE = "<script>alert(\"1\")</script><img src=x onerror='x'>&amp;"


def test_text_from_outside_is_inert(tmp_path):
    tokens = [
        HOSTILE,
        "</p>",
        '"',
        "'",
        "&lt;",
        "\x00\x1b",
        "\ud800",
        "\u202e",
        "-->",
        "{{ 7 * 7 }}",
        "be\x07ll",
        "a\u202eb",
    ]
    hostile = context(tokens, [1.0] * len(tokens), 0, source=f"{HOSTILE} x\udc80y")
    workdir = write_workdir(
        tmp_path / "a<b>&c",
        config=CONFIG | {"preset": HOSTILE, "source": {"model": HOSTILE, HOSTILE: HOSTILE}},
        concepts=concepts(concepts=[concept(0, contexts=[hostile])], few=[hostile], many=[hostile]),
    )
    page = Page(render(workdir))
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    assert page.text("h1") == "a<b>&c"
    card = page.text("article", id="concept-0")
    for shown in (
        HOSTILE,
        "</p>",
        "&lt;",
        "␀␛",
        "⟨U+D800⟩",
        "⟨U+202E⟩",
        "-->",
        "{{ 7 * 7 }}",
        "be␇ll",
        "a�b",
        "x�y",
    ):
        assert shown in card
    assert not set(page.source) & {"\x00", "\x07", "\x1b", "\u202e"}
    assert HOSTILE in page.text("section", id="configuration")


def test_a_run_that_was_not_evaluated_says_so_and_names_the_command(tmp_path):
    workdir = write_workdir(tmp_path / "run", evaluation=None, concepts=None)
    page = Page(render(workdir))
    for place in ("header", "section"):
        assert f"python -m train.evaluate {workdir}" in page.text(place)
    for section in ("active", "frequency", "concepts"):
        assert "There is no concepts.json yet." in page.text("section", id=section)
    assert not page.all("section", id="loss")
    assert "0.125 held-out rows, step 100" in page.text("header")


def test_a_run_without_metrics_says_so(tmp_path):
    page = Page(render(write_workdir(tmp_path, metrics=None, evaluation=None, concepts=None)))
    assert "Nothing was logged yet" in page.text("section", id="training")


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    torn = jsonl(records(steps=(20, 40))) + '{"step": 60, "lo'
    text = Page(render(write_workdir(tmp_path, metrics=torn))).text("section", id="training")
    assert "40 of 100 steps over 1,280 rows." in text
    assert "The last line of metrics.jsonl is unfinished" in text


def test_long_runs_are_averaged_and_say_so(tmp_path):
    lines = records(steps=range(1, 1201))
    text = Page(render(write_workdir(tmp_path, metrics=jsonl(lines)))).text("section", id="training")
    assert "the mean of 3 logged values" in text


def test_vision_and_plain_sets_have_no_language_model_loss(tmp_path):
    evaluation = {
        name: v for name, v in EVALUATION.items() if "ce_" not in name and not name.startswith("loss_recovered")
    }
    page = Page(render(write_workdir(tmp_path, evaluation=evaluation)))
    assert not page.all("section", id="loss")
    assert "Cross-entropy" not in page.text()


def test_contexts_without_tokens_name_their_rows(tmp_path):
    bare = context(None, [2.5], 0, source=None, row=12345)
    shown = concepts(concepts=[concept(0, contexts=[bare])], few=[bare], many=[bare])
    page = Page(render(write_workdir(tmp_path, concepts=shown)))
    assert "2.50 row 12,345 of the set" in page.text("article", id="concept-0")
    assert "outlined" not in page.text().lower()


def test_a_fixed_number_of_active_concepts_is_called_a_setting(tmp_path):
    config = CONFIG | {"preset": "topk", "sae": CONFIG["sae"] | {"activation": "topk", "k": 32}}
    histogram = {"edges": [31, 32, 33], "counts": [0, 1000]}
    workdir = write_workdir(tmp_path, config=config, concepts=concepts(active_histogram=histogram))
    text = Page(render(workdir)).text("section", id="active")
    assert "Each of the 1,000 held-out inputs uses exactly 32 concepts." in text
    assert "TopK keeps the k = 32 largest scores of every input: the number is a setting, not a finding." in text
    assert "Inputs that use" not in text


def test_the_same_files_give_the_same_page(tmp_path):
    workdir = write_workdir(tmp_path)
    first = render(workdir).read_bytes()
    assert render(workdir).read_bytes() == first


def test_a_page_of_many_contexts_stays_small(tmp_path):
    contexts = [context([f" token{i}" for i in range(40)], [1.0 + i for i in range(40)], 39) for _ in range(8)]
    workdir = write_workdir(tmp_path, concepts=concepts(concepts=[concept(i, contexts=contexts) for i in range(48)]))
    assert render(workdir).stat().st_size < 3e6


@pytest.mark.parametrize("name", ["config", "evaluation", "concepts"])
@pytest.mark.parametrize("text", ["{", "[]", "null", '"text"', '{"rows": 1}'])
def test_a_damaged_file_is_named_and_the_old_page_stays(tmp_path, name, text):
    workdir = write_workdir(tmp_path)
    before = render(workdir).read_bytes()
    (workdir / f"{name}.json").write_text(text)
    with pytest.raises(InputError, match=f"{name}.json") as caught:
        render(workdir)
    assert "\n" not in str(caught.value)
    assert (workdir / "report.html").read_bytes() == before
    assert not list(workdir.glob(".*"))


def test_a_page_that_cannot_be_moved_into_place_leaves_the_old_one(tmp_path, monkeypatch):
    workdir = write_workdir(tmp_path)
    before = render(workdir).read_bytes()
    (workdir / "config.json").write_text(json.dumps(CONFIG | {"preset": "topk"}))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        render(workdir)
    assert (workdir / "report.html").read_bytes() == before


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("")])
def test_what_is_no_run_ends_with_one_line_and_code_2(tmp_path, capsys, make):
    make(tmp_path / "run")
    with pytest.raises(SystemExit) as caught:
        cli.run(main, [str(tmp_path / "run")], prog="python -m train.report")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "run") in error
    assert error.count("\n") == 1


def test_the_command_prints_where_the_page_is(tmp_path, capsys):
    workdir = write_workdir(tmp_path)
    cli.run(main, [str(workdir)], prog="python -m train.report")
    assert capsys.readouterr().out == f"report: {workdir / 'report.html'}\n"
