"""A repository on the Hugging Face hub: its files in the hub client's own cache, each compared with the hub's hash.

The client (huggingface_hub) downloads, resumes, and shares its cache with other tools, but compares no hashes. They are
compared here, on every run, so changes on the disk are noticed as well. The hub gives the SHA-256 of large files and
git's SHA-1 of small ones, and the cache names its blobs by them, so they can be checked offline. Files are fetched one
at a time, in the main thread, so that Ctrl-C stops at once.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import text
from pipeline.errors import DataError, PipelineError
from pipeline.hub import errors
from pipeline.hub.kinds import Kind
from pipeline.io import atomic, system_errors
from pipeline.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)

_HASH = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")


class Repository:
    """A model or data set at a commit; `sizes` are its files, path with "/" between the parts -> bytes.

    `listed` is False if only the files in the cache are known.
    """

    def __init__(self, kind: Kind, hub_id: str, revision: str, listings: Path) -> None:
        """List the repository's files, and keep the list in the folder `listings`.

        If the hub cannot be reached, use the list of an earlier run, so that the same files are chosen; or else the
        files of the commit in the cache. Raise DataError if neither has it, or access is refused.
        """
        self.kind, self.hub_id, self.revision = kind, hub_id, revision
        self.title = f"{hub_id} at {revision[:12]}"
        self.sizes: dict[str, int] = {}
        self._hashes: dict[str, str] = {}
        self._unreachable: DataError | None = None
        self.listed = True
        prefix = kind.prefix.replace("/", "--")
        kept = listings / f"{prefix}{hub_id.replace('/', '--')}-{revision}.json"
        try:
            with _quiet_client():
                self._list()
            kept.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_json(kept, {"sizes": self.sizes, "hashes": self._hashes})
        except PipelineError:
            raise
        except Exception as error:  # the hub's client raises many unrelated types
            refusal = errors.in_words(error, kind, hub_id, revision)
            if not errors.is_unreachable(error) or system_errors.status(self.folder) is None:
                raise refusal from None
            self._unreachable = refusal
            self._list_without_hub(kept)
            log.info("%s: the hub cannot be reached; using cached files", hub_id)

    def read(self, name: str) -> Path:
        """Return the path of a small file, downloaded if it is not in the cache."""
        with _quiet_client():
            return self._fetch_checked(name, None)[0]

    def fetch(self, names: Sequence[str]) -> dict[str, tuple[Path, str]]:
        """Download missing files, compare all with the hub's hashes, and return each one's absolute path and SHA-256.

        Raise DataError if a file cannot be fetched, or arrives with other bytes than the hub lists.
        """
        self._remove_leftovers()
        missing = [name for name in names if not (self.folder / name).exists()]
        size = sum(self.sizes[name] for name in missing)
        self._check_room(size)
        if missing:
            log.info("%s: %d files to download, %s", self.title, len(missing), text.size(size))
        found: dict[str, tuple[Path, str]] = {}
        with _quiet_client(), progress_bar(size, f"download {self.hub_id}", "B") as bar:
            try:
                for name in names:
                    before = bar.n
                    found[name] = self._fetch_checked(name, bar)
                    if name in missing:
                        bar.update(before + self.sizes[name] - bar.n)  # less if another revision had the same file
            except BaseException:
                bar.close()  # so that messages start on their own line
                if missing:
                    kept = sum(name in missing for name in found)
                    log.info("%d of these %d files are complete, and are kept in %s", kept, len(missing), _cache())
                raise
        return found

    def _list(self) -> None:
        from huggingface_hub import HfApi, RepoFile

        tree = HfApi().list_repo_tree(self.hub_id, revision=self.revision, recursive=True, repo_type=self.kind.type)
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        self.sizes = {path: file.size for path, file in files.items()}
        self._hashes = {path: file.lfs.sha256 if file.lfs else file.blob_id for path, file in files.items()}

    def _list_without_hub(self, kept: Path) -> None:
        try:
            listing = json.loads(kept.read_text(encoding="utf-8"))
            self.sizes, self._hashes = listing["sizes"], listing["hashes"]
        except (OSError, ValueError, KeyError, TypeError):
            self.listed = False
            files = [file for file in self.folder.rglob("*") if file.is_file()]
            self.sizes = {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in files}
            self.title += " (files in the cache, because the hub cannot be reached)"

    def _fetch_checked(self, name: str, bar: "tqdm | None") -> tuple[Path, str]:
        new = not (self.folder / name).exists()
        path = self._download(name, bar)
        sha256, agrees = self._compare(name, path)
        if agrees:
            return path, sha256
        if self._unreachable:
            raise DataError(
                f"{name} of {self.title} is damaged in the cache (its hash differs from the hub's). Run again with a "
                "network connection to download it again."
            )
        what = "arrived damaged" if new else "is damaged in the cache"
        log.warning("%s of %s %s (its hash differs from the hub's). Downloading it again", name, self.title, what)
        path = self._download(name, bar, again=True)
        sha256, agrees = self._compare(name, path)
        if agrees:
            return path, sha256
        path.resolve().unlink(missing_ok=True)  # so that no other tool finds it in the cache
        path.unlink(missing_ok=True)
        raise DataError(
            f"{name} of {self.title} differs from the hash that the hub lists, so it was removed from the cache. Run "
            "again. If the error repeats, a proxy or the disk changes the file."
        )

    def _download(self, name: str, bar: "tqdm | None", again: bool = False) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            path = hf_hub_download(
                self.hub_id,
                name,
                repo_type=self.kind.type,
                revision=self.revision,
                force_download=again,
                tqdm_class=_reporting_to(bar),
            )
        except Exception as error:  # the hub's client raises many unrelated types
            raise self._unreachable or errors.in_words(error, self.kind, self.hub_id, self.revision, name) from None
        return Path(path).absolute()

    def _compare(self, name: str, path: Path) -> tuple[str, bool]:
        """Return the file's SHA-256, and whether its bytes are the hub's."""
        expected = self._hashes.get(name) or _name_of_blob(path)
        digests = {64: hashlib.sha256()}
        if expected and len(expected) == 40:
            digests[40] = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        try:
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    for digest in digests.values():
                        digest.update(block)
        except OSError as error:
            raise system_errors.refusal(error, path) or error from None
        return digests[64].hexdigest(), expected is None or digests[len(expected)].hexdigest() == expected

    def _remove_leftovers(self) -> None:
        """Remove partial files of killed downloads, except those that another process is downloading."""
        from filelock import FileLock, Timeout

        for leftover in (self._storage / "blobs").glob("*.incomplete"):
            blob = leftover.name.partition(".")[0]
            lock = _cache() / ".locks" / self._storage.name / f"{blob}.lock"  # the hub client's own
            if lock.parent.is_dir():
                with contextlib.suppress(Timeout, OSError), FileLock(lock, timeout=0):
                    leftover.unlink(missing_ok=True)

    def _check_room(self, size: int) -> None:
        folder = next(folder for folder in (_cache(), *_cache().parents) if folder.exists())
        free = shutil.disk_usage(folder).free
        if size > free:
            raise DataError(
                f"{self.title} needs {text.size(size)}, and {_cache()} has {text.size(free)} free. Make room, or set "
                "HF_HOME to a folder on a larger disk."
            )

    @property
    def _storage(self) -> Path:
        return _cache() / f"{self.kind.type}s--{self.hub_id.replace('/', '--')}"

    @property
    def folder(self) -> Path:
        """The folder of the files in the client's cache; those that were not fetched are missing."""
        return self._storage / "snapshots" / self.revision


def commit_of(kind: Kind, hub_id: str, revision: str | None) -> str | None:
    """Return the present commit of a branch or tag, None for the main branch; None if the hub gives no answer."""
    from huggingface_hub import HfApi

    try:
        with _quiet_client():
            return str(HfApi().repo_info(hub_id, revision=revision, repo_type=kind.type).sha)
    except Exception as error:  # the hub's client raises many unrelated types
        if errors.is_unreachable(error):
            return None
        raise errors.in_words(error, kind, hub_id, revision) from None


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def _name_of_blob(path: Path) -> str | None:
    """Return the hash by which the cache names the file; None if the cache does not use links."""
    name = path.readlink().name if path.is_symlink() else ""
    return name if _HASH.fullmatch(name) else None


def _reporting_to(bar: "tqdm | None") -> Any:
    """Return a class that the hub's client uses as the bar of one file, and that advances the bar of all."""

    class Part:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.n, self.total = 0, kwargs.get("total")

        def __enter__(self) -> "Part":
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            if bar is not None:
                bar.update(count or 0)

        def ignore(self, *args: object, **kwargs: object) -> None:
            pass

        close = refresh = set_postfix_str = set_transfer_postfix_str = update_transfer = set_description_str = ignore

    return Part


class _Once(logging.Handler):
    """Forward the client's warnings, one line per kind."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage().splitlines()[0]
        kind = re.sub(r"https?://\S+|[\d.]+", "", line)
        if kind not in self._seen:
            self._seen.add(kind)
            log.info("the hub's client: %s", line)


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
    """Replace the client's log handler, which would show each line twice because records propagate as well."""
    import huggingface_hub.utils  # noqa: F401  its import adds the handler

    logger = logging.getLogger("huggingface_hub")
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [_Once()], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
