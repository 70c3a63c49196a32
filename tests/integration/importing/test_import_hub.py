"""A hub id is downloaded from the hub alone; a small local server stands in for it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.unit.importing.directories import write_model

COMMIT = "0" * 40
TOKEN = "hf_only_for_this_test"


class _Hub(BaseHTTPRequestHandler):
    """One open model, one gated model; everything else is unknown."""

    directory: Path
    requested: list[str]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def _answer(self, *, with_body: bool) -> None:
        self.requested.append(self.path)
        repository = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        if repository == "org/gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(403, b"", with_body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif repository not in ("org/open", "org/gated"):
            self._send(404, b"", with_body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "unknown"})
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": path.name} for path in self.directory.iterdir()]
            body = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False}
            if "/tree/" in self.path:
                files = sorted(self.directory.iterdir())
                listing = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40} for path in files
                ]
                self._send(200, json.dumps(listing).encode(), with_body, {"Content-Type": "application/json"})
            else:
                self._send(200, json.dumps(body).encode(), with_body, {"Content-Type": "application/json"})
        else:
            content = (self.directory / self.path.rpartition("/")[2]).read_bytes()
            tag = hashlib.sha1(content).hexdigest()
            self._send(200, content, with_body, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    directory = write_model(tmp_path / "hub")
    for name in ("pytorch_model.bin", "modeling_custom.py", "README.md"):
        (directory / name).write_text("not wanted")
    handler = type("Hub", (_Hub,), {"directory": directory, "requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _import(tmp_path: Path, port: int, *arguments: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "gpu_service.engine.importing", "--models-directory", str(tmp_path / "models")]
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [*command, "--name", "org/model", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout if done.returncode == 0 else done.stderr
    return done.returncode, json.loads(output.splitlines()[-1]), done.stdout + done.stderr


def test_only_wanted_files_are_downloaded(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    code, result, _ = _import(tmp_path, hub.server_port, "--hub-id", "org/open")
    assert code == 0, result
    assert result["num_parameters"] == 10
    names = {path.name for path in Path(result["path"]).iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    requested = " ".join(getattr(hub.RequestHandlerClass, "requested"))  # noqa: B009
    assert "model.safetensors" in requested
    assert "pytorch_model.bin" not in requested
    assert "modeling_custom.py" not in requested


def test_a_gated_model_needs_a_token_file_and_never_shows_the_token(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    code, failure, _ = _import(tmp_path, hub.server_port, "--hub-id", "org/gated")
    assert (code, failure["reason"]) == (1, "DOWNLOAD_FAILED")
    assert "--token-file" in failure["message"]
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    code, result, output = _import(
        tmp_path, hub.server_port, "--hub-id", "org/gated", "--token-file", str(tmp_path / "token")
    )
    assert code == 0, result
    assert TOKEN not in output
    assert not [path for path in Path(result["path"]).rglob("*") if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("content", [None, "", "two words"])
def test_a_token_file_without_one_token_is_refused(
    tmp_path: Path, hub: ThreadingHTTPServer, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "token").write_text(content)
    arguments = ("--hub-id", "org/gated", "--token-file", str(tmp_path / "token"))
    code, failure, output = _import(tmp_path, hub.server_port, *arguments)
    assert (code, failure["reason"]) == (1, "INVALID_TOKEN_FILE")
    assert "two words" not in output


def test_an_unknown_model_is_not_found(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    code, failure, _ = _import(tmp_path, hub.server_port, "--hub-id", "org/absent")
    assert (code, failure["reason"]) == (1, "SOURCE_NOT_FOUND")


def test_a_hub_that_does_not_answer_is_a_failed_download(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    hub.shutdown()
    hub.server_close()
    code, failure, _ = _import(tmp_path, hub.server_port, "--hub-id", "org/open")
    assert (code, failure["reason"]) == (1, "DOWNLOAD_FAILED")
    assert list((tmp_path / "models/org").iterdir()) == []
