"""`posttrain serve`: a folder, or a project's champion, behind an OpenAI-compatible API."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import shlex
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.core import RegistryError, ServeError, UsageError

if TYPE_CHECKING:
    from starlette.applications import Starlette

KEY_VARIABLE = "POSTTRAIN_API_KEY"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve`."""
    parser = commands.add_parser(
        "serve",
        help="serve a model behind an OpenAI-compatible API",
        description="Serve a model behind an OpenAI-compatible API. Every answer is kept in the feedback store, so "
        "that what users say of it can become training data (`posttrain feedback`). Ctrl-C ends it gracefully.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder of the model, or a Hugging Face name")
    which.add_argument("--project", help="serve the champion of this project")
    parser.add_argument("--name", help="what clients call it (default: the project, or the folder's name)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the registry (default: runs)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"clients must send one; repeatable. Better in the environment, as {KEY_VARIABLE}",
    )
    parser.add_argument("--feedback-db", type=Path, help="where answers are kept (default: <runs>/feedback.db)")
    parser.add_argument("--template", type=Path, help="a chat template file that replaces the model's own")
    parser.add_argument("--slots", type=int, default=16, help="answers sampled at the same time (default: 16)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:0 … (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("--drain", type=float, default=30.0, metavar="S", help="seconds that requests get at the end")
    parser.set_defaults(action=serve)


def serve(chosen: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    keys = api_keys(chosen)
    if not keys and not is_loopback(chosen.host):
        raise UsageError(
            f"--host {chosen.host} opens the API to the network: set {KEY_VARIABLE} (or --api-key), or bind 127.0.0.1"
        )
    from posttrain.serve import ServedModel, create_app, run  # first, for the error that says which extra to install

    folder, card_id, name = _which_model(chosen)
    from posttrain.feedback import FeedbackStore
    from posttrain.recipes.policy import load_policy

    policy = load_policy(folder, device=chosen.device, dtype=chosen.dtype, template=chosen.template)
    port = chosen.port or _free_port(chosen.host)
    store_path = chosen.feedback_db or chosen.runs / "feedback.db"
    with FeedbackStore(store_path) as store, policy.engine(slots=chosen.slots) as engine:
        served = ServedModel(name=name, engine=engine, renderer=policy.renderer, card_id=card_id)
        app = create_app({name: served}, store=store, api_keys=keys)
        host = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
        has_template = bool(policy.renderer.template or policy.tokenizer.chat_template)
        lines = welcome(f"http://{host}:{port}", name, has_key=bool(keys), chat=has_template)
        _announce(app, [*lines, f"answers and feedback: {store_path}"])
        run(app, chosen.host, port, drain_s=chosen.drain)
    print("stopped; every answer is in the feedback store")
    return 0


def api_keys(chosen: argparse.Namespace) -> list[str]:
    """Keys of the options, else of the environment."""
    keys = chosen.api_key or [os.environ.get(KEY_VARIABLE, "")]
    return [key for key in keys if key]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name other than localhost counts as open."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def welcome(url: str, name: str, *, has_key: bool, chat: bool) -> list[str]:
    """What a person needs to call the server: its address and a request to copy."""
    body: dict[str, object] = {"model": name, "max_tokens": 64}
    body |= {"messages": [{"role": "user", "content": "Hello!"}]} if chat else {"prompt": "Hello"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if has_key else ""
    return [
        f"serving {name} on {url}",
        f"curl -sS {url}{path}{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}",
    ]


def _which_model(chosen: argparse.Namespace) -> tuple[str, str, str]:
    """Folder, card id and name of what is to be served."""
    from posttrain.cli.artifacts import open_registry

    if chosen.model is not None:
        folder = Path(chosen.model).resolve()
        own_name = folder.parent.name if folder.name == "model" else folder.name  # a run's model is runs/<id>/model
        return chosen.model, registered_id(folder, chosen.runs), chosen.name or own_name

    with open_registry(chosen.runs) as registry:
        card = registry.champion(chosen.project)
        if card is None:
            known = ", ".join(registry.projects()) or "none"
            raise RegistryError(
                f"project {chosen.project!r} has no champion in {registry.path}; projects: {known}. "
                "Make one: posttrain promote MODEL --project NAME"
            )
    print(f"champion of {chosen.project}: {card.name} ({card.id[:12]})")
    return card.path, card.id, chosen.name or chosen.project


def registered_id(folder: Path, runs: Path) -> str:
    """The id under which the registry knows a folder as it is now; "" where it does not."""
    from posttrain.cli.artifacts import open_registry

    if not (folder.is_dir() and (runs / "registry.db").is_file()):
        return ""
    with open_registry(runs) as registry:
        for artifact in reversed(registry.artifacts("model")):
            if Path(artifact.path) == folder:
                try:
                    return registry.verify(artifact.id).id
                except RegistryError:  # trained on since: another model now
                    return ""
    return ""


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
            port: int = probe.getsockname()[1]
            return port
    except OSError as error:
        raise ServeError(f"cannot serve on {host}: {error}") from error


def _announce(app: Starlette, lines: list[str]) -> None:
    """Print lines once the address is bound and the application is up."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def announced(starting: Starlette) -> AsyncIterator[None]:
        async with inner(starting):
            print("\n".join(lines), flush=True)
            yield

    app.router.lifespan_context = announced
