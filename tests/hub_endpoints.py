"""
The Hub's endpoints for `tests/hub_server.py`: repositories, upload, download. Each takes the hub and a request and
returns an answer or raises [`Refused`], with the status codes and error headers of the real Hub.
"""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

import yaml

from tests.hub_store import Commit, File, PullRequest, Repo


if TYPE_CHECKING:
    from tests.hub_server import HubServer

LARGE = (".safetensors", ".bin", ".pt", ".parquet", ".gz", ".h5", ".msgpack", ".npz")  # as in the Hub's .gitattributes
LARGE_BYTES = 10_000_000
REPO = r"/api/(?P<kind>model|dataset)s/(?P<repo>[^/]+/[^/]+)"
FILE = r"/(?:(?P<kind>dataset)s/)?(?P<repo>[^/]+/[^/]+)"


class Refused(Exception):
    """An answer other than 2xx; `code` is the Hub's word for it, by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        self.status, self.body = status, {"error": message} | body
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class Request:
    method: str
    path: str  # still quoted
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    user: str | None
    kind: str = "model"
    repo: str = ""
    rest: dict[str, str] = field(default_factory=dict)  # what else the route names, unquoted

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    body: bytes | dict | list = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------- access


def find(hub: "HubServer", request: Request, write: bool = False) -> Repo:
    repo = hub.repos.get((request.kind, request.repo))
    if repo is None or (repo.private and request.user != repo.owner):
        raise Refused(404 if request.user else 401, "Repository not found", "RepoNotFound")
    if write and request.user is None:
        raise Refused(401, "Invalid username or password.")
    if write and request.user != repo.owner:
        raise Refused(403, f"You have read access but not the required permissions to write to {repo.id}")
    return repo


def find_commit(repo: Repo, revision: str) -> Commit:
    commit = repo.resolve(revision)
    if commit is None:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def find_for_commit(hub: "HubServer", request: Request) -> Repo:
    """Everybody who is known may open a pull request where they can read."""
    pull_request = "create_pr" in request.query or request.rest["rev"].startswith("refs/pr/")
    if pull_request and request.user is None:
        raise Refused(401, "Invalid username or password.")
    return find(hub, request, write=not pull_request)


# ----------------------------------------------------------------------------------------------------------------- repos


def whoami(hub: "HubServer", request: Request) -> Answer:
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    return Answer({"type": "user", "name": request.user, "orgs": [], "auth": {"type": "access_token"}})


def agent_harnesses(hub: "HubServer", request: Request) -> Answer:
    raise Refused(404, "Not kept here")  # a list that the client asks for on the side, and does without


def create_repo(hub: "HubServer", request: Request) -> Answer:
    asked = request.json()
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    owner, kind = asked.get("organization") or request.user, asked.get("type") or "model"
    name = f"{owner}/{asked['name']}"
    url = f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
    if owner != request.user:
        raise Refused(403, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
    if (kind, name) in hub.repos:
        raise Refused(409, f"You already created this {kind} repo", url=url)
    hub.create(name, kind, asked.get("visibility") == "private")
    return Answer({"url": url, "name": name})


def delete_repo(hub: "HubServer", request: Request) -> Answer:
    asked = request.json()
    request.kind, request.repo = asked.get("type") or "model", f"{asked.get('organization')}/{asked['name']}"
    find(hub, request, write=True)
    del hub.repos[request.kind, request.repo]
    return Answer({})


def repo_info(hub: "HubServer", request: Request) -> Answer:
    repo = find(hub, request)
    commit = find_commit(repo, request.rest.get("rev") or "main")
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    if "blobs" in request.query:
        siblings = [{"rfilename": entry["path"], **_sizes(entry)} for entry in _tree(commit.files, True)]
    info = {"id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": commit.oid, "private": repo.private}
    info |= {"lastModified": commit.date, "createdAt": commit.date, "siblings": siblings, "tags": [], "gated": False}
    return Answer(info | {"disabled": False, "downloads": 0, "likes": 0})


def _sizes(entry: dict[str, Any]) -> dict[str, Any]:
    lfs = entry.get("lfs")
    large = {"lfs": {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}} if lfs else {}
    return {"size": entry["size"], "blobId": entry["oid"]} | large


def refs(hub: "HubServer", request: Request) -> Answer:
    repo = find(hub, request)
    kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    listed: dict[str, list] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for ref, oid in repo.refs.items():
        for prefix, kind in kinds.items():
            if ref.startswith(prefix):
                listed[kind].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
    return Answer(listed)


def history(hub: "HubServer", request: Request) -> Answer:
    repo = find(hub, request)
    find_commit(repo, request.rest["rev"])
    return Answer(
        [
            {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
            | {"authors": [{"user": commit.author}]}
            for commit in repo.history(request.rest["rev"])
        ]
    )


def create_ref(hub: "HubServer", request: Request) -> Answer:
    """A branch (named in the path, its start in the body) or a tag (the other way round)."""
    repo, asked = find(hub, request, write=True), request.json()
    if "branch" in request.rest:
        ref, start = f"refs/heads/{request.rest['branch']}", asked.get("startingPoint") or "main"
    else:
        ref, start = f"refs/tags/{asked['tag']}", request.rest["rev"]
    if ref in repo.refs:
        raise Refused(409, f"Reference {ref} already exists")
    repo.refs[ref] = find_commit(repo, start).oid
    return Answer({}, 201)


def delete_ref(hub: "HubServer", request: Request) -> Answer:
    repo = find(hub, request, write=True)
    ref = f"refs/heads/{request.rest['branch']}" if "branch" in request.rest else f"refs/tags/{request.rest['rev']}"
    if repo.refs.pop(ref, None) is None:
        raise Refused(404, f"Reference {ref} does not exist", "RevisionNotFound")
    return Answer({})


def open_discussion(hub: "HubServer", request: Request) -> Answer:
    repo, asked = find(hub, request), request.json()
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    opened = _open(repo, asked["title"], asked["description"], request.user)
    return Answer({"num": opened.num, "pullRequest": True, "url": f"{hub.url}/{repo.id}/discussions/{opened.num}"})


def _open(repo: Repo, title: str, description: str, author: str) -> PullRequest:
    opened = PullRequest(len(repo.pull_requests) + 1, title, description, author)
    repo.pull_requests.append(opened)
    repo.refs[opened.ref] = repo.resolve().oid
    return opened


def discussion(hub: "HubServer", request: Request) -> Answer:
    repo = find(hub, request)
    opened = next((each for each in repo.pull_requests if each.num == int(request.rest["num"])), None)
    if opened is None:
        raise Refused(404, "Discussion not found")
    details = {"title": opened.title, "num": opened.num, "status": opened.status, "author": {"name": opened.author}}
    details |= {"createdAt": repo.history()[-1].date, "isPullRequest": True, "events": [], "filesWithConflicts": []}
    details |= {"repo": {"name": repo.id, "type": repo.kind}, "changes": {"base": "refs/heads/main"}, "diff": ""}
    return Answer(details)


# ---------------------------------------------------------------------------------------------------------------- upload


def validate_yaml(hub: "HubServer", request: Request) -> Answer:
    errors = _card_errors(request.json()["content"])
    return Answer({"errors": [{"message": text} for text in errors], "warnings": []}, 400 if errors else 200)


def _card_errors(text: str) -> list[str]:
    """What the Hub refuses in a card's metadata, as far as it concerns the cards here."""
    block = re.match(r"---\n(.*?)\n---\n", text, re.S)
    if not block:
        return []  # the Hub warns of it
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"YAML cannot be read: {error}"]
    if not isinstance(metadata, dict):
        return ["metadata must be an object"]
    errors = [f'"{key}" must be a string' for key in ("license", "library_name", "pipeline_tag")
              if not isinstance(metadata.get(key, ""), str)]  # fmt: skip
    for index, entry in enumerate(metadata.get("model-index") or []):
        if not isinstance(entry.get("name"), str):
            errors.append(f'"model-index[{index}].name" is required')
        for result in entry.get("results", []):
            wanted = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            errors += [f"model-index: {a}.{b} is required" for a, b in wanted if not result.get(a, {}).get(b)]
            errors += ["model-index: a metric needs type and value" for metric in result.get("metrics", [{}])
                       if metric.get("type") is None or metric.get("value") is None]  # fmt: skip
    return errors


def preupload(hub: "HubServer", request: Request) -> Answer:
    repo = find_for_commit(hub, request)
    commit, uploads = find_commit(repo, request.rest["rev"]), []
    for file in request.json()["files"]:
        binary = b"\0" in base64.b64decode(file["sample"])
        large = file["path"].endswith(LARGE) or file["size"] > LARGE_BYTES or binary
        here = commit.files.get(file["path"])
        oid = here and (here.sha256 if here.lfs else here.blob_id)
        uploads.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        uploads[-1] |= {"oid": oid} if oid else {}
    return Answer({"files": uploads, "commitOid": commit.oid})


def xet_token(hub: "HubServer", request: Request) -> Answer:
    raise Refused(404, "This Hub has no xet storage")


def lfs_batch(hub: "HubServer", request: Request) -> Answer:
    repo, objects = find(hub, request), []
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    for wanted in request.json()["objects"]:
        upload = {"href": f"{hub.storage_url}/upload/{wanted['oid']}", "header": {}}
        kind = "datasets/" if request.kind == "dataset" else ""
        verify = {"href": f"{hub.url}/{kind}{repo.id}.git/info/lfs/objects/verify", "header": {}}
        missing = wanted["oid"] not in hub.objects
        objects.append(wanted | ({"actions": {"upload": upload, "verify": verify}} if missing else {}))
    return Answer({"transfer": "basic", "objects": objects})


def lfs_verify(hub: "HubServer", request: Request) -> Answer:
    find(hub, request)
    wanted = request.json()
    if len(hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise Refused(404, f"Object {wanted['oid']} is not in the storage")
    return Answer({})


def put_object(hub: "HubServer", request: Request) -> Answer:
    if File(request.body).sha256 != request.rest["oid"]:
        raise Refused(400, "The content does not match its SHA-256")
    hub.objects[request.rest["oid"]] = request.body
    return Answer(b"")


def commit(hub: "HubServer", request: Request) -> Answer:
    """One line of JSON an operation; all of them take effect, or none."""
    repo, revision = find_for_commit(hub, request), request.rest["rev"]
    parent = find_commit(repo, revision)
    header, *operations = (json.loads(line) for line in request.body.splitlines())
    about, files = header["value"], dict(parent.files)
    if about.get("parentCommit") not in (None, parent.oid):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    for operation in operations:
        _apply(hub, files, operation["key"], operation["value"])
    if "README.md" in files and (errors := _card_errors(files["README.md"].content.decode())):
        raise Refused(400, "; ".join(errors))
    ref, pull_request = repo.ref(revision), {}
    if "create_pr" in request.query:
        opened = _open(repo, about["summary"], about["description"], request.user)
        ref, pull_request = opened.ref, {"pullRequestUrl": f"{hub.url}/{repo.id}/discussions/{opened.num}"}
    made = repo.commit(ref, files, about["summary"], about["description"], request.user, parent)
    url = f"{hub.url}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.id}/commit/{made.oid}"
    return Answer({"success": True, "commitOid": made.oid, "commitUrl": url} | pull_request)


def _apply(hub: "HubServer", files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = File(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in hub.objects:
            raise Refused(422, f"LFS pointer of {path} points to a file that does not exist")
        files[path] = File(hub.objects[value["oid"]], lfs=True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[name]
    else:
        raise Refused(400, f"Unknown operation {key}")


# -------------------------------------------------------------------------------------------------------------- download


def tree(hub: "HubServer", request: Request) -> Answer:
    files = find_commit(find(hub, request), request.rest["rev"]).files
    folder = request.rest.get("path")
    if folder:
        files = {path: file for path, file in files.items() if path.startswith(f"{folder}/")}
        if not files:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
    recursive = request.query.get("recursive") in (["true"], ["True"])
    return Answer(_tree(files, recursive, f"{folder}/" if folder else ""))


def _tree(files: dict[str, File], recursive: bool, prefix: str = "") -> list[dict[str, Any]]:
    entries: dict[str, dict] = {}
    for path, file in sorted(files.items()):
        folder, _, below = path.removeprefix(prefix).partition("/")
        if below:
            entries.setdefault(prefix + folder, {"type": "directory", "oid": "0" * 40, "size": 0})
        if not below or recursive:
            entries[path] = {"type": "file", "oid": file.blob_id, "size": len(file.content)}
            if file.lfs:
                large = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
                entries[path]["lfs"] = large
    return [entry | {"path": path} for path, entry in entries.items()]


def paths_info(hub: "HubServer", request: Request) -> Answer:
    files = find_commit(find(hub, request), request.rest["rev"]).files
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return Answer([entry for entry in _tree(files, True) if entry["path"] in wanted])


def resolve(hub: "HubServer", request: Request) -> Answer:
    """A file, or for a large one the way to the storage; the headers name the commit and the content in either case."""
    request.kind = request.kind or "model"
    commit, path = find_commit(find(hub, request), request.rest["rev"]), request.rest["path"]
    headers = {"X-Repo-Commit": commit.oid}
    file = commit.files.get(path)
    if file is None:
        refused = Refused(404, f"{path} is not in this revision", "EntryNotFound")
        refused.headers |= headers
        raise refused
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        location = f"{hub.storage_url}/objects/{file.sha256}/{quote(path.rpartition('/')[2])}"
        return Answer(b"", 302, headers | {"Location": location})
    return _content(hub, request, path, file.content, headers | {"ETag": f'"{file.blob_id}"'})


def get_object(hub: "HubServer", request: Request) -> Answer:
    content = hub.objects[request.rest["oid"]]
    return _content(hub, request, request.rest["path"], content, {"ETag": f'"{request.rest["oid"]}"'})


def _content(hub: "HubServer", request: Request, path: str, content: bytes, headers: dict[str, str]) -> Answer:
    alter = hub.tampered.get(path.rpartition("/")[2])
    content = alter(content) if alter and request.method == "GET" else content
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    headers = headers | {"Accept-Ranges": "bytes"}
    if not wanted:
        return Answer(content, 200, headers)
    first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
    if first > last:
        raise Refused(416, f"{path} has {len(content)} bytes")
    return Answer(content[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"})


def _routes(*table: tuple[str, str, Callable]) -> list[tuple[set[str], re.Pattern, Callable]]:
    return [(set(methods.split()), re.compile(path), function) for methods, path, function in table]


HUB_ROUTES = _routes(
    ("GET", "/api/whoami-v2", whoami),
    ("GET", "/api/agent-harnesses", agent_harnesses),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("GET", REPO, repo_info),
    ("GET", REPO + "/revision/(?P<rev>[^/]+)", repo_info),
    ("GET", REPO + "/refs", refs),
    ("GET", REPO + "/commits/(?P<rev>[^/]+)", history),
    ("GET", REPO + "/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", tree),
    ("POST", REPO + "/paths-info/(?P<rev>[^/]+)", paths_info),
    ("POST", REPO + "/preupload/(?P<rev>[^/]+)", preupload),
    ("GET", REPO + "/xet-(?:read|write)-token/(?P<rev>[^/]+)", xet_token),
    ("POST", REPO + "/commit/(?P<rev>[^/]+)", commit),
    ("POST", REPO + "/branch/(?P<branch>[^/]+)", create_ref),
    ("DELETE", REPO + "/branch/(?P<branch>[^/]+)", delete_ref),
    ("POST", REPO + "/tag/(?P<rev>[^/]+)", create_ref),
    ("DELETE", REPO + "/tag/(?P<rev>[^/]+)", delete_ref),
    ("POST", REPO + "/discussions", open_discussion),
    ("GET", REPO + r"/discussions/(?P<num>\d+)", discussion),
    ("POST", FILE + r"\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", FILE + r"\.git/info/lfs/objects/verify", lfs_verify),
    ("GET HEAD", FILE + "/resolve/(?P<rev>[^/]+)/(?P<path>.+)", resolve),
)
STORAGE_ROUTES = _routes(
    ("PUT", "/upload/(?P<oid>[0-9a-f]{64})", put_object),
    ("GET HEAD", "/objects/(?P<oid>[0-9a-f]{64})/(?P<path>.+)", get_object),
)
