"""Serves a page on which you can try a run: draw samples, edit codes, complete pictures.

    taming-jax playground --workdir runs/mnist

Needs `pip install 'taming_jax[playground]'`. The page is for this computer only. For others, set
--host and --token, and use a tunnel or a proxy that encrypts the connection.
"""

from dataclasses import dataclass, field
from pathlib import Path

from taming_jax.cli.arguments import DataFlags, collect_data_settings, parse
from taming_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Playground:
    workdir: Path
    """The run's folder."""
    port: int = 8765
    """The port of the page; 0 takes any free one."""
    host: str = "127.0.0.1"
    """The address to listen on. 0.0.0.0 stands for all addresses of this computer."""
    token: str | None = None
    """A secret that the page requires. Without it, only this computer can use the page."""
    data: DataFlags = field(default_factory=DataFlags)


def main() -> None:
    args = parse(Playground, __doc__)
    try:
        from taming_jax.playground import server
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise UserError(
            f"the playground needs the package {error.name}; install it with "
            "`pip install 'taming_jax[playground]'`."
        ) from None
    from taming_jax.run import load_run

    server.check_address(args.host, args.token)
    with server.open_socket(args.host, args.port) as listener:
        run = load_run(args.workdir, collect_data_settings(args.data))
        server.serve(run, listener, args.token)
