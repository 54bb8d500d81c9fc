"""W&B runs: offline ones as wandb's own reader shows them, online ones as their server receives them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("drive_wandb.py")
KEY = "a" * 40
PERPLEXITY = "perplexity/perplexity"


def python(
    folder: Path, *arguments: str, variables: Mapping[str, str] | None = None, status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, at home there: without a terminal, or an account that the user may have."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**kept, **home, **(variables or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    return done


def drive(output_dir: Path, first: int, last: int, ending: str, **more: Any) -> str:
    """Run the driver; `more` are options of the monitor, or environment variables in capitals.

    Returns what was written to stderr.
    """
    variables = {key: value for key, value in more.items() if key.isupper()}
    options = {key: value for key, value in more.items() if not key.isupper()}
    arguments = [str(DRIVER), str(output_dir), str(first), str(last), ending, json.dumps(options)]
    status = -9 if ending == "kill" else 0
    done = python(output_dir.parent, *arguments, variables=variables, status=status)
    assert done.stdout == ""
    assert {path.name for path in output_dir.parent.iterdir()} <= {output_dir.name, ".cache", "wandb"}
    return done.stderr


def inspect(file: Path, *options: str) -> str:
    """What W&B's own reader says of a `.wandb` file: its records, or with --summary its state."""
    return python(file.parent, "-m", "wandb", "leet", "inspect", "--json", *options, str(file)).stdout


def files(output_dir: Path, pattern: str = "*run-*") -> list[Path]:
    return sorted(output_dir.glob(f"wandb/{pattern}/*.wandb"))


def records(files: list[Path], kind: str) -> list[dict[str, Any]]:
    """Every record of a kind in all the files, in order."""
    found = [json.loads(line) for file in files for line in inspect(file).splitlines()]
    return [record[kind] for record in found if record["type"] == kind]


def history(files: list[Path]) -> list[dict[str, Any]]:
    return [record["item"] for record in records(files, "history")]


def test_an_offline_run_has_name_config_history_and_summary(tmp_path: Path) -> None:
    output_dir = tmp_path / "llama-2.7b"
    labels = {"tags": ["small", "test"], "group": "g", "notes": "why"}
    drive(output_dir, 0, 20, "finish", project="llamas", mode="offline", **labels)
    [run] = records(files(output_dir), "run")
    assert run["display_name"] == "llama-2.7b" and run["project"] == "llamas"
    assert run["tags"] == ["small", "test"] and run["run_group"] == "g" and run["notes"] == "why"

    rows = history(files(output_dir))
    assert [row["_step"] for row in rows] == list(range(1, 21))
    assert [row["loss"] for row in rows] == [1 / step for step in range(1, 21)]
    perplexity = {row["_step"]: row[PERPLEXITY] for row in rows if PERPLEXITY in row}
    assert perplexity == {5: 7.0, 10: 2.0, 15: 7.0, 20: 12.0}
    assert rows[2]["grad_norm"] == "NaN" and rows[-1]["sample"] == "a [sample] of text"
    assert "step" not in rows[0]  # it is W&B's own axis

    state = json.loads(inspect(files(output_dir)[0], "--summary"))
    assert state["summary"]["loss"] == 1 / 20
    assert state["summary"][PERPLEXITY] == 12.0 and state["summary"]["perplexity/best"] == 2.0
    assert state["config"]["model"]["path"] == "some/model" and state["config"]["seed"] == 7
    assert [ending["exit_code"] for ending in records(files(output_dir), "exit")] == [0]


def test_without_an_account_it_stays_offline_and_says_so_in_one_line(tmp_path: Path) -> None:
    output_dir = tmp_path / "demo"
    [line] = drive(output_dir, 0, 2, "fail").splitlines()
    assert line.startswith("wandb: offline, since no API key is configured; ")
    assert f"wandb sync {output_dir}/wandb/offline-run-" in line
    assert [ending["exit_code"] for ending in records(files(output_dir), "exit")] == [1]


def test_stopped_killed_and_resumed_it_is_one_run_with_each_step_once(tmp_path: Path) -> None:
    output_dir = tmp_path / "demo"
    drive(output_dir, 0, 12, "finish")
    drive(output_dir, 12, 19, "kill")  # W&B has written none of these
    drive(output_dir, 16, 25, "kill")
    drive(output_dir, 24, 30, "finish")
    rows = history(files(output_dir))
    assert [row["_step"] for row in rows] == list(range(1, 31))
    assert [row["loss"] for row in rows] == [1 / step for step in range(1, 31)]
    assert [row["_step"] for row in rows if PERPLEXITY in row] == [5, 10, 15, 20, 25, 30]
    assert len({run["run_id"] for run in records(files(output_dir), "run")}) == 1
    state = json.loads(inspect(files(output_dir)[-1], "--summary"))
    assert state["summary"]["perplexity/best"] == 2.0 and state["summary"][PERPLEXITY] == 22.0


def test_what_a_killed_process_has_written_is_written_anew(tmp_path: Path) -> None:
    output_dir = tmp_path / "demo"
    drive(output_dir, 0, 300, "kill")
    [killed] = files(output_dir)
    steps = [row["_step"] for row in history([killed])]
    assert steps == list(range(1, len(steps) + 1)) and 50 < len(steps) < 300
    drive(output_dir, 40, 60, "finish")
    assert [row["_step"] for row in history(files(output_dir))] == list(range(1, 61))


def test_a_run_that_begins_anew_is_another_one(tmp_path: Path) -> None:
    output_dir = tmp_path / "demo"
    drive(output_dir, 0, 3, "finish")
    drive(output_dir, 0, 3, "finish", run_name="second")
    runs = records(files(output_dir), "run")
    assert len({run["run_id"] for run in runs}) == 2
    assert {run["display_name"] for run in runs} == {"demo", "second"}


def test_a_disabled_run_writes_no_wandb_file(tmp_path: Path) -> None:
    assert drive(tmp_path / "demo", 0, 3, "finish", mode="disabled") == "wandb: disabled\n"
    assert files(tmp_path / "demo") == []


def test_a_server_that_does_not_answer_does_not_stop_the_run(tmp_path: Path) -> None:
    output_dir = tmp_path / "demo"
    nobody = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    assert "offline, since the server does not answer" in drive(
        output_dir, 0, 3, "finish", init_timeout=2.0, **nobody
    )
    assert [row["_step"] for row in history(files(output_dir, "offline-run-*"))] == [1, 2, 3]


CHECK = """
from collie_monitors.wandb_monitor import WandB
for mode in ("online", None):
    print(WandB(WandB.Options(mode=mode)).collie_check())
"""


@pytest.mark.parametrize("account", [{}, {"WANDB_API_KEY": KEY}])
def test_online_without_a_key_is_refused_before_the_run(tmp_path: Path, account: dict[str, str]) -> None:
    online, automatic = python(tmp_path, "-c", CHECK, variables=account).stdout.splitlines()
    assert ("no API key" in online) == (not account)
    assert automatic == "[]"


@dataclass
class Server:
    """What wandb asks of its server to upload and resume runs; keeps the history lines that it receives."""

    url: str = ""
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    def graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "e", "name": "me"}
        name = variables.get("name")
        if operation == "RunResumeStatus":
            lines = self.history.get(name or "")
            known: dict[str, Any] = {
                "id": "b",
                "name": name,
                "summaryMetrics": "{}",
                "logLineCount": 0,
                "eventsLineCount": 0,
                "historyLineCount": len(lines or []),
                "historyTail": json.dumps([json.dumps(line) for line in (lines or [])[-1:]]),
                "eventsTail": "[]",
                "config": "{}",
                "tags": [],
                "wandbConfig": '{"t": 1}',
            }
            return {"model": {"id": "p", "name": "p", "entity": entity, "bucket": known if lines else None}}
        if operation == "UpsertBucket":
            project = {"id": "p", "name": "p", "entity": entity}
            made = {"id": "b", "name": name, "displayName": variables["displayName"], "project": project}
            return {"upsertBucket": {"inserted": True, "bucket": made}}
        if operation == "CreateRunFiles":
            uploads = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": uploads}}
        return {}

    def stream(self, run_id: str, message: dict[str, Any]) -> None:
        lines = message.get("files", {}).get("wandb-history.jsonl")
        if lines:
            history = self.history.setdefault(run_id, [])
            assert lines["offset"] == len(history)
            history += map(json.loads, lines["content"])
        if message.get("complete"):
            self.exit_codes.append(message["exitcode"])


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            answer: dict[str, Any] = {}
            if self.path.endswith("/file_stream"):
                state.stream(self.path.split("/")[-2], json.loads(body))
            elif self.path.endswith("/graphql"):
                query = json.loads(body)
                answer = {"data": state.graphql(query["operationName"], query.get("variables") or {})}
            self.answer(json.dumps(answer).encode())

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(b"")

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_address[1]}"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield state
        http.shutdown()


def test_online_the_server_gets_each_step_once(tmp_path: Path, server: Server) -> None:
    output_dir = tmp_path / "demo"
    account = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
    assert server.url in drive(output_dir, 0, 12, "finish", **account)
    drive(output_dir, 12, 19, "kill", **account)  # nothing was sent: steps 13 to 15 have to be sent again
    drive(output_dir, 15, 22, "fail", **account)
    drive(output_dir, 18, 30, "finish", **account)  # an older checkpoint: steps 19 to 22 are there already
    [rows] = server.history.values()
    assert [row["_step"] for row in rows] == list(range(1, 31))
    assert [row["loss"] for row in rows] == [1 / step for step in range(1, 31)]
    assert [row["_step"] for row in rows if PERPLEXITY in row] == [5, 10, 15, 20, 25, 30]
    assert server.exit_codes == [0, 1, 0]


def test_an_offline_run_in_parts_is_uploaded_as_one(tmp_path: Path, server: Server) -> None:
    output_dir = tmp_path / "demo"
    drive(output_dir, 0, 12, "finish", project="p")
    drive(output_dir, 12, 20, "finish", project="p")
    folders = [str(file.parent) for file in files(output_dir)]
    account = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
    python(tmp_path, "-m", "wandb", "sync", *folders, variables=account)
    [rows] = server.history.values()
    assert [row["_step"] for row in rows] == list(range(1, 21))
