"""What a denoiser's training goes on from: weights from here or published ones, with other classes.

All weights are kept but the rows of the class table. What was loaded, what starts anew and what was left is said.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from vavae_tools.data.latents import LatentDataModule
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.ddt import DDT
from vavae_tools.diffusion.lora import TARGETS, add_lora, lora_settings
from vavae_tools.diffusion.transformer import DiT
from vavae_tools.recipes.init_weights import KINDS, StartingWeights, features, read_starting_weights
from vavae_tools.recipes.nearest_classes import Nearest, nearest_classes
from vavae_tools.runtime.console import say
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError

Classes = str | Sequence[int | str | None]
CLASSES = ("new", "nearest", "keep")
SHOWN_CLASSES = 40


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
    say: Callable[[str], None] = say,
) -> None:
    """Load weights into a freshly built denoiser and conditioner, in place, and say what was loaded and what not.

    Args:
        weights: what `read_starting_weights` takes.
        kind: of published weights, "lightningdit", "ddt" or "dit"; None: seen in them. "dit" are those of Peebles &
            Xie, which predict noise at timesteps 0 … 999: their patches, blocks and classes are kept as a beginning,
            the embedding of time and the last linear map start anew.
        classes: "new": rows as in a fresh model; "nearest": of each class the row of the published class whose row
            explains its latents best (`nearest_classes`); "keep": the rows of the classes of the same names, or all
            rows where names are unknown and the numbers equal; or for each class a published label, or its name, or
            None for a new row. The null row is always the published one.
        lora_rank: above 0 the denoiser is frozen and gets low-rank additions, see `lora.add_lora`; they and the class
            table are trained.
        latents: what will be trained on; "nearest" needs it.
        seed: of new rows, of additions, and of the noise in "nearest".

    Raises:
        UserError: the file cannot be read or is no denoiser; it is another one than that which was built (with the
            line of overrides that fits); classes that do not exist.
    """
    found = read_starting_weights(weights, kind)
    if found.kind == "dit" and (lora_rank or classes == "nearest"):
        raise UserError(
            f"{found.source} predicts noise, so its last layer starts anew here and predicts nothing yet: train all "
            "weights (init.lora_rank=0) with init.classes=new, or a list of its labels"
        )
    _check_architecture(found, denoiser)
    loaded, anew = _load(found, denoiser)
    if lora_rank:  # before the search for classes, which takes long: what is wrong with these arguments is said at once
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trained = add_lora(denoiser, lora_rank, lora_alpha, lora_targets)
    copied, how = _choose_rows(found, denoiser, conditioner, classes, latents, seed, say)
    _fill_table(conditioner, found, copied, seed)
    said = [f"{loaded} tensors matched", _said_of_table(found, conditioner, how)]
    if anew:
        said.append(f"anew: {', '.join(_grouped(anew))}")
    said.append(f"not loaded: {_said_of_left(found, denoiser)}")
    say(f"{found.source} ({KINDS[found.kind]}): {', '.join(said)}")
    if unknown := [name for name in ("num_heads", "rope") if name not in found.arguments]:
        given = ", ".join(f"{name}={_text(_comparable(denoiser.config)[name])}" for name in unknown)
        say(f"Not told by these weights, so as given: {given}")
    same = [name for name in _own_names(latents).values() if name in found.classes]
    if classes == "new" and same:
        few = ", ".join(same[:3])
        say(f"{len(same)} classes bear names of the weights' ({few} …): init.classes=keep takes their rows")
    if lora_rank:
        rows = conditioner.embedding_table.weight.numel()
        whole = sum(weight.numel() for weight in denoiser.parameters()) + rows
        targets = lora_settings(denoiser)["targets"]
        say(
            f"LoRA of rank {lora_rank} on {', '.join(targets)}: {trained + rows:,} of {whole:,} weights are trained, "
            "the class table's among them"
        )


# ---- fitting and loading
KEYS = ("hidden_size", "depth", "num_heads", "patch_size", "mlp_ratio", "qk_norm", "swiglu", "rope", "rms_norm")
"""Arguments of a denoiser that are always told."""
MORE_KEYS = ("adaln_shift", "pos_embed", "learn_sigma", "time_embed", "reversed_time")
"""Those that are told where they differ."""


def _check_architecture(found: StartingWeights, denoiser: DiT | DDT) -> None:
    """Say what differs between the weights and the denoiser that was built, and the overrides that fit."""
    ours, theirs = _comparable(denoiser.config), _comparable(found.arguments)
    if theirs["in_channels"] != ours["in_channels"]:
        raise UserError(
            f"{found.source} was trained on latents of {theirs['in_channels']} channels, these have "
            f"{ours['in_channels']}: encode the pictures with the autoencoder that it was trained with"
        )
    if theirs.get("learn_sigma"):
        del theirs["learn_sigma"]  # what it says of the variance is left out
    if _hidden(theirs) == _hidden(ours):
        theirs["mlp_ratio"] = ours["mlp_ratio"]  # it may be 2.67 here and 2.6719 by the shapes there
    told = [name for name in (*KEYS, *MORE_KEYS) if name in theirs]
    differing = [name for name in told if name in ours and theirs[name] != ours[name]]
    if not differing:
        return
    made = DDT if isinstance(theirs["hidden_size"], tuple) else DiT
    defaults = {name: value.default for name, value in signature(made.__init__).parameters.items()}
    telling = [name for name in told if name in KEYS or name in differing or theirs[name] != defaults[name]]
    fitting = [f"model.{name}={_text(theirs[name])}" for name in telling]
    differences = ", ".join(f"{name} {_text(theirs[name])} (here {_text(ours[name])})" for name in differing)
    raise UserError(
        f"{found.source} is another {KINDS[found.kind]} than the denoiser that was asked for: {differences}. It fits "
        f"model.size=null {' '.join(fitting)}"
    )


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Pairs as tuples; of a wide head two numbers of heads, and one patch."""
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
    """As an override is typed.

    >>> _text((1152, 2048)), _text(True)
    ('[1152,2048]', 'true')
    """
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _load(found: StartingWeights, denoiser: DiT | DDT) -> tuple[int, list[str]]:
    """Put the weights into the denoiser; how many tensors were matched, and the names of those that start anew."""
    weights = dict(found.denoiser)
    anew: list[str] = []
    if found.kind == "dit":
        anew = [name for name in weights if name.startswith(("t_embedder.", "final_layer.linear."))]
        weights = {name: tensor for name, tensor in weights.items() if name not in anew}
    elif found.arguments.get("learn_sigma") and not denoiser.config.get("learn_sigma"):
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            both = weights[name].unflatten(0, (-1, 2 * denoiser.in_channels))  # (p·p, 2·C, …)
            weights[name] = both[:, : denoiser.in_channels].flatten(0, 1)
    own = denoiser.state_dict()
    missing = [name for name in own if name not in weights and name not in anew]
    unknown = [name for name in weights if name not in own]
    other = [name for name in weights if name in own and weights[name].shape != own[name].shape]
    for names, what in ((missing, "lacks"), (unknown, "has besides")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{found.source} {what} {names[0]}{more}: it is not whole, or another model")
    if other:
        shapes = tuple(weights[other[0]].shape), tuple(own[other[0]].shape)
        raise UserError(f"{found.source} is of another form: {other[0]} is {shapes[0]}, expected {shapes[1]}")
    denoiser.load_state_dict(weights, strict=False)
    return len(weights), anew


def _said_of_left(found: StartingWeights, denoiser: DiT | DDT) -> str:
    said = []
    if "input_size" in found.arguments and _side(found.arguments) != _side(denoiser.config):
        said.append(
            f"positions, computed here for latents of {_side(denoiser.config)} in place of {_side(found.arguments)}"
        )
    if found.tables:
        own = denoiser.enc_pos_embed if isinstance(denoiser, DDT) else denoiser.pos_embed
        theirs = found.tables.get("pos_embed")
        if theirs is None or own is None:
            why = "computed here"
        elif theirs.shape != own.shape:
            why = f"computed here, for {own.shape[1]} tokens in place of {theirs.shape[-2]}"
        elif not torch.allclose(theirs.float(), own.cpu(), atol=1e-3):
            why = "computed here; pos_embed is another than the fixed one, which is taken"
        else:
            why = "the same, computed here"
        said.append(f"{', '.join(found.tables)} ({why})")
    if found.left:
        said.append(", ".join(_grouped(found.left)))
    return ", ".join(said) or "nothing"


def _side(config: Mapping[str, Any]) -> str:
    size = config["input_size"]
    return "×".join(map(str, (size, size) if isinstance(size, int) else size))


def _grouped(names: Sequence[str], most: int = 6) -> list[str]:
    """
    >>> _grouped(["opt", "a.b.1", "a.b.2"], most=1)
    ['opt', 'a.b.* (2)']
    """
    if len(names) <= most:
        return list(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:2]) if name.count(".") > 1 else name, []).append(name)
    return [members[0] if len(members) == 1 else f"{begin}.* ({len(members)})" for begin, members in groups.items()]


# ---- the class table
def _fill_table(conditioner: ClassConditioner, found: StartingWeights, copied: dict[int, int], seed: int) -> None:
    """New rows are normal with a standard deviation of 0.02, as in a fresh model."""
    own = conditioner.embedding_table.weight.data
    rows = 0.02 * Draws(seed, 0, torch.arange(len(own))).normal("class table", own.shape[1])
    for label, theirs in copied.items():
        rows[label] = found.table[theirs].float()
    if conditioner.dropout > 0 and found.null is not None:
        rows[conditioner.num_classes] = found.null.float()
    own.copy_(rows)


def _said_of_table(found: StartingWeights, conditioner: ClassConditioner, how: str) -> str:
    null = "without a null row"
    if conditioner.dropout > 0:
        null = "the null row kept" if found.null is not None else "a new null row"
    return f"class table {how} ({conditioner.num_classes:,} classes, were {len(found.table):,}; {null})"


def _own_names(latents: LatentDataModule | None) -> dict[int, str]:
    return {} if latents is None else {label: name for name, label in latents.folder.people.items()}


def _choose_rows(
    found: StartingWeights,
    denoiser: DiT | DDT,
    conditioner: ClassConditioner,
    classes: Classes,
    latents: LatentDataModule | None,
    seed: int,
    say: Callable[[str], None],
) -> tuple[dict[int, int], str]:
    """{own label: published label} of the rows to copy, and a word for it."""
    number, names = conditioner.num_classes, _own_names(latents)
    if not isinstance(classes, str):
        copied = _listed(classes, found, latents.num_classes if latents else number, number)
        return copied, f"anew but for {len(copied)} copied rows" if len(copied) < number else "copied as listed"
    if classes == "new":
        return {}, "anew"
    if classes == "keep":
        copied = _kept(found, names, number)
        new = number - len(copied)
        return copied, "kept" if not new else f"kept, with {new} new rows"
    if classes != "nearest":
        raise UserError(f"classes={classes!r} is unknown; it is {', '.join(CLASSES)} or a list of published labels")
    if latents is None or found.null is None:
        lacking = "the latents to train on" if latents is None else f"a null row, which {found.source} has not"
        raise UserError(f"classes=nearest needs {lacking}: choose classes=new, or list the labels")
    nearest = nearest_classes(denoiser, found.table, found.null, latents.train_data, seed)
    _say_nearest(nearest, names, {label: name for name, label in found.classes.items()}, say)
    copied = {label: match.published for label, match in nearest.items()}
    new = number - len(copied)
    return copied, "copied from the nearest" + (f", with {new} new rows for labels without latents" if new else "")


def _listed(classes: Sequence[int | str | None], found: StartingWeights, wanted: int, most: int) -> dict[int, int]:
    if len(classes) not in (wanted, most):
        raise UserError(f"classes lists {len(classes)} labels, expected {wanted}: one, or null, for each class here")
    copied = {}
    for own, label in enumerate(classes):
        if label is None:
            continue
        if isinstance(label, str):
            if label not in found.classes:
                there = ", ".join(list(found.classes)[:5]) or "only labels are known"
                raise UserError(f"classes: the weights have no class {label!r} ({there} …); name a label or null")
            label = found.classes[label]
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(found.table):
            raise UserError(f"classes: no published label {label}; they go from 0 to {len(found.table) - 1}")
        copied[own] = label
    return copied


def _kept(found: StartingWeights, names: dict[int, str], number: int) -> dict[int, int]:
    if found.classes and names:
        copied = {label: found.classes[name] for label, name in names.items() if name in found.classes}
        if not copied:
            here, there = (", ".join(list(known)[:3]) for known in (names.values(), found.classes))
            raise UserError(
                f"classes=keep: none of the classes here ({here} …) is one of the weights' ({there} …): choose new or "
                "nearest, or list the labels"
            )
        return copied
    if number != len(found.table):
        raise UserError(
            f"classes=keep: the weights have {len(found.table):,} classes, here are {number:,}: choose new or nearest, "
            "or list the labels"
        )
    return {label: label for label in range(number)}


def _say_nearest(
    nearest: Mapping[int, Nearest], names: Mapping[int, str], published: Mapping[int, str], say: Callable[[str], None]
) -> None:
    wide = max([5, *(len(names.get(label, str(label))) for label in nearest)])
    say(f"{'class':<{wide}}  nearest  error, against that of any class")
    for label, found in list(nearest.items())[:SHOWN_CLASSES]:
        change = 100 * (found.loss / found.loss_of_null - 1)
        of = published.get(found.published, found.published)
        say(f"{names.get(label, label):<{wide}}  {of:>7}  {found.loss:.4f} ({change:+.1f} %)")
    if len(nearest) > SHOWN_CLASSES:
        say(f"… and {len(nearest) - SHOWN_CLASSES} more")
