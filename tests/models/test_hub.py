"""Models by hub id, from a server on this machine that answers the few routes that huggingface_hub asks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file

from collie_core import AutoModelForCausalLM, AutoTokenizer

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Repositories by id and revision; counts what is fetched."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Path]] = {}
        self.fetched: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """`/api/models/ID/revision/REV`, `/api/models/ID/tree/REV` and `/ID/resolve/REV/FILE`."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        repository, (kind, revision), rest = "/".join(parts[:2]), parts[2:4], parts[4:]
        revisions = self.server.repositories.get(repository)
        if revisions is None:
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = next((name for name, sha in COMMITS.items() if sha == revision), revision)
        if revision not in revisions:
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        folder, commit = revisions[revision], COMMITS[revision]
        if api and kind == "revision":
            return self.reply(200, json.dumps({"id": repository, "sha": commit, "siblings": []}).encode())
        if api and kind == "tree":
            files = [
                {
                    "type": "file",
                    "path": p.name,
                    "size": p.stat().st_size,
                    "oid": digest(p.read_bytes()),
                }
                for p in sorted(folder.iterdir())
            ]
            return self.reply(200, json.dumps(files).encode())
        content = (folder / rest[0]).read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(content)}"'}
        if body:
            self.server.fetched[rest[0]] += 1
        self.reply(200, content, headers, body)

    def reply(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(content)


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def start(hub: Hub | None, cache: Path, code: str, offline: bool = False) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    code = f"from collie_core.models.hub import resolve\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    return out


def error_of(process: subprocess.Popen[str]) -> str:
    _, error = process.communicate(timeout=180)
    assert process.returncode != 0
    return error.strip().splitlines()[-1]


FIND = "print(resolve('lab/tiny'))"


@pytest.fixture
def repository(tiny_llama: Path, tmp_path: Path) -> Path:
    """What a hub repository may hold: both kinds of weights, code, a picture."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "picture.png").write_bytes(b"png")
    return folder


def test_downloads_what_is_needed_once(hub: Hub, repository: Path, tmp_path: Path) -> None:
    hub.repositories["lab/tiny"] = {"main": repository}
    cache = tmp_path / "cache"
    finish(start(hub, cache, "resolve('lab/tiny', weights=False)"))  # for a tokenizer
    assert "config.json" in hub.fetched and "model.safetensors" not in hub.fetched
    # two processes of one node share a download
    processes = [start(hub, cache, FIND) for _ in range(2)]
    folders = {finish(process).strip() for process in processes}
    assert hub.fetched["model.safetensors"] == 1 and hub.fetched["config.json"] == 1
    assert not {"pytorch_model.bin", "modeling.py", "picture.png"} & hub.fetched.keys()
    # then offline, or with the hub away
    assert {finish(start(hub, cache, FIND, offline=True)).strip()} == folders
    assert {finish(start(None, cache, FIND)).strip()} == folders
    assert hub.fetched["model.safetensors"] == 1
    [folder] = folders
    assert (
        load_file(f"{folder}/model.safetensors").keys() == load_file(repository / "model.safetensors").keys()
    )


def test_a_model_by_its_id(hub: Hub, repository: Path, tmp_path: Path) -> None:
    hub.repositories["lab/tiny"] = {"main": repository}
    code = """
import torch
from collie_core import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained('lab/tiny')('What does it return?')['input_ids']
print(AutoModelForCausalLM.from_pretrained('lab/tiny')(torch.tensor([ids])).logits[0, -1].argmax().item())
"""
    found = int(finish(start(hub, tmp_path / "cache", code)))
    ids = AutoTokenizer.from_pretrained(repository)("What does it return?")["input_ids"]
    logits = AutoModelForCausalLM.from_pretrained(repository)(torch.tensor([ids])).logits
    assert found == int(logits[0, -1].argmax())


def test_revisions_and_bin(hub: Hub, repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in repository.iterdir():
        if path.suffix in (".json", ".bin"):
            (other / path.name).write_bytes(path.read_bytes())
    hub.repositories["lab/tiny"] = {"main": repository, "v2": other}
    cache = tmp_path / "cache"
    code = "print(sorted(p.name for p in resolve('lab/tiny', 'v2').iterdir()))"
    found = finish(start(hub, cache, code))
    assert "pytorch_model.bin" in found and "safetensors" not in found
    assert "model.safetensors" in finish(start(hub, cache, code.replace(", 'v2'", "")))
    assert hub.fetched["pytorch_model.bin"] == hub.fetched["model.safetensors"] == 1
    assert finish(start(hub, cache, code, offline=True)) == found


def test_errors_name_id_and_cache(hub: Hub, repository: Path, tmp_path: Path) -> None:
    hub.repositories["lab/tiny"] = {"main": repository}
    cache = tmp_path / "cache"
    absent = "resolve('lab/absent')"
    processes = {
        "absent": start(hub, cache, absent),
        "offline": start(hub, cache, absent, offline=True),
        "away": start(None, cache, absent),
        "revision": start(hub, cache, "resolve('lab/tiny', 'v9')"),
    }
    errors = {name: error_of(process) for name, process in processes.items()}
    assert all("CheckpointError: lab/" in error and "no such folder" in error for error in errors.values())
    assert f"{hub.url} has no such model" in errors["absent"]
    assert "HF_HUB_OFFLINE is set" in errors["offline"] and str(cache) in errors["offline"]
    assert "http://127.0.0.1:9 cannot be reached" in errors["away"] and str(cache) in errors["away"]
    assert "has no revision 'v9'" in errors["revision"]
