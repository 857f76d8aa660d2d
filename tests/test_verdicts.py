"""Verdicts after training: which side of a threshold, and what to change next."""

import pytest

from vavae_tools.evaluation.reconstructions import ConditionComparison, ConditionScore, ReconstructionScores
from vavae_tools.evaluation.verdicts import judge_losses, judge_vavae, memorising_since
from vavae_tools.runtime.errors import UserError
from vavae_tools.training.curves import judge_training


@pytest.mark.parametrize(
    ("sharp", "verdict"),
    [
        (0.57, "sharpness 0.57 of the originals': blurred (below 0.75); more epochs"),
        (0.75, "sharpness 0.75 of the originals': sharp enough (from 0.75)"),
    ],
)
def test_sharpness_alone(sharp, verdict):
    assert judge_vavae(ReconstructionScores(9, 30.0, 0.9, sharp)) == verdict


@pytest.mark.parametrize(
    ("scores", "sentences"),
    [
        (
            (0.5, 0.75, 6.0, 2.0),
            ["persons are lost (more than 2.0 % below)", "3.0 times the originals': far off (above 2)"],
        ),
        ((0.75, 0.75, 4.0, 2.0), ["as good as the originals", "2.0 times the originals': close (up to 2)"]),
    ],
)
def test_what_a_classifier_says(scores, sentences):
    lines = judge_vavae(ReconstructionScores(9, 30.0, 0.9, 1.0, *scores)).splitlines()
    assert len(lines) == 3 and all(sentence in line for sentence, line in zip(sentences, lines[1:], strict=True))


@pytest.mark.parametrize(
    ("another", "sentence"),
    [
        (19.66, "the vectors change nothing (19.70 dB own, 19.66 another's, less than 0.2 dB apart: "),
        (18.0, "the vectors carry something of the person (19.70 dB own, 18.00 another's, at least 0.2 dB apart)"),
        (None, None),
    ],
)
def test_what_the_vectors_carry(another, sentence):
    own, other = ConditionScore(0.1, 19.7), None if another is None else ConditionScore(0.1, another)
    said = judge_vavae(
        ReconstructionScores(9, 30.0, 0.9, 1.0), ConditionComparison(9, own, other, own, {})
    ).splitlines()
    assert len(said) == (1 if sentence is None else 2) and (sentence is None or said[1].startswith(sentence))


@pytest.mark.parametrize(("transfer", "carries"), [(0.5, True), (0.49, False)])
def test_vectors_that_make_another_person(transfer, carries):
    scores = ReconstructionScores(9, 30.0, 0.9, 1.0, transfer=transfer)
    own = ConditionScore(0.1, 20.0)
    said = judge_vavae(scores, ConditionComparison(9, own, own, own, {})).splitlines()[-1]
    assert said.startswith("the vectors carry the person: 50.0 % of" if carries else "the vectors change nothing")


FALLS, RISES = [(i, 1 - i / 100) for i in range(40)], [(i, 1 + i / 100) for i in range(40)]


@pytest.mark.parametrize(
    ("train", "val", "sentence"),
    [
        (
            FALLS,
            [(9, 2.0), (19, 1.0), (39, 1.06)],
            "memorises the training images (above 1.05 times the least); "
            "export=best, early_stopping_patience, max_steps=19, or more images",
        ),
        (FALLS, [(9, 2.0), (19, 1.0), (39, 1.04)], "no sign of memorising"),
        (RISES, [(9, 2.0), (19, 1.0), (39, 1.06)], "no sign of memorising"),
        (FALLS, [(39, 1.0)], "too few validations for a verdict"),
        ([], [], "too few validations for a verdict"),
    ],
)
def test_a_validation_loss_that_rose(train, val, sentence):
    assert sentence in judge_losses(train, val)


def test_nothing_is_memorised_where_nothing_validates():
    assert memorising_since(FALLS, []) is None
    assert memorising_since(FALLS, [(9, 2.0), (19, 1.0), (39, 1.06)]) == 19


def test_the_losses_of_a_run_are_read_from_its_log(tmp_path):
    with pytest.raises(UserError, match="No curves in"):
        judge_training(tmp_path)
    folder = tmp_path / "lightning_logs" / "version_0"
    folder.mkdir(parents=True)
    rows = ["step,train/loss,val/loss", *(f"{i},{1 - i / 10}," for i in range(8)), "3,,1", "7,,2"]
    (folder / "metrics.csv").write_text("\n".join(rows))
    assert judge_training(tmp_path).startswith("val/loss 2 at step 7, its least 1 at step 3, while train/loss fell")
