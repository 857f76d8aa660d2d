"""Verdicts on a training and on what it generates: a sentence each, with its threshold and what to change next.

The thresholds are here.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vavae_tools.evaluation.metrics import percent
from vavae_tools.evaluation.reconstructions import ConditionComparison, ReconstructionScores
from vavae_tools.runtime.errors import join_first

if TYPE_CHECKING:
    from vavae_tools.evaluation.augmentation import Gain
    from vavae_tools.evaluation.report import Evaluation

# Measured on 240 real spectrograms (docs, "Results"), where the source is not named
SHARPNESS = 0.75  # 0.79 after 40 epochs at 128 pixels, 0.71 after 12, which the eye calls blurred
ACCURACY_LOST = 0.02  # below the originals': every recipe lost 0 to 0.4 %, the worst one, too
FRECHET_RATIO = 2.0  # 1.0 to 1.4 with every recipe but the one that failed, which had 5.1
VECTOR_PSNR = 0.2  # dB between own and another's: 0.02 to 0.17 where the latents alone tell the person
TRANSFER = 0.5  # chosen: most; 0 to 0.4 % where the latents alone tell the person (benchmarks/vectors.py)
LOSS_ROSE = 1.05  # chosen: validation's noise is always the same, and 2.1 was measured where 60 images were memorised
KNOBS = "export=best, early_stopping_patience"  # against memorising

# Of generated images beside real ones
# (measured: of 720 real spectrograms of 64 pixels 240 train, 240 others stand for generated ones; a blur of 1.2 pixels)
FEWEST = 20  # generated images: of fewer, one that is wrong changes the accuracy by more than WRONG_PERSON
COPIES = 0.05  # more than of real validation images: measured 0 to 0.004, and 0.175 where 60 images were memorised
WRONG_PERSON = 0.05  # below real images' accuracy: chosen; measured 0 with real images, 0.06 with blurred ones
NOISE = 1.25  # sharpness: measured 0.98 to 1.10 of other real images
ALIKE = 0.5  # of real training images' recall: measured 1.4, and 0 of three images a person, ten times each
FAR = 0.1  # precision below real training images': chosen; measured 0.05, blurred 0.26

Points = list[tuple[int, float]]  # of step and value


def judge_vavae(scores: ReconstructionScores, vectors: ConditionComparison | None = None) -> str:
    """Return sentences on what `evaluate_vavae` and `compare_conditions` returned, a line each."""
    said = [_sharpness(scores.sharpness)]
    if scores.accuracy is not None:
        found = f"accuracy {percent(scores.accuracy)}, the originals' {percent(scores.real_accuracy)}"
        if scores.real_accuracy - scores.accuracy > ACCURACY_LOST:
            said.append(f"{found}: persons are lost (more than {percent(ACCURACY_LOST)} below); more epochs")
        else:
            said.append(f"{found}: as good as the originals")
    if scores.frechet is not None:
        ratio = scores.frechet / max(scores.real_frechet, 1e-12)
        found = f"Fréchet distance {ratio:.1f} times the originals'"
        more = f"far off (above {FRECHET_RATIO:g}); more epochs, or a lower disc_weight where there is one"
        said.append(f"{found}: {more if ratio > FRECHET_RATIO else f'close (up to {FRECHET_RATIO:g})'}")
    if scores.transfer is not None and scores.transfer >= TRANSFER:
        found = (
            f"{percent(scores.transfer)} of the images are named as another person whose vector they are decoded with"
        )
        said.append(f"the vectors carry the person: {found} (from {percent(TRANSFER)})")
    elif vectors is not None and vectors.another is not None:
        said.append(_vectors(vectors.own.psnr, vectors.another.psnr))
    return "\n".join(said)


def judge_images(evaluation: "Evaluation", gain: "Gain | None" = None) -> list[str]:
    """Return sentences on generated images, the most important first.

    That is whether they make a classifier better, with a gain; then what is wrong with them and what to change,
    or that nothing is.
    """
    said, total = [gain.verdict] if gain else [], evaluation.total
    if evaluation.missing:
        names = join_first(evaluation.missing)
        said.append(f"a missing person: no generated images of {names}: sample them, too")
    if total.generated < FEWEST:
        return [*said, f"too few images for more of a verdict: {total.generated}, at least {FEWEST}: sample more"]
    wrong, right = [], []
    for is_wrong, sentence in _checked(evaluation):
        (wrong if is_wrong else right).append(sentence)
    if wrong:
        return said + wrong
    about = f" ({total.generated:,} generated and {total.validation:,} real validation images)"
    lacks = "" if total.validation else "; without validation images little can be told: data_split.py --val_ratio 0.2"
    return [*said, ("good: " if total.validation else "") + "; ".join(right) + about + lacks]


def _checked(evaluation: "Evaluation") -> Iterator[tuple[bool, str]]:
    """Yield what was asked of the images, whether the answer is a bad one, the worst first, and a sentence."""
    copies, total, texture, distances = evaluation.copies, evaluation.total, evaluation.texture, evaluation.distances
    near, usual = copies.generated_within, copies.validation_within or 0.0
    found = f"{percent(near)} are suspiciously near to a training image, {percent(usual)} of real validation images"
    if near - usual > COPIES:
        yield True, f"copies: {found} (above {percent(COPIES)} more): train fewer steps (export=best) or on more images"
    else:
        yield False, "no copies"
    if texture:
        found = f"sharpness {texture.sharpness_generated:.2f} of real images'"
        if texture.sharpness_generated < SHARPNESS:
            knob = "fine-tune the VA-VAE longer, or the DiT where the reconstructions are sharp"
            yield True, f"too blurred: {found} (below {SHARPNESS:g}): {knob}"
        elif texture.sharpness_generated > NOISE:
            yield (
                True,
                f"too noisy: {found} (above {NOISE:g}): more num_inference_steps, or train the DiT for more steps",
            )
        else:
            yield False, found
    made, real = total.generated_accuracy, total.validation_accuracy
    if made is not None and real is not None:
        found = f"{percent(made)} are the right person, {percent(real)} of real images"
        if real - made > WRONG_PERSON:
            name, score = min(evaluation.people.items(), key=lambda item: item[1].generated_accuracy)
            worst = f"the worst {name} with {percent(score.generated_accuracy)} of {score.generated}"
            knob = "train the DiT for more steps, or a larger guidance_scale"
            yield True, f"the wrong person: {found} (more than {percent(WRONG_PERSON)} below), {worst}: {knob}"
        else:
            yield False, found
    if distances and distances.neighbourhoods_generated:
        made, real = distances.neighbourhoods_generated, distances.neighbourhoods_real
        recall, usual = made["recall"].value, real["recall"].value
        found = f"recall {recall:.2f}, real training images' {usual:.2f}"
        if recall < ALIKE * usual and made["recall"].high < real["recall"].low:
            yield True, f"too alike: {found} (below {ALIKE:g} times): a lower guidance_scale, or train on more images"
        else:
            yield False, found
        precision, usual = made["precision"].value, real["precision"].value
        found = f"precision {precision:.2f}, real training images' {usual:.2f}"
        if usual - precision > FAR and made["precision"].high < real["precision"].low:
            knob = "train the VA-VAE and the DiT for more steps, or a larger guidance_scale"
            yield True, f"unlike real images: {found} (more than {FAR:g} below): {knob}"
        else:
            yield False, found


def _sharpness(value: float) -> str:
    found = f"sharpness {value:.2f} of the originals'"
    if value < SHARPNESS:
        return f"{found}: blurred (below {SHARPNESS:g}); more epochs"
    return f"{found}: sharp enough (from {SHARPNESS:g})"


def _vectors(own: float, anothers: float) -> str:
    found = f"{own:.2f} dB own, {anothers:.2f} another's"
    if own - anothers < VECTOR_PSNR:
        why = f"less than {VECTOR_PSNR:g} dB apart: the latents alone tell the person"
        return f"the vectors change nothing ({found}, {why}); condition_dim=0 would do"
    return f"the vectors carry something of the person ({found}, at least {VECTOR_PSNR:g} dB apart)"


def memorising_since(train: Points, val: Points) -> int | None:
    """Return the step of the least validation loss where it rose from there as the training loss fell, else None."""
    if not val:
        return None
    best, least = min(val, key=lambda point: point[1])
    later = [value for step, value in train if step > best]
    before = [value for step, value in train if step <= best][-len(later) :]  # as many as later, where there are
    falls = bool(later and before) and sum(later) / len(later) < sum(before) / len(before)
    return best if falls and val[-1][1] > LOSS_ROSE * least else None


def judge_losses(train: Points, val: Points) -> str:
    """Return a sentence on whether the validation loss rose from its least while the training loss fell."""
    if len(val) < 2 or len(train) < 2:
        return "val/loss: too few validations for a verdict; more max_steps"
    (best, least), (last, now) = min(val, key=lambda point: point[1]), val[-1]
    found = f"val/loss {now:.4g} at step {last:,}, its least {least:.4g} at step {best:,}"
    if memorising_since(train, val) is None:
        return f"{found}: no sign of memorising (up to {LOSS_ROSE:g} times the least, or train/loss rose, too)"
    why = f"it memorises the training images (above {LOSS_ROSE:g} times the least)"
    return f"{found}, while train/loss fell: {why}; {KNOBS}, max_steps={best}, or more images"
