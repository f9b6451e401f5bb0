"""Entry point of `python -m pml`, the same as the `pml` command."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `-m` puts the working directory first on the path, so a file there with the name of a package would be imported.
    if sys.path and Path(sys.path[0]) in (Path(), Path.cwd()):
        sys.path.append(sys.path.pop(0))

    from pml.cli import main

    sys.exit(main())
