"""What a denoiser's training goes on from: weights from here or published ones, all kept but the class table's rows."""

import json
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.data.latents import LatentDataModule, LatentDataset
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DDT, DiT
from vavae_tools.diffusion.lora import TARGETS, add_lora, lora_settings
from vavae_tools.diffusion.objectives import FlowMatching, time_shift_of
from vavae_tools.recipes.init_weights import KINDS, StartingWeights, features, read_starting_weights
from vavae_tools.runtime.console import log
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError, join_first
from vavae_tools.runtime.machine import find_device, find_machine
from vavae_tools.training.run import Log

Classes = str | Sequence[int | str | None]
Batch = tuple[Tensor, Tensor, Tensor]  # latents (B, C, h, w), noise, and times (B,)
PROBES = 128  # random projections in all: they estimate the squared move of the predictions to 12 %


def start_from(
    denoiser: DiT | DDT,
    conditioner: ClassConditioner,
    weights: str | Path,
    kind: str | None = None,
    classes: Classes = "new",
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    lora_targets: Sequence[str] = TARGETS,
    latents: LatentDataModule | None = None,
    seed: int = 0,
    log: Log = log,
) -> None:
    """Load weights into a freshly built denoiser and conditioner, in place, and log what was loaded and what not.

    Args:
        weights, kind: see `read_starting_weights`. Of "dit", which predicts noise, patches, blocks and classes are
            kept, the embedding of time and the last linear map start anew.
        classes: "new": rows as in a fresh model; "nearest": see `nearest_classes`; "keep": the rows of the classes of
            the same names, or all rows where names are unknown and the numbers equal; or for each class a published
            label, or its name, or None for a new row. The null row is always the published one.
        lora_rank: above 0 low-rank additions (`lora.add_lora`) and the class table alone are trained.
        latents: what will be trained on; "nearest" needs it.

    Raises:
        UserError: no denoiser, another one than that which was built, or classes that do not exist.
    """
    found = read_starting_weights(weights, kind)
    if found.kind == "dit" and (lora_rank or classes == "nearest"):
        why = f"{found.source} predicts noise, so its last layer starts anew here and predicts nothing yet"
        raise UserError(f"{why}: train all weights (init.lora_rank=0), with init.classes=new or a list of its labels")
    _check_architecture(found, denoiser)
    loaded, anew = _load(found, denoiser)
    if lora_rank:  # before the search for classes, which takes long: what is wrong with these arguments is said at once
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trained = add_lora(denoiser, lora_rank, lora_alpha, lora_targets)
    names = {} if latents is None else {label: name for name, label in latents.folder.people.items()}
    copied = _choose_rows(found, denoiser, conditioner.num_classes, classes, latents, names, seed, log)
    null = _fill_table(conditioner, found, copied, seed)
    said = [
        f"{loaded} tensors matched",
        f"class table: {len(copied)} of {conditioner.num_classes:,} rows copied, {null}",
    ]
    said += [f"anew: {join_first(sorted(anew), 5)}"] if anew else []
    left = [f"{', '.join(found.tables)} (computed here)"] if found.tables else []
    left += [join_first(sorted(found.left), 5)] if found.left else []
    log(f"{found.source} ({KINDS[found.kind]}): {', '.join(said)}, not loaded: {', '.join(left) or 'nothing'}")
    if unknown := [name for name in ("num_heads", "rope") if name not in found.arguments]:
        given = ", ".join(f"{name}={_text(_comparable(denoiser.config)[name])}" for name in unknown)
        log(f"Not told by these weights, so as given: {given}")
    if lora_rank:
        rows = conditioner.embedding_table.weight.numel()
        whole = sum(weight.numel() for weight in denoiser.parameters()) + rows
        targets = ", ".join(lora_settings(denoiser)["targets"])
        log(f"LoRA of rank {lora_rank} on {targets}: {trained + rows:,} of {whole:,} weights are trained")


# ---- fitting and loading


def _check_architecture(found: StartingWeights, denoiser: DiT | DDT) -> None:
    """Raise what differs between the weights and the denoiser that was built, with the overrides that fit."""
    ours, theirs = _comparable(denoiser.config), _comparable(found.arguments)
    if theirs["in_channels"] != ours["in_channels"]:
        channels = f"latents of {theirs['in_channels']} channels, these have {ours['in_channels']}"
        raise UserError(f"{found.source} was trained on {channels}: encode the images with its own autoencoder")
    if theirs.get("learn_sigma"):
        del theirs["learn_sigma"]  # what it says of the variance is left out
    if _hidden(theirs) == _hidden(ours):
        theirs["mlp_ratio"] = ours["mlp_ratio"]  # it may be 2.67 here and 2.6719 by the shapes there
    made = signature((DDT if isinstance(theirs["hidden_size"], tuple) else DiT).__init__).parameters
    told = {name: value for name, value in theirs.items() if name in made and name not in ("input_size", "in_channels")}
    differing = [name for name in told if name in ours and told[name] != ours[name]]
    if differing:
        differences = ", ".join(f"{name} {_text(told[name])} (here {_text(ours[name])})" for name in differing)
        fitting = " ".join(f"model.{name}={_text(value)}" for name, value in told.items())
        other = f"{found.source} is another {KINDS[found.kind]} than was asked for"
        raise UserError(f"{other}: {differences}. It fits model.size=null {fitting}")


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return pairs as tuples; of a wide head two numbers of heads, and one patch."""
    plain = {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in config.items()}
    if isinstance(plain.get("patch_size"), tuple):
        plain["patch_size"] = plain["patch_size"][0]
    if isinstance(plain.get("hidden_size"), tuple) and isinstance(plain.get("num_heads"), int):
        plain["num_heads"] = (plain["num_heads"],) * 2
    return plain


def _hidden(config: Mapping[str, Any]) -> list[int]:
    widths = config["hidden_size"] if isinstance(config["hidden_size"], tuple) else (config["hidden_size"],)
    return [features(width, config["mlp_ratio"], config["swiglu"]) for width in widths]


def _text(value: Any) -> str:
    """Return a value as an override is typed, [1152,2048] or true."""
    return json.dumps(value, separators=(",", ":"))


def _load(found: StartingWeights, denoiser: DiT | DDT) -> tuple[int, list[str]]:
    """Load the weights; return how many tensors were matched, and the names of those that start anew."""
    weights, anew = dict(found.denoiser), []
    if found.kind == "dit":
        anew = [name for name in weights if name.startswith(("t_embedder.", "final_layer.linear."))]
        weights = {name: tensor for name, tensor in weights.items() if name not in anew}
    elif found.arguments.get("learn_sigma") and not denoiser.config.get("learn_sigma"):
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            both = weights[name].unflatten(0, (-1, 2 * denoiser.in_channels))  # (p·p, 2·C, …)
            weights[name] = both[:, : denoiser.in_channels].flatten(0, 1)
    try:
        missing, unknown = denoiser.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # tensors of another shape
        raise UserError(f"{found.source} is of another form: {str(error).splitlines()[1].strip()}") from None
    for names, what in (([name for name in missing if name not in anew], "lacks"), (unknown, "has besides")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{found.source} {what} {names[0]}{more}: it is not whole, or another model")
    return len(weights), anew


# ---- the class table


def _fill_table(conditioner: ClassConditioner, found: StartingWeights, copied: dict[int, int], seed: int) -> str:
    """Copy rows; new ones have a standard deviation of 0.02, as in a fresh model. Return a word about the null row."""
    own = conditioner.embedding_table.weight.data
    rows = 0.02 * Draws(seed, 0, torch.arange(len(own))).normal("class table", own.shape[1])
    for label, theirs in copied.items():
        rows[label] = found.table[theirs].float()
    if conditioner.dropout > 0 and found.null is not None:
        rows[conditioner.num_classes] = found.null.float()
    own.copy_(rows)
    if not conditioner.dropout > 0:
        return "no null row"
    return "the null row kept" if found.null is not None else "a new null row"


def _choose_rows(
    found: StartingWeights,
    denoiser: DiT | DDT,
    number: int,
    classes: Classes,
    latents: LatentDataModule | None,
    names: Mapping[int, str],
    seed: int,
    log: Log,
) -> dict[int, int]:
    """Return {own label: published label} of the rows to copy."""
    if not isinstance(classes, str):
        return _listed(classes, found, latents.num_classes if latents else number, number)
    if classes == "new":
        return {}
    if classes == "keep":
        return _kept(found, names, number)
    if classes != "nearest":
        raise UserError(f"classes={classes!r} is unknown; it is new, nearest, keep or a list of published labels")
    if latents is None or found.null is None:
        lacking = "the latents to train on" if latents is None else f"a null row, which {found.source} has not"
        raise UserError(f"classes=nearest needs {lacking}: choose classes=new, or list the labels")
    nearest = nearest_classes(denoiser, found.table, found.null, latents.train_data, seed)
    published = {label: name for name, label in found.classes.items()}
    log("class  nearest  error, against that of any class")
    for label, match in nearest.items():
        change = 100 * (match.loss / match.loss_of_null - 1)
        of = published.get(match.published, match.published)
        log(f"{names.get(label, label):<5}  {of:>7}  {match.loss:.4f} ({change:+.1f} %)")
    return {label: match.published for label, match in nearest.items()}


def _listed(classes: Sequence[int | str | None], found: StartingWeights, wanted: int, most: int) -> dict[int, int]:
    if len(classes) not in (wanted, most):
        raise UserError(f"classes lists {len(classes)} labels, expected {wanted}: one, or null, for each class here")
    copied = {}
    for own, label in enumerate(classes):
        if isinstance(label, str):
            if label not in found.classes:
                there = ", ".join(list(found.classes)[:5]) or "only labels are known"
                raise UserError(f"classes: the weights have no class {label!r} ({there} …); name a label or null")
            label = found.classes[label]
        if label is not None:
            if label not in range(len(found.table)):
                raise UserError(f"classes: no published label {label}; they go from 0 to {len(found.table) - 1}")
            copied[own] = label
    return copied


def _kept(found: StartingWeights, names: Mapping[int, str], number: int) -> dict[int, int]:
    if found.classes and names:
        copied = {label: found.classes[name] for label, name in names.items() if name in found.classes}
        here, there = (f"{', '.join(list(known)[:3])} …" for known in (names.values(), found.classes))
    else:
        copied = {label: label for label in range(number)} if number == len(found.table) else {}
        here, there = f"{number:,}", f"{len(found.table):,}"
    if not copied:
        none = f"classes=keep: none of the classes here ({here}) is one of the weights' ({there})"
        raise UserError(f"{none}: choose new or nearest, or list the labels")
    return copied


# ---- which of the classes that a denoiser knows explains the latents of a new one best


class Nearest(NamedTuple):
    """The published class that explains a class's latents best, and the loss with it and with the null row."""

    published: int
    loss: float
    loss_of_null: float


def nearest_classes(
    denoiser: DiT | DDT,
    rows: Tensor,
    null: Tensor,
    data: LatentDataset,
    seed: int = 0,
    candidates: int = 8,
    pairs: int = 32,
    batch_size: int = 8,
) -> dict[int, Nearest]:
    """Return own label → the row with which the denoiser's squared error on the latents of that class is smallest.

    All classes share times evenly over the path, each latent with noise that follows from the seed. What the step from
    the null row to each row would change is estimated there: to first order by the error's gradient with respect to the
    conditioning, to second by how much the predictions move (Gauss–Newton, by random projections), since to first order
    a row that changes much promises much. From so far away the second order overstates the move, three times in a
    trained model, so a row is judged by the best part of the step to it. The rows that promise most are then tried.

    Args:
        rows: the published class table, (K, D); null: the row for any class, (D,).
        candidates: how many rows are tried, each on `pairs` of latents with noise and a time.
    """
    device, checkpointing = torch.device(find_device()), denoiser.gradient_checkpointing
    rows, null = rows.float().to(device), null.float().to(device)
    labels = sorted(set(data.labels.tolist()))
    probes = -(-PROBES * batch_size // (len(labels) * pairs))  # for each batch

    path = FlowMatching(time="uniform", time_shift=max(1.0, time_shift_of(denoiser.latent_shape)))
    times = path.sample_time((torch.arange(pairs) + 0.5) / pairs)

    def batches(label: int) -> list[Batch]:
        places = (data.labels == label).nonzero().flatten()
        evenly = torch.linspace(0, len(places) - 1, min(pairs, len(places))).round().long()
        places, rounds = places[evenly], -(-pairs // len(evenly))  # few latents come several times
        latents = data.__getitems__(places.tolist())["latents"].repeat(rounds, 1, 1, 1)[:pairs]  # (pairs, C, h, w)
        draws = [Draws(seed, number, places) for number in range(rounds)]
        noise = torch.cat([each.normal("nearest class", *denoiser.latent_shape) for each in draws])[:pairs]
        return list(zip(*(part.to(device).split(batch_size) for part in (latents, noise, times)), strict=True))

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
                tried = {published: rows[published] for published in promise.argsort()[:candidates].tolist()}
                losses = _losses(denoiser, {**tried, -1: null}, batches(label))
                best = min(tried, key=losses.get)
                found[label] = Nearest(best, losses[best], losses[-1])
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
    return flow.squared_error(prediction, data, noise, t).sum(), prediction


def _slope(
    denoiser: DiT | DDT, null: Tensor, batches: list[Batch], seed: int, probes: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the error's gradient at the null row (D,), and vectors p (D,) with E (p·step)² = a squared move."""
    slope, moves = torch.zeros_like(null), []
    for number, batch in enumerate(batches):
        row = null.clone().requires_grad_()
        with torch.enable_grad():
            error, prediction = _error(denoiser, row, batch)
        slope += torch.autograd.grad(error, row, retain_graph=True)[0]
        samples = torch.arange(len(prediction), device=prediction.device)
        for probe in range(probes):
            signs = Draws(seed, probe, samples).normal(f"probe {number}", *prediction.shape[1:])
            move = torch.autograd.grad(prediction, row, signs.to(prediction.dtype), retain_graph=True)[0]
            moves.append(move / prediction.numel() ** 0.5)
    return slope, moves


@torch.no_grad()
def _losses(denoiser: DiT | DDT, rows: Mapping[int, Tensor], batches: list[Batch]) -> dict[int, float]:
    number = sum(len(data) for data, _, _ in batches)
    return {
        label: sum(_error(denoiser, row, batch)[0].item() for batch in batches) / number for label, row in rows.items()
    }
