"""`python -m pml` is the `pml` command."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `-m` looks for modules in the working directory first, so that a file there, named as a package is, would run.
    if sys.path and Path(sys.path[0]) in (Path(), Path.cwd()):
        sys.path.append(sys.path.pop(0))

    from pml.cli import main

    sys.exit(main())
