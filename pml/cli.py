"""Train LoRA adapters that recall text word for word, certify the recall, and fit a scaling law to the runs."""

import ast
import errno
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from pml.disk import disk_failure, quiet_threads
from pml.errors import InputError, reason
from pml.escape import one_line
from pml.own_classes import OPTION, allowed
from pml.stopping import Stopped, listening

__all__ = ["COMMANDS", "main"]

FIT_COMMANDS = {
    "fit": "Train an adapter on a corpus; leaves a run folder with record, adapter and curves",
    "validate": "Measure the teacher-forced recall of a run or a checkpoint",
    "test": "Measure the recall of a run or a checkpoint with greedy decoding",
    "predict": "Score every target token of a run's corpus; leaves a table, predictions.parquet",
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
"""Commands around a run. Each is a module of `pml.commands`, imported only when called."""

BROKEN_PIPE = 128 + 13
"""Exit code that shells report for a program ended by SIGPIPE."""


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
"""Maximum number of characters of a path that a message shows."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pml` and return the exit code: 0 done, 1 something failed, 2 wrong input, 128 + N by signal N."""
    arguments = [OPTION if a == OPTION.replace("_", "-") else a for a in (sys.argv[1:] if argv is None else argv)]
    command = arguments[0] if arguments else "--help"
    where = f"pml {command}" if command in (*FIT_COMMANDS, *COMMANDS) else "pml"
    try:
        with listening(where), quiet_threads(), allowed(OPTION in arguments):
            code = _dispatch(command, [argument for argument in arguments if argument != OPTION])
            sys.stdout.flush()
            return code
    except Stopped as stop:
        with suppress(OSError):  # the terminal may be gone
            print(f"{where}: {stop}", file=sys.stderr, flush=True)
        return stop.code
    except BrokenPipeError:
        # The reader of the output, such as `head`, has closed the pipe.
        _drop_output()
        return BROKEN_PIPE
    except Exception as error:
        if not _is_wrong_input(error) and disk_failure(error) is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        print(f"{where}: error: {one_line(' '.join(_message(error).split()))}", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """Discard what is left in the buffer of stdout, so that flushing it at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _message(error: Exception) -> str:
    if not isinstance(error, InputError) and (trouble := disk_failure(error)) is not None:
        return f"{trouble}; expected room to write; completed files are unchanged"
    if isinstance(error, OSError):
        return f"{str(error.filename)[:LONGEST_PATH]}: {error.strerror}; expected a usable file or folder"
    text = str(error) if isinstance(error, InputError) else reason(error)
    return f"{text}; see --help" if "arguments are required" in text else text


def _is_wrong_input(error: Exception) -> bool:
    if isinstance(error, OSError):
        # Only errors about a path that the user gave, not those about a device or a process.
        return error.filename is not None and error.errno in PATH_ERRORS
    # Not imported here: if it is not in `sys.modules`, it has not raised the error.
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
        # The imports below take seconds without any output.
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
    """Arguments with RUN of `pml test RUN` replaced by its configuration file, and without a logger."""
    command, *rest = arguments
    if command == "fit" or not rest or rest[0].startswith("-"):
        yield arguments
        return
    from pml.arguments import limit_of
    from pml.own_classes import own_classes_refused
    from pml.run_folder import CONFIG_NAME, run_folder
    from pml.yaml_file import read_yaml

    config = run_folder(Path(rest[0])) / CONFIG_NAME
    if not config.is_file():
        raise InputError(
            f"{str(config)[:LONGEST_PATH]}: no such file; expected the folder of a run that `pml fit` or `pml sweep` "
            "made"
        )
    # A fit that made no validation may have turned it off.
    whole = f"--trainer.{limit_of(command)}=1.0"
    with own_classes_refused(read_yaml(config), config):
        yield [command, f"--config={config}", "--ckpt_path=null", "--trainer.logger=false", whole, *rest[1:]]


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
    if hasattr(module, "split_arguments"):  # the command also takes keys of `pml fit`
        own, keys = module.split_arguments(arguments)
        return int(module.run(parser.parse_args(own), keys))
    return int(module.run(parser.parse_args(arguments)))


def _with_underscores(argument: str) -> str:
    """The argument with underscores in an option's name: `--retry-failed` becomes `--retry_failed`."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def _overview() -> str:
    lines = ["usage: pml COMMAND [--help | ARGUMENTS]", "", __doc__.splitlines()[0], "", "a run:"]
    lines += [f"  {name:<10}{text}" for name, text in FIT_COMMANDS.items()]
    lines += ["", "around runs:"]
    for name in COMMANDS:
        # Read, because importing takes seconds.
        source = (Path(__file__).parent / "commands" / f"{name}.py").read_text(encoding="utf-8")
        doc = ast.get_docstring(ast.parse(source)) or ""
        lines.append(f"  {name:<10}{doc.splitlines()[0].rstrip('.')}")
    return "\n".join(lines)
