"""A language client as small as it gets: JSON-RPC over a server's pipes, as an editor speaks it."""

from __future__ import annotations

import itertools
import json
import queue
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Seconds until a server that says nothing has failed."""

CAPABILITIES = {
    "textDocument": {
        "completion": {"completionItem": {"documentationFormat": ["markdown"], "snippetSupport": True}},
        "hover": {"contentFormat": ["markdown"]},
        "publishDiagnostics": {},
    },
    "workspace": {"configuration": True, "workspaceFolders": True},
}


class Client:
    """One server with one open folder; `settings` are what the user's editor is set to."""

    def __init__(self, command: Sequence[str], folder: Path, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._ids = itertools.count(1)
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._diagnostics: dict[str, list[dict[str, Any]]] = {}
        self._configured = False
        threading.Thread(target=self._listen, daemon=True).start()
        root = folder.as_uri()
        folders = [{"uri": root, "name": folder.name}]
        self._ask(
            "initialize",
            {"processId": None, "rootUri": root, "workspaceFolders": folders, "capabilities": CAPABILITIES},
        )
        self._tell("initialized", {})
        self._tell("workspace/didChangeConfiguration", {"settings": settings})
        while not self._configured:
            self._take()

    def diagnostics(self, texts: Mapping[Path, str]) -> dict[Path, list[tuple[int, str]]]:
        """Open files with these texts, and return what the server complains of: line (from 1) and message."""
        for file, text in texts.items():
            self._open(file, text)
        found = {file: self._diagnosed(file) for file in texts}
        for file in texts:
            self._close(file)
        return {
            file: [(one["range"]["start"]["line"] + 1, one["message"]) for one in diagnostics]
            for file, diagnostics in found.items()
        }

    def completion(self, file: Path, text: str) -> dict[str, str]:
        """Return what is offered at the `|` in the text: label to documentation."""
        found = self._at("textDocument/completion", file, text)
        return {item["label"]: _markdown(item.get("documentation")) for item in found["items"]}

    def hover(self, file: Path, text: str) -> str:
        """Return what is shown at the `|` in the text."""
        found = self._at("textDocument/hover", file, text)
        return _markdown(found and found["contents"])

    def close(self) -> None:
        """End the server, if need be by force."""
        self._ask("shutdown", None)
        self._tell("exit", None)
        try:
            self._server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._server.kill()

    def _at(self, method: str, file: Path, text: str) -> Any:
        before, _, after = text.partition("|")
        self._open(file, before + after)
        self._diagnosed(file)
        position = {"line": before.count("\n"), "character": len(before.rpartition("\n")[2])}
        found = self._ask(method, {"textDocument": {"uri": file.as_uri()}, "position": position})
        self._close(file)
        return found

    def _open(self, file: Path, text: str) -> None:
        # The server remembers what it parsed by the version.
        document = {"uri": file.as_uri(), "languageId": "yaml", "version": next(self._ids), "text": text}
        self._tell("textDocument/didOpen", {"textDocument": document})

    def _close(self, file: Path) -> None:
        self._tell("textDocument/didClose", {"textDocument": {"uri": file.as_uri()}})
        assert self._diagnosed(file) == []  # it takes back what it said

    def _diagnosed(self, file: Path) -> list[dict[str, Any]]:
        while file.as_uri() not in self._diagnostics:
            self._take()
        return self._diagnostics.pop(file.as_uri())

    def _ask(self, method: str, params: Any) -> Any:
        number = next(self._ids)
        self._send({"id": number, "method": method, "params": params})
        while True:
            message = self._take()
            if message.get("id") == number and "method" not in message:
                assert "error" not in message, message
                return message["result"]

    def _tell(self, method: str, params: Any) -> None:
        self._send({"method": method, "params": params})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._server.stdin
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self._server.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self._server.stdin.flush()

    def _take(self) -> dict[str, Any]:
        """Take the server's next message; answer what it asks, remember its diagnostics."""
        message = self._messages.get(timeout=PATIENCE)
        assert message is not None, "the language server ended"
        method = message.get("method")
        if method == "workspace/configuration":
            self._configured = True
            sections = [item.get("section") for item in message["params"]["items"]]
            self._send({"id": message["id"], "result": [self._settings.get(section) for section in sections]})
        elif method == "textDocument/publishDiagnostics":
            self._diagnostics[message["params"]["uri"]] = message["params"]["diagnostics"]
        elif method and "id" in message:
            self._send({"id": message["id"], "result": None})
        return message

    def _listen(self) -> None:
        stream = self._server.stdout
        assert stream
        while line := stream.readline():
            length = 0
            while line.strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
                line = stream.readline()
            self._messages.put(json.loads(stream.read(length)))
        self._messages.put(None)


def _markdown(content: Any) -> str:
    return content["value"] if isinstance(content, dict) else content or ""
