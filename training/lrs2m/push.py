"""
Pushes a built data set to the Hub, its manifest last.

    python -m training.lrs2m.push DIR --repo you/lrs2m [--private] [--dry-run]

Shards go up in several commits; manifest, card, statistics and lists follow in one. Where the manifest stands, the rest
is complete. An interrupted push goes on when the same command is run again: what is there is not sent twice. Exit status:
0 done; 2 bad input; 3 the Hub refused or could not be reached.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from modeling_lrsclip.commands import command, command_parser
from modeling_lrsclip.files.hashing import file_sha256, git_blob_id

from .card import CARD, LICENCES, is_own, write_card
from .output import DATA, LISTS
from .shards import MANIFEST, read_manifest
from .statistics import PICTURES, STATISTICS, TABLES


KIND = "dataset"
_SHARD = re.compile(rf"{DATA}/(?:train|validation)-\d+-of-\d+\.(?:parquet|tar)")
# Files and bytes of one commit. upload_folder cuts large folders itself, but only where hf_xet is in use.
COMMIT_FILES, COMMIT_BYTES = 50, 20 * 10**9
FAILURES = (OSError, RuntimeError, ValueError, *HfHubHTTPError.__bases__)  # the last: what the HTTP client raises


class HubError(Exception):
    """The Hub refused or could not be reached; one sentence with what to do."""

    exit_status = 3


@dataclass(frozen=True)
class File:
    path: str  # in the data set's folder and in the repository
    size: int  # bytes
    sha256: str


def check_files(folder: Path) -> tuple[list[File], list[File]]:
    """
    The shards of a finished data set, and what goes with its manifest, each as the manifest describes it.

    Raises:
        `ValueError`: for an unfinished data set, a missing file, or one that is not as it was written.
    """
    manifest = read_manifest(folder)
    shards = [file for split in manifest["splits"].values() for file in split["files"]]
    for file in (*shards, *manifest["lists"].values()):
        path = folder / file["path"]
        if not path.is_file() or path.stat().st_size != file["bytes"] or file_sha256(path) != file["sha256"]:
            what = "is not what was built" if path.is_file() else "is missing"
            raise ValueError(f"{path} {what}; build the data set again. Nothing was sent.")
    beside = [CARD, LICENCES, STATISTICS, TABLES, *PICTURES, *(f"{name}.jsonl" for name in LISTS), MANIFEST]
    last = [name for name in beside if (folder / name).is_file() and (folder / name).stat().st_size]
    described = [File(file["path"], file["bytes"], file["sha256"]) for file in shards]
    return described, [File(name, (folder / name).stat().st_size, file_sha256(folder / name)) for name in last]


def push(api: HfApi, folder: Path, repo_id: str, private: bool = False) -> str:
    """
    Uploads a checked data set.

    Args:
        api: client; its endpoint and token decide where and as whom.
        private: if the repository is made now.

    Returns:
        `str`: address of the data set.

    Raises:
        `ValueError`: as [`check_files`], or for a public repository that was meant to be private.
        [`HubError`]: when it failed; no manifest is to be seen there then.
    """
    shards, last = check_files(folder)
    try:
        present = _prepare(api, repo_id, private)
        if all(_is_there(file, folder, present) for file in (*shards, *last)):
            _say("unchanged", "the repository holds these very files already")
            return f"{api.endpoint}/datasets/{repo_id}"
        if MANIFEST in present:  # of an earlier push, whose shards are about to change
            api.delete_file(MANIFEST, repo_id, repo_type=KIND, commit_message="Begin an upload")
            _say("began", f"{MANIFEST} of an earlier push is taken away until all is there")
        missing = [file for file in shards if not _is_there(file, folder, present)]
        done = len(shards) - len(missing)
        for batch in _batches(missing):
            commit = {
                "commit_message": f"Shards {done + 1} to {done + len(batch)} of {len(shards)}",
                "repo_type": KIND,
            }
            paths = [file.path for file in batch]
            api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=paths, **commit)
            done += len(batch)
            _say("uploaded", f"{done} of {len(shards)} shards")
        operations = [CommitOperationAdd(file.path, folder / file.path) for file in last]
        # Of all that some push of a data set may have brought, what is no longer part of it.
        beside = (*PICTURES, STATISTICS, TABLES, *(f"{name}.jsonl" for name in LISTS), MANIFEST)
        pushed = {path for path in present if path in beside or _SHARD.fullmatch(path)}
        stale = sorted(pushed - {file.path for file in (*shards, *last)})
        if stale:
            _say("deleting", f"{len(stale)} files of an earlier push, first: {stale[0]}")
        operations += [CommitOperationDelete(path) for path in stale if path != MANIFEST]
        api.create_commit(repo_id, operations, commit_message="Manifest, card and statistics", repo_type=KIND)
    except FAILURES as error:
        print(file=sys.stderr)  # the client leaves its progress bar without an end of line
        raise HubError(f"{repo_id}: {_explain(error, repo_id)}") from error
    return f"{api.endpoint}/datasets/{repo_id}"


def _prepare(api: HfApi, repo_id: str, private: bool) -> dict[str, RepoFile]:
    """Makes the repository where it is not there; the files in it by path."""
    api.whoami()
    try:
        info = api.dataset_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type=KIND, private=private or None, exist_ok=True)
        _say("created", f"{repo_id}{', private' if private else ''}")
        return {}
    if private and not info.private:
        raise _Public(f"{repo_id} exists and is public; make it private in its settings, or name another one.")
    files = {}
    for folder in ("", DATA):
        try:
            entries = list(api.list_repo_tree(repo_id, folder or None, repo_type=KIND))
        except EntryNotFoundError:
            continue
        files |= {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    return files


class _Public(Exception):
    exit_status = 2


def _is_there(file: File, folder: Path, present: dict[str, RepoFile]) -> bool:
    """Tell whether the repository has a file with this very content; the Hub knows small ones by Git's id."""
    entry = present.get(file.path)
    if entry is None or entry.size != file.size:
        return False
    if entry.lfs:
        return entry.lfs.sha256 == file.sha256
    return entry.blob_id == git_blob_id((folder / file.path).read_bytes())


def _batches(files: Sequence[File]) -> Iterator[list[File]]:
    batch: list[File] = []
    for file in files:
        if batch and (len(batch) == COMMIT_FILES or sum(one.size for one in batch) + file.size > COMMIT_BYTES):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _explain(error: BaseException, repo_id: str) -> str:
    """A sentence with the reason and what to do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = (lines[0] if lines else type(error).__name__).rstrip(".:")
    left = "No manifest is to be seen there; what was uploaded is not sent twice."
    if status == 401 or "token" in reason.lower() and status is None:
        return f"the token was not accepted ({reason}); log in with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"the token may not write to {repo_id}; take a repository of your own."
    if status is not None and status < 500:
        return f"the Hub refused ({reason}); mend what it names and run the same command again. {left}"
    return f"the Hub failed or could not be reached ({reason}); run the same command again. {left}"


# ------------------------------------------------------------------------------------------------------------- command


def _say(stage: str, text: str) -> None:
    print(f"{stage}: {text}", flush=True)


def run(options: argparse.Namespace, api: HfApi) -> None:
    """From the arguments to the last commit; see `main` for what is raised."""
    validate_repo_id(options.repo)
    if options.repo.count("/") != 1:
        raise ValueError(f"--repo {options.repo} has no owner; give owner/name.")
    read_manifest(options.folder)
    card = options.folder / CARD
    if options.replace_card or not card.is_file() or is_own(card.read_text(encoding="utf-8")):
        write_card(options.folder, options.replace_card)
    else:
        _say("note", f"{CARD} was changed by hand and goes up as it is; --replace-card writes it anew")
    if options.dry_run:
        shards, last = check_files(options.folder)
        for file in (*shards, *last):
            print(f"  {file.path:52}{file.size / 1e6:>12,.1f} MB")
        print(f"\n{card.read_text(encoding='utf-8')}\n")
        _say("dry run", "nothing was contacted")
        return
    _say("done", push(api, options.folder, options.repo, options.private))


@command()
def main(arguments: Sequence[str] | None = None, api: HfApi | None = None) -> None:
    """Run the command; what goes wrong is one sentence on standard error and an exit status, see above."""
    parser = command_parser("python -m training.lrs2m.push", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="a finished data set")
    add("--repo", required=True, help="owner/name on the Hub; made if it does not exist")
    add("--private", action="store_true", help="if the repository is made now")
    add("--replace-card", action="store_true", help="write the card anew where it was changed by hand")
    add("--dry-run", action="store_true", help="show files, sizes and the card; contact nothing")
    run(parser.parse_args(arguments), api or HfApi())


if __name__ == "__main__":
    sys.exit(main())
