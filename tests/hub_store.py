"""What the test Hub keeps in memory: repositories of commits, as git has them, but with whole trees."""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime, timezone


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself keeps: the file, or for large ones a few lines that name it."""
        return POINTER.format(oid=self.sha256, size=len(self.content)).encode() if self.lfs else self.content

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.pointer) + self.pointer).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    files: dict[str, File]
    date: str


@dataclass
class PullRequest:
    num: int
    title: str
    description: str
    author: str
    status: str = "draft"

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    """A model or data set; `refs` maps full names (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`) to commits."""

    kind: str  # "model" or "dataset"
    id: str  # owner/name
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def ref(self, revision: str) -> str | None:
        """Full name of a branch, tag or pull request."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return name
        return None

    def resolve(self, revision: str = "main") -> Commit | None:
        """The commit that a branch, tag, pull request, or (the beginning of) a commit's id stands for."""
        name = self.ref(revision)
        if name:
            return self.commits[self.refs[name]]
        matches = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        return self.commits[matches[0]] if len(matches) == 1 else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content, for tests that look at what is visible."""
        return {path: file.content for path, file in self.resolve(revision).files.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        commit, commits = self.resolve(revision), []
        while commit:
            commits.append(commit)
            commit = self.commits.get(commit.parent)
        return commits

    def commit(
        self, ref: str, files: dict[str, File], title: str, message: str, author: str, parent: Commit | None
    ) -> Commit:
        """Moves `ref` to a new commit with exactly these files."""
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        tree = {path: file.blob_id for path, file in sorted(files.items())}
        parts = [tree, title, message, author, date, parent and parent.oid, len(self.commits)]
        oid = hashlib.sha1(json.dumps(parts).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent and parent.oid, title, message, author, files, date)
        self.refs[ref] = oid
        return self.commits[oid]
