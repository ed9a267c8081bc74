"""Folders in repositories of the Hugging Face hub, or of a server with its interface.

The server is that of the variable HF_ENDPOINT, and the token that of HF_TOKEN or `hf auth login`.
"""

import errno
import functools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from taming_jax.errors import UserError, say

PREFIX = "hf://"
SECONDS = 2.5  # to wait for the first answer; the hub's own timeouts and retries take far longer

DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)

T = TypeVar("T")


def download(
    source: str, files: Sequence[str], any_of: Sequence[str] = (), what: str = "run"
) -> Path:
    """Downloads files of `user/name` or `user/name@revision`, with or without hf://, into the hub's
    cache, and the first of the files `any_of` that exists. Returns the folder there. Without a
    network, uses the cache.

    Raises UserError if the repository, the revision or a file does not exist, if a token is needed,
    or if the repository is neither reachable nor in the cache. `what` is what the files are, for
    messages.
    """
    repository, _, revision = source.removeprefix(PREFIX).partition("@")

    def fetch(names: Sequence[str], local_files_only: bool) -> Path:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            repository, revision=revision or None, local_files_only=local_files_only,
            allow_patterns=[*names], endpoint=os.environ.get("HF_ENDPOINT"),
        )  # fmt: skip
        return Path(folder)

    info, error = call(lambda: get_api().model_info(repository, revision=revision or None), SECONDS)
    if error is not None and not has_answer(error):
        for option in any_of or (None,):
            names = [*files, *([option] if option else ())]
            folder, _ = call(functools.partial(fetch, names, local_files_only=True))
            if folder is not None and all((folder / name).exists() for name in names):
                say(f"The hub cannot be reached; using the copy of {source} in the cache.")
                return folder
    check_error(error, repository, revision)
    present = {file.rfilename for file in cast(Any, info).siblings or ()}
    chosen = [name for name in any_of if name in present][:1]
    missing = [name for name in files if name not in present]
    if not chosen and any_of:
        missing.append(any_of[0])
    if missing:
        raise UserError(f"the repository {repository} holds no {what}: it has no {missing[0]}.")
    folder, error = call(lambda: fetch([*files, *chosen], local_files_only=False))
    check_error(error, repository, revision)
    return cast(Path, folder)


def upload(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder as a commit to the repository `user/name`, which is created if it does not
    exist, private if you say so. Returns its address. Raises UserError if the hub refuses it, or if
    the repository exists and is public, but should be private."""

    def create_and_upload() -> str:
        api = get_api()
        address = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            return ""
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a run of taming_jax"
        )
        return str(address)

    address, error = call(create_and_upload)
    check_error(error, repository)
    if not address:
        raise UserError(
            f"the repository {repository} exists and is public; make it private in its settings on "
            "the hub, or name another one."
        )
    return address


def check_login(repository: str) -> None:
    """Raises UserError if the name of a repository is not valid, if the hub cannot be reached, or
    if it does not accept the token."""
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"'{repository}' is not the name of a repository; use user/name.")
    _, error = call(lambda: get_api().whoami(), SECONDS)
    check_error(error, repository)


def get_api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="taming_jax")


def call(function: Callable[[], T], seconds: float | None = None) -> tuple[T | None, Any]:
    """Returns the result of a function, or its exception, whatever its type: it comes from one of
    the HTTP clients that versions of huggingface_hub use. Waits for at most `seconds`."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:  # noqa: BLE001  (the caller gets it)
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return None, TimeoutError(f"no answer within {seconds} seconds")
    return (results[0], None) if results else (None, errors[0])


def has_answer(error: BaseException) -> bool:
    """Returns whether an error is an answer of the hub, or of a check before asking it, rather than
    a sign that the hub cannot be reached."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return get_status(error) < 500
    return isinstance(error, errors.LocalTokenNotFoundError | errors.HFValidationError)


def get_status(error: BaseException) -> int:
    """Returns the HTTP status of an error, or 0 if it has none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def check_error(error: BaseException | None, repository: str, revision: str = "") -> None:
    """Raises UserError with a sentence for an error of the hub, if there is one."""
    from huggingface_hub import errors

    if error is None:
        return
    login, status = "log in with `hf auth login`, or set HF_TOKEN", get_status(error)
    if isinstance(error, errors.RevisionNotFoundError):
        message = f"the repository {repository} has no revision '{revision}'."
    elif isinstance(error, errors.GatedRepoError):
        message = f"the repository {repository} asks you to accept its terms on the hub first."
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = f"the hub has no repository {repository}, or it is private; if it is, {login}."
    elif isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        message = f"the hub did not accept your token, or you have none: {login}."
    elif status == 403:
        message = f"your token does not allow this for {repository}; use one that does."
    elif isinstance(error, errors.HFValidationError):
        message = f"'{repository}' is not the name of a repository; use user/name."
    elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
        message = f"the hub's cache cannot be written ({error.strerror}); set HF_HOME."
    else:
        reason = " ".join(str(error).split()).split(" For more information")[0]
        reason = reason or type(error).__name__
        verb = f"refused the request for {repository}" if has_answer(error) else "cannot be reached"
        message = f"the hub {verb} ({reason[:200]})."
    raise UserError(message) from error
