"""The report: one page that holds all of it, and what it says of bad input."""

import json
import shutil
from html.parser import HTMLParser

import pytest
from test_evaluation import run, split, trained, write_people  # noqa: F401  (fixtures)

from vavae_tools.evaluation import augmentation
from vavae_tools.evaluation import classifier as classifier_module
from vavae_tools.evaluation.augmentation import evaluate_gain
from vavae_tools.evaluation.compared import PersonScore
from vavae_tools.evaluation.html import write_report
from vavae_tools.evaluation.metrics import Interval
from vavae_tools.evaluation.report import CopyCheck, Evaluation, SetDistances
from vavae_tools.evaluation.texture import Texture
from vavae_tools.evaluation.verdicts import judge_images
from vavae_tools.runtime.files import write_json


class Page(HTMLParser):
    """A page's texts by tag, its tags in order, and whether each that was opened was closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.sources, self.links = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        of = dict(attributes)
        self.sources += [of["src"]] if "src" in of else []
        self.links += [of["href"]] if "href" in of else []
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and "style" not in self.open:
            self.texts.append((self.open[-1], data.strip()))

    def said(self, tag):
        return [text for of, text in self.texts if of == tag]


def evaluation(**changed):
    """One that finds nothing wrong with 60 generated images, but for what is changed."""
    scale = Interval(0.9, 0.85, 0.95)
    around = dict.fromkeys(("precision", "recall", "density", "coverage"), scale)
    made = around | {name: changed.pop(name) for name in list(changed) if name in around}
    distances = SetDistances(60, 1.0, 1.0, scale, scale, made, around, {}, [1.0])
    sharp = changed.pop("sharpness", 1.0)
    texture = Texture({}, sharp, 1.0, {}, {})
    about = {"generated_dir": "made", "data_dir": "data", "output_dir": "out", "image_size": (8, 8), "classifiers": 1}
    people = {"ID_1": PersonScore(30, 0.5, 30, 0.95), "ID_2": PersonScore(30, 1.0, 30, 0.95)}
    found = {"total": PersonScore(60, changed.pop("accuracy", 0.95), 60, 0.95), "people": people, "missing": []}
    found |= {"copies": CopyCheck(0.1, changed.pop("near", 0.0), 0.0, 1.0), "distances": distances, "texture": texture}
    rest = {"calibration": {}, "nearest": [], "notes": [], "key": "", "figures": {}}
    return Evaluation(**{**about, **found, **rest, **changed})


LOW = Interval(0.2, 0.1, 0.3)


@pytest.mark.parametrize(
    ("changed", "first", "count"),
    [
        ({}, "good: no copies; sharpness 1.00 of real images'; 95.0 % are the right person", 1),
        (
            {"sharpness": 0.74},
            "too blurred: sharpness 0.74 of real images' (below 0.75): fine-tune the VA-VAE longer",
            1,
        ),
        ({"sharpness": 1.3}, "too noisy: sharpness 1.30", 1),
        ({"near": 0.06, "sharpness": 0.5}, "copies: 6.0 % are suspiciously near to a training image, 0.0 % of real", 2),
        ({"near": 0.05}, "good", 1),
        (
            {"accuracy": 0.8},
            "the wrong person: 80.0 % are the right person, 95.0 % of real images (more than 5.0 % below), the wor",
            1,
        ),
        ({"recall": LOW}, "too alike: recall 0.20, real training images' 0.90 (below 0.5 times): a lower guidance_", 1),
        ({"recall": Interval(0.4, 0.1, 0.88)}, "good", 1),
        ({"precision": LOW, "accuracy": 0.5}, "the wrong person", 2),
        ({"missing": ["ID_3"]}, "a missing person: no generated images of ID_3", 2),
        ({"total": PersonScore(19, 0.1, 60, 0.95)}, "too few images for more of a verdict: 19, at least 20", 1),
        ({"distances": None, "texture": None, "total": PersonScore(60, 0.9, 0, None)}, "no copies (60 generated", 1),
    ],
)
def test_the_first_sentence_is_the_most_important(changed, first, count):
    said = judge_images(evaluation(**changed))
    assert said[0].startswith(first) and len(said) == count, said


class Guess:
    """In place of a trained classifier."""

    def judge(self, images):
        return None, images.labels.roll(1)


@pytest.fixture
def gain(split, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(augmentation, "train_classifier", lambda *of: Guess())
    options = {"shares": (1,), "seeds": 1, "images_per_person": 2, "progress": False}
    return lambda made: evaluate_gain(made, split, tmp_path / "out", **options)


def test_one_page_holds_all_and_its_verdict_comes_first(run, gain, tmp_path):  # noqa: F811
    made = write_people(tmp_path / "made", (1, 2, 3), 8, seed=5)
    found = run(made)
    page = Page(tmp_path / "out" / "evaluation.html")
    assert page.said("li")[: len(found.verdict)] == found.verdict
    assert page.texts[2][0] == "li" and page.said("h1") == ["Generated images beside real ones"]
    assert len(page.sources) == len(found.figures) and not page.links
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "://" not in page.source and "url(" not in page.source
    alone = page.source
    asked = gain(made)
    both = Page(tmp_path / "out" / "evaluation.html")
    assert both.said("li")[: 1 + len(found.verdict)] == judge_images(found, asked) == [asked.verdict, *found.verdict]
    assert len(both.sources) == len(page.sources) + 1
    run(made)
    assert (tmp_path / "out" / "evaluation.html").read_text() == both.source  # in either order
    write_people(tmp_path / "made", (1, 2, 3), 9, seed=6)  # others, which the gain is not about
    run(made)
    other = Page(tmp_path / "out" / "evaluation.html")
    assert len(other.sources) == len(page.sources) and other.source != alone


def test_names_are_no_tags(run, split, tmp_path):  # noqa: F811
    found = run(write_people(tmp_path / "made", (1, 2, 3), 4, seed=5))
    out, name = tmp_path / "out", "<b>&'\""
    values = json.loads((out / "evaluation.json").read_text())
    values["people"][name] = values["people"].pop("ID_1")
    values["verdict"], values["notes"], values["generated_dir"] = [name], [name], name
    write_json(out / "evaluation.json", values)
    write_report(out)
    page = Page(out / "evaluation.html")
    assert page.said("td").count(name) == 1 and page.said("li") == [name, name] and not page.said("b")
    assert found.generated_dir not in page.source


def test_accuracies_are_means_over_classifiers_each_kept_for_the_next_time(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(classifier_module, "default_steps", lambda images: 3)
    made = write_people(tmp_path / "made", (1, 2), 8, seed=5)
    single = [run(made, seed=seed).total.generated_accuracy for seed in (0, 1)]
    monkeypatch.setattr(classifier_module, "train_classifier", None)
    found = run(made, seeds=2)
    assert found.classifiers == 2 and found.total.generated_accuracy == pytest.approx(sum(single) / 2)
    assert single[0] > single[1] and len(found.distances.times_by_classifier) == 2


def test_of_bad_input_the_rest_is_reported(run, gain, split, tmp_path):  # noqa: F811
    made = write_people(tmp_path / "made", (1,), 1, seed=5)
    write_people(tmp_path / "made", (7,), 3, seed=6)
    (tmp_path / "made" / "ID_2").mkdir()
    found = run(made)
    assert found.total.generated == 1 and found.missing == ["ID_2", "ID_3"] and found.distances is None
    assert "images of ID_7, but" in found.notes[0] and found.notes[0].endswith("images of others are left out")
    assert any(note.startswith("ID_1: fewer than 4 ") for note in found.notes)
    page = Page(tmp_path / "out" / "evaluation.html")
    assert found.notes[0] in page.said("li") and page.said("li")[0].startswith("a missing person")
    assert "sharpness" in " ".join(page.said("td"))
    # a person without training images, and a test side of one image
    data = tmp_path / "data"
    shutil.copytree(split, data)
    shutil.move(data / "val", data / "test")
    for person in (2, 3):
        shutil.rmtree(data / "test" / f"ID_{person}")
    for path in [*sorted((data / "test" / "ID_1").iterdir())[1:], *(data / "train" / "ID_3").iterdir()]:
        path.unlink()
    write_people(tmp_path / "made", (2, 3), 5, seed=7)
    options = {"shares": (1,), "seeds": 1, "images_per_person": 2, "progress": False}
    asked = evaluate_gain(made, data, tmp_path / "few", **options)
    assert asked.test_images == 1 and any("too few for a number of their own" in note for note in asked.notes)
    assert Page(tmp_path / "few" / "evaluation.html").said("li")[0] == asked.verdict
