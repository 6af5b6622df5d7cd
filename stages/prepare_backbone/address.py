"""Parse the name of a model on the hub: an id, an id@revision or the URL of its page, pinned to a commit."""

import re

from pipeline.errors import ConfigError
from stages.prepare_backbone.selection import CONVERT

_COMMIT = re.compile("[0-9a-f]{40}")
_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HOST = re.compile(r"(www\.)?(huggingface\.co|hf\.co)/")
_PATH = re.compile(r"[./~$].*|.*/|[^/@]+(/[^/@]+){2,}")


def is_path(source: str) -> bool:
    """Return whether a source can only be a directory: ./sd, ~/sd, /models/sd, a/b/c, sd/."""
    return "://" not in source and not _HOST.match(source) and _PATH.fullmatch(source) is not None


def pinned(source: str, revision: str | None) -> tuple[str, str]:
    """Return the id and the commit that prepare_backbone.source and revision name.

    Raise ConfigError if they name no model, or no commit; the message gives the present commit of a branch or tag.
    """
    hub_id, written = _parse(source)
    if written and revision and written != revision and _COMMIT.fullmatch(written):
        raise ConfigError(
            f"prepare_backbone.source and revision give different commits ({written} and {revision}). Remove one of "
            "them."
        )
    chosen = written if written and _COMMIT.fullmatch(written) else revision or written
    if chosen and _COMMIT.fullmatch(chosen):
        return hub_id, chosen
    from stages.prepare_backbone import hub

    commit = hub.commit_of(hub_id, chosen)
    now = f"{chosen or 'main'} is now at {commit}" if commit else "The model's page on the hub lists commits"
    raise ConfigError(
        f"{hub_id} needs a commit, because branches and tags can move. Set prepare_backbone.revision to a commit (40 "
        f"hexadecimal digits). {now}."
    )


def _parse(source: str) -> tuple[str, str | None]:
    """Return organisation/model, and the revision that is written after it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    written = source.strip().rstrip("/")
    address = re.sub(r"/commits?/", "/tree/", written) if "://" in written else written
    if _HOST.match(address):
        address = f"https://{address}"
    try:
        uri = parse_hf_uri(address if "://" in address else f"hf://{address}", endpoint=constants.ENDPOINT)
    except HfUriError:
        uri = None
    if uri is None or uri.type != "model" or not _ID.fullmatch(uri.id) or (uri.path_in_repo and "://" not in address):
        problem = "is neither embedded, nor a directory, nor a hub id. Check the path, or write organisation/model."
        if written.endswith((".safetensors", ".ckpt", ".gguf")):
            problem = f"is a single-file model. {CONVERT}"
        elif "://" in written:
            problem = "is not the page of a model on the Hugging Face hub. Download the model, and set its directory."
        raise ConfigError(f"prepare_backbone.source = {written!r} {problem}")
    return uri.id, uri.revision
