"""Sentences that people read have the field's words."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
AVOIDED = (  # what was once said for accuracy, estimated, resume, memorise, enough, image
    r"named (as )?rightly|reckon|gone on with|go(es)? on from|by heart|suffice|elsewhen|the house|\bpictures?\b"
)
FORMER = (  # names that still work, what images in others' data are called, and names of random draws
    r"[\"'|(]pictures?\b|--pictures|\.pictures|\bpictures[=:|]|VAVAE_PICTURES|the mirrored picture"
)


def test_words_are_the_fields():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/pages/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    found = []
    for path in [*texts, *ROOT.glob("vavae_tools/**/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if word := re.search(AVOIDED, re.sub(FORMER, "", line), re.IGNORECASE):
                found.append(f"{path.relative_to(ROOT)}, line {number}: {word[0]}")
    assert not found
