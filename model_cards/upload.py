"""A model repository on the Hub: put together, loaded by a stranger's process, and sent as one commit."""

import argparse
import functools
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from model_cards.staging import OWN, OWN_NAMES, RESULTS, Staged, stage, stage_plain_clip, verify
from modeling_lrsclip.files.documents import first_line, read_json
from modeling_lrsclip.files.hashing import file_sha256, git_blob_id


ATTEMPTS = 3  # at the commit, which the client itself does not repeat; it does repeat uploads
FAILURES = (OSError, RuntimeError, ValueError, *HfHubHTTPError.__bases__)  # the last: what the HTTP client raises


class HubError(Exception):
    """The Hub refused or could not be reached; one sentence with what to do."""

    exit_status = 3


class TagError(HubError):
    """The commit was made, its tag was not."""

    exit_status = 5


@dataclass(frozen=True)
class Target:
    """A repository that may be written to, as found before anything is sent."""

    repo_id: str
    exists: bool
    private: bool = False  # if it is made now
    tag: str | None = None


def check_target(api: HfApi, repo_id: str, tag: str | None = None, private: bool = False) -> Target:
    """
    Ask the Hub whether the token is accepted, and what is there already. Nothing is changed.

    Args:
        api: with the token.
        repo_id: `owner/name`.
        tag: that is to be made.
        private: whether the repository must not be public.

    Returns:
        What is there.

    Raises:
        `ValueError`: for a tag that exists, or a public repository that was meant to be private.
        [`HubError`]: for a token that is not accepted, or a Hub that is out of reach.
    """
    try:
        api.whoami()
        try:
            public = not api.model_info(repo_id).private
        except RepositoryNotFoundError:
            return Target(repo_id, False, private, tag)
        tags = {ref.name for ref in api.list_repo_refs(repo_id).tags}
    except FAILURES as error:
        raise HubError(f"{repo_id}: {_explain(error, repo_id)}") from error
    if private and public:
        raise ValueError(f"{repo_id} exists and is public; make it private in its settings, or name another one.")
    if tag in tags:
        raise ValueError(f"{repo_id} has a tag {tag} already; choose another --revision. Nothing was sent.")
    return Target(repo_id, True, private, tag)


def push(api: HfApi, staged: Staged, target: Target, message: str, create_pr: bool = False) -> str:
    """
    Uploads a staged folder and makes it visible as one commit; of an earlier push, what it no longer has is deleted.

    Args:
        api: client; its endpoint and token decide where and as whom.
        target: of [`check_target`]; a repository that does not exist is made, its tag is given to the commit.
        message: of the commit.
        create_pr: as a pull request, which needs no right to write.

    Returns:
        `str`: address of the commit, or of the pull request.

    Raises:
        [`HubError`]: when it failed for good. Files that were uploaded are not to be seen without the commit, and are
            not sent again by another run.
        [`TagError`]: when only the tag failed.
    """
    repo_id, made = target.repo_id, False
    try:
        if not target.exists:
            api.create_repo(repo_id, private=target.private or None, exist_ok=True)
            made = True
            _say("created", f"{repo_id}{', private' if target.private else ''}")
        head = api.model_info(repo_id).sha
        present = api.list_repo_tree(repo_id, revision=head)
        stale = [file.path for file in present if file.path in OWN_NAMES or re.fullmatch(OWN, file.path)]
        stale = [path for path in stale if path not in staged.sizes]
        if stale:
            _say("deleting", f"left by an earlier push: {', '.join(stale)}")
        _say("uploading", f"{len(staged.sizes)} files, {_megabytes(staged.bytes)} to {repo_id}")
        operations: list[Any] = [CommitOperationAdd(name, staged.folder / name) for name in staged.sizes]
        operations += [CommitOperationDelete(path) for path in stale]
        send = functools.partial(api.create_commit, repo_id, operations, commit_message=message)
        if create_pr:
            oid, url = _propose(send, f"{api.endpoint}/{repo_id}")
        else:
            oid, url = _commit(api, staged, repo_id, head, functools.partial(send, parent_commit=head))
    except FAILURES as error:
        print(file=sys.stderr)  # the client leaves its progress bar without an end of line
        left = "The repository was made and is empty" if made else "Nothing new is to be seen there"
        left += "; what was uploaded before is not sent twice."
        raise HubError(f"{repo_id}: {_explain(error, repo_id)} {left}") from error
    if oid == head:
        _say("unchanged", "the repository holds these very files already")
    if target.tag:
        try:
            api.create_tag(repo_id, tag=target.tag, revision=oid)
        except FAILURES as error:
            raise TagError(
                f"{repo_id}: the commit {oid[:12]} is there, but not its tag ({_reason(error)}); make it with: "
                f"hf repos tag create {repo_id} {target.tag} --revision {oid}"
            ) from error
        _say("tagged", target.tag)
    return url


def _commit(api: HfApi, staged: Staged, repo_id: str, head: str, send: Callable[[], CommitInfo]) -> tuple[str, str]:
    """
    Id and address of the commit. A failure of the server or the line at the commit itself is repeated: its parent sees
    to it that no commit is made twice, and where an answer was lost, the repository is asked whether it is there.
    """
    url = f"{api.endpoint}/{repo_id}/commit"
    attempt = 1
    while True:
        try:
            info = send()
            return info.oid, info.commit_url
        except FAILURES as error:
            if not _may_have_landed(error):
                raise
            try:
                now = api.model_info(repo_id).sha
                landed = now != head and _holds(api, repo_id, now, staged)
            except FAILURES as second:
                raise HubError(
                    f"{repo_id}: the Hub failed at the commit ({_reason(error)}) and since ({_reason(second)}): look at "
                    f"{url}s/main whether it is there; running the same command again makes no second one."
                ) from error
            if landed:
                return now, f"{url}/{now}"
            if attempt == ATTEMPTS:
                raise
            _say("committing", f"{_reason(error)}; trying again")
            time.sleep(2**attempt)
            attempt += 1


def _propose(send: Callable[..., CommitInfo], url: str) -> tuple[str, str]:
    """Id and address of the pull request; never repeated, since a second one might be opened."""
    try:
        info = send(create_pr=True)
        return info.oid, info.pr_url or info.commit_url
    except FAILURES as error:
        if not _may_have_landed(error):
            raise
        raise HubError(
            f"the Hub failed at the pull request ({_reason(error)}): look at {url}/discussions whether it is open before "
            "you run the same command again."
        ) from error


def _holds(api: HfApi, repo_id: str, revision: str, staged: Staged) -> bool:
    """Whether a revision has every staged file with its very content."""
    remote = {file.path: file for file in api.list_repo_tree(repo_id, revision=revision) if isinstance(file, RepoFile)}

    def same(file: RepoFile | None, path: Path) -> bool:
        if file is None or not file.lfs:
            return file is not None and file.blob_id == git_blob_id(path.read_bytes())
        return file.lfs.sha256 == file_sha256(path)

    return all(same(remote.get(name), staged.folder / name) for name in staged.sizes)


# ---------------------------------------------------------------------------------------------------------------- errors


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """HTTP status of an error or of what caused it; None where no answer came."""
    return next((cause.response.status_code for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)


def _path(error: BaseException) -> str:
    """Path of the request that an error answers; empty where it is not known."""
    for cause in _causes(error):
        try:
            return urlsplit(str(cause.request.url)).path
        except (AttributeError, RuntimeError):  # no error of HTTP, or one without its request
            continue
    return ""


def _may_have_landed(error: BaseException) -> bool:
    """Whether it is the commit itself, not an upload before it, that the server or the line failed at."""
    return "/commit/" in _path(error) and (_status(error) or 500) >= 500


def _reason(error: BaseException) -> str:
    *_, first = _causes(error)
    known = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), first)
    return first_line(known).rstrip(".:")


def _explain(error: BaseException, repo_id: str) -> str:
    """A sentence with the reason and what to do."""
    status = _status(error)
    if isinstance(error, LocalTokenNotFoundError):
        return "no token is known here; log in with `hf auth login`, or set HF_TOKEN."
    if status == 401:
        return "the token was not accepted; log in anew with `hf auth login`, or set HF_TOKEN to one that may write."
    if status == 403 and re.search(r"^/api/|\.git/", _path(error)):  # not at the storage of large files
        return f"the token may not write to {repo_id}; take a repository of your own, or propose it with --create-pr."
    if status == 412:
        return "somebody else committed there meanwhile; run the same command again."
    if status is not None and status < 500:
        return f"the Hub refused ({_reason(error)}); mend what it names and run the same command again."
    plain = "" if status else " (behind a proxy that lets only the Hub through, with HF_HUB_DISABLE_XET=1)"
    return f"the Hub failed or could not be reached ({_reason(error)}); run the same command again later{plain}."


# --------------------------------------------------------------------------------------------------------------- whole


def _say(stage_name: str, text: str) -> None:
    print(f"{stage_name}: {text}", flush=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def run(options: argparse.Namespace, api: HfApi) -> None:
    """Stage, verify and push what the arguments name; see `push_to_hub.main` for what is raised."""
    validate_repo_id(options.repo)
    if options.repo.count("/") != 1:
        raise ValueError(f"--repo {options.repo} has no owner; give owner/name.")
    if options.revision and options.create_pr:
        raise ValueError("--revision tags a commit of the repository; a pull request is tagged once it is merged.")
    if options.plain_clip:
        validate_repo_id(options.plain_clip)
        if options.plain_clip.count("/") != 1 or options.plain_clip == options.repo:
            another = "owner/name of another repository than --repo"
            raise ValueError(f"--plain-clip {options.plain_clip} must be {another}.")
    repos = [options.plain_clip, options.repo] if options.plain_clip else [options.repo]  # the linked one first
    advice = "give results.json of evaluation.run, run.json of training.train"
    results, training = (path and read_json(path, advice) for path in (options.results, options.training))
    if not options.dry_run:  # rather now than after the work
        targets = [check_target(api, repo, options.revision, options.private) for repo in repos]
    with tempfile.TemporaryDirectory(prefix="push-to-hub-") as work:
        folder = Path(work, "staged")
        folder.mkdir()
        _say("staging", str(options.checkpoint))
        chosen = {"published": options.published, "license_id": options.license, "plain_repo": options.plain_clip}
        trusted = options.trust_checkpoint_code
        prepared = [stage(options.checkpoint, folder, options.repo, results, training, trusted, **chosen)]
        if options.plain_clip:
            plain = folder.with_name("staged-plain-clip")
            prepared.insert(0, stage_plain_clip(prepared[0], plain, options.plain_clip, options.repo))
        for staged in prepared:
            for name, size in staged.sizes.items():
                print(f"  {name:44}{_megabytes(size):>12}")
            _say("staged", f"{len(staged.sizes)} files, {_megabytes(staged.bytes)}")
        if RESULTS not in prepared[-1].sizes:
            _say("note", "no --results: the card says that nothing was measured yet")
        for staged in prepared:
            _say("verifying", "loading it in a process that cannot import this project")
            worst = max(value for name, value in verify(options.checkpoint, staged).items() if "embed" in name)
            _say("verified", f"same token ids and weights, embeddings within {worst:.0e} of the checkpoint's")
        if options.dry_run:
            for staged in prepared:
                print(f"\n{staged.card}\n")
            _say("dry run", "nothing was contacted")
            return
        for staged, target in zip(prepared, targets, strict=True):
            _say("done", push(api, staged, target, options.message, options.create_pr))
