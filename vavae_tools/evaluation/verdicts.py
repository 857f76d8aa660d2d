"""Verdicts on a training: a sentence each, with its threshold and what to change next. The thresholds are here."""

from vavae_tools.evaluation.metrics import percent
from vavae_tools.evaluation.reconstructions import ConditionComparison, ReconstructionScores

# Measured on 240 real spectrograms (docs, "Results"), where the source is not named
SHARPNESS = 0.75  # 0.79 after 40 epochs at 128 pixels, 0.71 after 12, which the eye calls blurred
ACCURACY_LOST = 0.02  # below the originals': every recipe lost 0 to 0.4 %, the worst one, too
FRECHET_RATIO = 2.0  # 1.0 to 1.4 with every recipe but the one that failed, which had 5.1
VECTOR_PSNR = 0.2  # dB between own and another's: 0.02 to 0.17 where the latents alone tell the person
TRANSFER = 0.5  # chosen: most; 0 to 0.4 % where the latents alone tell the person (benchmarks/vectors.py)
LOSS_ROSE = 1.05  # chosen: validation's noise is always the same, and 2.1 was measured where 60 images were memorised
KNOBS = "export=best, early_stopping_patience"  # against memorising

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
