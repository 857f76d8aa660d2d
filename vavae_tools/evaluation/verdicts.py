"""Verdicts on a training: a sentence each, with its threshold and what to change next. The thresholds are here."""

from vavae_tools.evaluation.metrics import percent
from vavae_tools.evaluation.reconstructions import ConditionComparison, ReconstructionScores

# Measured on 240 real spectrograms (README, "What to expect")
SHARPNESS = 0.8  # 0.71 after 12 epochs, 0.79 after 40, when nothing else was wrong any more
ACCURACY_LOST = 0.02  # below the originals': 0 to 0.4 % were lost, by the worst recipe too
FRECHET_RATIO = 2.0  # 1.0 to 1.4 with every recipe but the one that failed, which had 5.1
VECTOR_PSNR = 0.2  # dB between own and another's: 0.02 to 0.17 where the latents hold the person already
LOSS_ROSE = 1.05  # chosen: above the 0.1 to 0.4 % by which late validations of a whole training differed

Points = list[tuple[int, float]]  # of step and value


def judge_vavae(scores: ReconstructionScores, vectors: ConditionComparison | None = None) -> str:
    """Return sentences on what `evaluate_vavae` and `compare_conditions` returned, a line each."""
    said = [_sharpness(scores.sharpness)]
    if scores.accuracy is not None:
        found = f"accuracy {percent(scores.accuracy)}, the originals' {percent(scores.real_accuracy)}"
        if scores.real_accuracy - scores.accuracy > ACCURACY_LOST:
            said.append(f"{found}: persons get lost (more than {percent(ACCURACY_LOST)}); a lower kl_weight of 02")
        else:
            said.append(f"{found}: the persons are still there")
    if scores.frechet is not None:
        ratio = scores.frechet / max(scores.real_frechet, 1e-12)
        found = f"Fréchet distance {ratio:.1f} times the originals'"
        more = f"far off (above {FRECHET_RATIO:g}); more epochs of 02, or a lower disc_weight where there is one"
        said.append(f"{found}: {more if ratio > FRECHET_RATIO else f'close (up to {FRECHET_RATIO:g})'}")
    if vectors is not None and vectors.another is not None:
        said.append(_vectors(vectors.own.psnr, vectors.another.psnr))
    return "\n".join(said)


def _sharpness(value: float) -> str:
    found = f"sharpness {value:.2f} of the originals'"
    if value < SHARPNESS:
        return f"{found}: blurred (below {SHARPNESS:g}); more epochs of 02"
    return f"{found}: sharp enough (from {SHARPNESS:g})"


def _vectors(own: float, anothers: float) -> str:
    found = f"{own:.2f} dB own, {anothers:.2f} another's"
    if own - anothers < VECTOR_PSNR:
        why = f"less than {VECTOR_PSNR:g} dB apart: the latents hold the person already"
        return f"the vectors change nothing ({found}, {why}); condition_dim=0 would do, or try a higher kl_weight"
    return f"the vectors carry something of the person ({found}, at least {VECTOR_PSNR:g} dB apart)"


def judge_losses(train: Points, val: Points) -> str:
    """Return a sentence on whether the validation loss rose from its least while the training loss fell."""
    if len(val) < 2 or len(train) < 2:
        return "val/loss: too few validations for a verdict; more max_steps"
    (best, least), (last, now) = min(val, key=lambda point: point[1]), val[-1]
    found = f"val/loss {now:.4g} at step {last:,}, its least {least:.4g} at step {best:,}"
    later = [value for step, value in train if step > best]
    before = [value for step, value in train if step <= best][-len(later) :]  # as many as later, where there are
    falls = bool(later and before) and sum(later) / len(later) < sum(before) / len(before)
    if now > LOSS_ROSE * least and falls:
        return (
            f"{found}, while train/loss fell: it learns the training images by heart (above {LOSS_ROSE:g} times the "
            f"least); max_steps={best}, or more images"
        )
    return f"{found}: no sign of learning by heart (up to {LOSS_ROSE:g} times the least, or train/loss rose, too)"
