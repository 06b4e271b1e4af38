"""Predict a folder of images, adapting as they come, without torch; --help says how."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

HERE, KINDS = Path(__file__).parent, (".npy", ".png", ".jpg", ".jpeg", ".bmp", ".webp")


def read(path: Path, shape: Any, kind: Any, meta: dict[str, str]) -> np.ndarray:
    """One image (C, H, W) as the model takes it."""
    if path.suffix.lower() == ".npy":
        return np.broadcast_to(np.load(path), shape).astype(kind)
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture, np.int64) / 257 + 0.5).astype(np.uint8))
    picture = picture.convert("RGBA") if picture.mode in ("P", "PA") else picture
    picture = ImageOps.fit(picture.convert("L" if shape[0] == 1 else "RGB"), (shape[2], shape[1]))
    levels = np.asarray(picture, kind).reshape(*shape[1:], -1).transpose(2, 0, 1)
    mean, std = (np.reshape(json.loads(meta[key]), (-1, 1, 1)) for key in ("mean", "std"))
    return levels if kind is np.uint8 else ((levels / 255 - mean) / std).astype(kind)


def main() -> None:
    import onnxruntime

    parser = argparse.ArgumentParser(description="Predict a folder of images.")
    parser.add_argument("images", type=Path, help="folder; .npy are (C, H, W)")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--state", type=Path, help="where to go on, and to leave the state")
    args = parser.parse_args()
    if args.batch < 1 or not args.images.is_dir():
        parser.error(f"images must be a folder, and --batch 1 or more: {args.images}, {args.batch}")
    session: Any = onnxruntime.InferenceSession(str(HERE / "model.onnx"))
    meta, entry = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0]
    how = entry.shape[1:], np.uint8 if "uint8" in entry.type else np.float32, meta
    old = bool(args.state and args.state.is_file())
    state: Any = dict(np.load(args.state if old else HERE / "state.npz"))
    files = sorted(path for path in args.images.iterdir() if path.suffix.lower() in KINDS)
    try:
        for some in (files[i : i + args.batch] for i in range(0, len(files), args.batch)):
            feeds = {"images": np.stack([read(path, *how) for path in some]), **state}
            logits, *after = session.run(None, feeds | {"reset": np.array([not old])})
            state, old = {f"state_in_{i}": value for i, value in enumerate(after)}, True
            for path, row in zip(some, np.exp(logits - logits.max(1, keepdims=True)), strict=True):
                found = {"file": path.name, "class": int(row.argmax())}
                print(json.dumps(found | {"probability": round(float(row.max() / row.sum()), 4)}))
    finally:  # also after a picture that cannot be read
        if args.state is not None:
            np.savez(part := args.state.with_name(args.state.name + ".part.npz"), **state)
            part.replace(args.state)  # the former one is there until this one is whole


if __name__ == "__main__":
    main()
