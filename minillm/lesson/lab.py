"""`make lab`: JupyterLab on the learner's working copy, on 127.0.0.1 with a token, with or without a browser here."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import sys
from pathlib import Path

from minillm.lesson.workspace import fill

FIRST_PORT, PORTS = 8888, 100
_SETTINGS: dict[str, dict[str, object]] = {
    # no question about news, no request to the network
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
    # a saved lesson shows its interactive pictures again before its kernel runs
    "@jupyter-widgets/jupyterlab-manager/plugin.jupyterlab-settings": {"saveState": True},
}


def free_port(wanted: int | None) -> int:
    """`wanted`, or the first free port from 8888. Raises `ValueError` when there is none, or the wanted one is taken."""
    if wanted is not None and not 1 <= wanted <= 65535:
        raise ValueError(f"PORT={wanted}: give a number from 1 to 65535")
    for port in [wanted] if wanted else range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise ValueError(
        f"port {wanted} is in use or not allowed: choose another with PORT=" if wanted else "no free port from 8888 on"
    )


def has_screen() -> bool:
    """Whether a browser could open on this machine."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def quiet_settings(folder: Path) -> Path:
    """A settings folder of the working copy: JupyterLab asks nothing at its start, and keeps widgets in saved notebooks."""
    for name, values in _SETTINGS.items():
        file = folder / ".jupyter" / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
    return folder / ".jupyter"


def main() -> None:
    """Fill the working copy, print the URL, and become JupyterLab."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    try:
        port = free_port(options.port)
    except ValueError as error:
        sys.exit(f"minillm: {error}")
    work = Path("work")
    for line in fill(Path("notebooks"), work):
        print(line)
    first = sorted(Path("notebooks").glob("*.ipynb"))[0].name
    token = os.environ.get("JUPYTER_TOKEN") or secrets.token_hex(24)
    own = quiet_settings(work).resolve()  # nothing of the user's other Jupyter: its tabs, its settings, its open doors
    environment = {
        **os.environ,
        "JUPYTER_TOKEN": token,
        "JUPYTER_CONFIG_DIR": str(own),
        "JUPYTERLAB_SETTINGS_DIR": str(own),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
    }
    print(
        f"\n    Open this in a browser:\n    http://127.0.0.1:{port}/lab/tree/work/{first}?token={token}\n", flush=True
    )
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.ip=127.0.0.1",
    ]
    command += [
        f"--ServerApp.root_dir={Path.cwd()}",
        f"--LabApp.default_url=/lab/tree/work/{first}",
        "--log-level=ERROR",
    ]
    if not has_screen():
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
