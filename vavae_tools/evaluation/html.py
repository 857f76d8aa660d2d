"""The report as one file: `evaluation.json`, `gain.json` and the figures beside them, each with how to read it."""

import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from vavae_tools.evaluation.metrics import Interval, percent
from vavae_tools.runtime.files import atomic_write

REPORT = "evaluation.html"
_MOST_ROWS = 10  # of the images nearest to training images

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Generated images beside real ones</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 52rem; margin: 0 auto; padding: 0 1rem 3rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.verdict { background: #f1f5fb; border-left: 4px solid #36c; padding: 0.5rem 1rem; }
.verdict li:first-child { font-weight: bold; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.read { color: #555; }
.path { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Generated images beside real ones</h1>
<ul class="verdict">
$verdict
</ul>
$body
</body>
</html>
""")


def write_report(folder: Path) -> None:
    """Write `evaluation.html` of what `evaluate_images` and `evaluate_gain` wrote to a folder about the same images.

    Where the two are about different images, it holds the newer one.
    """
    paths = sorted((folder / f"{name}.json" for name in ("evaluation", "gain")), key=_time, reverse=True)
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()}
    newest = next(iter(found.values()))
    found = {name: values for name, values in found.items() if values.get("key") == newest["key"]}
    verdict = [found["gain"]["verdict"]] if "gain" in found else []
    verdict += found["evaluation"]["verdict"] if "evaluation" in found else []
    body = []
    if "gain" in found:
        body += _gain(found["gain"], folder)
    body += _images(found["evaluation"], folder) if "evaluation" in found else []
    notes = [note for values in found.values() for note in values["notes"]]
    if notes:
        body += ["<h2>Notes</h2>", f"<ul>{_items(dict.fromkeys(notes))}</ul>"]
    page = _PAGE.substitute(verdict=_items(verdict), body="\n".join(body))
    with atomic_write(folder / REPORT) as partial:
        partial.write_text(page, encoding="utf-8")


def _time(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() else 0.0


def _gain(gain: dict[str, Any], folder: Path) -> list[str]:
    rows = [("classifiers trained on", "images", "accuracy, % [95 %]", "macro F1, %", "gain, points [95 %]")]
    for score in gain["mixtures"]:
        more = f"{Interval(**score['gain']):+.1f}" if score["gain"] else "-"
        accuracy, f1 = (Interval(**score[name]) for name in ("accuracy", "macro_f1"))
        rows.append((score["name"], f"{score['images']:,}", f"{accuracy:.1f}", f"{f1.value:.1f}", more))
    real, best = (next(s for s in gain["mixtures"] if s["name"] == name) for name in ("real", gain["best"]))
    people = [(name, f"{before:.1f} %", f"{best['people'][name]:.1f} %") for name, before in real["people"].items()]
    how = f"{gain['test_images']:,} {gain['subset']} images, {gain['seeds']} classifiers of each kind, "
    return [
        "<h2>Do they make a classifier better?</h2>",
        f"<p>{escape(how)}{gain['steps']:,} steps each.</p>",
        _table(rows),
        _figure(folder, "gain", "Accuracy of classifiers by what they were trained on"),
        _read(
            "Each line is a classifier that was trained on other images, for equally many steps. Its accuracy is the "
            "share of real images, none of them seen in training, that it names as the right person. The numbers in "
            "brackets hold what endless such images would give, 19 times in 20: a gain whose brackets hold 0 may be "
            "chance. “Masked” images have bands of time and frequency hidden, which costs nothing: generated images "
            "must beat it."
        ),
        _table([("person", "real", gain["best"]), *people]) if people else "",
    ]


def _images(found: dict[str, Any], folder: Path) -> list[str]:
    figures = [name for name in found["figures"] if (folder / "figures" / f"{name}.png").is_file()]

    def shown(name: str, words: str) -> str:
        return _figure(folder, name, words) if name in figures else ""

    total, size = found["total"], "×".join(map(str, found["image_size"]))
    where = f"{found['generated_dir']} beside {found['data_dir']}"
    body = [
        "<h2>The images</h2>",
        f"<p class='path'>{total['generated']:,} generated images, {size}: {escape(where)}</p>",
        shown("real_and_generated", "Real images to the left, generated ones to the right, a person in each row"),
        "<h2>Are they the right person?</h2>",
        *_people(found, shown),
        "<h2>Do they look and vary as real images do?</h2>",
        *_distances(found, shown),
        "<h2>Are they copies?</h2>",
        *_copies(found, shown),
    ]
    return body


def _people(found: dict[str, Any], shown: Any) -> list[str]:
    rows = [("person", "generated images", "accuracy", "real validation images", "accuracy")]
    for name, of in [*found["people"].items(), ("all", found["total"])]:
        made, real = percent(of["generated_accuracy"]), percent(of["validation_accuracy"])
        rows.append((name, f"{of['generated']:,}", made, f"{of['validation']:,}", real))
    off = [f"{100 * value:.1f} points for {kind} images" for kind, value in found["calibration"].items()]
    return [
        _table(rows),
        shown("right_person", "Accuracy by person, real and generated"),
        _read(
            f"{found['classifiers']} small classifiers learnt the persons from the real training images; the numbers "
            "are their means. Accuracy is the share of images in which they see the person the image was made for. "
            "Generated images should come near the real ones; much lower means that persons are mixed up."
        ),
        shown("confusion", "Which person the images are named as"),
        _read("Each row is a person, each column whom the classifiers named: 100 on the diagonal is perfect.")
        if "confusion" in found["figures"]
        else "",
        shown("calibration", "Confidence and accuracy"),
        _read(
            "Of images of which the classifier is 80 % sure, 80 % should be right: its line is then the dotted one. "
            f"It is off by {' and '.join(off)}, on average. Points of fewer than ten images are left out."
        )
        if "calibration" in found["figures"]
        else "",
    ]


def _distances(found: dict[str, Any], shown: Any) -> list[str]:
    texture, distances, body = found["texture"], found["distances"], []
    if texture:
        rows = [("beside real validation images", "generated", "real training")]
        sharp = (f"{texture[f'sharpness_{kind}']:.2f}" for kind in ("generated", "real"))
        rows.append(("sharpness (theirs is 1)", *sharp))
        for axis, made in texture["spectra_generated"].items():
            rows.append((f"spectrum along {axis}, dB off", f"{made:.1f}", f"{texture['spectra_real'][axis]:.1f}"))
        rows.append(("images", *(f"{texture['images'][kind]:,}" for kind in ("generated", "training"))))
        body += [_table(rows)]
        body += [shown(f"spectrum_{axis}", f"Power spectra along {axis}") for axis in texture["spectra_generated"]]
        body += [
            _read(
                "Sharpness is how much neighbouring pixels differ: below 1 the images are blurred, far above 1 noisy. "
                "A spectrum says how much of an image changes slowly (left) and fast (right): a curve that falls below "
                "the real ones to the right lacks fine detail. The column of real training images says what is usual."
            )
        ]
    if distances:
        pairs = list(zip(("generated", "real"), ("generated", "real training"), strict=True))
        rows = [("beside real validation images", *(words for _, words in pairs))]
        rows.append(("Fréchet distance", *(f"{distances[f'frechet_{kind}']:.3g}" for kind, _ in pairs)))
        rows.append(("kernel distance [95 %]", *(str(Interval(**distances[f"kernel_{kind}"])) for kind, _ in pairs)))
        for name in distances["neighbourhoods_generated"]:
            both = (f"{Interval(**distances[f'neighbourhoods_{kind}'][name]):.2f}" for kind, _ in pairs)
            rows.append((f"{name} [95 %]", *both))
        rows.append(("images in each set", *[f"{distances['images']:,}"] * 2))
        few = [name for name in found["people"] if name not in distances["people"]]
        counts = sorted({of["images"] for of in distances["people"].values()})
        body += [
            _table(rows),
            shown("precision_recall", "Precision and recall by person"),
            _read(f"By person: {' to '.join(map(str, counts[:1] + counts[1:][-1:]))} images in each set.")
            if counts
            else "",
            _read(f"Too few images for precision and recall by person: {', '.join(few)}.") if few else "",
            _read(
                "Both distances are 0 where two sets of images are alike; what counts is how generated images compare "
                "with other real ones. Precision is the share of generated images that lie among real ones (low: they "
                "look wrong), recall the share of real ones that lie among generated ones (low: these are too alike). "
                "Density and coverage say the same, and mind single odd images less."
            ),
        ]
    return body or [_read("Too few images to tell; the notes say which.")]


def _copies(found: dict[str, Any], shown: Any) -> list[str]:
    copies = found["copies"]
    lines = [f"{percent(copies['generated_within'])} of {found['total']['generated']:,} generated images"]
    if copies["validation_within"] is not None:
        lines.append(
            f"{percent(copies['validation_within'])} of {found['total']['validation']:,} real validation images"
        )
    nearest = sorted(found["nearest"], key=lambda pair: pair["distance"])[:_MOST_ROWS]
    rows = [("generated", "nearest training image", "distance", "in pixels")]
    rows += [(a["generated"], a["training"], f"{a['distance']:.3g}", f"{a['pixel_distance']:.3g}") for a in nearest]
    return [
        f"<p>Suspiciously near to a training image: {', '.join(lines)}.</p>",
        shown("generated_and_nearest", "Generated images above the training images nearest to them"),
        _table(rows),
        _read(
            "Above, generated images; below each the training image most like it. Two that are the same but for noise "
            "are a copy: the model has learnt its images exactly, and looks better in all other numbers than it is. "
            "Real images have near ones, too: what counts is whether generated ones have more."
        ),
    ]


# ---- parts of a page
def _items(texts: Any) -> str:
    return "\n".join(f"<li>{escape(text)}</li>" for text in texts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for place, row in enumerate(rows):
        kind = "td" if place else "th"
        lines.append(f"<tr>{''.join(f'<{kind}>{escape(str(cell))}</{kind}>' for cell in row)}</tr>")
    return f"<div class='scroll'><table>\n{chr(10).join(lines)}\n</table></div>"


def _figure(folder: Path, name: str, words: str) -> str:
    data = b64encode((folder / "figures" / f"{name}.png").read_bytes()).decode()
    return f"<img alt='{escape(words)}' src='data:image/png;base64,{data}'>"


def _read(text: str) -> str:
    return f"<p class='read'>{escape(text)}</p>"
