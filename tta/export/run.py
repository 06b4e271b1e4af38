"""Predict a folder of images, adapting as they come, without torch.

    python run.py IMAGES [--batch 8] [--state FILE.npz]

It needs numpy and onnxruntime, and Pillow unless the images are .npy arrays (C, H, W) of what the
model takes. It prints a line of JSON for each; images that cannot be read are told on stderr and
left out. With --state it goes on from that file, if it is there, and leaves the state in it.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE, KINDS = Path(__file__).parent, (".npy", ".png", ".jpg", ".jpeg", ".bmp", ".webp")
TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


def read(path: Path, shape: tuple[int, ...], kind: Any, meta: dict[str, str]) -> np.ndarray:
    """One image (C, H, W) as the model takes it."""
    if path.suffix.lower() == ".npy":
        image = np.load(path).astype(kind)
        if image.shape != shape:
            raise ValueError(
                f"`images` must hold arrays of shape {shape}, got {image.shape}: save what the "
                "model takes."
            )
        return image
    from PIL import Image, ImageOps

    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"`images` must hold .npy arrays of shape {shape}, got a picture: save what the model "
            "takes."
        )
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
        grey = (np.asarray(picture, np.int64) * 255 + 32767) // 65535
        picture = Image.fromarray(grey.astype(np.uint8))
    elif picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")
    picture = ImageOps.fit(picture.convert("RGB" if shape[0] == 3 else "L"), (shape[2], shape[1]))
    levels = np.asarray(picture, kind).reshape(*shape[1:], shape[0])
    if kind is not np.uint8:
        mean, std = (np.array(json.loads(meta[key]), kind) for key in ("mean", "std"))
        levels = (levels / 255 - mean) / std
    return levels.transpose(2, 0, 1)


def batches(folder: Path, size: int, *how: Any) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and images of each batch."""
    names, images = [], []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in KINDS):
        try:
            images.append(read(path, *how))
            names.append(path.name)
        except Exception as error:  # decoders raise anything
            print(f"{path.name} is left out: {error}", file=sys.stderr)
        if len(names) == size:
            yield names, np.stack(images)
            names, images = [], []
    if names:
        yield names, np.stack(images)


def probabilities(logits: np.ndarray, meta: dict[str, str]) -> np.ndarray:
    """Of each class, (B, C)."""
    if meta.get("activation") == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    parts = np.exp(logits - logits.max(1, keepdims=True))
    return parts / parts.sum(1, keepdims=True)


def main() -> None:
    """Run the command line."""
    import onnxruntime

    parser = argparse.ArgumentParser(description="Predict a folder of images.")
    parser.add_argument("images", type=Path, help="a folder")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--state", type=Path, help="where to go on, and to leave the state")
    args = parser.parse_args()
    if args.batch < 1 or not args.images.is_dir():
        parser.error("IMAGES must be a folder, and --batch at least 1")
    session: Any = onnxruntime.InferenceSession(str(HERE / "model.onnx"))
    meta, (images, _, *inputs) = session.get_modelmeta().custom_metadata_map, session.get_inputs()
    first = not (args.state and args.state.is_file())
    state: Any = dict(np.load(HERE / "state.npz" if first else args.state))
    if {name: list(state[name].shape) for name in state} != {i.name: i.shape for i in inputs}:
        parser.error(f"--state {args.state} must be a state of this graph")
    try:
        for names, batch in batches(
            args.images, args.batch, tuple(images.shape[1:]), TYPES[images.type], meta
        ):
            feeds = {"images": batch, "reset": np.array([first]), **state}
            logits, *after = session.run(None, feeds)
            state, first = {f"state_in_{i}": value for i, value in enumerate(after)}, False
            for name, row in zip(names, probabilities(logits, meta), strict=True):
                if not np.isfinite(row).all():
                    print(f"{name} is left out: it has no finite prediction", file=sys.stderr)
                    continue
                found = {"class": int(row.argmax()), "probability": round(float(row.max()), 4)}
                print(json.dumps({"file": name, **found}), flush=True)
    except BrokenPipeError:  # whoever reads has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        if args.state is not None:
            part = args.state.with_name(f"{args.state.name}.part")
            with open(part, "wb") as file:
                np.savez(file, **state)
            os.replace(part, args.state)


if __name__ == "__main__":
    main()
