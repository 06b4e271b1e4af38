"""``python -m experiments preview``: what a stream shows, before any model sees it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments.run.flags import add_settings, settings_flags
from experiments.run.settings import make_run
from experiments.run.setup import load_setup
from tta.core.files import replacing
from tta.streams import Stream

__all__ = ["Previews", "add_flags"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``preview`` does and takes."""
    parser.description = (
        "Print a stream's figures, draw domain and label over time as a PNG, and write "
        "the small JSON that tta.streams.from_config turns into the stream again."
    )
    add_settings(parser, methods=False)
    parser.add_argument("--seed", type=int, help="of everything random (default: 0)")
    parser.add_argument("--name", default="preview", help="begins the files' names")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the files")
    parser.set_defaults(prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Previews:
    settings, flags = settings_flags(args)
    settings.pop("sweep", None)
    config = make_run(settings, {**flags, "seed": args.seed, "methods": ["source"], "tuned": []})
    setup = load_setup(config)
    streams = {c.name: s for c, s in zip(setup.config.streams, setup.streams, strict=True)}
    return Previews(streams, args.output, args.name)


class Previews:
    """The previews of some streams, to be printed and written.

    Args:
        streams: The streams by name.
        folder: Where the files go.
        name: It begins the files' names.
    """

    def __init__(self, streams: dict[str, Stream], folder: Path, name: str) -> None:
        self.streams = streams
        self.folder = folder
        self.name = name

    def execute(self) -> None:
        """Print, draw and write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, stream in self.streams.items():
            stem = self.folder / f"{self.name}-{name}"
            picture, file = (Path(f"{stem}{ending}") for ending in (".png", ".json"))
            print(stream.preview(draw=picture), end="\n\n")
            with replacing(file) as part:
                part.write_text(json.dumps(stream.config, indent=1) + "\n")
            print(f"{picture}\n{file}")
