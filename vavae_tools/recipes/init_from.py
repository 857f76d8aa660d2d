"""What a denoiser's training starts from: weights from here or published ones, all kept but the class table's rows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.data.latents import LatentDataModule
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DDT, DiT
from vavae_tools.diffusion.lora import add_lora
from vavae_tools.diffusion.objectives import FlowMatching, time_shift_of
from vavae_tools.pipelines.classes import load_pipeline
from vavae_tools.published.denoisers import KINDS, StartingWeights, read_published
from vavae_tools.recipes.base import InitFrom
from vavae_tools.runtime.console import log
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError, check_known, join_first
from vavae_tools.runtime.files import load_weights, read_weights, refuse_not_finite
from vavae_tools.runtime.machine import find_device, find_machine
from vavae_tools.training.run import Log

Classes = str | Sequence[int | str | None]
Batch = tuple[Tensor, Tensor, Tensor]  # latents (B, C, h, w), noise, and times (B,)
BATCH, PROBES = 8, 128  # latents at once; random projections in all, which estimate a squared move to 12 %


def start_from(
    denoiser: DiT | DDT,
    conditioner: ClassConditioner,
    init: InitFrom,
    latents: LatentDataModule | None = None,
    seed: int = 0,
    log: Log = log,
    reversed_time: bool | None = None,
) -> None:
    """Load weights into a freshly built denoiser and conditioner, in place, and log what was loaded and what not.

    Of DiT's own weights, which predict noise, patches, blocks and classes are kept, the embedding of time and the last
    linear map start anew. Rows of the class table are as in a fresh model ("new"), or those that `nearest_classes`
    finds, or ("keep") of the classes of the same names, or all where names are unknown and the numbers equal; or
    `classes` lists a published label, or its name, or None, for each class. The null row is always kept.

    Args:
        reversed_time: as was asked for; None: where the weights' names do not tell it, their predictions do.
    """
    people = latents.folder.people if latents else {}
    found = read_fitting_weights(denoiser, conditioner, init, people)
    loaded, anew = _load(found, denoiser)
    untold = [name for name in ("num_heads", "rope") if name not in found.arguments]
    if not time_is_told(found, denoiser, reversed_time):
        untold.append("reversed_time")
    if init.lora_rank:  # before the search for classes, which takes long: what is wrong with it is said at once
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trained = add_lora(denoiser, init.lora_rank, init.lora_alpha, init.lora_targets)
    copied = _rows_by_name(found, init.classes, people, conditioner.num_classes)
    if copied is None:
        copied = _nearest_rows(found, denoiser, latents, seed, log)
    null = _fill_table(conditioner, found, copied, seed)
    said = f"{loaded} tensors matched, class table: {len(copied)} of {conditioner.num_classes:,} rows copied, {null}"
    said += f", anew: {join_first(sorted(anew), 5)}" if anew else ""
    log(f"{found.source} ({KINDS[found.kind]}): {said}, not loaded: {found.left or 'nothing'}")
    if untold:
        given = ", ".join(f"{name}={_text(_comparable(denoiser.config)[name])}" for name in untold)
        log(f"Not told by these weights, so as given: {given}")
    if init.lora_rank:
        rows = conditioner.embedding_table.weight.numel()
        whole = sum(weight.numel() for weight in denoiser.parameters()) + rows
        targets = ", ".join(denoiser.lora["targets"])
        log(f"LoRA of rank {init.lora_rank} on {targets}: {trained + rows:,} of {whole:,} weights are trained")


def read_fitting_weights(
    denoiser: DiT | DDT, conditioner: ClassConditioner, init: InitFrom, people: Mapping[str, int]
) -> StartingWeights:
    """Read what a denoiser starts from, or say why that does not fit it and the people here."""
    found = read_starting_weights(init.weights, init.kind)
    if found.kind == "dit" and (init.lora_rank or init.classes == "nearest"):
        why = f"{found.source} predicts noise, so its last layer starts anew here and predicts nothing yet"
        raise UserError(f"{why}: train all weights (init.lora_rank=0), with init.classes=new or a list of its labels")
    _check_architecture(found, denoiser)
    _rows_by_name(found, init.classes, people, conditioner.num_classes)
    return found


# ---- reading, fitting and loading
def read_starting_weights(source: str | Path, kind: str | None = None) -> StartingWeights:
    """Read what `load_pipeline` reads (of a checkpoint the averaged weights), or published weights of a `kind`.

    Those are a `.pt` or `.safetensors`, bare or under "ema" or "model"; their kind is seen in names and shapes.
    """
    source = Path(source)
    if kind is not None:
        check_known("kind of weights", kind, KINDS, " (null: seen in them)")
    found = _read_starting_weights(source, kind)
    if kind not in (None, found.kind):
        raise UserError(f"{source} is a {KINDS[found.kind]}, not a {KINDS[kind]}: set init.kind={found.kind}")
    refuse_not_finite({**found.denoiser, "class table": found.table, "null row": found.null}, source)
    return found


def _read_starting_weights(source: Path, kind: str | None) -> StartingWeights:
    if not source.is_dir():
        saved = read_weights(source)
        if not isinstance(saved.get("trainer"), dict) and "denoiser_config" not in saved.get("hyper_parameters", {}):
            return read_published(source, saved, kind)
    pipe = load_pipeline(source, with_autoencoder=False)
    rows, number = pipe.conditioner.embedding_table.weight.data, pipe.conditioner.num_classes
    kind = "ddt" if isinstance(pipe.denoiser, DDT) else "lightningdit"
    weights, null = pipe.denoiser.state_dict(), rows[number] if len(rows) > number else None
    return StartingWeights(source, kind, pipe.denoiser.config, weights, rows[:number], null, pipe.config.people or {})


def _check_architecture(found: StartingWeights, denoiser: DiT | DDT) -> None:
    """Raise what differs between the weights and the denoiser that was built, with the overrides that fit."""
    ours, theirs = _comparable(denoiser.config), _comparable(found.arguments)
    if theirs["in_channels"] != ours["in_channels"]:
        channels = f"latents of {theirs['in_channels']} channels, these have {ours['in_channels']}"
        raise UserError(f"{found.source} was trained on {channels}: encode the images with its own autoencoder")
    told = told_arguments(found)
    differing = [name for name in told if name in ours and told[name] != ours[name]]
    if differing:
        differences = ", ".join(f"{name} {_text(told[name])} (here {_text(ours[name])})" for name in differing)
        fitting = " ".join(f"model.{name}={_text(value)}" for name, value in told.items())
        other = f"{found.source} is another {KINDS[found.kind]} than was asked for"
        raise UserError(f"{other}: {differences}. It fits model.size=null {fitting}")


def told_arguments(found: StartingWeights) -> dict[str, Any]:
    """Return what weights tell of the model that they fit, as keys of `model`."""
    others = ("input_size", "in_channels", "learn_sigma")
    told = _comparable(found.arguments)
    return {name: value for name, value in told.items() if not name.startswith("_") and name not in others}


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return pairs as tuples, of a wide head also the numbers of heads."""
    plain = {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in config.items()}
    if isinstance(plain.get("hidden_size"), tuple) and isinstance(plain.get("num_heads"), int):
        plain["num_heads"] = (plain["num_heads"],) * 2
    return plain


def _text(value: Any) -> str:
    """Return a value as an override is typed, [1152,2048] or true."""
    return json.dumps(value, separators=(",", ":"))


def _load(found: StartingWeights, denoiser: DiT | DDT) -> tuple[int, list[str]]:
    """Load the weights; return how many tensors were matched, and the names of those that start anew."""
    weights, anew = dict(found.denoiser), []
    if found.kind == "dit":
        anew = [name for name in weights if name.startswith(("t_embedder.", "final_layer.linear."))]
        weights = {name: tensor for name, tensor in weights.items() if name not in anew}
    elif found.arguments.get("learn_sigma") and not denoiser.config.get("learn_sigma"):  # the variance's half is left
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            both = weights[name].unflatten(0, (-1, 2 * denoiser.in_channels))  # (p·p, 2·C, …)
            weights[name] = both[:, : denoiser.in_channels].flatten(0, 1)
    load_weights(denoiser, weights, found.source, anew=tuple(anew))
    return len(weights), anew


def time_is_told(found: StartingWeights, denoiser: DiT | DDT, reversed_time: bool | None) -> bool:
    """Return whether names, or else predictions, tell the direction of time; raise where it is the other one.

    The denoiser has these weights, or is on the device "meta". What is asked for is not measured.
    """
    if found.kind != "lightningdit" or "reversed_time" in found.arguments:
        return True
    if reversed_time is not None:
        return False
    if denoiser.device.type == "meta":
        denoiser = type(denoiser).from_config(denoiser.config)
        _load(found, denoiser)
    measured = _time_of(denoiser, (found.table.mean(0) if found.null is None else found.null).float())
    if measured > 0.12:
        found_out = f"{found.source} predicts noise − data, as weights do whose t = 1 is noise ({measured:.2f})"
        raise UserError(f"{found_out}: set model.reversed_time=true, or false where that is wrong")
    return measured < -0.12


@torch.no_grad()
def _time_of(denoiser: DiT, null: Tensor) -> float:
    """Return how the raw prediction at noise correlates with it, on average over the times from 0 to 1.

    A network moves noise towards data. One that was trained with t = 1 at the data predicts data − noise and comes out
    below 0, at any time, one with t = 1 at the noise above; of random weights it is near 0. It takes no data: errors on
    latents of another autoencoder than the network was trained with say nothing.
    """
    noise = Draws(0, 0, torch.arange(2 * BATCH)).normal("direction of time", *denoiser.latent_shape)
    cosines = []
    for time in torch.linspace(0, 1, 5):
        out = denoiser.predict(noise, time.expand(len(noise)), null.expand(len(noise), -1))[:, : denoiser.in_channels]
        cosines.append(F.cosine_similarity((out - out.mean(0)).flatten(), noise.flatten(), dim=0).item())
    return sum(cosines) / len(cosines)


# ---- the class table
def _fill_table(conditioner: ClassConditioner, found: StartingWeights, copied: dict[int, int], seed: int) -> str:
    """Copy rows; new ones have a standard deviation of 0.02, as in a fresh model. Return a word about the null row."""
    own = conditioner.embedding_table.weight.data
    rows = 0.02 * Draws(seed, 0, torch.arange(len(own))).normal("class table", own.shape[1])
    for label, theirs in copied.items():
        rows[label] = found.table[theirs].float()
    kept = conditioner.dropout > 0 and found.null is not None
    if kept:
        rows[conditioner.num_classes] = found.null.float()
    own.copy_(rows)
    return "the null row kept" if kept else "a new null row" if conditioner.dropout > 0 else "no null row"


def _rows_by_name(
    found: StartingWeights, classes: Classes, people: Mapping[str, int], number: int
) -> dict[int, int] | None:
    """Return {own label: published label} of the rows to copy, for a table of `number` classes; None: the nearest."""
    if not isinstance(classes, str):
        return _listed(classes, found, max(people.values()) + 1 if people else number, number)
    if classes == "new":
        return {}
    if classes == "keep":
        return _kept(found, {label: name for name, label in people.items()}, number)
    if classes != "nearest":
        raise UserError(f"classes={classes!r} is unknown; it is new, nearest, keep or a list of published labels")
    if not people or found.null is None:
        lacking = "the latents to train on" if not people else f"a null row, which {found.source} has not"
        raise UserError(f"classes=nearest needs {lacking}: choose classes=new, or list the labels")
    return None


def _nearest_rows(
    found: StartingWeights, denoiser: DiT | DDT, latents: LatentDataModule, seed: int, log: Log
) -> dict[int, int]:
    names = {label: name for name, label in latents.folder.people.items()}
    nearest = nearest_classes(denoiser, found.table, found.null, latents.train_data, seed)
    published = {label: name for name, label in found.classes.items()}
    log("class  nearest  error, against that of any class")
    for label, match in nearest.items():
        change = 100 * (match.loss / match.loss_of_null - 1)
        of = published.get(match.published, match.published)
        log(f"{names.get(label, label):<5}  {of:>7}  {match.loss:.4f} ({change:+.1f} %)")
    return {label: match.published for label, match in nearest.items()}


def _listed(classes: Classes, found: StartingWeights, wanted: int, most: int) -> dict[int, int]:
    if len(classes) not in (wanted, most):
        raise UserError(f"classes lists {len(classes)} labels, expected {wanted}: one, or null, for each class here")
    copied = {own: found.classes.get(label, label) for own, label in enumerate(classes) if label is not None}
    for own, label in copied.items():
        if isinstance(label, str) and label.isdecimal():  # as it was typed
            copied[own] = label = int(label)
        if isinstance(label, str):
            there = ", ".join(list(found.classes)[:5]) or "only labels are known"
            raise UserError(f"classes: the weights have no class {label!r} ({there} …); name a label or null")
        if label not in range(len(found.table)):
            raise UserError(f"classes: no published label {label}; they go from 0 to {len(found.table) - 1}")
    return copied


def _kept(found: StartingWeights, names: Mapping[int, str], number: int) -> dict[int, int]:
    if found.classes and names:
        copied = {label: found.classes[name] for label, name in names.items() if name in found.classes}
        here, there = join_first(names.values()), join_first(found.classes)
    else:
        copied = {label: label for label in range(number)} if number == len(found.table) else {}
        here, there = f"{number:,}", f"{len(found.table):,}"
    if not copied:
        raise UserError(f"classes=keep: none of the classes here ({here}) is one of the weights' ({there}): list them")
    return copied


# ---- which of the classes that a denoiser knows explains the latents of a new one best
class Nearest(NamedTuple):
    published: int
    loss: float
    loss_of_null: float


def nearest_classes(
    denoiser: DiT | DDT, rows: Tensor, null: Tensor, data: Any, seed: int = 0, candidates: int = 8, pairs: int = 32
) -> dict[int, Nearest]:
    """Return own label → the row with which the denoiser's squared error on that class's latents is smallest.

    All classes share times evenly over the path, each latent with noise that follows from the seed. What the step from
    the `null` row (D,) to each of `rows` (K, D) would change is estimated: to first order by the error's gradient with
    respect to the conditioning, to second by how much the predictions move (Gauss–Newton, by random projections), since
    to first order a row that changes much promises much. From so far away the second order overstates the move, three
    times in a trained model, so a row is judged by the best part of the step to it. The `candidates` that promise most
    are then tried, each on `pairs` of latents, of the `LatentDataset` data, with noise and a time.
    """
    device, checkpointing = torch.device(find_device()), denoiser.gradient_checkpointing
    rows, null = rows.float().to(device), null.float().to(device)
    labels = sorted(set(data.labels.tolist()))
    probes = -(-PROBES * BATCH // (len(labels) * pairs))  # for each batch
    path = FlowMatching(time="uniform", time_shift=max(1.0, time_shift_of(denoiser.latent_shape)))
    times = path.sample_time((torch.arange(pairs) + 0.5) / pairs)

    def batches(label: int) -> list[Batch]:
        places = (data.labels == label).nonzero().flatten()
        evenly = torch.linspace(0, len(places) - 1, min(pairs, len(places))).round().long()
        places, rounds = places[evenly], -(-pairs // len(evenly))  # few latents come several times
        latents = data.get_batch(places.tolist())["latents"].repeat(rounds, 1, 1, 1)[:pairs]  # (pairs, C, h, w)
        draws = [Draws(seed, number, places) for number in range(rounds)]
        noise = torch.cat([each.normal("nearest class", *denoiser.latent_shape) for each in draws])[:pairs]
        return list(zip(*(part.to(device).split(BATCH) for part in (latents, noise, times)), strict=True))

    denoiser.to(device).enable_gradient_checkpointing()  # a large model's activations have to fit beside its weights
    try:
        half = torch.autocast(device.type, torch.bfloat16, enabled=find_machine().kind == "ampere")
        with half, tqdm(total=2 * len(labels), desc="nearest classes", disable=None) as bar:
            slopes, moved = {}, []
            for label in labels:
                slopes[label], moves = _slope(denoiser, null, batches(label), seed, probes)
                moved += moves
                bar.update()
            steps = rows - null  # (K, D)
            bend = pairs * (steps @ torch.stack(moved, dim=1)).square().mean(1)  # (K,): the squared move of predictions
            found = {}
            for label in labels:
                slope = steps @ slopes[label]  # (K,)
                part = (-slope / (2 * bend + 1e-12)).clamp(0, 1)  # of the step to each row, the best one
                promise = part * slope + part.square() * bend  # the change of the error: the smaller the better
                tried, of_label = promise.argsort()[:candidates].tolist(), batches(label)
                losses = {published: _loss(denoiser, rows[published], of_label) for published in tried}
                best = min(losses, key=losses.get)
                found[label] = Nearest(best, losses[best], _loss(denoiser, null, of_label))
                bar.update()
        return found
    finally:
        denoiser.to("cpu")
        if not checkpointing:
            denoiser.disable_gradient_checkpointing()


def _error(denoiser: DiT | DDT, row: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the summed squared error of a batch, all of it with one row (D,) as conditioning, and the prediction."""
    data, noise, t = batch
    flow = FlowMatching(cosine_weight=0)
    prediction = denoiser(flow.add_noise(data, noise, t), t, row.expand(len(data), -1))
    return (prediction.float() - flow.target(data, noise, t)).square().flatten(1).mean(1).sum(), prediction


@torch.enable_grad()
def _slope(denoiser: DiT | DDT, null: Tensor, batches: list[Batch], seed: int, probes: int) -> tuple[Tensor, list]:
    """Return the error's gradient at the null row (D,), and vectors p (D,) with E (p·step)² = a squared move."""
    slope, moves = torch.zeros_like(null), []
    for number, batch in enumerate(batches):
        row = null.clone().requires_grad_()
        error, prediction = _error(denoiser, row, batch)
        slope += torch.autograd.grad(error, row, retain_graph=True)[0]
        samples = torch.arange(len(prediction), device=prediction.device)
        for probe in range(probes):
            signs = Draws(seed, probe, samples).normal(f"probe {number}", *prediction.shape[1:])
            move = torch.autograd.grad(prediction, row, signs.to(prediction.dtype), retain_graph=True)[0]
            moves.append(move / prediction.numel() ** 0.5)
    return slope, moves


@torch.no_grad()
def _loss(denoiser: DiT | DDT, row: Tensor, batches: list[Batch]) -> float:
    return sum(_error(denoiser, row, batch)[0].item() for batch in batches) / sum(len(data) for data, *_ in batches)
