"""The calculator as a page: served on this machine, or written as static files.

Without options a server on 127.0.0.1 answers until Ctrl-C; nothing leaves this machine, and nothing is loaded from
elsewhere. --write makes a folder that any web server can hand out: there the browser runs the same Python, through
Pyodide, whose npm package is not part of memopt and is named with --pyodide.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from memopt.cli.output import files, progress

SUMMARY = "the calculator as a page, on this machine or as static files"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--port", metavar="N", default="0", help="default: one that is free")
    parser.add_argument("--write", metavar="FOLDER", help="write static files instead of serving")
    parser.add_argument("--pyodide", metavar="FOLDER", help="with --write: Pyodide's npm package, unpacked")


def run(args: Namespace) -> int:
    if args.write:
        return _write(args)
    if args.pyodide:
        raise ValueError("--pyodide is for --write: the server on this machine runs its own Python")
    port = args.port
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ValueError(f"--port {port!r} is not allowed; it is a whole number from 0 (a free one) to 65535")
    from memopt.web.server import Server

    try:
        server = Server(int(port))
    except OSError as error:
        raise ValueError(f"--port {port} cannot be had: {error.strerror or error}") from None
    with server:
        print(f"The calculator is at {server.address} until Ctrl-C.", flush=True)
        server.serve_forever()
    return 0


def _write(args: Namespace) -> int:
    from memopt.web.site import write

    if not args.pyodide:
        raise ValueError(
            "--write needs Pyodide, which runs Python in the browser: npm install pyodide, then "
            "--pyodide node_modules/pyodide"
        )
    try:
        with progress.working("writing"):
            sizes = write(args.write, args.pyodide)
    except OSError as error:
        raise OSError(f"--write {args.write!r} cannot be written: {error.strerror or error}") from None
    files.written(args.write)
    print(f"{len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB")
    return 0
