"""Optimizer state under another spec, or for another tool, without a model.

IN is a checkpoint of memopt.save (or a folder of them), a file that torch.save wrote with the state_dict() of
torch.optim, transformers' Adafactor, bitsandbytes, torchao, flashoptim or memopt, alone (Trainer's optimizer.pt,
accelerate's optimizer.bin) or in a checkpoint with more (Lightning, nanoGPT), or a checkpoint folder of DeepSpeed (ZeRO
1 to 3, universal) or torch.distributed.checkpoint (FSDP). OUT is a folder in which a checkpoint is committed. Where its
name ends in .pt, .pth, .bin or .ckpt it is a file for load_state_dict, with all else that a file IN has: it takes the
place of IN in the run that wrote it (and may be IN). For another tool it is such a file whatever its name, and a folder
for --to dcp, from which torch.distributed.checkpoint loads "optimizer" (FSDP), and --to deepspeed, a universal
checkpoint for engines of ZeRO 1 to 3. The exit code is 0 when it is done, 2 if the input cannot be used.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from memopt.cli.output import files, terminal
from memopt.cli.output.progress import bar
from memopt.untrusted.text import printable, printable_lines

SUMMARY = "optimizer state of a checkpoint or of another tool under another spec"

#: Endings of files that torch.save wrote.
FILES = (".pt", ".pth", ".bin", ".ckpt")
#: Tools that read a folder.
FOLDERS = ("dcp", "deepspeed")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a checkpoint, a folder of them, or another tool's file or folder")
    parser.add_argument(
        "out",
        metavar="OUT",
        help="a folder of checkpoints, or a .pt, .pth, .bin or .ckpt file in the place of IN; for another tool a file "
        "(dcp, deepspeed: a folder)",
    )
    parser.add_argument(
        "--to",
        metavar="SPEC",
        required=True,
        help="a spec (memopt list), or torch, dcp, deepspeed, "
        "transformers, muon, bitsandbytes, bitsandbytes-32bit, torchao, torchao-4bit, torchao-fp8, flashoptim",
    )
    parser.add_argument("--from", metavar="RULE", dest="rule", help="the rule, where the file does not say it")
    parser.add_argument("--engine", metavar="ENGINE", help="of a spec: native (default) or bitsandbytes")
    parser.add_argument(
        "--fill",
        metavar="MOMENT=VALUE",
        action="append",
        default=[],
        help="what stands in for a moment that was not kept: a number, or another moment",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")


def run(args: Namespace) -> int:
    from memopt.checkpoint.exporting import TOOLS

    fill = dict(map(_fill, args.fill))
    if not args.dry_run:
        _check_out(Path(args.out), args.to, TOOLS)
    source, checkpoint = open_source(Path(args.source), args.rule)
    if args.to in TOOLS:
        if args.engine is not None:
            raise ValueError(f"--engine {args.engine} is of a spec of ours; --to {args.to} is a tool")
        return _export(source, checkpoint, args, args.to, fill)
    from memopt.checkpoint.conversion.converted_source import Converted
    from memopt.checkpoint.conversion.rewrite import rewrite
    from memopt.checkpoint.tensorfile import nbytes_of
    from memopt.spec import parse

    spec = parse(args.to, engine=args.engine or "native")
    if Path(args.out).suffix in FILES and not Path(args.out).is_dir():
        return _export(source, checkpoint, args, spec, fill)
    converted = Converted(source, spec, fill)
    nbytes = sum(nbytes_of(spec) for spec in converted.layout().values())
    print(
        printable(f"{source.origin}: {converted.report.before} -> {converted.report.after}, {nbytes:,} bytes of state")
    )
    if args.dry_run:
        return 0
    if checkpoint is not None and checkpoint.model is not None:
        nbytes += sum(nbytes_of(spec) for spec in checkpoint.model_specs.values())
    with bar("converting", nbytes) as progress:
        path = rewrite(converted, checkpoint, Path(args.out), progress)
    print(terminal.folded(printable_lines(str(converted.report)).splitlines()))
    files.written(str(path))
    return 0


def _check_out(out: Path, to: str, tools: Any) -> None:
    """Before a source is read, which may take minutes."""
    if to in FOLDERS and out.exists():
        raise ValueError(f"{out} exists; name a folder that does not")
    if to in FOLDERS:
        files.check_folder("OUT", out, parents=False)
    elif to in tools or (out.suffix in FILES and not out.is_dir()):
        files.check("OUT", str(out))
    else:
        files.check_folder("OUT", out)


def open_source(path: Path, rule: str | None) -> tuple[Any, Any]:
    """``(source, checkpoint)``; no checkpoint where it is another tool's."""
    from memopt.checkpoint.opened import Checkpoint
    from memopt.checkpoint.state.detect import is_foreign, read_path

    if not path.exists():
        raise ValueError(f"{str(path)!r} does not exist")
    if is_foreign(path):
        return read_path(path, rule), None

    with bar("verifying", None) as progress:
        checkpoint = Checkpoint(path, progress)
    return checkpoint.optimizer_of(rule), checkpoint


def _export(source: Any, checkpoint: Any, args: Namespace, to: Any, fill: dict[str, Any]) -> int:
    """``to`` is a tool's name, or a spec of ours."""
    from memopt.checkpoint.exporting import exported, write

    found = exported(source, to, fill)
    print(printable(f"{source.origin}: {len(source.records)} parameters for {to}, {found.nbytes:,} bytes of state"))
    if args.dry_run:
        return 0
    given, out = Path(args.source), Path(args.out)
    with bar("exporting", found.nbytes) as progress:
        write(found, out, checkpoint, progress, within=given if given.is_file() else None)
    print(terminal.folded(printable_lines(str(found.report)).splitlines()))
    files.written(str(out))
    return 0


def _fill(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"--fill {text!r} is not MOMENT=VALUE")
    try:
        return name, float(value)
    except ValueError:
        return name, value
