"""Models that a person names by a folder, or by their repository on Hugging Face's hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from vavae_tools.errors import UserError

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def local_folder(
    source: str | Path,
    of: str,
    name: str,
    instead: str,
    patterns: Sequence[str],
    ignored: Sequence[str] = (),
    file: str | None = None,
) -> Path:
    """A path as it is; "owner/name", where no such path is there, as the folder that the hub's repository comes to.

    Args:
        of: whose folder it is, such as "a text encoder", for messages.
        name, instead: what messages say is to be named, and to be done where the hub cannot be reached.
        patterns, ignored: of the files that are fetched, and of those among them that are not.
        file: what a path may be in place of a folder, such as "config.json"; None: it must be a folder.

    Raises:
        UserError: no such path and no name of a repository, or one that cannot be reached.
    """
    path = Path(source)
    if path.is_dir() or (file and path.exists()):
        return path
    is_file = file is not None and path.suffix == Path(file).suffix
    if path.exists() or is_file or not _REPOSITORY.fullmatch(str(source)):
        raise UserError(f"No {f'folder or {file}' if file else 'folder'} {source} of {of}: name {name}")
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(str(source), allow_patterns=list(patterns), ignore_patterns=list(ignored) or None)
        return Path(found)
    except Exception as error:  # no network, no such repository, not allowed: of many classes
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"There is no folder {source}, and the hub's repository of that name cannot be reached ({reason}): "
            f"{instead}"
        ) from None
