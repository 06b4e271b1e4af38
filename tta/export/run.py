"""Predict a folder of images, adapting as they come, without torch; --help says how."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

HERE, ENDS = Path(__file__).parent, (".npy", ".png", ".jpg", ".jpeg", ".bmp", ".webp")


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
    parser = argparse.ArgumentParser(description="Predict a folder of images.")
    parser.add_argument("images", type=Path, help="folder; .npy are (C, H, W)")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--state", type=Path, help="where to go on, and to leave the state")
    args = parser.parse_args()
    if args.batch < 1 or not (args.images.is_dir() and (args.state or HERE).parent.is_dir()):
        parser.error(f"images must be a folder, --state in one, --batch 1 or more: {vars(args)}")
    net: Any = __import__("onnxruntime").InferenceSession(str(HERE / "model.onnx"))
    meta, entry = net.get_modelmeta().custom_metadata_map, net.get_inputs()[0]
    how = entry.shape[1:], np.uint8 if "uint8" in entry.type else np.float32, meta
    old = bool(args.state and args.state.is_file())
    state: Any = dict(np.load(args.state if old else HERE / "state.npz"), reset=np.array([not old]))
    files = sorted(p for p in args.images.glob("[!.]*") if p.suffix.lower() in ENDS and p.is_file())
    try:
        for some in (files[i : i + args.batch] for i in range(0, len(files), args.batch)):
            rows, *new = net.run(None, state | {"images": np.stack([read(p, *how) for p in some])})
            state = {f"state_in_{i}": v for i, v in enumerate(new)} | {"reset": np.array([False])}
            for p, row in zip(some, rows, strict=True):  # a sigmoid is a softmax beside 0
                beside = (row.max(), 0) if meta["activation"] == "sigmoid" else row
                share = round(1 / float(np.exp(beside - row.max()).sum()), 4)  # NaN for none
                top = {"class": int(row.argmax()), "probability": share}
                print(json.dumps({"file": p.name} | (top if share >= 0 else dict.fromkeys(top))))
    finally:  # also after a picture that cannot be read
        if args.state is not None:
            part, _ = args.state.with_name(args.state.name + ".part.npz"), state.pop("reset")
            np.savez(part, **state)
            part.replace(args.state)  # the former one is there until this one is whole


if __name__ == "__main__":
    main()
