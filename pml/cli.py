"""The `pml` command: LightningCLI's own subcommands, and the commands around a run."""

import ast
import errno
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from pml.disk import disk_trouble, quiet_threads
from pml.errors import InputError, reason
from pml.escape import one_line
from pml.own_classes import OPTION, allowed
from pml.stopping import Stopped, listening

__all__ = ["COMMANDS", "main"]

FIT_COMMANDS = {
    "fit": "train an adapter on a corpus; leaves a run folder with record, adapter and curves",
    "validate": "measure the teacher-forced recall of a run, or of a checkpoint",
    "test": "measure what greedy decoding recalls of a run, or of a checkpoint",
    "predict": "score every target token of a run's corpus; leaves a table, predictions.parquet",
}
COMMANDS = (
    "memorize",
    "data",
    "sweep",
    "search",
    "law",
    "plan",
    "calibrate",
    "compare",
    "report",
    "recall",
    "certify",
    "export",
    "bench",
    "fetch",
)
"""Commands around a run; each is a module of `pml.commands`, imported only when it is called."""

BROKEN_PIPE = 128 + 13
"""What shells say of a program that SIGPIPE ended."""


PATH_ERRORS = (
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ELOOP,
)

LONGEST_PATH = 200
"""Characters of a path that a message shows."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pml`; returns the exit code: 0 done, 1 something in a sweep failed, 2 wrong input, 130 or 143 stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    where = f"pml {command}" if command in (*FIT_COMMANDS, *COMMANDS) else "pml"
    try:
        with listening(where), quiet_threads(), allowed(OPTION in arguments):
            code = _dispatch(command, [argument for argument in arguments if argument != OPTION])
            sys.stdout.flush()
            return code
    except Stopped as stop:
        print(f"{where}: {stop}", file=sys.stderr)
        return stop.code
    except BrokenPipeError:
        # Who reads the output, such as `head`, has seen enough.
        _drop_output()
        return BROKEN_PIPE
    except Exception as error:
        if not _is_wrong_input(error) and disk_trouble(error) is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        print(f"{where}: error: {one_line(' '.join(_message(error).split()))}", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """Have what is left in the buffer of stdout go nowhere, rather than fail at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _message(error: Exception) -> str:
    if not isinstance(error, InputError) and (trouble := disk_trouble(error)) is not None:
        return f"{trouble}; expected room to write; files that were whole still are"
    if isinstance(error, OSError):
        return f"{str(error.filename)[:LONGEST_PATH]}: {error.strerror}; expected a file or folder that can be used so"
    text = str(error) if isinstance(error, InputError) else reason(error)
    return f"{text}; see --help" if "arguments are required" in text else text


def _is_wrong_input(error: Exception) -> bool:
    if isinstance(error, OSError):
        # Of a path that somebody gave, rather than of a device or a process.
        return error.filename is not None and error.errno in PATH_ERRORS
    # jsonargparse is looked for, rather than imported: what has not been imported has raised nothing.
    parser = sys.modules.get("jsonargparse")
    return isinstance(error, InputError) or (parser is not None and isinstance(error, parser.ArgumentError))


def _dispatch(command: str, arguments: Sequence[str]) -> int:
    if command in ("-h", "--help"):
        print(_overview())
        return 0
    if command == "--version":
        print(f"pml {version('pml')}")
        return 0
    if command in FIT_COMMANDS:
        if {"-h", "--help"} & set(arguments[1:]):
            from pml.fit_help import fit_help

            print(fit_help(command))
            return 0
        return _run_lightning(arguments)
    if command in COMMANDS:
        return _run_command(command, arguments[1:])
    raise InputError(f"unknown command {command!r}; expected one of {', '.join((*FIT_COMMANDS, *COMMANDS))}")


def _run_lightning(arguments: Sequence[str]) -> int:
    if sys.stderr.isatty():
        # What follows takes seconds before it has anything to say.
        print(f"pml {arguments[0]}: loading", file=sys.stderr, flush=True)
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from pml.lightning_cli import MemorizationCLI, prepare

    prepare()
    try:
        with _of_run(arguments) as asked:
            MemorizationCLI(asked)
    except MisconfigurationException as error:
        raise InputError(str(error)) from error
    return 0


@contextmanager
def _of_run(arguments: Sequence[str]) -> Iterator[Sequence[str]]:
    """Arguments in which the run of `pml test RUN` is its configuration; nothing is logged into a folder of its own."""
    command, *rest = arguments
    if command == "fit" or not rest or rest[0].startswith("-"):
        yield arguments
        return
    from pml.own_classes import own_classes_refused
    from pml.run_folder import CONFIG_NAME, run_folder
    from pml.yaml_file import read_yaml

    config = run_folder(Path(rest[0])) / CONFIG_NAME
    if not config.is_file():
        raise InputError(
            f"{str(config)[:LONGEST_PATH]}: no such file; expected the folder of a run that `pml fit` or `pml sweep` "
            "made"
        )
    with own_classes_refused(read_yaml(config), config):
        yield [command, f"--config={config}", "--ckpt_path=null", "--trainer.logger=false", *rest[1:]]


def _run_command(name: str, arguments: Sequence[str]) -> int:
    import jsonargparse

    from pml.commands._help import ParagraphFormatter

    module = importlib.import_module(f"pml.commands.{name}")
    parser = jsonargparse.ArgumentParser(
        prog=f"pml {name}",
        description=module.__doc__,
        formatter_class=ParagraphFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    module.configure(parser)
    arguments = [_with_underscores(argument) for argument in arguments]
    if hasattr(module, "separate"):  # it takes keys of `pml fit` too
        own, keys = module.separate(arguments)
        return int(module.run(parser.parse_args(own), keys))
    return int(module.run(parser.parse_args(arguments)))


def _with_underscores(argument: str) -> str:
    """An option by the name that it has: `--retry-failed` is `--retry_failed`."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def _overview() -> str:
    lines = ["usage: pml COMMAND [--help | ARGUMENTS]", "", __doc__.splitlines()[0], "", "a run:"]
    lines += [f"  {name:<10}{text}" for name, text in FIT_COMMANDS.items()]
    lines += ["", "around runs:"]
    for name in COMMANDS:
        # Read rather than imported, which takes seconds.
        source = (Path(__file__).parent / "commands" / f"{name}.py").read_text(encoding="utf-8")
        doc = ast.get_docstring(ast.parse(source)) or ""
        lines.append(f"  {name:<10}{doc.splitlines()[0]}")
    return "\n".join(lines)
