"""Parse the name of a repository on the hub: an id, an id@revision or the URL of its page, pinned to a commit."""

import re
from typing import NamedTuple

from pipeline.errors import ConfigError
from pipeline.hub.kinds import Kind

_COMMIT = re.compile("[0-9a-f]{40}")
_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HOST = re.compile(r"(www\.)?(huggingface\.co|hf\.co)/")
_PATH = re.compile(r"[./~$].*|.*/|[^/@]+(/[^/@]+){2,}")


def is_path(source: str) -> bool:
    """Return whether a source can only be a directory: ./sd, ~/sd, /models/sd, a/b/c, sd/."""
    return "://" not in source and not _HOST.match(source) and _PATH.fullmatch(source) is not None


class Address(NamedTuple):
    """A repository at a commit, and the folder in it, or the pattern of its files; "" for all."""

    hub_id: str
    commit: str
    folder: str


def pinned(kind: Kind, source: str, revision: str | None = None) -> Address:
    """Return the id and the commit that a setting, and the one of its revision if it has one, name.

    Raise ConfigError if they name no repository, or no commit; the message gives the present commit of a branch or tag.
    """
    hub_id, written, folder = _parse(kind, source)
    if written and revision and written != revision and _COMMIT.fullmatch(written):
        raise ConfigError(
            f"{kind.setting} and revision give different commits ({written} and {revision}). Remove one of them."
        )
    chosen = written if written and _COMMIT.fullmatch(written) else revision or written
    if chosen and _COMMIT.fullmatch(chosen):
        return Address(hub_id, chosen, folder)
    from pipeline.hub import repository

    commit = repository.commit_of(kind, hub_id, chosen)
    now = f"{chosen or 'main'} is now at {commit}" if commit else "The page on the hub lists commits"
    raise ConfigError(f"{hub_id} needs a commit, because branches and tags can move. {kind.pin}. {now}.")


def _parse(kind: Kind, source: str) -> tuple[str, str | None, str]:
    """Return organisation/name, and the revision and the folder that are written after it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    written = source.strip().rstrip("/")
    address = re.sub(r"/commits?/", "/tree/", written) if "://" in written else written
    if _HOST.match(address):
        address = f"https://{address}"
    try:
        address = address if "://" in address else f"hf://{kind.prefix}{address.removeprefix(kind.prefix)}"
        uri = parse_hf_uri(address, endpoint=constants.ENDPOINT)
    except HfUriError:
        uri = None
    with_folder = kind.type == "dataset" or "://" in written or bool(_HOST.match(written))
    if uri is None or uri.type != kind.type or not _ID.fullmatch(uri.id) or (uri.path_in_repo and not with_folder):
        problem = kind.no_id
        if written.endswith(kind.files):
            problem = kind.no_file
        elif "://" in written:
            problem = f"is not the page of a {kind.noun} on the Hugging Face hub. Download it, and {kind.local}."
        raise ConfigError(f"{kind.setting} = {written!r} {problem}")
    return uri.id, uri.revision, uri.path_in_repo
