"""Explain the hub's errors in one line: what is wrong, then what to do."""

import os
from collections.abc import Iterator

from pipeline.errors import DataError
from pipeline.hub.kinds import Kind
from pipeline.io import system_errors

_LOG_IN = "log in with `hf auth login` or set HF_TOKEN, using a token of an account with access"


def in_words(error: BaseException, kind: Kind, hub_id: str, revision: str | None, name: str | None = None) -> DataError:
    """Return the error to raise for an error of the hub's client when it was asked for a repository or a file of it."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{kind.prefix}{hub_id}"
    causes = list(_chain(error))
    for cause in causes:
        if isinstance(cause, errors.GatedRepoError):
            if cause.response.status_code == 403:
                return DataError(
                    f"{hub_id} is gated, and the account of your token has no access. Request access at {page} and run "
                    f"again, or {_LOG_IN}."
                )
            return DataError(f"{hub_id} is gated. Accept its terms at {page}, then {_LOG_IN}.")
        if isinstance(cause, errors.RepositoryNotFoundError):
            problem = f"The hub has no {kind.noun} {hub_id}, or it is private"
            return DataError(f"{problem}. Check the id at {page}; if it is private, {_LOG_IN}.")
        if isinstance(cause, errors.RevisionNotFoundError):
            return DataError(f"{hub_id} has no revision {revision}. Choose a commit from {page}/commits/main.")
        if isinstance(cause, errors.RemoteEntryNotFoundError):
            return DataError(f"{hub_id} at {revision} has no file {name}. See {page}/tree/{revision}.")
        if isinstance(cause, errors.HfHubHTTPError):
            return _of_status(cause.response.status_code, hub_id, page, name)
    file = f"{name} of {hub_id}" if name else hub_id
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        problem = f"{file} is not in the hub cache, and HF_HUB_OFFLINE is set"
        return DataError(f"{problem}. Unset it, or run where the cache has it.")
    if any("Consistency check failed" in str(cause) for cause in causes):
        return DataError(
            f"{file} differs in length from the file on the hub, so it was removed. Run again. If the error repeats, a "
            "proxy changes the file."
        )
    if (number := system_errors.error_number(error)) and not is_unreachable(error):
        return DataError(
            f"{file} cannot be written to the cache of the hub ({os.strerror(number)}). Make room or give access, "
            "or set HF_HOME to another folder."
        )
    reason = next((str(cause).strip().splitlines()[0] for cause in reversed(causes) if str(cause).strip()), "no reason")
    return DataError(f"{file} cannot be downloaded ({reason}). Check the network and run again, or {kind.local}.")


def is_unreachable(error: BaseException) -> bool:
    """Return whether the hub gave no answer or is busy, so that the cache may be used instead."""
    from huggingface_hub import errors

    for cause in _chain(error):
        if isinstance(cause, errors.HfHubHTTPError):
            return cause.response.status_code == 429 or cause.response.status_code >= 500
        if isinstance(cause, errors.OfflineModeIsEnabled | ConnectionError):
            return True
        if any(base.__name__ == "TransportError" for base in type(cause).__mro__):  # of httpx or httpx2
            return True
    return False


def _of_status(status: int, hub_id: str, page: str, name: str | None) -> DataError:
    file = f"{name} of {hub_id}" if name else hub_id
    if status == 429:
        return DataError(
            f"The hub limits the number of requests (429, at {file}). Wait a few minutes and run again. To raise the "
            "limit, log in with `hf auth login`, or set HF_TOKEN."
        )
    if status >= 500:
        return DataError(f"The hub is busy or down ({status}, at {file}). Wait a few minutes and run again.")
    if status in (401, 403):
        return DataError(f"The hub refuses access ({status}, at {file}). See {page}; {_LOG_IN}.")
    return DataError(f"The hub refuses the request ({status}, at {file}). Check the id and the revision at {page}.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and its causes, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
