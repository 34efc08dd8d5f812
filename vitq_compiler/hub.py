"""Models on the Hugging Face hub: ``hf:owner/name[@revision][/path.onnx]``.

Files go into the hub's own cache, and its settings are obeyed (``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``). Only the
model, its external data and its configurations are fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from vitq_compiler.errors import ModelError
from vitq_compiler.model_folder import CONFIGS, Choice, choose, config_folders
from vitq_compiler.model_io import model_files
from vitq_compiler.runtime import first_line

PREFIX = "hf:"
# The revision as in the hub's own URIs: a slash in it is %2F, except in references of the hub.
_FORM = re.compile(r"hf:/{0,2}([\w.-]+/[\w.-]+)(?:@(refs/(?:pr|convert)/[\w.-]+|.+?))?(?:/(.+\.onnx))?")
_SECONDS = 10  # to wait for the hub's first answer


@dataclass(frozen=True)
class Reference:
    """A model on the hub.

    Attributes:
        repository: ``owner/name``.
        revision: branch, tag or commit; None for the main branch.
        file: path of the ONNX file; None where it is left to `model_folder.choose`.
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = self.revision or ""
        revision = revision if revision.startswith("refs/") else quote(revision, safe="")
        return f"{PREFIX}{self.repository}{f'@{revision}' if revision else ''}{f'/{self.file}' if self.file else ''}"


@dataclass(frozen=True)
class Fetched:
    """A model in the hub's cache.

    Attributes:
        file: the ONNX file.
        reference: where it is from, with the commit as revision and its path.
        why: as of `model_folder.Choice`.
        warnings: what the user should know of how it was found.
    """

    file: Path
    reference: Reference
    why: str
    warnings: tuple[str, ...]


def parse(text: str) -> Reference:
    """Read ``hf:owner/name[@revision][/path.onnx]``; ``hf://`` will do.

    Raises:
        ModelError: it has another form.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise ModelError(f"model {text}: is no model on the hub; write hf:owner/name, hf:owner/name@revision or hf:owner/name/file.onnx")
    repository, revision, file = found.groups()
    return Reference(repository, revision and unquote(revision), file)


def fetch(reference: Reference, *, show_progress: bool = False) -> Fetched:
    """Bring a model, its external data and its configurations into the hub's cache, where they are not there yet.

    Where the hub cannot be reached, what the cache holds will do.

    Args:
        show_progress: draw the hub's own bars on a terminal.

    Raises:
        ModelError: huggingface_hub is not installed, the hub cannot be reached, there is no such repository, revision or file, access is
            not granted, or the files do not tell which is the model.
    """
    try:
        from huggingface_hub.errors import GatedRepoError  # noqa: F401  # there since 0.25
    except ImportError as error:
        raise ModelError(f"model {reference}: needs huggingface_hub 0.25 or newer; pip install 'vitq-compiler[hub]'") from error
    with ExitStack() as stack:
        stack.enter_context(_explained(reference))
        if not show_progress:
            stack.enter_context(_without_bars())
        listing = _list_files(reference)
        choice = Choice(reference.file) if reference.file else choose(listing.names, str(replace(reference, file=None)))
        # Asked for by its revision, so that the cache knows it offline too; where it lies tells the commit, for all other files.
        file = _download(reference, choice.name, listing)
        folder = PurePosixPath(choice.name).parent
        pinned = replace(reference, revision=file.parents[len(folder.parts)].name, file=choice.name)
        wanted = [folder / data.relative_to(file.parent).as_posix() for data in model_files(file)[1:] if data.is_relative_to(file.parent)]
        places = (folder, folder.parent) if len(config_folders(file)) > 1 else (folder,)
        wanted += [place / name for place in places for name in CONFIGS]
        for name in dict.fromkeys(map(str, wanted)):
            if name in listing.names:
                _download(pinned, name, listing)
        return Fetched(file, pinned, choice.why, listing.warnings)


@dataclass(frozen=True)
class _Listing:
    """The files of a repository; ``is_cached`` where the hub was not asked, and they are those in the cache."""

    names: tuple[str, ...]
    is_cached: bool = False
    warnings: tuple[str, ...] = ()


def _list_files(reference: Reference) -> _Listing:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(reference.repository, revision=reference.revision, timeout=_SECONDS)
        return _Listing(tuple(file.rfilename for file in info.siblings or ()))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (OSError, *HfHubHTTPError.__bases__) as error:  # which HTTP library is behind it depends on the version
        try:
            found = snapshot_download(reference.repository, revision=reference.revision, local_files_only=True, allow_patterns=[])
        except LocalEntryNotFoundError:
            raise error from None
        folder = Path(found)
        names = tuple(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        warning = f"{_reason()}: of {reference}, commit {folder.name} of the cache is taken"
        return _Listing(names, True, () if constants.HF_HUB_OFFLINE else (warning,))


def _download(reference: Reference, name: str, listing: _Listing) -> Path:
    """A file in the cache; one of a commit that is there is not asked for again."""
    from huggingface_hub import hf_hub_download

    options = {"revision": reference.revision, "etag_timeout": _SECONDS, "local_files_only": listing.is_cached}
    return Path(hf_hub_download(reference.repository, name, **options))


@contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub import utils

    shown = not utils.are_progress_bars_disabled()
    if shown:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()


@contextmanager
def _explained(reference: Reference) -> Iterator[None]:
    """What the hub or its library raises inside becomes a ModelError of one line: what is wrong, and what to do."""
    from huggingface_hub import constants, errors

    where, remedy = f"model {reference}", "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{reference.repository}"
        raise ModelError(f"{where}: its owner grants access on request; ask for it on {page}, then {remedy}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{where}: no such repository on {constants.ENDPOINT}, or a private one; check its name, or {remedy}") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{where}: the repository has no revision {reference.revision}; give a branch, tag or commit of it") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{where}: {first_line(error)}; write hf:owner/name") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ModelError(f"{where}: {_reason()}, and the cache does not hold it; fetch it once with a connection") from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{where}: the repository has no such file at this revision; leave it out to see which there are") from error
    except errors.HfHubHTTPError as error:
        raise ModelError(f"{where}: the hub refuses ({first_line(error)}); try again later, or {remedy}") from error
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:
        if isinstance(error, OSError) and error.strerror:  # the disk, not the network
            raise
        raise ModelError(f"{where}: {_reason()}, and the cache does not hold it; check the connection, or HF_ENDPOINT") from error


def _reason() -> str:
    """Why the hub did not answer."""
    from huggingface_hub import constants

    return "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
